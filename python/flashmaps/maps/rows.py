"""Some rows of a lazy map: which ones, copies of their queries, and as many at a time as fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashmaps.arguments import as_whole
from flashmaps.maps import operators as ops
from flashmaps.maps.budget import budget_in_force
from flashmaps.maps.lazy import LazyMap
from flashmaps.maps.planning import Step, portion
from flashmaps.maps.problem import Problem, Request

Index = int | slice | Sequence[int] | Tensor


def row_index(index: Index, rows: int, device: torch.device) -> Tensor:
    """``index`` as a [n] int64 tensor of rows, negatives counted from the end."""
    if isinstance(index, slice):
        return torch.arange(rows, device=device)[index]
    mixed = isinstance(index, Sequence) and any(as_whole(each) is None for each in index)
    try:
        picked = torch.as_tensor(index, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(
            f"rows(index) wants whole numbers in one dimension, got {index!r}"
        ) from None
    whole = not (picked.is_floating_point() or picked.is_complex() or picked.dtype == torch.bool)
    if mixed or not (whole or picked.numel() == 0) or picked.dim() > 1:
        raise TypeError(f"rows(index) wants whole numbers in one dimension, got {index!r}")
    picked = picked.reshape(-1).to(torch.int64)
    if not torch.compiler.is_compiling():
        bad = (picked < -rows) | (picked >= rows)
        if bool(bad.any()):
            raise IndexError(f"row {int(picked[bad][0])} is out of range: the map has {rows} rows")
    return torch.where(picked < 0, picked + rows, picked)


def picked_rows(problem: Problem, picked: Tensor) -> Problem:
    """The same map, some queries only (copies)."""
    lse = None if problem.lse is None else problem.lse.index_select(2, picked)
    bias = problem.bias
    if bias is not None and problem.masks_queries:
        bias = bias.index_select(1, picked)
    return problem._replace(query=problem.query.index_select(2, picked), bias=bias, lse=lse)


def picked_bytes(problem: Problem, count: int) -> int:
    """What `picked_rows` copies."""
    query, lse = problem.query, problem.lse
    copied = query.shape[0] * query.shape[1] * query.shape[3] * query.element_size()
    if lse is not None:
        copied += lse.shape[0] * lse.shape[1] * lse.element_size()
    if problem.bias is not None and problem.masks_queries:
        copied += problem.bias.shape[0] * problem.num_keys
    return count * copied


def rows_in_portions(
    index: Index,
    problem: Problem,
    num_keys: int,
    *,
    step_of: Callable[[int, int], Step],
    dense: Callable[[Problem, int | None], Tensor],
    budget: int | None,
) -> Tensor:
    """Rows of a map with the queries of ``problem``: [batch, n, num_keys].

    ``step_of(size, count)`` is what so many of the ``count`` rows take, and ``dense(some, budget)``
    makes the rows of some queries.
    """
    picked = row_index(index, problem.num_queries, problem.query.device)
    count = picked.shape[0]
    size, budget = portion(count, lambda n: step_of(n, count), budget, "rows")
    if size == count:
        return dense(picked_rows(problem, picked), budget)
    out = torch.empty(
        (problem.batch, count, num_keys), dtype=problem.compute_dtype, device=problem.query.device
    )
    for start in range(0, count, size):
        some = picked_rows(problem, picked[start : start + size])
        out[:, start : start + size] = dense(some, budget)
        del some  # before the next ones are copied
    return out


def rows_held(problem: Problem, num_keys: int, size: int, count: int) -> int:
    """Bytes beside the pass: copies of queries, indices, and the part unless it is all."""
    part = 0 if size == count else problem.batch * size * num_keys * problem.itemsize
    return picked_bytes(problem, size) + part + 3 * 8 * count


def map_rows(A: LazyMap, index: Index) -> Tensor:
    """`AttentionMap.rows`."""

    def dense(some: Problem, budget: int | None) -> Tensor:
        return ops.reduce(some, Request(("dense",), memory_budget=budget), A.backend)["dense"]

    return rows_in_portions(
        index,
        A.problem,
        A.shape[2],
        step_of=lambda size, count: rows_step(A, size, count),
        dense=dense,
        budget=budget_in_force(None),
    )


def rows_step(A: LazyMap, size: int, count: int) -> Step:
    """``size`` rows of ``count`` of a map."""
    held = rows_held(A.problem, A.shape[2], size, count)
    return A._step("dense", held=held, problem=A.problem.query_rows(0, size))
