"""What the operations of one map will take, before they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flashmaps.maps import strips, strips_backward
from flashmaps.maps.backends.choice import backward_name, plan_backward_pass
from flashmaps.maps.budget import budget_in_force
from flashmaps.maps.gradients import held_bytes, is_float, of_results, with_companions
from flashmaps.maps.grids import Grid
from flashmaps.maps.lazy import LazyMap, check_reductions, stand_in
from flashmaps.maps.planning import Ceilings, Plan, Step, plan, portion
from flashmaps.maps.pooling import num_cells, pool_portion, pool_step
from flashmaps.maps.problem import FIELDS, Cost, Gradient, Problem, Request, output_bytes
from flashmaps.maps.rows import rows_step
from flashmaps.maps.validation import check_count, check_k


def plan_map(
    A: LazyMap,
    names: tuple[str, ...],
    *,
    k: int,
    columns: int,
    count: int,
    query_to: Grid | None,
    key_to: Grid | None,
    memory_budget: int | None,
    ceilings: Ceilings | None,
    backward: bool = False,
) -> Plan:
    """`AttentionMap.plan`."""
    batch, queries, keys = A.shape
    columns, count = check_count("columns", columns), check_count("count", count)
    budget = budget_in_force(memory_budget)
    what = ", ".join(names)
    fields: tuple[str, ...] = names
    operands: dict[str, Any] = {}
    steps: list[Step] | None = None
    outputs: int | None = None
    match names:
        case ("to_dense",):
            fields = ("dense",)
        case ("lse",):
            pass
        case ("topk",):
            fields, operands = ("topk_values", "topk_indices"), {"k": check_k(k, keys)}
        case ("product",):
            operands = {"right": stand_in(A.problem, batch, keys, columns)}
        case ("transposed_product",):
            operands = {"left": stand_in(A.problem, batch, queries, columns)}
        case ("rows",):
            size, _ = portion(count, lambda n: rows_step(A, n, count), budget, what)
            steps = [_repeated(rows_step(A, size, count), count, size)]
            outputs = batch * count * keys * A.problem.itemsize
        case ("pool",):
            cells = num_cells(A, "query", query_to), num_cells(A, "key", key_to)
            size, _ = pool_portion(A, *cells, budget)
            steps = [_repeated(pool_step(A, size, *cells), queries, size)]
            outputs = batch * cells[0] * cells[1] * A.problem.itemsize
        case _:
            fields = check_reductions(names, A.shape, A.key_grid)
    if backward:
        if steps is not None:
            raise ValueError(f"backward=True plans the way back of one pass, not of {what!r}")
        request = Request(fields, **operands)
        step, outputs = _backward_step(A, request)
        what, steps = f"backward of {what}", [step]
    elif steps is None or outputs is None:
        steps = [A._step(*fields, **operands)]
        outputs = output_bytes(A.problem, Request(fields, **operands))
    name = backward_name(A.backend, A.problem) if backward else A.backend
    return plan(what, name, steps, outputs=outputs, memory_budget=budget, ceilings=ceilings)


def _backward_step(A: LazyMap, request: Request) -> tuple[Step, int]:
    """The way back to Q and K of a pass, and the bytes of their gradients."""
    problem = A.problem
    if problem.lse is None:
        lse = stand_in(problem, problem.batch, problem.heads, problem.num_queries)
        problem = problem._replace(lse=lse)
    gradient = _gradient(problem, request, ("query", "key"), problem.lines)
    held, outputs = _gradients_bytes(problem)
    held += held_bytes(gradient)

    def cost(budget: int | None) -> Cost:
        return plan_backward_pass(A.backend, problem, replace(gradient, memory_budget=budget))

    return Step(held, cost), outputs


def _gradient(problem: Problem, request: Request, wanted: tuple[str, ...], lines: int) -> Gradient:
    """What comes back of every float result."""
    fields = {
        name: torch.empty(
            FIELDS[name].shape(problem, request),
            dtype=torch.int64 if FIELDS[name].is_index else problem.compute_dtype,
            device="meta",
        )
        for name in with_companions(request.names)
    }
    upstream = {name: fields[name] for name in request.names if is_float(name)}
    return of_results(problem, request, fields, upstream, wanted, lines=lines)


def _gradients_bytes(problem: Problem) -> tuple[int, int]:
    """Of dQ and dK: (held beside them until they are converted, theirs)."""
    held = outputs = 0
    for tokens in (problem.query, problem.key):
        outputs += tokens.numel() * tokens.element_size()
        if tokens.dtype != problem.compute_dtype:  # made in it, then converted
            held += tokens.numel() * problem.itemsize
    return held, outputs


def composed_backward_step(
    first: Problem, second: Problem, request: Request, backends: tuple[str, str]
) -> tuple[Step, int]:
    """The way back to Q and K of both maps of a product, and the bytes of their gradients."""
    shape = strips.result(first, second)._replace(normalize="block")
    gradient = _gradient(shape, request, (), first.lines * second.lines)
    wanted = ("query", "key"), ("query", "key")
    each = [_gradients_bytes(problem) for problem in (first, second)]
    held = held_bytes(gradient) + sum(of[0] for of in each)

    def cost(budget: int | None) -> Cost:
        told = replace(gradient, memory_budget=budget)
        return strips_backward.plan(first, second, told, wanted, backends)

    return Step(held, cost), sum(of[1] for of in each)


def _repeated(step: Step, count: int, size: int) -> Step:
    """The cost of doing ``count`` rows ``size`` at a time: arithmetic of all, memory of one."""

    def cost(budget: int | None) -> Cost:
        return step.cost(budget).times(count / size)

    return Step(step.held, cost)
