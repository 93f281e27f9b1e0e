"""Token grids: row-major, coordinates are cell centres in the unit square, (x, y)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grid = tuple[int, int]


def square_grid(tokens: int) -> Grid | None:
    """(s, s) when ``tokens`` is s * s, else None."""
    side = int(math.sqrt(tokens) + 0.5)  # not math.isqrt, which torch.compile cannot trace
    return (side, side) if side * side == tokens else None


def centres(
    grid: Grid, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Cell centres of a (height, width) grid: [height * width, 2] as (x, y) in (0, 1)."""
    height, width = grid
    y = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
    return torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1)


def cell_index(grid: Grid, to: Grid, *, device: torch.device | str | None = None) -> Tensor:
    """Which cell of the coarser grid ``to`` each token of ``grid`` falls in: [h * w] int64.

    Token row r of h falls in cell row floor(r * h' / h): a partition, so that sums are kept, and
    ordinary block pooling where h' divides h.
    """
    (height, width), (rows, columns) = grid, to
    row = torch.arange(height, device=device) * rows // height
    column = torch.arange(width, device=device) * columns // width
    return (row[:, None] * columns + column[None, :]).flatten()
