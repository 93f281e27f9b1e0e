"""Points of images and their tokens: which token holds a pixel, how tokens carry pixels along.

Points are (x, y), in pixels ((0, 0) being the centre of the top left one) or in the unit square.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flashmaps.maps.grids import centres


def token_at(point: Sequence[float], grid: tuple[int, int], size: tuple[int, int]) -> int:
    """Row-major index of the token that holds the pixel (x, y) of an image of size (h, w)."""
    x, y = point
    height, width = size
    if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5):
        raise ValueError(
            f"point ({x:g}, {y:g}) lies outside the image of {width} x {height} pixels"
        )
    rows, columns = grid
    return int((y + 0.5) / height * rows) * columns + int((x + 0.5) / width * columns)


def corners(
    points: Tensor, grid: tuple[int, int], *, smooth: bool
) -> tuple[Tensor, Tensor]:  # [..., 4] int64 and float, or [..., 1]
    """The tokens that carry each point [..., 2] of the unit square, and their weights.

    ``smooth``: the four around it, bilinear between their centres and without change beyond the
    outermost; otherwise the token that it lies in.
    """
    size = torch.tensor([grid[1], grid[0]])
    if not smooth:
        cell = (points * size).floor().long().clamp_min(0).minimum(size - 1)
        return (cell[..., 1] * grid[1] + cell[..., 0])[..., None], torch.ones_like(points[..., :1])
    place = (points * size - 0.5).clamp_min(0).minimum(size - 1.0)
    low = place.floor().long()
    high = (low + 1).minimum(size - 1)
    share = place - low
    index, weight = [], []
    for y, wy in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
        for x, wx in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
            index.append(y * grid[1] + x)
            weight.append(wy * wx)
    return torch.stack(index, -1), torch.stack(weight, -1)


def pixel_field(
    matched: Tensor,  # [N, 2] (x, y) in the other image's unit square
    grid: tuple[int, int],
    size: tuple[int, int],
    other_size: tuple[int, int],
    *,
    smooth: bool,
) -> np.ndarray:
    """[h, w, 2]: for every pixel of an image of ``size`` its (x, y) pixel in the other image.

    What is carried from tokens to pixels is the movement in the unit square, not the position, so
    that pixels of one token stay apart and tokens that stay put give exactly the identity.
    ``smooth``: bilinear between token centres; otherwise that of the token the pixel lies in.
    Results are clipped to the other image.
    """
    height, width = size
    moved = (matched - centres(grid, dtype=matched.dtype)).reshape(1, *grid, 2)
    planes = moved.permute(0, 3, 1, 2)
    if smooth:
        planes = torch.nn.functional.interpolate(planes, size, mode="bilinear")
    else:
        planes = torch.nn.functional.interpolate(planes, size, mode="nearest-exact")
    here = centres((height, width), dtype=matched.dtype).reshape(height, width, 2)
    there = (here + planes[0].permute(1, 2, 0)).clamp(0, 1).numpy()
    other_height, other_width = other_size
    pixels = there * np.array((other_width, other_height), dtype=there.dtype) - 0.5
    return pixels.clip(0, (other_width - 1, other_height - 1)).astype(np.float32)
