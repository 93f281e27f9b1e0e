"""From rows of a map to places in the other image, finer than its tokens where that is wanted.

A row is how one token (or point) spreads over the M tokens of the other image. Coordinates are
(x, y) in the unit square, tokens being at their cells' centres.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmaps.arguments import whole
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import Grid, centres
from flashmaps.maps.modes import exact
from flashmaps.matching.consensus import map_votes

ROWS = ("hard", "soft", "window", "parabola")  # a row says where, by itself
READOUTS = (*ROWS, "consensus")
WINDOWED = ("window", "consensus")  # those that ``window`` says something to
_CHUNK_ELEMENTS = 2**22  # of rows at a time
_TINY = 1e-30  # below any probability that says something; keeps logarithms finite


def check_readout(name: str, value: object) -> None:
    """ValueError, naming the argument, unless ``value`` is one of READOUTS."""
    if value not in READOUTS:
        wanted = ", ".join(map(repr, READOUTS[:-1])) + f" or {READOUTS[-1]!r}"
        raise ValueError(f"{name}={value!r}; wanted {wanted}")


def without_neighbours(readout: str) -> str:
    """The readout for rows that have no neighbours: "window" in place of "consensus"."""
    return "window" if readout == "consensus" else readout


def check_window(window: object) -> None:
    """ValueError unless ``window`` is a whole number of tokens, at least 1."""
    whole("window", window, 1)


def read(rows: Tensor, grid: Grid, readout: str = "hard", window: int = 1) -> Tensor:
    """The place that each row points to: [..., 2] from rows [..., M] that are >= 0.

    Args:
        rows: probabilities; they need not sum to 1.
        grid: (height, width) of the M tokens.
        readout: "hard": the centre of the largest entry, the lowest index among ties. "soft": the
            mean over all tokens. "window": the mean over the tokens at most ``window`` rows and
            columns from the largest one. "parabola": the peak of a parabola through the logarithms
            of the largest entry and its two neighbours, in each direction by itself; within half a
            token of the largest entry, which it stays at on the edge of the grid. "consensus" is
            a "window" of the votes of a row's neighbours (:mod:`flashmaps.matching.consensus`); a
            row alone does not tell them.
        window: tokens, at least 1.

    Raises ValueError for an unknown readout, "consensus", or rows that do not fit the grid.
    """
    check_readout("readout", readout)
    if readout == "consensus":
        raise ValueError(
            "readout='consensus' asks a row's neighbours, which rows alone do not tell; use "
            "read_map, or 'window'"
        )
    check_window(window)
    height, width = grid
    if rows.shape[-1] != height * width:
        raise ValueError(
            f"rows have {rows.shape[-1]} entries; a grid of {grid} has {height * width}"
        )
    at = centres(grid, dtype=rows.dtype, device=rows.device)
    if readout == "soft":
        with exact(rows.device):
            mean = rows @ at
        return mean / rows.sum(-1, keepdim=True).clamp_min(_TINY)
    best = rows.argmax(-1)
    if readout == "hard":
        return at[best]
    y, x = best // width, best % width
    if readout == "window":
        steps = torch.arange(-window, window + 1, device=rows.device)
        ys = y[..., None, None] + steps[:, None]
        xs = x[..., None, None] + steps[None, :]
        inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
        index = (ys.clamp(0, height - 1) * width + xs.clamp(0, width - 1)).flatten(-2)
        mass = rows.gather(-1, index) * inside.flatten(-2)
        mass = mass / mass.sum(-1, keepdim=True).clamp_min(_TINY)
        return (mass[..., None] * at[index]).sum(-2)
    across = _peak(rows, best, x, width, 1)
    down = _peak(rows, best, y, height, width)
    return at[best] + torch.stack((across / width, down / height), dim=-1)


def _peak(rows: Tensor, best: Tensor, place: Tensor, size: int, step: int) -> Tensor:
    """How far, in tokens, the parabola's peak lies from the largest entry along one direction."""
    inner = (place > 0) & (place < size - 1)
    last = rows.shape[-1] - 1

    def log_at(index: Tensor) -> Tensor:
        index = index.clamp(0, last)[..., None]
        return rows.gather(-1, index)[..., 0].clamp_min(_TINY).log()

    before, here, after = log_at(best - step), log_at(best), log_at(best + step)
    bend = 2 * here - before - after  # >= 0, since ``here`` is the largest
    shift = (after - before) / (2 * bend.clamp_min(1e-6))
    return torch.where(inner, shift.clamp(-0.5, 0.5), torch.zeros_like(shift))


def read_map(A: AttentionMap, readout: str = "hard", window: int = 1) -> Tensor:
    """:func:`read` of every row of a lazy map, a few rows at a time: [batch, N, 2]."""
    check_readout("readout", readout)
    check_window(window)
    grid = A.key_grid
    if grid is None:
        raise ValueError("the map has no key_grid; give (height, width) of its keys")
    if readout == "hard":
        return centres(grid, dtype=A.dtype, device=A.device)[A.argmax()]
    if readout == "soft":
        return A.expectation()
    if readout == "consensus":
        return torch.cat([read(rows, grid, "window", window) for rows in map_votes(A)], dim=1)
    batch, queries, keys = A.shape
    step = max(1, _CHUNK_ELEMENTS // (batch * keys))
    parts = [
        read(A.rows(slice(first, min(first + step, queries))), grid, readout, window)
        for first in range(0, queries, step)
    ]
    return torch.cat(parts, dim=1)
