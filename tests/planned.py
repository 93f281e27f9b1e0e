"""Every operation of one map and of two, each with its plan; and what a plan and a budget promise.

For test_memory_budget.py, which runs over chosen maps, and attack/core.py, over random ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flashmaps as fm
import pytest
import torch
from contract import possible, smallest
from workspaces import flat, output_bytes, peak

# A plan is an upper bound of the peak, and at most this much above it. A few operations of torch
# hold less than their inputs' shapes suggest; the slack is for scalars and for maps of a few cells.
FACTOR, SLACK = 1.6, 1024

Run = Callable[[], Any]
Planner = Callable[..., fm.Plan]


def operations_of_a_map(A: fm.AttentionMap) -> dict[str, tuple[Run, Planner]]:
    """Each operation, and its plan."""
    batch, queries, keys = A.shape
    found: dict[str, tuple[Run, Planner]] = {}

    def reduce(*names: str) -> None:
        found["+".join(names)] = (
            lambda: A.reduce(*names),
            lambda **options: A.plan(*names, **options),
        )

    for name in possible(A.shape, has_grid=A.key_grid is not None):
        reduce(name)
    reduce("entropy", "max", "argmax", "column_sum", "column_entropy", "column_argmax")
    x, y = (torch.randn(batch, tokens, 5, dtype=A.dtype) for tokens in (keys, queries))
    some = torch.arange(0, queries, 3)
    grid = None if A.key_grid is None else tuple(max(1, side // 2) for side in A.key_grid)
    more: dict[str, tuple[Run, dict[str, Any]]] = {
        "lse": (lambda: A._fields("lse")["lse"], {}),
        "to_dense": (A.to_dense, {}),
        "topk": (lambda: A.topk(min(3, keys)), {"k": min(3, keys)}),
        "product": (lambda: A @ x, {"columns": 5}),
        "transposed_product": (lambda: A.mT @ y, {"columns": 5}),
        "rows": (lambda: A.rows(some), {"count": len(some)}),
        "pool": (lambda: A.pool(None, grid), {"key_to": grid}),
    }
    for name, (run, operands) in more.items():
        found[name] = run, lambda name=name, operands=operands, **o: A.plan(name, **operands, **o)
    found["topk of all"] = lambda: A.topk(keys), lambda **o: A.plan("topk", k=keys, **o)
    return found


def operations_of_two(A: fm.AttentionMap, B: fm.AttentionMap) -> dict[str, tuple[Run, Planner]]:
    R = A @ B
    queries = R.shape[1]
    found: dict[str, tuple[Run, Planner]] = {}

    def forgetting(run: Run) -> Run:
        """B keeps a log-sum-exp that it had to compute: not from one call of ours to the next."""

        def forgetful() -> Any:
            B._lse = B.problem.lse
            return run()

        return forgetful

    def reduce(*names: str) -> None:
        found["R " + "+".join(names)] = (
            forgetting(lambda: R.reduce(*names)),
            lambda **options: R.plan(*names, **options),
        )

    for name in ("entropy", "argmax", "diagonal", "column_sum", "column_argmax"):
        reduce(name)
    if B.key_grid is not None:
        reduce("expectation")
        found["round_trip"] = (
            forgetting(lambda: fm.round_trip(A, B)),
            lambda **options: fm.plan_round_trip(A, B, **options),
        )
    x = torch.randn(R.shape[0], queries, 5, dtype=R.dtype)
    some = torch.arange(0, queries, 3)
    more: dict[str, tuple[Run, dict[str, Any]]] = {
        "to_dense": (R.to_dense, {}),
        "topk": (lambda: R.topk(1), {"k": 1}),
        "product": (lambda: R @ x, {"columns": 5}),
        "transposed_product": (lambda: R.transposed_product(x), {"columns": 5}),
        "rows": (lambda: R.rows(some), {"count": len(some)}),
    }
    for name, (run, operands) in more.items():
        planner = lambda name=name, operands=operands, **o: R.plan(name, **operands, **o)  # noqa: E731
        found[f"R {name}"] = run, planner
    return found


def check_same(got: Any, want: Any, *, bits: bool, what: str) -> None:
    """The same tensors; unless to the bit, as near as roundings of two orders of summation."""
    for a, b in zip(flat(got), flat(want), strict=True):
        if bits:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=what)
        elif a.dtype.is_floating_point:  # of indices, near ties may fall otherwise
            # As test_instruction_sets.py: 60 eps for an entry, times |log| up to 8 in entropies.
            close = {
                "rtol": 2**10 * torch.finfo(a.dtype).eps,
                "atol": 2**6 * torch.finfo(a.dtype).eps,
            }
            torch.testing.assert_close(a, b, equal_nan=True, **close, msg=what)


def check_operation(
    run: Run,
    planner: Planner,
    what: str,
    *,
    budgets: tuple[int, ...],
    factor: float | None = FACTOR,
) -> None:
    """Planned, measured, bounded; ``budgets`` are multiples of the smallest.

    ``factor``: how far above the peak a plan may be; None: as far as it likes.
    """
    want = run()
    least = smallest(lambda: planner(memory_budget=1))
    with fm.memory_budget(1):
        assert smallest(run) == least, what
    with fm.memory_budget(least - 1), pytest.raises(ValueError, match=f"works is {least}$"):
        run()
    for budget in (None, *(times * least for times in budgets)):
        plan = planner(memory_budget=budget)
        case = f"{what}, budget {budget}: {plan.workspace} planned"
        with fm.memory_budget(budget):
            held, got = peak(run)
        assert held <= plan.workspace, f"{case}, {held} held"
        if factor is not None:
            assert plan.workspace <= factor * held + SLACK, f"{case}, only {held} held"
        assert plan.outputs == output_bytes(got), case
        assert budget is None or plan.workspace <= budget, case
        check_same(got, want, bits=budget is None, what=case)
