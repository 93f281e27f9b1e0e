"""The types every layer shares: one attention map to compute, and what is wanted from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """A validated mean map A = sum_h w_h softmax(scale * Q_h K_h^T + bias), never built.

    The fields are, in order, the leading arguments of every custom operator, so that
    ``op(*problem, ...)`` and ``Problem(*args)`` are all the plumbing there is.
    """

    query: Tensor  # [B, H, N, d], any strides
    key: Tensor  # [B', H, M, d], any strides
    bias: Tensor | None  # [B', M], compute dtype; added to the scaled scores, -inf hides a key
    head_weights: Tensor | None  # [H], compute dtype; None means 1 / H
    pairs: Tensor | None  # [P, 2] int64; None means (0, 0), (1, 1), ...
    lse: Tensor | None  # [P, H, N], compute dtype, natural log
    scale: float
    normalize: str  # "block", "rows" or "columns"
    grid_height: int  # of the keys; 0 when no grid is known
    grid_width: int

    @property
    def batch(self) -> int:
        """P, the number of maps."""
        return self.query.shape[0] if self.pairs is None else self.pairs.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_queries(self) -> int:
        """N."""
        return self.query.shape[2]

    @property
    def num_keys(self) -> int:
        """M."""
        return self.key.shape[2]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 stays float64; everything else is accumulated and returned in float32."""
        return compute_dtype(self.query.dtype)

    @property
    def lines(self) -> int:
        """What a row of the printed map sums to (1, or its number of normalised lines)."""
        return {"block": 1, "rows": self.grid_height, "columns": self.grid_width}[self.normalize]

    def query_rows(self, start: int, stop: int) -> Problem:
        """The same map, queries ``start`` to ``stop`` only (views, no copies of Q)."""
        lse = None if self.lse is None else self.lse[:, :, start:stop]
        return self._replace(query=self.query[:, :, start:stop], lse=lse)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Request:
    """What to compute from one map in one pass.

    ``names`` are keys of `FIELDS`; the operands are those that the named reducers need.
    """

    names: tuple[str, ...]
    right: Tensor | None = None  # [P, M, C] for "product"
    left: Tensor | None = None  # [P, N, C] for "transposed_product"
    k: int = 0  # for "topk_values" and "topk_indices"
    cells: Tensor | None = None  # [M] int64 for "pooled_keys": the cell that each key falls in
    num_cells: int = 0
    partner: Problem | None = None  # the map back, M x N with its lse, for "return_probability"


Shape = tuple[int, ...]


class Field(NamedTuple):
    """One output of a pass: its shape and whether it holds indices (int64)."""

    shape: Callable[[Problem, Request], Shape]
    is_index: bool = False


def _per_query(problem: Problem, request: Request) -> Shape:
    return (problem.batch, problem.num_queries)


def _per_key(problem: Problem, request: Request) -> Shape:
    return (problem.batch, problem.num_keys)


def _columns(operand: Tensor | None) -> int:
    assert operand is not None
    return operand.shape[2]


# Every statistic of a map, in the names that all backends use.
FIELDS: dict[str, Field] = {
    "lse": Field(lambda p, r: (p.batch, p.heads, p.num_queries)),
    "entropy": Field(_per_query),
    "max": Field(_per_query),
    "argmax": Field(_per_query, is_index=True),
    "expectation": Field(lambda p, r: (*_per_query(p, r), 2)),
    "diagonal": Field(_per_query),
    "return_probability": Field(_per_query),
    "product": Field(lambda p, r: (*_per_query(p, r), _columns(r.right))),
    "dense": Field(lambda p, r: (*_per_query(p, r), p.num_keys)),
    "topk_values": Field(lambda p, r: (*_per_query(p, r), r.k)),
    "topk_indices": Field(lambda p, r: (*_per_query(p, r), r.k), is_index=True),
    "pooled_keys": Field(lambda p, r: (*_per_query(p, r), r.num_cells)),
    "column_sum": Field(_per_key),
    "column_entropy": Field(_per_key),
    "column_max": Field(_per_key),
    "column_argmax": Field(_per_key, is_index=True),
    "transposed_product": Field(lambda p, r: (*_per_key(p, r), _columns(r.left))),
}


def empty_outputs(problem: Problem, request: Request) -> dict[str, Tensor]:
    """Uninitialised outputs of the right shapes and dtypes, on the problem's device."""
    return {
        name: torch.empty(
            FIELDS[name].shape(problem, request),
            dtype=torch.int64 if FIELDS[name].is_index else problem.compute_dtype,
            device=problem.query.device,
        )
        for name in request.names
    }
