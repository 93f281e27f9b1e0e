"""Single points carried from image to image by tokens' matches, as ``Match.field`` carries pixels.

Points are (x, y) in pixels, [n, 2], with (0, 0) the centre of the top left pixel. A point moves as
far as the token it lies in (hard), or as the tokens around it, interpolated (soft), where movement
is measured in the unit square; it stays inside the target.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashmaps.maps.grids import Grid, centres

Size = tuple[int, int]  # (height, width) in pixels


def to_unit(points: np.ndarray, size: Size) -> np.ndarray:
    """Pixels to the unit square."""
    return (points + 0.5) / (size[1], size[0])


def tokens_at(points: np.ndarray, grid: Grid, size: Size) -> np.ndarray:
    """Row-major index of the token that each point lies in, [n] int64; the nearest if outside."""
    rows, columns = grid
    x, y = (to_unit(points, size) * (columns, rows)).T
    # NaN has no token; what comes out for it is never used.
    x, y = (np.nan_to_num(v, nan=0.0) for v in (x, y))
    row = np.floor(y).clip(0, rows - 1).astype(np.int64)
    return row * columns + np.floor(x).clip(0, columns - 1).astype(np.int64)


def carry(points: np.ndarray, movement: np.ndarray, size: Size, other: Size) -> np.ndarray:
    """Points after ``movement`` [n, 2] in the unit square, in pixels of the other image."""
    there = (to_unit(points, size) + movement).clip(0, 1)
    height, width = other
    return (there * (width, height) - 0.5).clip(0, (width - 1, height - 1))


def hard(
    points: np.ndarray,
    matched: np.ndarray,  # [n] index of the target token of each point's token
    grid: Grid,
    target_grid: Grid,
    size: Size,
    other: Size,
) -> np.ndarray:
    """Each point as its token moves to the token it is matched to, [n, 2]."""
    here = centres(grid, dtype=torch.float64).numpy()[tokens_at(points, grid, size)]
    there = centres(target_grid, dtype=torch.float64).numpy()[matched]
    return carry(points, there - here, size, other)


def soft(
    points: np.ndarray,
    expected: Tensor,  # [N, 2] mean target position of each source token, in the unit square
    grid: Grid,
    size: Size,
    other: Size,
) -> np.ndarray:
    """Each point as the tokens around it move, bilinear between their centres, [n, 2]."""
    moved = expected.double().cpu() - centres(grid, dtype=torch.float64)
    planes = moved.reshape(1, *grid, 2).permute(0, 3, 1, 2)
    at = torch.from_numpy(to_unit(points, size) * 2 - 1)[None, None]
    sampled = torch.nn.functional.grid_sample(
        planes, at, mode="bilinear", padding_mode="border", align_corners=False
    )
    return carry(points, sampled[0, :, 0].T.numpy(), size, other)
