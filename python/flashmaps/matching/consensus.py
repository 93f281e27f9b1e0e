"""Neighbours' votes: a point goes where its neighbours' rows agree that it goes.

A single row of a map often has several peaks: both eyes, every leg. Its neighbours have theirs, and
only near the right place do they lie as the neighbours themselves lie, turned, scaled or mirrored.
With the neighbours i + d of token i, d on a grid of 7 x 7 with ``spacing`` tokens between them,

    v_ij = max_S sum_d w_d log(1 + A[i + d, j + S d] / e) / sum_d w_d

over the similarities S of SCALES, ROTATIONS and both handednesses, w_d = exp(-|d|^2 / 2 s^2),
s = 0.7 of the outermost ring's distance, and places outside of either image saying nothing. Rows
are softmax(v / T), T = TEMPERATURE. Votes for an offset go back to Cho et al., "Unsupervised object
discovery and localization in the wild", 2015 (probabilistic Hough matching), and Min et al.,
"Hyperpixel Flow", 2019; Rocco et al., "Neighbourhood Consensus Networks", 2018, learn them. Nothing
is learnt here.

Workspaces here are bounded, but not by a memory budget in force.

e, T and what S and d range over were chosen on 48 pairs of the world's validation split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import Grid

RINGS = 3  # of neighbours, square
SPACING = 0.054  # between neighbours, of the longer side of the grid: 3 of 56 tokens
SCALES = (0.7, 1.0, 1.4)
ROTATIONS = (-30.0, 0.0, 30.0)  # degrees
LEAST = 1e-2  # e: probability below which a row's entry says little
TEMPERATURE = 0.1  # of the votes
_SPREAD = 0.7  # s, in units of the outermost ring's distance


def spacing(grid: Grid) -> int:
    """Tokens between neighbours on a grid, at least 1."""
    return max(1, round(SPACING * max(grid)))


def offsets(grid: Grid, rings: int = RINGS) -> list[tuple[int, int]]:
    """(dx, dy) of the neighbours, in tokens, the token itself among them."""
    steps = [step * spacing(grid) for step in range(-rings, rings + 1)]
    return [(dx, dy) for dy in steps for dx in steps]


def weights(grid: Grid, rings: int = RINGS) -> list[float]:
    """w_d of each of :func:`offsets`; they sum to 1."""
    reach = 2 * (_SPREAD * rings * spacing(grid)) ** 2
    found = [math.exp(-(dx * dx + dy * dy) / reach) for dx, dy in offsets(grid, rings)]
    return [each / sum(found) for each in found]


def similarities() -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The matrices S: what (dx, dy) becomes is S @ (dx, dy)."""
    found = []
    for scale, degrees, hand in product(SCALES, ROTATIONS, (1, -1)):
        cosine = scale * math.cos(math.radians(degrees))
        sine = scale * math.sin(math.radians(degrees))
        found.append(((hand * cosine, -hand * sine), (sine, cosine)))
    return found


def votes(said: Iterable[Tensor], grid: Grid, target: Grid) -> Tensor:
    """Rows of votes, [..., M], >= 0 and summing to 1.

    Args:
        said: for each of :func:`offsets` the rows of all points' neighbours there, [..., M]; zeros
            where a neighbour lies outside of its image.
        grid, target: (height, width) of the tokens of both images.
    """
    height, width = target
    parts = [
        (rows.to(torch.promote_types(rows.dtype, torch.float32)) / LEAST)
        .log1p()
        .mul_(share)
        .unflatten(-1, target)
        for rows, share in zip(said, weights(grid), strict=True)
    ]
    best: Tensor | None = None
    for (a, b), (c, d) in similarities():
        total = torch.zeros_like(parts[0])
        for part, (dx, dy) in zip(parts, offsets(grid), strict=True):
            right, down = round(a * dx + b * dy), round(c * dx + d * dy)
            if abs(right) < width and abs(down) < height:
                total[..., _here(down, height), _here(right, width)] += part[
                    ..., _here(-down, height), _here(-right, width)
                ]
        best = total if best is None else torch.maximum(best, total)
    assert best is not None
    return (best.flatten(-2) / TEMPERATURE).softmax(-1)


def _here(step: int, size: int) -> slice:
    """The places of a side whose place ``step`` further lies on it too."""
    return slice(max(0, -step), min(size, size - step))


def map_votes(A: AttentionMap) -> Iterator[Tensor]:
    """The rows of votes of a whole lazy map, one row of its query grid after the other: [B, w, M].

    It keeps the rows of the map that neighbours share, 2 RINGS spacings + 1 rows of the query grid.
    Raises ValueError for a map without grids.
    """
    grid, target = A.query_grid, A.key_grid
    if grid is None or target is None:
        raise ValueError("neighbours' votes need the map's query_grid and key_grid")
    height, width = grid
    reach = RINGS * spacing(grid)
    kept: dict[int, Tensor] = {}

    def band(y: int) -> Tensor:  # [B, w, M]
        if y not in kept:
            kept[y] = A.rows(slice(y * width, (y + 1) * width))
        return kept[y]

    for y in range(height):
        for gone in [each for each in kept if each < y - reach]:
            del kept[gone]

        said = []
        for dx, dy in offsets(grid):
            found = torch.zeros_like(band(y))
            if 0 <= y + dy < height and abs(dx) < width:
                found[:, _here(dx, width)] = band(y + dy)[:, _here(-dx, width)]
            said.append(found)
        yield votes(said, grid, target)
