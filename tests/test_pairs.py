"""Many pairs at once: the same numbers as one pair at a time, in bounded memory, in Parquet."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flashmaps.diffusion.features import Features
from flashmaps.matching.confidence import SCORES
from flashmaps.matching.match import match_features
from flashmaps.matching.options import COMPARE
from flashmaps.matching.pair_chunks import (
    HEAD_BYTES,
    TOKEN_BYTES,
    Images,
    compared_bytes,
    compared_only,
)
from flashmaps.matching.pair_order import most_reads, tile_order
from flashmaps.matching.pairs import all_pairs, match_pairs, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, HEADS = 8, 3
# Two images of 20 tokens: stacked, and their keys scaled (twice in float32), and the results.
PAIR = 2 * 20 * (3 * HEADS * WIDTH * 4 + TOKEN_BYTES + HEADS * HEAD_BYTES)


def random_features(seed, grid=(4, 5)):
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    query, key, output = torch.randn(3, 1, HEADS, tokens, WIDTH, generator=generator)
    return Features(
        query=query, key=key, output=output[:, :2], scale=WIDTH**-0.5,
        head_weights=torch.tensor([0.5, 0.3, 0.2]),
        grid=grid, image=np.zeros((40, 50, 3), np.float32), input_size=(40, 50),
        layers=("known",), timestep=1, seeds=(0,), prompt="",
    )  # fmt: skip


@pytest.fixture
def sets():
    return [random_features(seed) for seed in range(4)]


def test_all_pairs_are_each_pair_once():
    assert all_pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert all_pairs(3, both_ways=True) == [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]


@pytest.mark.parametrize("compare", COMPARE)
def test_a_batch_has_the_numbers_of_single_matches(sets, compare):
    wanted = [(0, 1), (3, 2), (2, 2), (0, 3)]
    (batch,) = match_pairs(sets, wanted, compare=compare)
    assert batch.pairs.tolist() == [list(pair) for pair in wanted]
    for row, (s, t) in enumerate(wanted):
        one = match_features(sets[s], sets[t], compare=compare)
        assert torch.equal(batch.trip.forward[row], one.forward)
        assert torch.equal(batch.trip.backward[row], one.backward)
        assert torch.equal(batch.mutual[row], one.mutual)
        for name in ("hard_distance", "soft_distance", "spread", "return_probability"):
            mine, theirs = getattr(batch.trip, name)[row], getattr(one.round_trip, name)[0]
            torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(batch.score(name)[row], theirs)
        torch.testing.assert_close(batch.expected_target[row], one.expected_target)
        dense = one.forward_map.to_dense()[0]
        torch.testing.assert_close(batch.max_probability[row], dense.amax(1))
        torch.testing.assert_close(batch.entropy[row], -torch.xlogy(dense, dense).sum(1))


def test_scores_of_target_tokens_are_read_at_the_match(sets):
    (batch,) = match_pairs(sets, [(0, 1)])
    forward = batch.trip.forward[0]
    density = torch.bincount(forward, minlength=20)
    assert batch.score("density")[0].tolist() == density[forward].tolist()
    alone = density[forward] == 1
    assert batch.score("nims")[0].isnan().tolist() == alone.tolist()
    with pytest.raises(ValueError, match=r"score 'x' is unknown; choose from return_probability"):
        batch.score("x")


def test_a_small_budget_makes_small_chunks_of_the_same_numbers(sets):
    whole = list(match_pairs(sets))
    assert [len(each.pairs) for each in whole] == [6]
    one_pair = PAIR
    parts = list(match_pairs(sets, memory_budget=2 * one_pair))
    assert len(parts) >= 3
    assert torch.equal(torch.cat([each.pairs for each in parts]), whole[0].pairs)
    for name in ("forward", "hard_ims", "return_probability", "nims_log1p"):
        joined = torch.cat([getattr(each.trip, name) for each in parts])
        assert torch.equal(joined.nan_to_num(), getattr(whole[0].trip, name).nan_to_num())
    with pytest.raises(ValueError, match=rf"{one_pair - 1} bytes is too small.* takes {one_pair}"):
        list(match_pairs(sets, memory_budget=one_pair - 1))


class Loader:
    """A sequence that reads, and notes what."""

    def __init__(self, sets):
        self.sets, self.asked = sets, []

    def __len__(self):
        return len(self.sets)

    def __getitem__(self, index):
        self.asked.append(index)
        return replace(self.sets[index], image=np.zeros((40, 50, 3), np.float32))


def test_only_the_features_of_a_chunk_are_asked_for(sets):
    loader = Loader(sets)
    kept = 2 * 20 * HEADS * WIDTH * 4  # the keys of a pair
    whole = sets[0].nbytes
    chunks = match_pairs(loader, [(0, 1), (2, 3)], memory_budget=max(PAIR + 2 * kept, whole))
    assert loader.asked == []
    next(chunks)
    # The first image tells how many fit; the next pair has been looked at, to know that it does
    # not; nothing after it.
    assert loader.asked == [0, 0, 1, 2, 3]


def test_tiles_read_each_image_seldom_and_give_the_same_numbers(sets):
    many = [random_features(seed) for seed in range(24)]
    wanted = all_pairs(24)
    kept = 20 * HEADS * WIDTH * 4
    for side in (2, 3, 6):
        # Room for 2 * side images, in the words of Room.of, and for the largest as it is read.
        budget = -(-(2 * side * 4 * kept * 4) // 3) + many[0].nbytes
        loader = Loader(many)
        found = {}
        for batch in match_pairs(loader, wanted, memory_budget=budget):
            for row, number in enumerate(batch.numbers.tolist()):
                assert tuple(batch.pairs[row].tolist()) == wanted[number]
                found[number] = batch.trip.forward[row], batch.trip.hard_ims[row]
        assert sorted(found) == list(range(len(wanted)))
        assert len(loader.asked) <= 1 + most_reads(24, len(wanted), side)
        (whole,) = match_pairs(many, wanted)
        assert torch.equal(
            torch.stack([found[n][0] for n in range(len(wanted))]), whole.trip.forward
        )
    given = Loader(many)
    for _ in match_pairs(given, wanted, memory_budget=budget, order="given"):
        pass
    assert len(given.asked) > len(loader.asked)


@pytest.mark.parametrize("count, pairs", [(60, 400), (60, 3540), (200, 3000)])
def test_the_order_of_tiles_keeps_its_bound(count, pairs):
    tiny = replace(random_features(0, (1, 1)), key=torch.zeros(1, 1, 1, 1))
    generator = torch.Generator().manual_seed(count + pairs)
    wanted = torch.randint(count, (pairs, 2), generator=generator).tolist()
    for blocks in (2, 5, max(1, round((pairs / count) ** 0.5))):
        side = -(-count // blocks)
        ordered = [tuple(wanted[position]) for position in tile_order(wanted, side)]
        assert sorted(ordered) == sorted(map(tuple, wanted))
        loader = Loader([tiny] * count)
        images = Images(loader, "kk", ordered)
        for position, pair in enumerate(ordered):
            for image in pair:
                images.let_go((2 * side - 1) * 4, pair, position)
                images[image]
                assert len(images._held) <= 2 * side
        reads = len(loader.asked)
        assert reads <= most_reads(count, pairs, side)
    # With as many blocks as the root of pairs an image, about n sqrt(P / n): one block more, and
    # what rounding the side up adds.
    assert most_reads(count, pairs, side) <= (blocks + 1) * (count + blocks)


def test_what_is_not_compared_is_not_kept(sets):
    for compare in COMPARE:
        whole = sum(len(b.pairs) for b in match_pairs(Loader(sets), compare=compare))
        assert whole == 6
        kept = compared_only(sets[0], compare)
        assert compared_bytes(kept, compare) == compared_bytes(sets[0], compare)
        assert kept.nbytes <= compared_bytes(sets[0], compare) + sets[0].head_weights.nbytes
        assert kept.image.shape == sets[0].image.shape


def test_grids_may_differ():
    sets = [random_features(0), random_features(1, (3, 6)), random_features(2)]
    batches = list(match_pairs(sets, all_pairs(3, both_ways=True)))
    assert sum(len(each.pairs) for each in batches) == 6
    for batch in batches:
        for row, (s, t) in enumerate(batch.pairs.tolist()):
            assert (batch.source_grid, batch.target_grid) == (sets[s].grid, sets[t].grid)
            one = match_features(sets[s], sets[t])
            assert torch.equal(batch.trip.forward[row], one.forward)


def test_mistakes_are_named(sets):
    with pytest.raises(ValueError, match=r"pairs\[1\] picks image 4, but there are 4"):
        match_pairs(sets, [(0, 1), (0, 4)])
    with pytest.raises(ValueError, match=r"pairs\[0\] = \(0, 1, 2\); wanted two integers"):
        match_pairs(sets, [(0, 1, 2)])
    with pytest.raises(ValueError, match="pairs is empty"):
        match_pairs(sets, [])
    with pytest.raises(ValueError, match="sets has 1 images"):
        match_pairs(sets[:1])
    with pytest.raises(ValueError, match="compare='vv' is not known"):
        match_pairs(sets, compare="vv")
    other = replace(sets[1], layers=("another",))
    with pytest.raises(ValueError, match="features of image 1 do not go with those of image 0"):
        list(match_pairs([sets[0], other]))


def test_token_rows_in_parquet_say_what_the_batch_says(sets, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    one_pair = PAIR
    path = write_pairs(tmp_path / "all.parquet", sets, memory_budget=2 * one_pair)
    table = parquet.read_table(path)
    assert table.num_rows == 6 * 20
    columns = {name: table[name].to_numpy() for name in table.column_names}
    (batch,) = match_pairs(sets)
    assert columns["pair"].tolist() == np.repeat(np.arange(6), 20).tolist()
    assert columns["target_token"].tolist() == batch.trip.forward.flatten().tolist()
    for name in SCORES:
        np.testing.assert_array_equal(columns[name], batch.score(name).flatten().numpy())
    # Token 7 of 4 x 5 is row 1, column 2.
    assert (columns["x"][7], columns["y"][7]) == (np.float32(0.5), np.float32(0.375))
    settings = json.loads(table.schema.metadata[b"flashmaps"])
    assert settings["compare"] == "kk" and settings["layers"] == ["known"]
    assert parquet.ParquetFile(path).num_row_groups > 1


def test_pair_rows_in_parquet(sets, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write_pairs(tmp_path / "all.parquet", sets, [(0, 1), (1, 0)], rows="pairs")
    rows = parquet.read_table(path).to_pylist()
    one = match_features(sets[1], sets[0]).summary()
    assert [(row["source"], row["target"]) for row in rows] == [(0, 1), (1, 0)]
    for name in ("hard_ims", "soft_ims", "mutual_share", "targets_hit_share", "density_max"):
        assert rows[1][name] == pytest.approx(one[name])
    assert rows[1]["mean_return_probability"] == pytest.approx(one["mean_return_probability"])
    with pytest.raises(ValueError, match="rows='all'; wanted 'tokens' or 'pairs'"):
        write_pairs(tmp_path / "x.parquet", sets, rows="all")


def test_a_file_that_fails_halfway_leaves_the_old_one(sets, tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "all.parquet"
    path.write_text("old")
    bad = [*sets, replace(random_features(9), layers=("another",))]
    one_pair = PAIR
    with pytest.raises(ValueError, match="do not go with"):
        write_pairs(path, bad, [(0, 1), (0, 4)], memory_budget=one_pair)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


_GROWTH = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from flashmaps.diffusion.feature_folder import FeatureFolder
from flashmaps.matching.pairs import all_pairs, match_pairs
sys.path.insert(0, sys.argv[1])
from test_pairs import random_features
torch.set_num_threads(1)
folder, budget = Path(sys.argv[2]), int(sys.argv[3])
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
one = random_features(0, (16, 16))
wide = {name: torch.randn(1, 4, 256, 32) for name in ("query", "key")}
for number in range(200):
    each = replace(one, **wide, head_weights=torch.full((4,), 0.25))
    each.save(folder / f"{number:03d}.safetensors")
pairs = all_pairs(200)[:1500]
for _ in match_pairs(FeatureFolder(folder), pairs[:3], compare="qk", memory_budget=budget):
    pass
before = peak()
for _ in match_pairs(FeatureFolder(folder), pairs, compare="qk", memory_budget=budget):
    del _
print(peak() - before)
"""


@pytest.mark.slow
def test_the_budget_counts_what_is_loaded(tmp_path):
    # A process of its own: 200 images of 0.8 MB in files under 40 MB. The base: what the kernels
    # take, and what the allocator keeps in parts of what was let go.
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is told by /proc")
    budget, base = 40_000_000, 24_000_000
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(Path(__file__).parent), str(tmp_path), str(budget)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= budget + base
