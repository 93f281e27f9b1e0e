"""The types every layer shares: one attention map to compute, what is wanted from it, its cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """A validated mean map A = sum_h w_h softmax(scale * Q_h K_h^T + bias), never built.

    The fields are, in order, the leading arguments of every custom operator, so that
    ``op(*problem, ...)`` and ``Problem(*args)`` are all the plumbing there is.
    """

    query: Tensor  # [B, H, N, d], any strides
    # [B', H, M, d]. On backend "cpu" H may be fewer, each for several query heads in turn.
    key: Tensor
    # [B', M], compute dtype; added to the scaled scores, -inf hides a key. On backend "reference"
    # also bool [B', N, M]: which keys each query may attend to.
    bias: Tensor | None
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
    def key_group(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // self.key.shape[1]

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
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 8 if self.query.dtype == torch.float64 else 4

    @property
    def lines(self) -> int:
        """What a row of the printed map sums to (1, or its number of normalised lines)."""
        return {"block": 1, "rows": self.grid_height, "columns": self.grid_width}[self.normalize]

    @property
    def scores(self) -> int:
        """How many q k there are, of all maps and heads."""
        return self.batch * self.heads * self.num_queries * self.num_keys

    def some_maps(self, some: slice) -> Problem:
        """A few of the maps of the batch (views)."""
        lse = None if self.lse is None else self.lse[some]
        if self.pairs is not None:
            return self._replace(pairs=self.pairs[some], lse=lse)
        bias = None if self.bias is None else self.bias[some]
        return self._replace(query=self.query[some], key=self.key[some], bias=bias, lse=lse)

    def query_rows(self, start: int, stop: int) -> Problem:
        """The same map, queries ``start`` to ``stop`` only (views, no copies of Q)."""
        lse = None if self.lse is None else self.lse[:, :, start:stop]
        bias = self.bias[:, start:stop] if self.masks_queries else self.bias  # type: ignore[index]
        return self._replace(query=self.query[:, :, start:stop], bias=bias, lse=lse)

    @property
    def masks_queries(self) -> bool:
        """Whether the mask differs between queries."""
        return self.bias is not None and self.bias.dim() == 3


def query_mask_reason(backend: str) -> str:
    """Why a backend cannot run a map whose mask differs between queries."""
    return (
        f"backend {backend!r} takes a mask over keys, [B', M]; one that differs between queries, "
        "[B', N, M], needs backend='reference'"
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: float64 for float64, else float32."""
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
    memory_budget: int | None = None  # bytes beyond inputs and outputs that it may take


@dataclass(frozen=True)
class Gradient:
    """What to compute from one map going backwards: G = dL/dA in closed form, and for whom.

    A is the printed map (after `normalize`), A' the map back. For every query i and key j

        G_ij = row_add_i + column_add_j - (row_log_i + column_log_j) log A_ij
               + left_i . right_j + dense_ij + pooled_i,cells(j)
               + (row_back_i + column_back_j) A'_ji

    and ``row_values`` are added at ``row_index``, ``column_values`` at ``column_index``. Terms that
    are None are zero; the logarithm's is zero where A_ij is. ``lse`` is dL / d log-sum-exp.

    ``wanted`` are among "query", "key", "bias", "head_weights" and "lse". The problem carries its
    log-sum-exp. That is a function of queries and keys like all else, unless "lse" is wanted: then
    it is an input of its own, which has its own gradient.
    """

    wanted: tuple[str, ...]
    row_add: Tensor | None = None  # [P, N]
    row_log: Tensor | None = None  # [P, N]
    row_back: Tensor | None = None  # [P, N]
    column_add: Tensor | None = None  # [P, M]
    column_log: Tensor | None = None  # [P, M]
    column_back: Tensor | None = None  # [P, M]
    left: Tensor | None = None  # [P, N, C]
    right: Tensor | None = None  # [P, M, C]
    row_index: Tensor | None = None  # [P, N, S] int64
    row_values: Tensor | None = None  # [P, N, S]
    column_index: Tensor | None = None  # [P, M] int64
    column_values: Tensor | None = None  # [P, M]
    dense: Tensor | None = None  # [P, N, M]
    cells: Tensor | None = None  # [M] int64
    pooled: Tensor | None = None  # [P, N, number of cells]
    lse: Tensor | None = None  # [P, H, N]
    partner: Problem | None = None  # A', M x N with its lse, for row_back and column_back
    memory_budget: int | None = None  # bytes beyond inputs and gradients that it may take

    def tensors(self) -> dict[str, Tensor]:
        """Those that are given, by name."""
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    @property
    def has_logs(self) -> bool:
        """Whether G is made from log A."""
        return self.row_log is not None or self.column_log is not None


Shape = tuple[int, ...]


class Field(NamedTuple):
    """One output of a pass: its shape, whether it holds indices (int64), and its arithmetic."""

    shape: Callable[[Problem, Request], Shape]
    is_index: bool = False
    # For each element of the mean map: multiplications and additions, and logarithms.
    flops: Callable[[Request], int] = lambda request: 1
    logs: int = 0


def _per_query(problem: Problem, request: Request) -> Shape:
    return (problem.batch, problem.num_queries)


def _per_key(problem: Problem, request: Request) -> Shape:
    return (problem.batch, problem.num_keys)


def _columns(operand: Tensor | None) -> int:
    assert operand is not None
    return operand.shape[2]


def _partner(request: Request) -> Problem:
    assert request.partner is not None
    return request.partner


# Every statistic of a map, in the names that all backends use.
FIELDS: dict[str, Field] = {
    "lse": Field(lambda p, r: (p.batch, p.heads, p.num_queries)),
    "entropy": Field(_per_query, logs=1),
    "max": Field(_per_query),
    "argmax": Field(_per_query, is_index=True),
    "expectation": Field(lambda p, r: (*_per_query(p, r), 2), flops=lambda r: 4),
    "diagonal": Field(_per_query),
    "return_probability": Field(_per_query),
    "product": Field(
        lambda p, r: (*_per_query(p, r), _columns(r.right)), flops=lambda r: 2 * _columns(r.right)
    ),
    "dense": Field(lambda p, r: (*_per_query(p, r), p.num_keys)),
    "topk_values": Field(lambda p, r: (*_per_query(p, r), r.k)),
    "topk_indices": Field(lambda p, r: (*_per_query(p, r), r.k), is_index=True),
    "pooled_keys": Field(lambda p, r: (*_per_query(p, r), r.num_cells)),
    "column_sum": Field(_per_key),
    "column_entropy": Field(_per_key, logs=1),
    "column_max": Field(_per_key),
    "column_argmax": Field(_per_key, is_index=True),
    "transposed_product": Field(
        lambda p, r: (*_per_key(p, r), _columns(r.left)), flops=lambda r: 2 * _columns(r.left)
    ),
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


def gradient_shapes(problem: Problem) -> dict[str, Shape]:
    """The shapes of what a `Gradient` may want, all in the compute dtype."""
    return {
        "query": (*problem.query.shape,),
        "key": (*problem.key.shape,),
        "bias": (problem.key.shape[0], problem.num_keys),
        "head_weights": (problem.heads,),
        "lse": (problem.batch, problem.heads, problem.num_queries),
    }


def empty_gradients(problem: Problem, gradient: Gradient) -> dict[str, Tensor]:
    """Uninitialised tensors for what is wanted, in the order of ``wanted``."""
    shapes = gradient_shapes(problem)
    return {
        name: torch.empty(shapes[name], dtype=problem.compute_dtype, device=problem.query.device)
        for name in gradient.wanted
    }


def output_bytes(problem: Problem, request: Request) -> int:
    """Of the tensors of `empty_outputs`."""
    return sum(
        math.prod(FIELDS[name].shape(problem, request))
        * (8 if FIELDS[name].is_index else problem.itemsize)
        for name in request.names
    )


def input_bytes(problem: Problem, request: Request) -> int:
    """Of the tensors that a pass reads."""
    partner = () if request.partner is None else request.partner
    operands = (request.right, request.left, request.cells)
    tensors = [t for t in (*problem, *partner, *operands) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Cost:
    """What a computation takes, known beforehand from shapes, dtypes and strides."""

    workspace: int = 0  # bytes held at once beyond inputs and outputs
    passes: int = 0  # how often the scores Q K^T of a whole map are computed
    flops: float = 0.0  # multiplications and additions, each counted as one
    exps: float = 0.0  # exponentials and logarithms
    traffic: float = 0.0  # bytes to and from main memory, at the least
    share: float = 1.0  # of the machine's threads that have work

    def then(self, other: Cost) -> Cost:
        """This and then the other, nothing of this held meanwhile."""
        return Cost(
            max(self.workspace, other.workspace),
            self.passes + other.passes,
            self.flops + other.flops,
            self.exps + other.exps,
            self.traffic + other.traffic,
            min(self.share, other.share),
        )

    def times(self, count: float) -> Cost:
        """So much of the same arithmetic, in as many passes."""
        more = {name: count * getattr(self, name) for name in ("flops", "exps", "traffic")}
        return replace(self, **more)


def cost_of(
    problem: Problem, request: Request, *, passes: int, workspace: int, back_passes: int = 1
) -> Cost:
    """The arithmetic of a pass that computes the map's scores ``passes`` times.

    The map back, for "return_probability", is computed ``back_passes`` times.
    """
    elements = problem.batch * problem.num_queries * problem.num_keys  # of the mean maps
    flops = exps = 0.0
    maps = [(problem, passes)]
    if "return_probability" in request.names:
        maps.append((_partner(request), back_passes))
    for one, times in maps:
        # A score takes d products and sums; as a probability it is weighted and added.
        flops += times * elements * one.heads * (2 * one.query.shape[3] + 2)
        exps += times * elements * one.heads
    for name in request.names:
        if name != "lse":
            flops += elements * FIELDS[name].flops(request)
            exps += elements * FIELDS[name].logs
    return Cost(
        workspace,
        sum(times for _, times in maps),
        flops,
        exps,
        float(input_bytes(problem, request) + output_bytes(problem, request)),
    )


def backward_cost(
    problem: Problem, gradient: Gradient, *, passes: int, workspace: int, back_passes: int = 1
) -> Cost:
    """The arithmetic of a way back that computes the map's scores ``passes`` times."""
    names = ("return_probability",) if gradient.partner is not None else ("lse",)
    request = Request(names, partner=gradient.partner)
    cost = cost_of(problem, request, passes=passes, workspace=workspace, back_passes=back_passes)
    elements = float(problem.batch * problem.num_queries * problem.num_keys)
    products = ("query" in gradient.wanted) + ("key" in gradient.wanted)
    columns = 0 if gradient.left is None else gradient.left.shape[2]
    flops = problem.heads * (2 * problem.query.shape[3] * products + 5) + 2 * columns
    return replace(
        cost,
        flops=cost.flops + elements * flops,
        exps=cost.exps + elements * gradient.has_logs,
    )


def default_plan(problem: Problem, request: Request) -> Cost:
    """For a backend that has no ``plan``: it keeps nothing but a log-sum-exp, computed first.

    Then one pass for what is per row and one for what is per column.
    """
    columns = {name for name in request.names if FIELDS[name].shape is _per_key}
    columns |= {"transposed_product"} & {*request.names}
    rows = {*request.names} - columns - {"lse"}
    lse = "lse" in request.names or problem.lse is None
    held = problem.batch * problem.heads * problem.num_queries * problem.itemsize
    kept = problem.lse is None and "lse" not in request.names
    return cost_of(
        problem,
        request,
        passes=lse + bool(rows) + bool(columns),
        workspace=held if kept else 0,
    )
