"""What each statistic is, on a tile of rows of a dense map. The reference and `Composition` use it.

A reducer sees the map a few rows at a time, in order. Row reducers map a tile [P, r, M] to their
rows of the output; column reducers keep a running state and write it at the end. A statistic is
added by adding one of the two, its line in `_problem.FIELDS`, and the same reducer in csrc/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashmaps.maps.grids import centres
from flashmaps.maps.problem import Problem, Request

_PIECE = 64  # of a row that is searched for its maximum


class Tile(NamedTuple):
    """Rows ``start`` to ``start + r`` of the maps ``maps`` of a batch."""

    values: Tensor  # [p, r, M], the printed map
    start: int
    maps: slice
    lines: int  # what a row sums to; values / lines is a distribution
    key_centres: Tensor | None  # [M, 2]
    request: Request

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.values.shape[1])

    @property
    def distribution(self) -> Tensor:
        return self.values if self.lines == 1 else self.values / self.lines


def row_entropy(values: Tensor) -> Tensor:
    """-sum_j a_j log a_j in nats over the last axis, with 0 log 0 = 0.

    torch's xlogy is not vectorised on a CPU. The logarithm of the smallest normal number stands in
    for those of what is below it: of a row that sums to 1 that changes nothing.
    """
    if values.requires_grad and torch.is_grad_enabled():
        return -torch.special.xlogy(values, values).sum(-1)
    tiny = torch.finfo(values.dtype).tiny
    return -values.clamp_min(tiny).log_().mul_(values).sum(-1)


def _argmax(values: Tensor, dim: int) -> Tensor:
    """First index of the maximum (torch.argmax promises no order among ties)."""
    size = values.shape[dim]
    shape = [1] * values.dim()
    shape[dim] = size
    index = torch.arange(size, device=values.device).view(shape)
    top = values.amax(dim, keepdim=True)
    return torch.where(values == top, index, size).amin(dim).clamp(max=size - 1)


def _row_argmax(values: Tensor) -> Tensor:
    """The same over the last axis: the first piece with the maximum, then the first in it."""
    size = values.shape[-1]
    if size < 4 * _PIECE:
        return _argmax(values, -1)
    whole = size // _PIECE * _PIECE
    tops = values[..., :whole].unflatten(-1, (-1, _PIECE)).amax(-1)
    if whole < size:
        tops = torch.cat((tops, values[..., whole:].amax(-1, keepdim=True)), dim=-1)
    first = _argmax(tops, -1).unsqueeze(-1)
    at = first * _PIECE + torch.arange(_PIECE, device=values.device)
    at.clamp_(max=size - 1)  # the last again and again: the first of equals is taken
    inside = _argmax(values.gather(-1, at), -1).unsqueeze(-1)
    return at.gather(-1, inside).squeeze(-1)


def _row_argmax_bytes(rows: int, keys: int, s: int) -> int:
    if keys < 4 * _PIECE:
        return rows * keys * 9 + rows * (s + 16) + keys * 8  # a mask and an index for each element
    pieces = -(-keys // _PIECE)
    of_pieces, of_one = pieces * (2 * s + 9), _PIECE * (s + 17)
    return rows * (of_pieces + of_one + s + 40) + (pieces + _PIECE) * 8


def _diagonal(tile: Tile) -> Tensor:
    return tile.values[:, :, tile.rows].diagonal(dim1=1, dim2=2)


def _expectation(tile: Tile) -> Tensor:
    assert tile.key_centres is not None
    return tile.distribution @ tile.key_centres


def _product(tile: Tile) -> Tensor:
    assert tile.request.right is not None
    return tile.values @ tile.request.right[tile.maps]


def _topk(tile: Tile) -> tuple[Tensor, Tensor]:
    """Largest first; among equals the lowest index first, as argmax has it."""
    values, indices = tile.values.sort(dim=-1, descending=True, stable=True)
    return values[..., : tile.request.k], indices[..., : tile.request.k]


def _pooled_keys(tile: Tile) -> Tensor:
    assert tile.request.cells is not None
    shape = (*tile.values.shape[:2], tile.request.num_cells)
    return tile.values.new_zeros(shape).index_add_(2, tile.request.cells, tile.values)


ROW_REDUCERS: dict[str, Callable[[Tile], Tensor]] = {
    "entropy": lambda tile: row_entropy(tile.distribution),
    "max": lambda tile: tile.values.amax(-1),
    "argmax": lambda tile: _row_argmax(tile.values),
    "expectation": _expectation,
    "diagonal": _diagonal,
    "product": _product,
    "dense": lambda tile: tile.values,
    "topk_values": lambda tile: _topk(tile)[0],
    "topk_indices": lambda tile: _topk(tile)[1],
    "pooled_keys": _pooled_keys,
}


class ColumnReducer(Protocol):
    """A state that sees the tiles in order and leaves its result in the output it was made with."""

    def update(self, tile: Tile) -> None: ...

    def finish(self) -> None: ...


class ColumnSum:
    """c_j = sum_i A_ij."""

    def __init__(self, out: Tensor) -> None:
        self.out = out.zero_()

    def update(self, tile: Tile) -> None:
        self.out[tile.maps] += tile.values.sum(1)

    def finish(self) -> None:
        pass


class ColumnEntropy:
    """Entropy over i of A_ij / c_j: log c_j - sum_i A_ij log A_ij / c_j.

    0 for an empty column, and for one whose mass is no normal number: what is left of its entries
    then has too few bits to make a distribution of.
    """

    def __init__(self, out: Tensor) -> None:
        self.out = out
        self.mass = torch.zeros_like(out)
        self.plogp = torch.zeros_like(out)

    def update(self, tile: Tile) -> None:
        self.mass[tile.maps] += tile.values.sum(1)
        self.plogp[tile.maps] += torch.special.xlogy(tile.values, tile.values).sum(1)

    def finish(self) -> None:
        some = self.mass >= torch.finfo(self.mass.dtype).tiny
        mass = self.mass.where(some, torch.ones_like(self.mass))
        self.out.copy_(torch.where(some, mass.log() - self.plogp / mass, 0.0))


class ColumnMax:
    """max_i A_ij."""

    def __init__(self, out: Tensor) -> None:
        self.out = out.fill_(-1.0)

    def update(self, tile: Tile) -> None:
        self.out[tile.maps] = torch.maximum(self.out[tile.maps], tile.values.amax(1))

    def finish(self) -> None:
        pass


class ColumnArgmax:
    """argmax_i A_ij, the lowest i among equals."""

    def __init__(self, out: Tensor) -> None:
        self.out = out.zero_()
        self.top: Tensor | None = None

    def update(self, tile: Tile) -> None:
        if self.top is None:
            self.top = tile.values.new_full(self.out.shape, -1.0)
        top = tile.values.amax(1)
        better = top > self.top[tile.maps]
        self.out[tile.maps] = torch.where(
            better, _argmax(tile.values, 1) + tile.start, self.out[tile.maps]
        )
        self.top[tile.maps] = torch.maximum(top, self.top[tile.maps])

    def finish(self) -> None:
        pass


class TransposedProduct:
    """A^T y."""

    def __init__(self, out: Tensor) -> None:
        self.out = out.zero_()

    def update(self, tile: Tile) -> None:
        assert tile.request.left is not None
        self.out[tile.maps] += tile.values.mT @ tile.request.left[tile.maps, tile.rows]

    def finish(self) -> None:
        pass


COLUMN_REDUCERS: dict[str, Callable[[Tensor], ColumnReducer]] = {
    "column_sum": ColumnSum,
    "column_entropy": ColumnEntropy,
    "column_max": ColumnMax,
    "column_argmax": ColumnArgmax,
    "transposed_product": TransposedProduct,
}


def tile_bytes(request: Request, shape: tuple[int, int, int], s: int, lines: int) -> int:
    """The most that the reducers take beside a tile [p, r, M] of numbers of ``s`` bytes."""
    maps, rows, keys = shape
    rows, columns = maps * rows, maps * keys
    tile = rows * keys
    distribution = tile * s if lines > 1 else 0
    right, left = (0 if x is None else x.shape[2] for x in (request.right, request.left))
    arg = tile * 9
    bytes_of = {
        "entropy": distribution + (tile + 2 * rows) * s,
        "max": rows * s,
        "argmax": _row_argmax_bytes(rows, keys, s),
        "expectation": distribution + 2 * rows * s,
        "product": rows * right * s,
        "topk_values": tile * (s + 8) + columns * 16,
        "topk_indices": tile * (s + 8) + columns * 16,
        "pooled_keys": rows * request.num_cells * s,
        "column_sum": columns * s,
        "column_entropy": (tile + 2 * columns) * s,
        "column_max": 2 * columns * s,
        "column_argmax": arg + shape[1] * 8 + columns * (2 * s + 16),
        "transposed_product": columns * left * s,
    }
    return max((bytes_of.get(name, 0) for name in request.names), default=0)


def state_bytes(request: Request, columns: int, s: int) -> tuple[int, int]:
    """What the column reducers keep, and what finishing them takes besides, for P * M columns."""
    entropy, argmax = (f"column_{name}" in request.names for name in ("entropy", "argmax"))
    return columns * s * (2 * entropy + argmax), columns * (5 * s + 1) * entropy


class Reduction:
    """All the reducers of one request, fed tile by tile into preallocated outputs."""

    def __init__(self, outputs: dict[str, Tensor], request: Request) -> None:
        self.outputs = outputs
        self.request = request
        self.columns = {
            name: COLUMN_REDUCERS[name](out)
            for name, out in outputs.items()
            if name in COLUMN_REDUCERS
        }

    def update(
        self,
        values: Tensor,
        start: int,
        *,
        maps: slice = slice(None),
        lines: int = 1,
        key_centres: Tensor | None = None,
    ) -> None:
        tile = Tile(values, start, maps, lines, key_centres, self.request)
        for name, out in self.outputs.items():
            if name in self.columns:
                self.columns[name].update(tile)
            elif name in ROW_REDUCERS:
                out[maps, tile.rows] = ROW_REDUCERS[name](tile)

    def finish(self) -> dict[str, Tensor]:
        for reducer in self.columns.values():
            reducer.finish()
        return self.outputs


def key_centres(problem: Problem) -> Tensor | None:
    """Centres of the key grid in the compute dtype, where the problem carries a grid."""
    if problem.grid_height == 0:
        return None
    return centres(
        (problem.grid_height, problem.grid_width),
        dtype=problem.compute_dtype,
        device=problem.query.device,
    )
