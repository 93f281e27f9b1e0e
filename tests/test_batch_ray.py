"""Batches on a Ray cluster of two workers: the bytes of one machine, whichever process dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import flashmaps as fm
import numpy as np
import psutil
import pytest
import torch
from flashmaps.batches.ray_engine import _Placed
from flashmaps.batches.ray_worker import Question, Worker, pack, unpack
from flashmaps.matching.settings import MatchSettings
from flashmaps.world import Split
from test_batch import HERE, RUN, asked, files
from test_pairs import random_features

pytest.importorskip("diffusers")
pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("features", "matches", "summaries")


class Life:
    """A driver in a process of its own, with a cluster of its own."""

    def __init__(self, folder: Path, *numbers: int) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), *map(str, numbers), "2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=HERE,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdout.readline() == "begun\n"

    def count(self) -> int:
        """Files that are finished."""
        return sum(
            len(os.listdir(self.folder / kind)) for kind in KINDS if (self.folder / kind).is_dir()
        )

    def workers(self) -> list[psutil.Process]:
        """The cluster's workers, which are the driver's grandchildren."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if each.cmdline()[:1] and each.cmdline()[0].startswith("ray::Worker"):
                    found.append(each)
            except psutil.NoSuchProcess:
                pass
        return found

    def until(self, count: int) -> bool:
        """Wait until so many files are finished; whether the driver still lives then."""
        while self.process.poll() is None and self.count() < count:
            time.sleep(0.005)
        return self.process.poll() is None

    def kill_a_worker(self, draw: random.Random) -> bool:
        """One of them, if there is one: it is started again, and its task too."""
        there = self.workers() if self.process.poll() is None else []
        if not there:
            return False
        draw.choice(there).send_signal(signal.SIGKILL)
        return True

    def end(self) -> None:
        _, errors = self.process.communicate()
        assert self.process.returncode == 0, errors

    def kill(self) -> bool:
        """The driver; its cluster goes with it."""
        others = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        _, left = psutil.wait_procs(others, timeout=60)
        for each in left:
            each.kill()
        return True


def check(folder: Path, whole: Path, pairs: int) -> None:
    """The very files, and each row once."""
    assert files(folder) == files(whole)
    table = parquet.read_table(folder / "matches")
    keys = table["pair"].to_numpy().astype(np.int64) * 256 + table["token"].to_numpy()
    assert np.array_equal(np.sort(keys), np.arange(pairs * 256))


@pytest.mark.slow  # two kills of the next test are of this kind, too
def test_a_worker_dies_and_the_files_are_those_of_one_machine(tmp_path):
    numbers = (6, 60, 2 * 256)
    asked(tmp_path / "whole", *numbers)
    life = Life(tmp_path / "killed", *numbers)
    assert life.until(8)  # features, and the first part
    assert life.kill_a_worker(random.Random(0))
    life.end()
    check(tmp_path / "killed", tmp_path / "whole", 60)


@pytest.mark.slow
def test_two_thousand_pairs_and_ten_kills_of_workers_and_drivers(tmp_path):
    numbers = (64, 2000, 8 * 256)
    asked(tmp_path / "whole", *numbers)
    total = len(files(tmp_path / "whole"))
    folder, draw, kills = tmp_path / "killed", random.Random(1), {"worker": 0, "driver": 0}
    for _ in range(5):
        life = Life(folder, *numbers)
        start = life.count()
        # A fifth of the work a life at most, so that all of them find something to do.
        first, last = sorted(draw.randint(1, total // 6) for _ in range(2))
        assert life.until(start + first)
        time.sleep(draw.uniform(0, 0.2))
        kills["worker"] += life.kill_a_worker(draw)
        assert life.until(start + last + 1)
        time.sleep(draw.uniform(0, 0.2))
        kills["driver"] += life.kill()
    Life(folder, *numbers).end()
    assert kills == {"worker": 5, "driver": 5}
    check(folder, tmp_path / "whole", 2000)


@pytest.mark.slow
def test_what_a_worker_refuses_is_the_error_of_one_machine(tmp_path):
    """Files of images, points, and a point that lies outside: the sentence comes back whole."""
    from PIL import Image

    split = Split("test", size=64, count=3, seed=0)
    for number in range(3):
        Image.fromarray(split[number].image).save(tmp_path / f"{number}.png")
    inside = {"source": [0, 1], "target": [1, 2], "x": [3, 10.5], "y": [4, 20]}
    how = {"size": 64, "engine": "ray", "workers": 2}
    found = [str(tmp_path / f"{number}.png") for number in range(3)]
    fm.batch(found, inside, tmp_path / "local", size=64)
    fm.batch(found, inside, tmp_path / "ray", **how)
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    with pytest.raises(ValueError, match=r"point \(70, 4\) lies outside image 0 of 64 x 64"):
        fm.batch(found, {**inside, "x": [70, 1]}, tmp_path / "out", **how)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="is not an image that Pillow can read"):
        fm.batch(found, inside, tmp_path / "broken", **how)
    kept = len(list((tmp_path / "out/features").iterdir()))
    assert kept == 3  # what was finished


# -- without a cluster -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_travel_as_they_are(dtype):
    one = random_features(0)
    one = one.__class__(**{**vars(one), "key": one.key.to(dtype), "query": one.query.to(dtype)})
    back = unpack(pack(one))
    assert torch.equal(back.key, one.key) and back.key.dtype == dtype
    assert torch.equal(back.query, one.query) and torch.equal(back.head_weights, one.head_weights)
    assert back.grid == one.grid and back.image.shape == one.image.shape
    less = unpack(pack(one, "kk"))
    assert less.query.shape[2] == 0 and torch.equal(less.key, one.key)


class Store:
    """Stands in for Ray's shared memory."""

    def put(self, value):
        return value


def test_each_image_is_placed_once_where_tiles_fit():
    sets = [random_features(i) for i in range(6)]
    size = sets[0].key.numel() * 4
    needed = [[0, 1], [0, 1, 2], [2, 3], [4, 5], [5]]
    roomy = _Placed(Store(), sets, "kk", needed, 6 * size)
    for task, images in enumerate(needed):
        assert len(roomy.of(task)) == len(images)
    assert roomy.puts == 6 and roomy.bytes == 0  # nobody needs them any more
    tight = _Placed(Store(), sets, "kk", [[0, 1], [2], [0], [1], [2]], 2 * size)
    for task in range(5):
        tight.of(task)
        assert tight.bytes <= 2 * size
    assert tight.puts == 4  # image 1, which is needed last, was let go for image 2


def test_what_cannot_run_on_a_cluster_is_said_before_anything_starts(tmp_path):
    images = [np.zeros((64, 64, 3), np.float32)] * 2
    for given, words in (
        ({"engine": "spark"}, "engine='spark'; wanted 'local' or 'ray'"),
        ({"address": "auto"}, "address and workers belong to engine='ray'"),
        ({"engine": "ray", "model": object()}, "give its name or folder, not a pipeline"),
        ({"engine": "ray", "workers": 0}, "workers"),
    ):
        with pytest.raises(ValueError, match=words):
            fm.batch(images, "all", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_worker_of_another_version_or_with_other_weights_is_refused():
    from importlib import metadata

    def question(version: str) -> Question:
        return Question(version, "builtin", "0" * 16, None, MatchSettings(), "pairs", "auto", 2)

    with pytest.raises(ValueError, match="install the same version on every machine"):
        Worker(question("0.0.0"))
    worker = Worker(question(metadata.version("flashmaps")))
    with pytest.raises(ValueError, match="has other weights than the driver's"):
        worker.features(0, [("image 'a'", np.zeros((64, 64, 3), np.float32))])
