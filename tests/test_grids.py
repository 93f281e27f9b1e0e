"""Token grids against the plainest code there is."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from flashmaps.maps.grids import cell_index, centres, square_grid


def test_square_grid() -> None:
    for tokens in (*range(1, 3000), 65_536, 65_535, 10**10, 10**10 + 1, (2**26 - 1) ** 2):
        side = math.isqrt(tokens)
        assert square_grid(tokens) == ((side, side) if side * side == tokens else None)


@pytest.mark.parametrize("grid", [(1, 1), (3, 7), (8, 2)])
def test_centres(grid: tuple[int, int]) -> None:
    torch.testing.assert_close(centres(grid, dtype=torch.float64), oracle.centres(grid))


@pytest.mark.parametrize("to", [(1, 1), (2, 3), (5, 7), (4, 6)])
def test_cells(to: tuple[int, int]) -> None:
    got = torch.nn.functional.one_hot(cell_index((5, 7), to), to[0] * to[1]).double()
    assert torch.equal(got, oracle.cells((5, 7), to))
    sizes = got.sum(0)
    assert (sizes > 0).all() and sizes.max() <= math.ceil(5 / to[0]) * math.ceil(7 / to[1])
