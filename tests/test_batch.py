"""Batches: each pair once whatever dies, the numbers of single matches, pairs of every kind."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.batches import run as runs
from flashmaps.batches.choose import choose, nearest
from flashmaps.batches.collection import Collection
from flashmaps.batches.features import FeatureStage
from flashmaps.batches.measure import assumed
from flashmaps.batches.parts import part_pairs, tile_side
from flashmaps.batches.plan import Rates, plan, simulated_reads
from flashmaps.batches.token_index import nearest_by_tokens, token_vectors
from flashmaps.diffusion.feature_folder import FeatureFolder
from flashmaps.diffusion.features import Features, features, load_model
from flashmaps.matching.match import match_features
from flashmaps.matching.pair_order import most_reads, tile_order
from flashmaps.matching.settings import MatchSettings, settings_of
from flashmaps.world import Split
from test_pairs import random_features

pytest.importorskip("diffusers")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.usefixtures("one_thread")
from pyarrow import parquet  # noqa: E402

SIZE = 64  # pixels, 256 tokens


@pytest.fixture(scope="module")
def images():
    split = Split("test", size=SIZE, count=10, seed=0)
    return [split[i].image for i in range(10)]


@pytest.fixture(scope="module")
def pipe():
    return load_model("builtin")


@pytest.fixture(scope="module")
def small_parts():
    """Parts of 4 pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashmaps.batches.parts._PART_ROWS", 4 * 256)
        yield


def files(folder: Path) -> dict[str, bytes]:
    """Every file of results, by name; not the list, which tells of the way there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "flashmaps.jsonl"
    }


@pytest.fixture(scope="module")
def whole(images, pipe, small_parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    told = fm.batch(images, "all", out, model=pipe, size=SIZE)
    return out, told


def test_rows_are_those_of_single_matches(whole, images, pipe):
    out, told = whole
    table = parquet.read_table(out / "matches").to_pandas()
    assert told["pairs"] == 45 and told["parts"] == 12
    assert not table.duplicated(["pair", "token"]).any() and len(table) == 45 * 256
    pairs = parquet.read_table(out / "pairs.parquet").to_pandas()
    assert pairs["pair"].tolist() == list(range(45))
    settings = settings_of(pipe).with_given(size=SIZE)
    for number in (0, 17, 44):
        s, t = pairs.loc[number, ["source", "target"]].astype(int)
        kept = [Features.load(out / f"features/{i:06d}.safetensors") for i in (s, t)]
        one = match_features(*kept, settings.options)
        mine = table[table["pair"] == number].sort_values("token")
        assert mine["target_token"].tolist() == one.forward.tolist()
        np.testing.assert_allclose(mine["soft_x"], one.expected_target[:, 0], rtol=1e-6)
        assert pairs.loc[number, "hard_ims"] == pytest.approx(float(one.round_trip.hard_ims[0]))
    # The features are those of the model itself.
    (third,) = features(pipe, [images[3]], outputs=True, **settings.for_features)
    torch.testing.assert_close(
        Features.load(out / "features/000003.safetensors").query, third.query
    )
    names = parquet.read_table(out / "images.parquet").to_pandas()
    assert names["name"].tolist() == [f"image {i}" for i in range(10)]
    assert (names["grid_height"] == 16).all()


def test_each_image_may_have_noise_of_its_own(images, pipe, tmp_path):
    out, settings = tmp_path / "out", settings_of(pipe).with_given(size=SIZE, same_noise=False)
    fm.batch(images[:2], [(0, 1)], out, model=pipe, size=SIZE, same_noise=False, rows="pairs")
    seeds = [seed + 1 * 1_000_003 for seed in settings.seeds]
    options = {**settings.for_features, "seeds": seeds}
    (second,) = features(pipe, [images[1]], outputs=True, **options)
    torch.testing.assert_close(
        Features.load(out / "features/000001.safetensors").query, second.query
    )


def test_again_nothing_is_computed_and_damaged_parts_are_made_again(
    whole, images, pipe, small_parts, tmp_path, monkeypatch
):
    before = files(whole[0])
    calls = []
    monkeypatch.setattr(
        "flashmaps.batches.features.features",
        lambda *a, **k: calls.append(len(a[1])) or features(*a, **k),
    )
    fm.batch(images, "all", whole[0], model=pipe, size=SIZE)
    assert files(whole[0]) == before and calls == []
    part = whole[0] / "matches/000003.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    (whole[0] / "summaries/000005.parquet").unlink()
    (whole[0] / "features/000002.safetensors").write_bytes(b"")
    fm.batch(images, "all", whole[0], model=pipe, size=SIZE)
    assert files(whole[0]) == before
    assert sum(calls) == 8  # the images of that group


def test_a_small_model_has_one_thread_while_it_makes_features(
    images, pipe, tmp_path, monkeypatch, threads
):
    seen = []

    def counted(*arguments, **options):
        seen.append(torch.get_num_threads())
        return features(*arguments, **options)

    monkeypatch.setattr("flashmaps.batches.features.features", counted)
    torch.set_num_threads(2)
    fm.batch(images[:2], "chain", tmp_path / "out", model=pipe, size=SIZE, stage="features")
    assert set(seen) == {1} and torch.get_num_threads() == 2


def test_neither_budget_nor_stages_change_a_byte(whole, images, pipe, small_parts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="the features of 10 images are not there"):
        fm.batch(images, "all", out, model=pipe, size=SIZE, stage="pairs")
    fm.batch(images, "all", out, model=pipe, size=SIZE, stage="features")
    assert not (out / "matches").exists()
    fm.batch(images, "all", out, model=pipe, size=SIZE, stage="pairs", memory_budget=2_000_000)
    assert files(out) == files(whole[0])
    with pytest.raises(ValueError, match="memory_budget = 1000 bytes is too small"):
        fm.batch(images, "chain", tmp_path / "b", model=pipe, size=SIZE, memory_budget=1000)


def test_another_question_is_refused(whole, images, pipe):
    with pytest.raises(ValueError, match="holds a run of other settings"):
        fm.batch(images, "chain", whole[0], model=pipe, size=SIZE)
    with pytest.raises(ValueError, match="holds a run of other settings"):
        fm.batch(images[::-1], "all", whole[0], model=pipe, size=SIZE)


def test_a_second_writer_is_refused(whole, images, pipe):
    from flashmaps.files import open_run

    settings = whole[1]["settings"]
    with (
        open_run(whole[0], "batch", json.loads(json.dumps(settings))),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        fm.batch(images, "all", whole[0], model=pipe, size=SIZE)


def test_a_full_disk_is_one_sentence_and_keeps_what_was_finished(
    whole, images, pipe, small_parts, tmp_path, monkeypatch
):
    import errno

    out = tmp_path / "out"
    write = runs.Parts.write_table
    count = []

    def full(path, table):
        count.append(path)
        if len(count) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, table)

    monkeypatch.setattr(runs.Parts, "write_table", staticmethod(full))
    with pytest.raises(OSError, match="cannot be written: the disk is full"):
        fm.batch(images, "all", out, model=pipe, size=SIZE)
    monkeypatch.undo()
    kept = files(out)
    assert len(kept) == 10 + 6  # features, and three parts of two files
    monkeypatch.setattr("flashmaps.batches.parts._PART_ROWS", 4 * 256)
    fm.batch(images, "all", out, model=pipe, size=SIZE)
    assert files(out) == files(whole[0])


@pytest.mark.parametrize("code", ["EACCES", "EROFS", "EIO"])
def test_a_place_that_is_lost_on_the_way_is_one_sentence_too(
    whole, images, pipe, small_parts, tmp_path, monkeypatch, code
):
    """After the journal has it and before it lies in its place: the next run finishes that."""
    import errno

    from flashmaps.files import runs as of_files

    out, move, count = tmp_path / "out", of_files._move, []

    def lost(*arguments):
        count.append(arguments)
        if len(count) == 5:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        move(*arguments)

    monkeypatch.setattr(of_files, "_move", lost)
    words = {"EACCES": "permission is denied", "EROFS": "read-only", "EIO": "disk reports an error"}
    with pytest.raises(OSError, match=f"cannot be written: .*{words[code]}"):
        fm.batch(images, "all", out, model=pipe, size=SIZE)
    monkeypatch.setattr(of_files, "_move", move)
    half = out / "features/000001.safetensors"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])  # and one is there in part
    fm.batch(images, "all", out, model=pipe, size=SIZE)
    assert files(out) == files(whole[0])
    assert not list(out.glob(".flashmaps-*"))


def test_points_are_carried_as_matches_carry_them(images, pipe, tmp_path):
    table = tmp_path / "points.csv"
    rows = [(0, 1, 3, 4), (2, 5, 10.5, 20), (0, 1, 30, 40)]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("source", "target", "x", "y"), *rows])
    out = tmp_path / "out"
    fm.batch(images, table, out, model=pipe, size=SIZE)
    found = parquet.read_table(out / "matches").to_pylist()
    assert [(r["pair"], r["point"], r["x"], r["y"]) for r in found] == [
        (0, 0, 3.0, 4.0), (0, 1, 30.0, 40.0), (1, 0, 10.5, 20.0),
    ]  # fmt: skip
    settings = settings_of(pipe).with_given(size=SIZE)
    kept = [Features.load(out / f"features/{i:06d}.safetensors") for i in (0, 1)]
    one = match_features(*kept, settings.options)
    there = one.transfer([(3, 4), (30, 40)])
    np.testing.assert_allclose([(r["target_x"], r["target_y"]) for r in found[:2]], there)
    with pytest.raises(ValueError, match=r"point \(70, 1\) lies outside image 0 of 64 x 64"):
        columns = {"source": [0], "target": [1], "x": [70], "y": [1]}
        fm.batch(images, columns, tmp_path / "b", model=pipe, size=SIZE)


# -- which pairs -----------------------------------------------------------------------------------


def test_kinds_of_pairs():
    five = Collection.of([np.zeros((2, 2, 3))] * 5)

    def all_of(*args, **options):
        chosen = choose(*args, five, **options)
        found = [(s, t) for s, t in chosen.resolved(5, [], "kk").tolist()]
        assert len(found) == chosen.count(5)
        return found

    assert all_of("chain") == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert all_of("star", number=2) == [(2, 0), (2, 1), (2, 3), (2, 4)]
    assert len(all_of("all")) == 10 and len(all_of("all", both_ways=True)) == 20
    assert all_of("chain", both_ways=True)[:2] == [(0, 1), (1, 0)]
    assert all_of([(0, 3), (3, 0)]) == [(0, 3), (3, 0)]
    for wrong, words in (
        ({"pairs": "ring"}, r"wanted all, nearest, chain, star, or a \.csv or \.parquet file"),
        ({"pairs": "star", "number": 5}, "the star's middle is an image of 0 to 4"),
        ({"pairs": "nearest", "number": 0}, "needs at least 1"),
        ({"pairs": [(0, 9)]}, "picks image 9, but there are 5"),
        ({"pairs": [(0, 1)], "both_ways": True}, "number and both_ways belong to pairs"),
        ({"pairs": {"source": [0]}}, "wanted source and target"),
        ({"pairs": {"source": [0], "target": [1], "x": [0]}}, "one of the columns x and y"),
        ({"pairs": {"source": ["q"], "target": [1]}}, "row 0: source 'q' is the name of no"),
    ):
        with pytest.raises(ValueError, match=words):
            choose(wrong.pop("pairs"), five, **wrong)


def test_names_of_images_stand_in_tables(tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    for name in ("b.png", "a.png", "in/c.png"):
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = Collection.of(tmp_path)
    assert found.names == ("a.png", "b.png", "in/c.png")
    chosen = choose({"source": ["c.png", "a.png"], "target": ["b.png", "2"]}, found)
    assert chosen.given == ((2, 1), (0, 2))
    before = found.digest()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png")
    assert Collection.of(tmp_path).digest() != before
    with pytest.raises(ValueError, match="holds no images"):
        Collection.of(tmp_path / "in" / "..").of(_empty(tmp_path))
    with pytest.raises(ValueError, match="is given twice"):
        Collection.of([tmp_path / "a.png", tmp_path / "a.png"])


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_nearest_are_the_largest_cosines(monkeypatch):
    monkeypatch.setattr("flashmaps.batches.choose._BLOCK", 7)
    unit = torch.nn.functional.normalize(
        torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), dim=1
    )
    found = nearest(unit, 3)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-2)
    assert found == [(i, j) for i in range(20) for j in cosines[i].topk(3).indices.tolist()]
    assert len(nearest(unit, 50)) == 20 * 19


def test_nearest_by_tokens_are_the_images_that_tokens_find():
    pytest.importorskip("faiss")
    sets = [random_features(seed) for seed in range(9)]
    sets += [replace(one, key=one.key.roll(3, dims=2) + 0.01) for one in sets[:4]]
    found = nearest_by_tokens(sets, "kk", 2)
    assert [found[2 * i][1] for i in range(4)] == [9, 10, 11, 12]  # the same tokens, moved
    assert [found[2 * i][1] for i in range(9, 13)] == [0, 1, 2, 3]
    cosines = token_vectors(sets[0], "kk") @ token_vectors(sets[9], "kk").T
    heads = torch.nn.functional.cosine_similarity(
        sets[0].key[0, :, :, None], sets[9].key[0, :, None], dim=-1
    )
    np.testing.assert_allclose(cosines, heads.mean(0), atol=1e-5)
    through_graph = nearest_by_tokens(sets, "kk", 2, flat=0)
    assert [pair[0] for pair in through_graph] == [pair[0] for pair in found]
    assert through_graph == nearest_by_tokens(sets, "kk", 2, flat=0)
    assert len(set(through_graph[::2]) & set(found[::2])) >= 11  # a graph may miss some


def test_an_index_over_tokens_says_which_pairs_are_matched(images, pipe, tmp_path):
    """From images to rows: features, the index, pairs, and their matches."""
    pytest.importorskip("faiss")
    out, six = tmp_path / "out", images[:6]
    told = fm.batch(six, "nearest", out, model=pipe, size=SIZE, number=2, search="tokens")
    settings = settings_of(pipe).with_given(size=SIZE)
    sets = FeatureFolder(out / "features")
    wanted = nearest_by_tokens(sets, settings.compare, 2)
    pairs = parquet.read_table(out / "pairs.parquet").to_pandas()
    assert list(zip(pairs["source"], pairs["target"], strict=True)) == wanted
    assert told["pairs"] == 12 and [s for s, _ in wanted] == [i for i in range(6) for _ in "ab"]
    table = parquet.read_table(out / "matches").to_pandas()
    assert len(table) == 12 * 256 and not table.duplicated(["pair", "token"]).any()
    source, target = wanted[5]
    one = match_features(sets[source], sets[target], settings.options)
    mine = table[table["pair"] == 5].sort_values("token")
    assert mine["target_token"].tolist() == one.forward.tolist()
    with pytest.raises(ValueError, match="holds a run of other settings"):
        fm.batch(six, "nearest", out, model=pipe, size=SIZE, number=2)


def test_search_belongs_to_nearest():
    five = Collection.of([np.zeros((2, 2, 3))] * 5)
    assert choose("nearest", five, search="tokens").search == "tokens"
    with pytest.raises(ValueError, match="search belongs to pairs='nearest'"):
        choose("all", five, search="tokens")
    with pytest.raises(ValueError, match="search='x'; wanted 'mean' or 'tokens'"):
        choose("nearest", five, search="x")


# -- plans -----------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_counts_what_a_run_does(whole, images, pipe, tmp_path):
    out = tmp_path / "out"
    told = fm.batch(images, "all", out, model=pipe, size=SIZE, dry_run=True)
    assert not out.exists()
    assert (told.images, told.pairs, told.passes) == (10, 45, 10)
    on_disk = sum(path.stat().st_size for path in whole[0].glob("features/*"))
    assert told.feature_bytes <= on_disk <= told.feature_bytes + 10 * 4096
    assert told.seconds(10) == pytest.approx(told.seconds(1) / 10) and told.seconds() > 0
    assert "forward passes" in str(told) and json.dumps(told.to_json())
    half = fm.batch(images, "all", out, model=pipe, size=SIZE, dry_run=True, dtype="float16")
    assert half.feature_bytes == told.feature_bytes // 2


def test_reads_are_about_n_times_the_root_of_pairs_an_image(monkeypatch):
    monkeypatch.setattr("flashmaps.batches.parts._PART_ROWS", 2**16)
    for count, pairs in ((1800, 70958), (5000, 12_497_500), (64, 2000)):
        side = tile_side(count, pairs, 1)
        told = plan(
            count, pairs, left=(count, pairs), tokens=1024, points=None, rows="pairs",
            feature_bytes=100, passes=1, side=side, rates=Rates(1, 1),
        )  # fmt: skip
        # Rounding the side up, and coming from nothing.
        assert told.reads <= 1.1 * count * (pairs / count) ** 0.5 + 2 * side
    assert tile_side(5000, 10_000, 2**24) == 4  # no more than fits
    assert part_pairs(100, 1024) == 64 and part_pairs(12_497_500, 1024) == 256
    assert part_pairs(10, 2**20) == 1


def test_a_collection_of_spair_s_shape_is_planned_at_given_rates(pipe):
    told = assumed(1800, 70958, model=pipe, size=SIZE, rates=(0.05, 0.002))
    assert told.passes == 1800 and not told.rates.measured
    assert told.seconds() == pytest.approx(1800 * 0.05 + 70958 * 0.002)
    assert "0.05 s, given, not measured on hardware" in str(told)
    assert 1800 <= told.simulated <= told.reads and "in a simulation" in str(told)
    for rates, words in (((0, 1), "seconds of a forward pass"), ((1, -1), "seconds of a pair")):
        with pytest.raises(ValueError, match=words):
            assumed(10, 20, model=pipe, size=SIZE, rates=rates)
    with pytest.raises(ValueError, match="rates belong to dry_run=True"):
        fm.batch([np.zeros((64, 64, 3))] * 2, "all", "out", model=pipe, rates=(1, 1))


@pytest.mark.parametrize(("count", "pairs", "side"), [(40, 600, 10), (100, 300, 17), (7, 49, 7)])
def test_a_simulation_reads_what_matching_reads(count, pairs, side):
    found = simulated_reads(count, pairs, side, seed=3)
    drawn = np.random.default_rng(3).integers(count, size=(pairs, 2)).tolist()
    ordered = [drawn[i] for i in tile_order(drawn, side)]
    asked = [i for pair in ordered for i in pair]
    held, reads = set(), 0
    for place, image in enumerate(asked):
        reads += image not in held
        held.add(image)
        if len(held) > 2 * side:
            rest = asked[place + 1 :]
            needed = {i: rest.index(i) if i in rest else len(asked) for i in held - {image}}
            held.discard(max(needed, key=needed.get))
    assert found == reads <= most_reads(count, pairs, side)


# -- memory ----------------------------------------------------------------------------------------


def _held(images: int, pairs: int, folder: Path) -> int:
    """Bytes that a batch keeps of so many images and pairs, but for what the budget counts."""
    rng = np.random.default_rng(0)
    tracemalloc.start()
    names = tuple(f"folder/image {i:06d}.jpg" for i in range(images))
    collection = Collection(tuple(folder / name for name in names), names)
    stage = FeatureStage(SimpleNamespace(folder=folder), collection, MatchSettings())
    sets = stage.sets()
    wanted = rng.integers(images, size=(pairs, 2), dtype=np.int32)
    parts = runs.Parts(None, tile_order(wanted, tile_side(images, pairs, 2**18)), 64, "pairs")
    # What flashmaps.jsonl says of each file: its size and its checksum.
    written = {name: [0, rng.bytes(32).hex()] for name in stage.names}
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(sets) == images == len(written) and parts.count == pairs
    return held


def test_an_image_keeps_a_kilobyte_and_a_pair_eighteen_bytes(tmp_path):
    least = _held(1000, 10_000, tmp_path)
    assert _held(11_000, 10_000, tmp_path) - least <= 10_000 * 1024
    # Two numbers of 4 bytes, a place of 8, and its share of a part's view.
    assert _held(1000, 210_000, tmp_path) - least <= 200_000 * 18


@pytest.mark.slow
@pytest.mark.parametrize("images", [64, 640])
def test_ten_times_the_images_stay_within_the_budget_and_the_base(tmp_path, images):
    """640 pairs of 1,024 tokens; 17 MB of features, or 168 MB, under 64 MB."""
    bench = Path(__file__).parents[1] / "benches/batches.py"
    command = [sys.executable, str(bench), "grow", str(tmp_path), str(images), "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 64 + 24


# -- what dies -------------------------------------------------------------------------------------

RUN = """
import sys, torch
torch.set_num_threads(1)
from test_batch import asked
folder, images, pairs, rows = sys.argv[1], *map(int, sys.argv[2:5])
how = {} if len(sys.argv) < 6 else {"engine": "ray", "workers": int(sys.argv[5])}
print("begun", flush=True)
asked(folder, images, pairs, rows, **how)
"""
HERE = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))}


def asked(folder: str | Path, images: int, pairs: int, part_rows: int, **how: Any) -> None:
    """The question that is killed: drawn pairs of scenes, in parts of so many rows."""
    split = Split("test", size=64, count=images, seed=0)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(images, (pairs, 2), generator=generator).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashmaps.batches.parts._PART_ROWS", part_rows)
        fm.batch([split[i].image for i in range(images)], wanted, folder, size=64, **how)


def _killed(
    folder: Path, images: int, pairs: int, part_rows: int, kills: int, seed: int, total: int
) -> int:
    """Run it, killed so often at random moments; then to its end, here. Returns the kills that hit.

    ``total``: files of a whole run. Each life ends a random number of files after it began, and a
    random moment later; so few that all of the kills find something to do, though parts come in
    bursts, of as many pairs as are matched at once.
    """
    draw, hits = random.Random(seed), 0

    def start() -> subprocess.Popen:
        arguments = [str(folder), *map(str, (images, pairs, part_rows))]
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL, env=HERE,
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        return process

    def count() -> int:
        # What is on its way lies in folders that come and go; these do not.
        kinds = ("features", "matches", "summaries")
        return sum(len(os.listdir(folder / k)) for k in kinds if (folder / k).is_dir())

    for _ in range(kills):
        process, wanted = start(), count() + draw.randint(0, total // (2 * kills))
        while process.poll() is None and count() < wanted:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hits += 1
        process.communicate()
    asked(folder, images, pairs, part_rows)
    return hits


def _check_killed(tmp_path: Path, images: int, pairs: int, part_rows: int, kills: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    asked(whole, images, pairs, part_rows)
    hits = _killed(killed, images, pairs, part_rows, kills, 1, len(files(whole)))
    assert hits == kills
    assert files(killed) == files(whole)
    table = parquet.read_table(killed / "matches")
    keys = table["pair"].to_numpy().astype(np.int64) * 256 + table["token"].to_numpy()
    assert np.array_equal(np.sort(keys), np.arange(pairs * 256))
    assert not list(killed.glob(".flashmaps-*"))


def test_killed_at_a_random_moment_a_run_ends_the_same(tmp_path):
    _check_killed(tmp_path, 6, 24, 2 * 256, 1)


@pytest.mark.slow
def test_three_thousand_pairs_killed_twenty_times(tmp_path):
    _check_killed(tmp_path, 64, 3000, 16 * 256, 20)
