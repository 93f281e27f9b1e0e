"""What the operations of one map will take, before they run."""

from __future__ import annotations

from typing import Any

from flashmaps.maps.budget import budget_in_force
from flashmaps.maps.grids import Grid
from flashmaps.maps.lazy import LazyMap, check_reductions, stand_in
from flashmaps.maps.planning import Ceilings, Plan, Step, plan, portion
from flashmaps.maps.pooling import num_cells, pool_portion, pool_step
from flashmaps.maps.problem import Cost, Request, output_bytes
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
    if steps is None or outputs is None:
        steps = [A._step(*fields, **operands)]
        outputs = output_bytes(A.problem, Request(fields, **operands))
    return plan(what, A.backend, steps, outputs=outputs, memory_budget=budget, ceilings=ceilings)


def _repeated(step: Step, count: int, size: int) -> Step:
    """The cost of doing ``count`` rows ``size`` at a time: arithmetic of all, memory of one."""

    def cost(budget: int | None) -> Cost:
        return step.cost(budget).times(count / size)

    return Step(step.held, cost)
