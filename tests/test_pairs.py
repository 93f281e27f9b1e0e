"""Many pairs at once: the same numbers as one pair at a time, in bounded memory, in Parquet."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from flashmaps.diffusion.features import Features
from flashmaps.matching import pairs
from flashmaps.matching.match import match_features
from flashmaps.matching.options import COMPARE
from flashmaps.matching.pairs import all_pairs, match_pairs, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, HEADS = 8, 3


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
    one_pair = 2 * 20 * (pairs._TOKEN_BYTES + 5 * HEADS * WIDTH * 4)
    parts = list(match_pairs(sets, memory_budget=2 * one_pair))
    assert len(parts) >= 3
    assert torch.equal(torch.cat([each.pairs for each in parts]), whole[0].pairs)
    for name in ("forward", "hard_ims", "return_probability", "nims_log1p"):
        joined = torch.cat([getattr(each.trip, name) for each in parts])
        assert torch.equal(joined.nan_to_num(), getattr(whole[0].trip, name).nan_to_num())
    with pytest.raises(ValueError, match=rf"{one_pair - 1} bytes is too small.* takes {one_pair}"):
        list(match_pairs(sets, memory_budget=one_pair - 1))


def test_only_the_features_of_a_chunk_are_asked_for(sets):
    asked = []

    class Loader:
        def __len__(self):
            return len(sets)

        def __getitem__(self, index):
            asked.append(index)
            return sets[index]

    one_pair = 2 * 20 * (pairs._TOKEN_BYTES + 5 * HEADS * WIDTH * 4)
    chunks = match_pairs(Loader(), [(0, 1), (2, 3)], memory_budget=one_pair)
    assert asked == []
    next(chunks)
    # The next pair has been looked at, to know that it does not fit; nothing after it.
    assert asked == [0, 1, 2, 3]


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
    one_pair = 2 * 20 * (pairs._TOKEN_BYTES + 5 * HEADS * WIDTH * 4)
    path = write_pairs(tmp_path / "all.parquet", sets, memory_budget=2 * one_pair)
    table = parquet.read_table(path)
    assert table.num_rows == 6 * 20
    columns = {name: table[name].to_numpy() for name in table.column_names}
    (batch,) = match_pairs(sets)
    assert columns["pair"].tolist() == np.repeat(np.arange(6), 20).tolist()
    assert columns["target_token"].tolist() == batch.trip.forward.flatten().tolist()
    for name in pairs.SCORES:
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
    one_pair = 2 * 20 * (pairs._TOKEN_BYTES + 5 * HEADS * WIDTH * 4)
    with pytest.raises(ValueError, match="do not go with"):
        write_pairs(path, bad, [(0, 1), (0, 4)], memory_budget=one_pair)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
