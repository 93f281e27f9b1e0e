"""Small dense maps: the map's tokens pooled over cells, in one pass or a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashmaps.arguments import sides
from flashmaps.maps import operators as ops
from flashmaps.maps.budget import budget_in_force
from flashmaps.maps.grids import Grid, cell_index
from flashmaps.maps.lazy import LazyMap, check_reductions
from flashmaps.maps.planning import Step, left, portion, shares
from flashmaps.maps.problem import Request
from flashmaps.maps.validation import need_grid

# Rows are pooled this many numbers of output at a time, so that pooling keeps no N x cells matrix.
_POOL_ELEMENTS = 2**18


def reduce_and_pool(
    A: LazyMap,
    names: Sequence[str],
    query_to: Grid | Tensor | None,
    key_to: Grid | Tensor | None,
    *,
    memory_budget: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """`AttentionMap.reduce_and_pool`."""
    wanted = check_reductions(names, A.shape, A.key_grid) if names else ()
    batch, queries, keys = A.shape
    query_cells, num_query_cells = _cells(A, "query", query_to)
    key_cells, num_key_cells = _cells(A, "key", key_to)
    out = torch.zeros((batch, num_query_cells, num_key_cells), dtype=A.dtype, device=A.device)
    pooled: dict[str, Any] = {"cells": key_cells, "num_cells": num_key_cells}
    budget = budget_in_force(memory_budget)
    fields: dict[str, Tensor] = {}
    together = wanted and num_key_cells <= A.problem.heads * A.problem.query.shape[3]
    if together and budget is not None and not torch.compiler.is_compiling():
        step = pool_step(A, queries, num_query_cells, num_key_cells, wanted)
        together = step.within(budget).workspace <= budget
    if together:
        held = pool_step(A, queries, num_query_cells, num_key_cells).held
        fields = A._fields(*wanted, "pooled_keys", memory_budget=left(budget, held), **pooled)
        _add_rows(out, query_cells, fields.pop("pooled_keys"), 0, apart=query_to is None)
    else:
        size, rest = pool_portion(A, num_query_cells, num_key_cells, budget)
        if wanted:
            step = A._step(*wanted, held=8 * (queries + keys))
            one = pool_step(A, 1, num_query_cells, num_key_cells)
            given, _ = shares([step, one], budget, "reduce and pool")
            fields = A._fields(*wanted, memory_budget=given)
        request = Request(("pooled_keys",), memory_budget=rest, **pooled)
        for start in range(0, queries, size):
            stop = min(start + size, queries)
            part = A.problem.query_rows(start, stop)
            sums = ops.reduce(part, request, A.backend)["pooled_keys"]
            _add_rows(out, query_cells[start:stop], sums, start, apart=query_to is None)
            del sums  # before the next ones are made
    if query_to is None:
        return fields, out
    # Not bincount, which waits for the GPU: a CUDA graph could not hold it.
    count = torch.zeros(num_query_cells, dtype=torch.int64, device=A.device)
    count.index_add_(0, query_cells, torch.ones_like(query_cells))
    return fields, out.div_(count[None, :, None])


def _add_rows(out: Tensor, cells: Tensor, sums: Tensor, first: int, *, apart: bool) -> None:
    """out[:, cells[i]] += sums[:, i]. ``apart``: the cells are first, first + 1, ..."""
    if apart:
        out[:, first : first + sums.shape[1]] = sums
    elif sums.is_cuda:
        # index_add_ would add in whatever order; this sorts, so that a call repeats bit for bit.
        out.transpose(0, 1).index_put_((cells,), sums.transpose(0, 1), accumulate=True)
    else:
        out.index_add_(1, cells, sums)


def _labels(name: str, labels: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Labels as cells: [N] int64, and the largest and one."""
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {labels.dtype}; wanted whole numbers, a label a token")
    if int(labels.min()) < 0:
        raise ValueError(f"{name} holds the label {int(labels.min())}; wanted labels from 0")
    return labels.to(device, torch.int64), int(labels.max()) + 1


def pool_portion(
    A: LazyMap, num_query_cells: int, num_key_cells: int, budget: int | None
) -> tuple[int, int | None]:
    """How many rows to pool at once, and the budget of their pass."""
    most = max(1, _POOL_ELEMENTS // (A.shape[0] * num_key_cells))
    return portion(
        min(A.shape[1], most),
        lambda size: pool_step(A, size, num_query_cells, num_key_cells),
        budget,
        "pool",
    )


def pool_step(
    A: LazyMap, size: int, num_query_cells: int, num_key_cells: int, names: tuple[str, ...] = ()
) -> Step:
    """``size`` rows: their sums, beside the cell of each token and what those are made from."""
    batch, queries, keys = A.shape
    sums = batch * size * num_key_cells * A.problem.itemsize
    held = sums + 8 * (queries + keys + 2 * num_query_cells)
    if A.device.type == "cuda":
        held += sums + 4 * 8 * size  # sorted: see `_add_rows`
    cells = torch.empty(keys, dtype=torch.int64, device="meta")
    problem = A.problem.query_rows(0, size)
    return A._step(
        *names, "pooled_keys", held=held, problem=problem, cells=cells, num_cells=num_key_cells
    )


def num_cells(A: LazyMap, side: str, to: Grid | Tensor | None) -> int:
    """How many cells a side of the map is pooled to."""
    return _cells(A, side, to)[1]


def _cells(A: LazyMap, side: str, to: Grid | Tensor | None) -> tuple[Tensor, int]:
    """The cell that each token of a side falls in, [N] or [M]; and how many there are."""
    queries = side == "query"
    grid, tokens = (A.query_grid, A.shape[1]) if queries else (A.key_grid, A.shape[2])
    if to is None:
        return torch.arange(tokens, device=A.device), tokens
    if isinstance(to, Tensor) and to.dim() == 1 and len(to) == tokens:
        return _labels(f"{side}_to", to, A.device)
    height, width = need_grid(f"{side}_grid", grid, tokens, "pool")
    found = sides(to)
    if found is None:
        raise TypeError(f"{side}_to must be (height, width) in whole numbers, got {to!r}")
    rows, columns = found
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(
            f"{side}_to = ({rows}, {columns}) must lie between (1, 1) and the {side} grid "
            f"({height}, {width})"
        )
    return cell_index((height, width), (rows, columns), device=A.device), rows * columns
