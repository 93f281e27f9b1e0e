"""Neighbours' votes: the formula written out, and maps that only neighbours can read."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from flashmaps import AttentionMap
from flashmaps.diffusion.features import Features
from flashmaps.maps.grids import centres
from flashmaps.matching import cross_map
from flashmaps.matching.consensus import (
    LEAST,
    ROTATIONS,
    SCALES,
    TEMPERATURE,
    map_votes,
    offsets,
    spacing,
    weights,
)
from flashmaps.matching.cross_map import place_points
from flashmaps.matching.options import BETWEEN, MatchOptions
from flashmaps.matching.readout import READOUTS, read, read_map


def written_out(rows, grid, target):
    """softmax(v / T), v as the module's docstring has it, of a whole map [N, M] in float64."""
    (height, width), (rows_of, columns_of) = grid, target
    found = np.zeros((height * width, rows_of * columns_of))
    logs = np.log1p(rows.double().numpy() / LEAST)
    for i, j in product(range(height * width), range(rows_of * columns_of)):
        y, x = divmod(i, width)
        v, u = divmod(j, columns_of)
        best = 0.0
        for scale, degrees, hand in product(SCALES, ROTATIONS, (1, -1)):
            c, s = (scale * f(math.radians(degrees)) for f in (math.cos, math.sin))
            total = 0.0
            for (dx, dy), weight in zip(offsets(grid), weights(grid), strict=True):
                at, to = (x + dx, y + dy), (
                    u + round(hand * (c * dx - s * dy)), v + round(s * dx + c * dy)
                )  # fmt: skip
                if 0 <= at[0] < width and 0 <= at[1] < height:
                    if 0 <= to[0] < columns_of and 0 <= to[1] < rows_of:
                        total += weight * logs[at[1] * width + at[0], to[1] * columns_of + to[0]]
            best = max(best, total)
        found[i, j] = best / TEMPERATURE
    return torch.from_numpy(found).softmax(-1)


@pytest.mark.parametrize(("grid", "target"), [((5, 6), (4, 7)), ((8, 3), (3, 8))])
def test_votes_are_the_formula(grid, target):
    torch.manual_seed(0)
    A = AttentionMap(
        3 * torch.randn(1, 2, grid[0] * grid[1], 8, dtype=torch.float64),
        torch.randn(1, 2, target[0] * target[1], 8, dtype=torch.float64),
        query_grid=grid, key_grid=target,
    )  # fmt: skip
    found = torch.cat(list(map_votes(A)), dim=1)[0]
    torch.testing.assert_close(found, written_out(A.to_dense()[0], grid, target))


def test_neighbours_lie_closer_on_a_coarser_grid():
    assert [spacing((side, side)) for side in (8, 16, 32, 56, 64)] == [1, 1, 2, 3, 3]
    assert offsets((56, 40))[0] == (-9, -9) and len(offsets((8, 8))) == 49
    assert sum(weights((56, 56))) == pytest.approx(1)


def turned_and_mirrored(side):
    """Where each token of a grid goes: 30 degrees about the middle, then mirrored."""
    at = centres((side, side), dtype=torch.float64) - 0.5
    turn = math.radians(30)
    x = math.cos(turn) * at[:, 0] - math.sin(turn) * at[:, 1]
    y = math.sin(turn) * at[:, 0] + math.cos(turn) * at[:, 1]
    return torch.stack([-x, y], 1) + 0.5


def test_neighbours_tell_the_right_peak_from_a_higher_wrong_one():
    """Each row has its place, and a higher peak anywhere: alone it is wrong, with others right."""
    side = 20
    there = turned_and_mirrored(side)
    inside = ((there > 0.15) & (there < 0.85)).all(1)
    place = (there * side).floor().clamp(0, side - 1).long()
    right = place[:, 1] * side + place[:, 0]
    wrong = torch.from_numpy(np.random.default_rng(0).integers(side * side, size=side * side))
    rows = torch.zeros(side * side, side * side)
    each = torch.arange(side * side)
    rows[each, right] += 0.4
    rows[each, wrong] += 0.6
    # An ordinary map with these rows: one-hot queries of as many channels, scores log p.
    A = AttentionMap(
        torch.eye(side * side)[None, None],
        (rows + 1e-9).log().T.contiguous()[None, None],
        scale=1.0,
        query_grid=(side, side),
        key_grid=(side, side),
    )

    def share(readout):
        off = (read_map(A, readout, 1)[0].double() - there).norm(dim=1)
        return float((off < 2 / side)[inside].double().mean())

    assert share("hard") < 0.2
    assert share("consensus") > 0.9


def images(side=9):
    torch.manual_seed(1)
    return [
        Features(
            query=torch.randn(1, 2, side * side, 8), key=torch.randn(1, 2, side * side, 8),
            scale=8**-0.5, head_weights=torch.full((2,), 0.5), grid=(side, side),
            image=np.zeros((side, side, 3), np.float32), input_size=(side, side), layers=("a",),
            timestep=1, seeds=(0,), prompt="", output=torch.randn(1, 1, side * side, 16),
        )
        for _ in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize("compare", ["qk", "features"])
def test_points_at_tokens_go_where_the_whole_map_says(compare, monkeypatch):
    options = MatchOptions(compare, temperature=0.3, readout="consensus", window=1)
    source, target = images()
    whole = read_map(cross_map.cross_map(source, target, options), "consensus", 1)
    at = centres(source.grid)[None]
    assert options.carried_by == "query"
    torch.testing.assert_close(place_points(source, target, at, options), whole)
    torch.testing.assert_close(
        place_points(source, target, at, options, between="token"), whole, atol=1e-6, rtol=0
    )
    monkeypatch.setattr(cross_map, "_ENTRIES", 3 * 49 * 81)  # three points at a time
    torch.testing.assert_close(place_points(source, target, at, options), whole)


def test_a_match_reads_by_consensus():
    from flashmaps.matching.match import match_features

    source, target = images()
    m = match_features(source, target, compare="features", readout="consensus", window=2)
    assert m.field().shape == (9, 9, 2)
    for origin in ("source", "target"):
        torch.testing.assert_close(m.place_of(30, origin), m._matched(origin, "consensus")[30])
    for kind in READOUTS:
        for between in (None, *BETWEEN):
            assert m.transfer(np.zeros((0, 2)), kind, between=between).shape == (0, 2)
    points = [(2.0, 3.0), (7.0, 1.0)]
    np.testing.assert_allclose(
        m.transfer(points), m.transfer(points, between="bilinear"), atol=1e-4
    )


def test_votes_need_neighbours_and_grids():
    with pytest.raises(ValueError, match="asks a row's neighbours, which rows alone do not tell"):
        read(torch.ones(9), (3, 3), "consensus")
    A = AttentionMap(torch.randn(1, 1, 10, 4), torch.randn(1, 1, 9, 4), key_grid=(3, 3))
    with pytest.raises(ValueError, match="need the map's query_grid and key_grid"):
        read_map(A, "consensus")
