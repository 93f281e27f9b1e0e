"""Every operation twice: on the lazy map, and on a dense one in plain torch.

Everything that a rival does follows from the dense form. Eager torch builds softmax(Q K^T) of all
heads, takes the mean and applies it; torch.compile gets that same function; materialise-then-reduce
builds the mean map head by head, so that it never holds more than two maps, and applies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flashmaps as fm
import torch
from flashmaps.maps.grids import centres
from shapes import Shape, qk
from torch import Tensor

Outputs = tuple[Tensor, ...]


@dataclass
class Inputs:
    """Q and K of one map, or of a map and its way back, and the operands of products."""

    shape: Shape
    pairs: tuple[tuple[Tensor, Tensor], ...]  # (Q_s, K_t), and (Q_t, K_s) where there are two maps
    right: Tensor | None = None  # [1, M, C]
    left: Tensor | None = None  # [1, N, C]

    def maps(self) -> list[fm.AttentionMap]:
        grids: dict[str, Any] = {
            "query_grid": self.shape.grid,
            "key_grid": self.shape.key_grid,
        }
        return [fm.AttentionMap(query, key, **grids) for query, key in self.pairs]


@dataclass(frozen=True)
class Operation:
    """What is measured."""

    name: str
    lazy: Callable[..., Outputs]  # of Inputs and the AttentionMaps
    dense: Callable[..., Outputs] | None  # of Inputs and the mean maps, [1, N, M] each
    maps: int = 1
    columns: int = 0  # C, of the operand
    operand: str = ""  # "right" or "left"
    more_flops: Callable[[Shape], float] = lambda shape: 0.0  # beyond Q K^T
    gradient: bool = False  # Q and K want gradients, which are the outputs

    def inputs(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Inputs:
        pairs = tuple(qk(shape, dtype, seed) for seed in range(self.maps))
        if self.gradient:
            pairs = tuple((q.requires_grad_(), k.requires_grad_()) for q, k in pairs)
        made = Inputs(shape, pairs)
        if self.operand:
            rows = shape.keys if self.operand == "right" else shape.queries
            random = torch.Generator().manual_seed(9)
            operand = torch.rand(1, rows, self.columns, generator=random)
            setattr(made, self.operand, operand.to(compute_dtype(dtype)))
        return made

    def flops(self, shape: Shape) -> float:
        """Multiplications and additions that the definition needs, each counted as one."""
        return self.maps * 2.0 * shape.scores * shape.dim + self.more_flops(shape)

    def exps(self, shape: Shape) -> float:
        return float(self.maps * shape.scores)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def eager_scores(query: Tensor, key: Tensor) -> Tensor:
    """Q_h K_h^T / sqrt(d), [1, H, N, M], in the compute dtype."""
    dtype = compute_dtype(query.dtype)
    return query.to(dtype) @ key.to(dtype).mT * (1 / math.sqrt(query.shape[-1]))


def eager_map(query: Tensor, key: Tensor) -> Tensor:
    """The mean map the way it is usually written."""
    return eager_scores(query, key).softmax(-1).mean(1)


def head_by_head_map(query: Tensor, key: Tensor) -> Tensor:
    """The mean map of a careful writer: one head at a time."""
    dtype = compute_dtype(query.dtype)
    heads = query.shape[1]
    mean = torch.zeros(1, query.shape[2], key.shape[2], dtype=dtype)
    for head in range(heads):
        mean += eager_scores(query[:, head], key[:, head]).softmax(-1)
    return mean.div_(heads)


def _entropy(dense: Tensor) -> Tensor:
    return -torch.special.xlogy(dense, dense).sum(-1)


def _fused(inputs: Inputs, a: fm.AttentionMap) -> Outputs:
    names = ["entropy", "max", "argmax"] + ["expectation"] * (inputs.shape.key_grid is not None)
    found = a.reduce(*names)
    return tuple(getattr(found, name) for name in names)


def _fused_dense(inputs: Inputs, dense: Tensor) -> Outputs:
    found = (_entropy(dense), *dense.max(-1))
    if inputs.shape.key_grid is None:
        return found
    at = centres(inputs.shape.key_grid, dtype=dense.dtype, device=dense.device)
    return (*found, dense @ at)


_COLUMNS = ("column_sum", "column_entropy", "column_max", "column_argmax")


def _columns(inputs: Inputs, a: fm.AttentionMap) -> Outputs:
    found = a.reduce(*_COLUMNS)
    return tuple(getattr(found, name) for name in _COLUMNS)


def _columns_dense(inputs: Inputs, dense: Tensor) -> Outputs:
    mass = dense.sum(1)
    entropy = mass.log() - torch.special.xlogy(dense, dense).sum(1) / mass
    return (mass, entropy, *dense.max(1))


def _pooled_to(grid: tuple[int, int]) -> tuple[int, int]:
    return (max(1, grid[0] // 4), max(1, grid[1] // 4))


def _pool(inputs: Inputs, a: fm.AttentionMap) -> Outputs:
    to = _pooled_to(inputs.shape.grid)
    return (a.pool(to, to),)


def _pool_dense(inputs: Inputs, dense: Tensor) -> Outputs:
    (height, width), (rows, columns) = inputs.shape.grid, _pooled_to(inputs.shape.grid)
    cell = (rows, height // rows, columns, width // columns)
    pooled = dense.view(1, *cell, *cell).sum((2, 4, 6, 8))
    return (pooled.flatten(3).flatten(1, 2) * (rows * columns / (height * width)),)


def _at(inputs: Inputs, like: Tensor) -> Tensor:
    return centres(inputs.shape.grid, dtype=like.dtype, device=like.device)


def _trip(inputs: Inputs, there: fm.AttentionMap, back: fm.AttentionMap) -> Outputs:
    trip = fm.round_trip(there, back)
    return (
        trip.hard_ims, trip.soft_ims, trip.spread, trip.return_probability, trip.inverse_entropy,
        trip.soft_density,
    )  # fmt: skip


def _trip_dense(inputs: Inputs, there: Tensor, back: Tensor) -> Outputs:
    at = _at(inputs, there)
    forward, backward = there.argmax(2), back.argmax(2)
    moments = torch.cat((at, at.square().sum(1, keepdim=True)), dim=1)
    ends = there @ (back @ moments)  # [1, N, 3]: E x, E y, E |x|^2
    square = ends[..., 2] - 2 * (at * ends[..., :2]).sum(2) + at.square().sum(1)
    return (
        (at - at[backward.gather(1, forward)]).norm(dim=2).mean(1),
        (at - ends[..., :2]).norm(dim=2).mean(1),
        square.clamp_min(0).sqrt(),
        (there * back.mT).sum(2),
        _entropy(back),
        there.sum(1),
    )


def _entropy_and_argmax(dense: Tensor) -> Outputs:
    return _entropy(dense), dense.argmax(-1)


def _product_flops(columns: int) -> Callable[[Shape], float]:
    return lambda shape: 2.0 * shape.queries * shape.keys * columns


FUSED = Operation("entropy+max+argmax+expectation", _fused, _fused_dense)

COMPOSED = Operation(
    "entropy+argmax of A_st A_ts",
    lambda i, there, back: tuple((there @ back).reduce("entropy", "argmax")._asdict().values()),
    lambda i, there, back: _entropy_and_argmax(there @ back),
    maps=2,
    more_flops=lambda shape: 2.0 * shape.queries**2 * shape.keys,
)


def _slopes(inputs: Inputs, entropy: Tensor, expectation: Tensor) -> Outputs:
    """Of the mean entropy and the mean square of the expectation, with respect to Q and K."""
    loss = entropy.mean() + expectation.square().mean()
    found: Outputs = torch.autograd.grad(loss, inputs.pairs[0])
    return found


def _gradient(inputs: Inputs, a: fm.AttentionMap) -> Outputs:
    with torch.enable_grad():
        query, key = inputs.pairs[0]
        again = fm.AttentionMap(query, key, key_grid=a.key_grid, backend=a.backend)
        found = again.reduce("entropy", "expectation")
        return _slopes(inputs, found.entropy, found.expectation)


def _gradient_dense(inputs: Inputs, dense: Tensor) -> Outputs:
    """``dense`` has a graph."""
    at = centres(inputs.shape.grid, dtype=dense.dtype, device=dense.device)
    return _slopes(inputs, _entropy(dense), dense @ at)


GRADIENT = Operation(
    "entropy+expectation and back",
    _gradient,
    _gradient_dense,
    # dQ and dK: one product each.
    more_flops=lambda shape: 4.0 * shape.scores * shape.dim,
    gradient=True,
)

OPERATIONS = [
    FUSED,
    Operation("lse", lambda i, a: (a.lse,), None),
    Operation("all columns", _columns, _columns_dense),
    Operation("topk(8)", lambda i, a: a.topk(8), lambda i, dense: tuple(dense.topk(8))),
    *(
        Operation(
            f"A @ x, C={columns}",
            lambda i, a: (a @ i.right,),
            lambda i, dense: (dense @ i.right,),
            columns=columns,
            operand="right",
            more_flops=_product_flops(columns),
        )
        for columns in (3, 64)
    ),
    Operation(
        "A.mT @ y, C=64",
        lambda i, a: (a.mT @ i.left,),
        lambda i, dense: (dense.mT @ i.left,),
        columns=64,
        operand="left",
        more_flops=_product_flops(64),
    ),
    Operation("to_dense", lambda i, a: (a.to_dense(),), lambda i, dense: (dense,)),
    Operation("pool to 1/4", _pool, _pool_dense),
    Operation("round_trip", _trip, _trip_dense, maps=2),
    Operation(
        "return probability",
        lambda i, there, back: ((there @ back).diagonal(),),
        lambda i, there, back: ((there * back.mT).sum(2),),
        maps=2,
    ),
    COMPOSED,
    GRADIENT,
]
