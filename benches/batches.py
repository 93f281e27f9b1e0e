"""Engines of batches beside a hand-written loop; twice the pairs; ten times the images.

    python benches/batches.py bars           # what has to hold, beside its bars: ten minutes
    python benches/batches.py speed          # local engine against a loop over lazy maps
    python benches/batches.py ray            # Ray with two workers against the local engine
    python benches/batches.py memory         # peak memory by the number of images
    python benches/batches.py ray-memory     # of the driver and of a worker
    python benches/batches.py processes      # threads of one process against worker processes

Features are drawn: 1,024 tokens, one head of 64. Each number is a ratio of times that were taken in
turns in one process, the best of ``--rounds``. Run it on a machine that does nothing else: where
cores are taken, OpenMP's threads wait for each other by spinning, and ratios say little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flashmaps.batches.local_engine import Local
from flashmaps.batches.parts import Parts, part_pairs, rows_bytes, tile_side
from flashmaps.diffusion.feature_folder import FeatureFolder
from flashmaps.diffusion.features import Features
from flashmaps.files import open_run
from flashmaps.maps.statistics import round_trip
from flashmaps.matching.cross_map import cross_maps
from flashmaps.matching.pair_batch import PairBatch, token_columns
from flashmaps.matching.pair_chunks import compared_bytes
from flashmaps.matching.pair_order import tile_order
from flashmaps.matching.settings import MatchSettings

SIDE = 32  # tokens
SETTINGS = MatchSettings(compare="features", temperature=0.05)


def make(folder: Path, images: int) -> FeatureFolder:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(images):
        x = torch.randn(1, 1, SIDE * SIDE, 64, generator=generator)
        Features(
            query=x[:, :, :0], key=x[:, :, :0], output=x, scale=0.125,
            head_weights=torch.ones(1), grid=(SIDE, SIDE), image=np.zeros((16, 16, 3), np.float32),
            input_size=(256, 256), layers=("a",), timestep=1, seeds=(0,), prompt="",
        ).save(folder / f"{number:06d}.safetensors", image=False)  # fmt: skip
    return FeatureFolder(folder)


def drawn(images: int, pairs: int) -> np.ndarray:
    return np.random.default_rng(0).integers(images, size=(pairs, 2), dtype=np.int32)


@contextmanager
def parts_in(folder: Path, sets: Sequence[Features], pairs: np.ndarray):
    """As `fm.batch` makes them."""
    each = part_pairs(len(pairs), SIDE * SIDE)
    side = tile_side(len(sets), len(pairs), compared_bytes(sets[0], "features"))
    out = Path(tempfile.mkdtemp(dir=folder))
    with open_run(out / "run", "batch", {}) as run:
        yield Parts(run, tile_order(pairs, side), each, "tokens")
    shutil.rmtree(out)


def engine_seconds(folder: Path, sets: Sequence[Features], pairs, engine, budget: int) -> float:
    with parts_in(folder, sets, pairs) as parts:
        held = 2 * rows_bytes(len(parts.numbers[0]), SIDE * SIDE)
        start = time.perf_counter()
        todo = parts.missing()
        parts.write(engine.pairs(todo, pairs, None, sets, budget - held), len(pairs), False)
        return time.perf_counter() - start


def loop_seconds(folder: Path, sets: Sequence[Features], pairs) -> float:
    """What somebody writes who has lazy maps: features in memory, a table for each pair."""
    import pyarrow
    from pyarrow import parquet

    start = time.perf_counter()
    held = list(sets)
    tables = []
    for number, (s, t) in enumerate(pairs.tolist()):
        forward, backward = cross_maps(held[s], held[t], SETTINGS.options)
        rows = forward.reduce("expectation", "max", "entropy")
        found = PairBatch(
            torch.tensor([[s, t]]), torch.tensor([number]), (SIDE, SIDE), (SIDE, SIDE),
            round_trip(forward, backward), rows.expectation, rows.max, rows.entropy,
        )  # fmt: skip
        columns = {k: v.numpy() for k, v in token_columns(found).items()}
        tables.append(pyarrow.table(columns))
    parquet.write_table(pyarrow.concat_tables(tables), folder / "loop.parquet")
    return time.perf_counter() - start


def local() -> Local:
    return Local(None, SETTINGS, "tokens", "auto")


def speed(folder: Path, rounds: int) -> dict[str, float]:
    sets, pairs = make(folder / "s", 24), drawn(24, 256)
    times: dict[str, list[float]] = {"loop": [], "local": [], "local, twice the pairs": []}
    for _ in range(rounds):
        times["loop"].append(loop_seconds(folder, sets, pairs))
        times["local"].append(engine_seconds(folder, sets, pairs, local(), 2**28))
        twice = np.concatenate((pairs, pairs[:, ::-1]))
        times["local, twice the pairs"].append(engine_seconds(folder, sets, twice, local(), 2**28))
    best = {name: min(each) for name, each in times.items()}
    return {
        **{f"{name}, pairs a second": len(pairs) / s for name, s in best.items()},
        "local / loop": best["loop"] / best["local"],
        "twice the pairs take": best["local, twice the pairs"] / best["local"],
    }


def ray_speed(folder: Path, rounds: int, count: int = 1024) -> dict[str, Any]:
    """Ray with two workers of one thread each, beside this process with one thread and with all.

    Its start (the cluster, and workers that load torch) takes seconds once a run, whatever its
    size; the ratios leave it out, and it is told apart, also as part of a run of ``count`` pairs.
    """
    from importlib import metadata

    from flashmaps.batches.ray_engine import cluster
    from flashmaps.batches.ray_worker import Question

    sets, pairs = make(folder / "r", 24), drawn(24, count)
    asked = Question(
        metadata.version("flashmaps"), "builtin", "", None, SETTINGS, "tokens", "auto", len(sets)
    )
    every = torch.get_num_threads()
    names = {"local, 1 thread": 1, f"local, {every} threads": every, "ray, 2 workers": every}
    times: dict[str, list[float]] = {name: [] for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    with cluster(asked, address=None, workers=2, store=2**28) as workers:
        engine_seconds(folder, sets, pairs[:2], workers, 2**28)
        start = time.perf_counter() - begin
        engine_seconds(folder, sets, pairs[:256], workers, 2**28)
        for _ in range(rounds):
            for name, threads in names.items():
                torch.set_num_threads(threads)
                engine = workers if name.startswith("ray") else local()
                before = processor_seconds()
                times[name].append(engine_seconds(folder, sets, pairs, engine, 2**28))
                spent[name].append(processor_seconds() - before)
    torch.set_num_threads(every)
    best = {name: min(each) for name, each in times.items()}
    ray, one = best.pop("ray, 2 workers"), best["local, 1 thread"]
    worked = {name: min(each) for name, each in spent.items()}
    turns = zip(times["local, 1 thread"], times["ray, 2 workers"], strict=True)
    rounds_apart = [here / there for here, there in turns]
    return {
        **{f"{name}, pairs a second": count / s for name, s in best.items()},
        "ray, 2 workers, pairs a second": count / ray,
        "ray / local, 1 thread": one / ray,
        "ray / local, the faster": min(best.values()) / ray,
        "ray / local, by processor time": worked["local, 1 thread"] / worked["ray, 2 workers"],
        "ray's start, s": start,
        f"ray / local, the faster, its start included, {count} pairs": min(best.values())
        / (ray + start),
        "ray / local, 1 thread, worst and best round": [min(rounds_apart), max(rounds_apart)],
    }


def ray_memory(folder: Path, rounds: int) -> dict[str, float]:
    """Growth of the private memory of the largest worker beyond a few pairs, in MB, and of the
    driver; what lies in Ray's shared memory is told apart."""
    from importlib import metadata

    import psutil
    from flashmaps.batches.ray_engine import cluster
    from flashmaps.batches.ray_worker import Question

    found = {}
    for images in (64, 640):
        sets, pairs = make(folder / f"f{images}", images), drawn(images, 640)
        asked = Question(
            metadata.version("flashmaps"), "builtin", "", None, SETTINGS, "tokens", "auto", images
        )
        with cluster(asked, address=None, workers=2, store=3 * 64 * 10**6) as workers:
            engine_seconds(folder, sets, pairs[:16], workers, 2**26)
            here = psutil.Process()
            every = [each for each in here.children(recursive=True) if "ray::Worker" in each.name()]
            assert every, "no workers are known by their name"

            def private(each: psutil.Process) -> float:
                told = each.memory_info()
                return (told.rss - told.shared) / 1e6

            watched = {"driver": [here], "a worker": every}
            before = {name: max(map(private, each)) for name, each in watched.items()}
            most, done = dict(before), threading.Event()

            def watch(watched=watched, most=most, done=done) -> None:
                while not done.wait(0.05):
                    for name, each in watched.items():
                        most[name] = max(most[name], *map(private, each))

            watcher = threading.Thread(target=watch)
            watcher.start()
            engine_seconds(folder, sets, pairs, workers, 64 * 10**6)
            done.set()
            watcher.join()
            for name in watched:
                found[f"{images} images, budget 64 MB, {name}"] = most[name] - before[name]
    return found


def processor_seconds() -> float:
    """Of this process and of all that it has started: Ray's own among them."""
    import psutil

    total = 0.0
    here = psutil.Process()
    for each in (here, *here.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            used = each.cpu_times()
            total += used.user + used.system
    return total


def memory(folder: Path, rounds: int) -> dict[str, float]:
    """Growth of the peak of a process that has matched a few pairs before, in MB."""
    found = {}
    for images in (64, 640):
        make(folder / f"f{images}", images)
        for budget in (64, 128):
            done = subprocess.run(
                [sys.executable, __file__, "one", str(folder), str(images), str(budget)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found[f"{images} images, budget {budget} MB"] = float(done.stdout)
    return found


def one(folder: Path, images: int, budget: int) -> None:
    torch.set_num_threads(1)
    sets, pairs = FeatureFolder(folder / f"f{images}"), drawn(images, 640)
    engine_seconds(folder, sets, pairs[:8], local(), 2**26)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine_seconds(folder, sets, pairs, local(), budget * 10**6)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)


# What has to hold, of the keys of `speed` and `ray_speed`.
BARS = {
    "local / loop": (">=", 0.9),
    "twice the pairs take": ("<=", 2.1),
    "ray / local, the faster": (">=", 0.7),
}


def bars(folder: Path, rounds: int) -> dict[str, Any]:
    """Every ratio that has a bar, beside it; then all that was measured on the way."""
    every = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = speed(folder, rounds)
    torch.set_num_threads(every)
    found |= ray_speed(folder, rounds)
    found["threads and processes"] = processes(folder / "p", rounds)
    told = {}
    for name, (sign, bar) in BARS.items():
        met = found[name] >= bar if sign == ">=" else found[name] <= bar
        told[name] = f"{found[name]:.2f} (bar: {sign} {bar}) {'holds' if met else 'MISSED'}"
    return {**told, "measured": found}


def _share(arguments: tuple[Path, int, int]) -> float:
    folder, place, count = arguments
    torch.set_num_threads(1)
    sets, pairs = FeatureFolder(folder / "f"), drawn(24, 256)
    engine_seconds(folder, sets, pairs[:8], local(), 2**28)
    return engine_seconds(folder, sets, pairs[place::count], local(), 2**28)


def processes(folder: Path, rounds: int) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    make(folder / "f", 24)
    sets, pairs = FeatureFolder(folder / "f"), drawn(24, 256)
    every = torch.get_num_threads()
    times: dict[str, list[float]] = {"1 thread": [], "2 threads": [], "2 processes": []}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_share, [(folder, i, 2) for i in range(2)])
        for _ in range(rounds):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                engine_seconds(folder, sets, pairs[:8], local(), 2**28)
                times[f"{threads} thread" + "s" * (threads > 1)].append(
                    engine_seconds(folder, sets, pairs, local(), 2**28)
                )
            times["2 processes"].append(max(pool.map(_share, [(folder, i, 2) for i in range(2)])))
    torch.set_num_threads(every)
    return {f"{name}, pairs a second": len(pairs) / min(each) for name, each in times.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["grow"]:  # both, for tests/test_batch.py
        place, images = Path(sys.argv[2]), int(sys.argv[3])
        make(place / f"f{images}", images)
        one(place, images, int(sys.argv[4]))
        sys.exit()
    if sys.argv[1:2] == ["one"]:
        one(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        sys.exit()
    jobs = {
        "bars": bars, "speed": speed, "ray": ray_speed, "memory": memory, "ray-memory": ray_memory,
        "processes": processes,
    }  # fmt: skip
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=jobs)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(jobs[given.what](Path(folder), given.rounds), indent=2))
