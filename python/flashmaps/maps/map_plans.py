"""What the operations of one map will take, before they run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from flashmaps.maps import strips, strips_backward
from flashmaps.maps.backends.choice import backward_name, plan_backward_pass
from flashmaps.maps.budget import budget_in_force
from flashmaps.maps.gradients import held_bytes, is_float, of_results, with_companions
from flashmaps.maps.grids import Grid
from flashmaps.maps.lazy import LazyMap, check_reductions, stand_in
from flashmaps.maps.planning import Ceilings, Plan, Step, left, plan, portion
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
    portions: tuple[Request, int, int, Step] | None = None
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
            step = rows_step(A, size, count)
            steps = [_repeated(step, count, size)]
            outputs = batch * count * keys * A.problem.itemsize
            portions = Request(("dense",)), size, count, step
        case ("pool",):
            cells = num_cells(A, "query", query_to), num_cells(A, "key", key_to)
            size, _ = pool_portion(A, *cells, budget)
            step = pool_step(A, size, *cells)
            steps = [_repeated(step, queries, size)]
            outputs = batch * cells[0] * cells[1] * A.problem.itemsize
            index = torch.empty(keys, dtype=torch.int64, device="meta")
            request = Request(("pooled_keys",), cells=index, num_cells=cells[1])
            portions = request, size, queries, step
        case _:
            fields = check_reductions(names, A.shape, A.key_grid)
    if backward:
        if portions is None:
            step, outputs = _backward_step(A.problem, Request(fields, **operands), A.backend)
        else:
            step, outputs = _portions_backward_step(A, *portions)
        what, steps = f"backward of {what}", [step]
    elif steps is None or outputs is None:
        steps = [A._step(*fields, **operands)]
        outputs = output_bytes(A.problem, Request(fields, **operands))
    name = backward_name(A.backend, A.problem) if backward else A.backend
    return plan(what, name, steps, outputs=outputs, memory_budget=budget, ceilings=ceilings)


def _portions_backward_step(
    A: LazyMap, request: Request, size: int, count: int, forward: Step
) -> tuple[Step, int]:
    """The way back of ``size`` of ``count`` rows at a time, and the bytes of dQ and dK.

    Each portion's gradients are added to those so far, its part of dQ as a whole one. What its pass
    may take is what the way forth left it.
    """
    problem = A.problem
    step, part = _backward_step(problem.query_rows(0, size), request, A.backend)
    outputs = sum(x.numel() * x.element_size() for x in (problem.query, problem.key))
    shape = FIELDS[request.names[0]].shape(problem.query_rows(0, size), request)
    upstream = math.prod(shape) * problem.itemsize
    held = part + upstream
    if size < count:
        held += outputs + 2 * upstream * count // size  # autograd's copies where parts are put

    def cost(budget: int | None) -> Cost:
        return step.within(left(budget, forward.held)).times(count / size)

    return Step(held, cost), outputs


def _backward_step(problem: Problem, request: Request, backend: str) -> tuple[Step, int]:
    """The way back to Q and K of a pass, and the bytes of their gradients."""
    if problem.lse is None:
        lse = stand_in(problem, problem.batch, problem.heads, problem.num_queries)
        problem = problem._replace(lse=lse)
    gradient = _gradient(problem, request, ("query", "key"), problem.lines)
    held, outputs = _gradients_bytes(problem)
    held += held_bytes(gradient)

    def cost(budget: int | None) -> Cost:
        return plan_backward_pass(backend, problem, replace(gradient, memory_budget=budget))

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
