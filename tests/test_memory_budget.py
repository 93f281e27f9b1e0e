"""Memory budgets: what is planned is what is held, budgets are kept, and answers stay the same.

An operation's workspace is what it holds at once beyond its inputs and its result. Here it is
measured by torch's record of allocations, C++'s account of its own included (workspaces.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flashmaps as fm
import numpy as np
import pytest
import torch
from contract import smallest, subject_of
from flashmaps.maps import problem as _problem
from flashmaps.maps import strips
from flashmaps.maps.backends import reference
from flashmaps.maps.backends.choice import plan_pass
from flashmaps.maps.problem import Request
from planned import (
    FACTOR,
    SLACK,
    Planner,
    Run,
    check_operation,
    check_same,
    operations_of_a_map,
    operations_of_two,
)
from problems import CASE_NAMES, CASES
from torch import Tensor
from workspaces import peak

PLANNED = [name for name in ("cpu", "reference") if fm.backends()[name]]


@pytest.fixture(params=PLANNED)
def planned(request: pytest.FixtureRequest) -> str:
    """The backends whose memory torch and C++ tell the whole truth about."""
    return request.param


@dataclass(frozen=True)
class Maps:
    """A map and its way back, by their shape and options."""

    shape: tuple[int, int, int, int, int]  # batch, heads, N, M, d
    dtype: torch.dtype = torch.float32
    key_batch: int = 0  # if not batch
    pairs: tuple[tuple[int, int], ...] = ()
    mask: bool = False
    weights: bool = False
    normalize: str | None = None
    lse: bool = False
    strides: bool = False

    def make(self, backend: str) -> tuple[fm.AttentionMap, fm.AttentionMap]:
        batch, heads, queries, keys, dim = self.shape
        generator = torch.Generator().manual_seed(0)

        def tokens(count: int, many: int) -> Tensor:
            made = torch.randn((many, count, heads, dim), generator=generator).transpose(1, 2)
            return (made if self.strides else made.contiguous()).to(self.dtype)

        query, key = tokens(queries, batch), tokens(keys, self.key_batch or batch)
        pairs = torch.tensor(self.pairs) if self.pairs else None
        there = self._map(query, key, pairs, backend)
        back = self._map(key, query, None if pairs is None else pairs.flip(1), backend)
        return there, back

    def _map(
        self, query: Tensor, key: Tensor, pairs: Tensor | None, backend: str
    ) -> fm.AttentionMap:
        options: dict[str, Any] = {"pairs": pairs, "normalize": self.normalize, "backend": backend}
        if self.mask:
            options["key_mask"] = torch.arange(key.shape[2]) % 3 > 0
        if self.weights:
            options["head_weights"] = [0.25, 0.75]
        if self.lse:
            options["lse"] = fm.AttentionMap(query, key, **options).lse
        return fm.AttentionMap(query, key, **options)


MAPS = {
    "one-row": Maps((1, 2, 1, 49, 8)),
    "one-key": Maps((1, 2, 49, 1, 8)),
    "square": Maps((2, 2, 25, 25, 16)),
    "one-head": Maps((1, 1, 16, 400, 16)),
    "text": Maps((1, 5, 49, 77, 16)),
    "mask": Maps((2, 3, 16, 121, 24), mask=True),
    "pairs": Maps((2, 2, 9, 121, 24), key_batch=3, pairs=((0, 1), (1, 2), (1, 0))),
    "weights-lse": Maps((2, 2, 16, 64, 24), weights=True, lse=True),
    "rows": Maps((2, 2, 16, 64, 24), normalize="rows"),
    "columns": Maps((1, 2, 36, 36, 24), normalize="columns"),
    "half-strides": Maps((2, 2, 16, 81, 24), dtype=torch.bfloat16, strides=True),
    "double": Maps((1, 2, 25, 36, 24), dtype=torch.float64),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.usefixtures("one_thread")
def test_a_plan_bounds_what_an_operation_holds_and_a_budget_bounds_both(
    name: str, planned: str
) -> None:
    A, _ = MAPS[name].make(planned)
    for index, (what, (run, planner)) in enumerate(operations_of_a_map(A).items()):
        # The reference is slow a row at a time: by turns.
        by_turns = (1,) if (len(name) + index) % 3 == 0 else (3,)
        check_operation(run, planner, what, budgets=(1, 3) if planned == "cpu" else by_turns)


TWO = ["one-row", "one-key", "mask", "pairs", "weights-lse", "columns", "half-strides", "double"]


@pytest.mark.parametrize("name", TWO)
@pytest.mark.usefixtures("one_thread")
def test_so_do_those_of_round_trips_and_compositions(name: str, planned: str) -> None:
    A, B = MAPS[name].make(planned)
    for what, (run, planner) in operations_of_two(A, B).items():
        # One row of R at a time takes long.
        few = "round_trip" if planned == "cpu" else "nothing"
        check_operation(run, planner, what, budgets=(1, 3) if what == few else (9,))


@pytest.mark.usefixtures("threads")
def test_plans_hold_on_several_threads_and_for_larger_maps(planned: str) -> None:
    torch.set_num_threads(2)
    A, B = Maps((1, 3, 144, 324, 16)).make(planned)
    R = A @ B
    names = ("entropy", "max", "argmax", "column_entropy")
    calls: list[tuple[Run, fm.Plan]] = [
        (lambda: A.reduce(*names), A.plan(*names)),
        (lambda: A.topk(8), A.plan("topk", k=8)),
        (lambda: A.pool((4, 4), (6, 6)), A.plan("pool", query_to=(4, 4), key_to=(6, 6))),
        (lambda: fm.round_trip(A, B), fm.plan_round_trip(A, B)),
        (lambda: R.reduce(*names), R.plan(*names)),
    ]
    for run, plan in calls:
        held, _ = peak(run)
        assert held <= plan.workspace <= FACTOR * held + SLACK, str(plan)


# What changes and what does not.


def need_cpu() -> None:
    available = fm.backends()["cpu"]
    if not available:
        pytest.skip(f"backend 'cpu': {available.reason}")


@pytest.mark.parametrize("name", ["square", "text", "mask", "rows", "double"])
@pytest.mark.usefixtures("threads")
def test_any_budget_that_holds_what_one_thread_takes_gives_the_same_bits(name: str) -> None:
    need_cpu()
    batch, heads, _, keys, dim = MAPS[name].shape
    A, B = replace(MAPS[name], shape=(batch, heads, 169, keys, dim)).make("cpu")
    names = ("entropy", "argmax", "column_sum", "column_entropy", "column_argmax")
    y = torch.randn(batch, 169, 5, dtype=A.dtype)
    operations: dict[str, tuple[Run, Planner]] = {
        "reduce": (lambda: A.reduce(*names), lambda: A.plan(*names)),
        "transposed_product": (
            lambda: A.mT @ y,
            lambda: A.plan("transposed_product", columns=5),
        ),
        "topk": (lambda: A.topk(9), lambda: A.plan("topk", k=9)),
    }
    if B.key_grid is not None:
        trip = (lambda: fm.round_trip(A, B), lambda: fm.plan_round_trip(A, B))
        operations["round_trip"] = trip
    for what, (run, planner) in operations.items():
        torch.set_num_threads(1)
        alone = planner().workspace
        torch.set_num_threads(4)
        together = planner().workspace
        assert alone < together, what
        want = run()
        for budget in (alone, (alone + together) // 2, together - 1):
            with fm.memory_budget(budget):
                assert planner().share < 1 or planner().workspace < together, what
                check_same(run(), want, bits=True, what=f"{what} in {budget}")


def test_below_that_blocks_come_from_the_log_sum_exp() -> None:
    """And rows are in memory no more, at the price of a second product."""
    need_cpu()
    A, _ = Maps((1, 2, 48, 4000, 16)).make("cpu")
    names = ("entropy", "max", "column_sum")
    usual = A.plan(*names)
    least = smallest(lambda: A.plan(*names, memory_budget=1))
    assert least < usual.workspace / 8
    assert usual.passes == 1
    assert A.plan(*names, memory_budget=least).passes == 3  # lse, rows, columns


SMALL_CASES = [i for i, case in enumerate(CASES) if case[1] in (torch.float32, torch.bfloat16)][::3]


@pytest.mark.parametrize(
    "case", [CASES[i] for i in SMALL_CASES], ids=[CASE_NAMES[i] for i in SMALL_CASES]
)
@pytest.mark.usefixtures("poison", "one_thread")
def test_answers_under_the_smallest_budget_are_held_to_the_oracle(case: Any, planned: str) -> None:
    subject = subject_of(case, planned)
    A = subject.lazy

    def within(run: Callable[[], None], *names: str, **operands: Any) -> None:
        with fm.memory_budget(smallest(lambda: A.plan(*names, **operands, memory_budget=1))):
            run()

    for name in subject.reductions:
        within(lambda name=name: subject.check_reduction(name, getattr(A, name)()), name)
    k = min(4, A.shape[2])
    within(lambda: subject.check_topk(k), "topk", k=k)
    x = torch.randn(A.shape[0], A.shape[2], 3, dtype=A.dtype)
    within(lambda: subject.check("product", A @ x, x), "product", columns=3)


@pytest.mark.usefixtures("one_thread")
def test_scores_of_two_maps_keep_a_budget_too(planned: str) -> None:
    A, B = Maps((2, 2, 36, 49, 16)).make(planned)
    scores: dict[str, Run] = {
        "hard": lambda: fm.inverse_mapping_score(A, B),
        "soft": lambda: fm.inverse_mapping_score(A, B, kind="soft"),
        "rows": lambda: fm.inverse_mapping_entropy(B),
        "bayes": lambda: fm.inverse_mapping_entropy(A, kind="bayes"),
        "density": lambda: fm.mapping_density(A),
        "soft density": lambda: fm.mapping_density(A, kind="soft"),
    }
    for name, run in scores.items():
        want = run()
        with fm.memory_budget(1):
            least = smallest(run)
        with fm.memory_budget(least):
            held, got = peak(run)
        assert held <= least <= FACTOR * held + SLACK, name
        check_same(got, want, bits=False, what=name)


@pytest.mark.usefixtures("one_thread")
def test_statistics_with_pooling_keep_a_budget_together_or_apart(planned: str) -> None:
    A, _ = Maps((1, 2, 64, 64, 16)).make(planned)

    def run() -> Any:
        fields, pooled = A.reduce_and_pool(("entropy", "max"), (4, 4), (4, 4))
        return (*fields.values(), pooled)

    want = run()
    with fm.memory_budget(1):
        least = smallest(run)
    for budget in (least, 2 * least, 20 * least):
        with fm.memory_budget(budget):
            held, got = peak(run)
        assert held <= budget
        check_same(got, want, bits=False, what=f"within {budget}")


def test_converted_operands_count(planned: str) -> None:
    A, B = Maps((1, 2, 25, 36, 16)).make(planned)
    for run, operand in (
        (lambda x: A @ x, torch.randn(1, 36, 300)),
        (lambda x: A.mT @ x, torch.randn(1, 25, 300)),
        (lambda x: (A @ B) @ x, torch.randn(1, 25, 300)),
    ):
        half = operand.half()
        with fm.memory_budget(1):
            as_it_is = smallest(lambda run=run, x=operand: run(x))
            converted = smallest(lambda run=run, x=half: run(x))
        assert converted == as_it_is + 4 * operand.numel()
        with fm.memory_budget(converted):
            assert peak(lambda run=run, x=half: run(x))[0] <= converted


# Who says what the budget is.


@pytest.fixture
def entropy() -> Callable[..., int | None]:
    """The budget that an operation runs under, as the error of one too small tells."""
    A, _ = MAPS["square"].make("reference")

    def budget(**options: Any) -> int | None:
        try:
            A.reduce("entropy", **options)
        except ValueError as error:
            return int(re.search(r"memory_budget = (\d+) bytes", str(error))[1])
        return None

    return budget


def test_the_argument_wins_over_the_context_and_inner_contexts_over_outer(
    entropy: Callable[..., int | None],
) -> None:
    assert entropy() is None
    assert entropy(memory_budget=3) == 3
    with fm.memory_budget(4):
        assert entropy() == 4
        assert entropy(memory_budget=5) == 5
        with fm.memory_budget(6):
            assert entropy() == 6
        with fm.memory_budget(None):
            assert entropy() is None
        with contextlib.suppress(KeyError), fm.memory_budget(7):
            raise KeyError
        assert entropy() == 4
    assert entropy() is None


def test_each_thread_and_each_task_has_its_own(entropy: Callable[..., int | None]) -> None:
    found: dict[str, int | None] = {}

    async def task(name: str, budget: int) -> None:
        with fm.memory_budget(budget):
            await asyncio.sleep(0)
            found[name] = entropy()
            await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(task("one", 1), task("other", 2))
        found["after"] = entropy()

    asyncio.run(both())
    with fm.memory_budget(9):
        thread = threading.Thread(target=lambda: found.update(thread=entropy()))
        thread.start()
        thread.join()
    assert found == {"one": 1, "other": 2, "after": None, "thread": None}


BAD = [True, False, 1.5, "64MB", [1]]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_budget_is_a_whole_number_of_bytes(bad: Any) -> None:
    A, B = MAPS["square"].make("reference")
    words = r"memory_budget must be a whole number of bytes, such as 64 \* 2\*\*20, got "
    for use in (
        lambda: fm.memory_budget(bad).__enter__(),
        lambda: A.reduce("entropy", memory_budget=bad),
        lambda: A.topk(1, memory_budget=bad),
        lambda: A.pool((1, 1), memory_budget=bad),
        lambda: A.plan("entropy", memory_budget=bad),
        lambda: fm.compose(A, B, memory_budget=bad),
        lambda: fm.round_trip(A, B, memory_budget=bad),
        lambda: fm.plan_round_trip(A, B, memory_budget=bad),
    ):
        with pytest.raises(TypeError, match=words + re.escape(repr(bad))):
            use()


def test_numpy_integers_are_whole_numbers(planned: str) -> None:
    A, B = MAPS["square"].make(planned)
    budget = np.int64(2**20)
    with fm.memory_budget(budget):
        A.entropy()
    A.topk(2, memory_budget=budget)
    fm.compose(A, B, memory_budget=budget).reduce("entropy")
    fm.round_trip(A, B, memory_budget=budget)


def test_none_of_it_is_no_budget(planned: str) -> None:
    A, _ = MAPS["square"].make(planned)
    for budget in (0, -1):
        with pytest.raises(ValueError, match=f"memory_budget = {budget} bytes is too small"):
            A.reduce("entropy", memory_budget=budget)


def test_a_composition_takes_the_context_in_which_it_runs(planned: str) -> None:
    A, B = MAPS["square"].make(planned)
    R = A @ B
    with fm.memory_budget(1), pytest.raises(ValueError, match="memory_budget = 1 bytes"):
        R.reduce("entropy")
    with fm.memory_budget(1):
        R = fm.compose(A, B, memory_budget=2**20)
        R.reduce("entropy")  # its own argument wins
    assert R.memory_budget == 2**20


# torch.compile.


def statistics(A: fm.AttentionMap, B: fm.AttentionMap, budget: int | None) -> tuple[Tensor, ...]:
    trip = fm.round_trip(A, B, memory_budget=budget)
    found = fm.compose(A, B, memory_budget=budget).reduce("entropy", "diagonal")
    pooled = A.pool((2, 2), (2, 2), memory_budget=budget)
    values, _ = A.topk(2, memory_budget=budget)
    return trip.spread, trip.hard_ims, found.entropy, found.diagonal, pooled, values


@pytest.mark.usefixtures("one_thread", "fresh")
def test_in_a_graph_the_argument_is_a_constant_and_the_context_that_of_the_call() -> None:
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 25, 8)

    def function(q: Tensor, k: Tensor, budget: int | None) -> tuple[Tensor, ...]:
        return statistics(fm.AttentionMap(q, k), fm.AttentionMap(k, q), budget)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = function(q, k, None)
    check_same(compiled(q, k, 2**20), want, bits=True, what="ample")
    check_same(compiled(q, k, None), want, bits=True, what="none")
    with fm.memory_budget(1), pytest.raises(ValueError, match="memory_budget = 1 bytes is too"):
        compiled(q, k, None)
    with pytest.raises(ValueError, match=r"memory_budget = \d+ bytes is too small"):
        compiled(q, k, 100)


# The planner itself.


def test_a_plan_counts_what_will_be_done() -> None:
    need_cpu()
    A, B = Maps((2, 3, 64, 100, 16)).make("cpu")
    elements = 2 * 64 * 100
    plan = A.plan("entropy", "max")
    assert plan.passes == 1
    assert plan.exps == 3 * elements + elements  # of each head's scores; logarithms of the mean
    assert plan.flops == 3 * elements * (2 * 16 + 2) + 2 * elements
    assert plan.outputs == 2 * 2 * 64 * 4
    assert plan.traffic >= plan.outputs + 2 * 3 * (64 + 100) * 16 * 4
    wide = A.plan("product", columns=8)
    assert wide.flops == 3 * elements * (2 * 16 + 2) + 2 * 8 * elements
    given = fm.AttentionMap(A.problem.query, A.problem.key, lse=A.lse, backend="cpu")
    assert given.plan("entropy", "column_sum").passes == 2  # one for rows, one for columns
    trip = fm.plan_round_trip(A, B)
    assert trip.passes == 3  # A_ts; A_st; and A_ts again, in tiles that meet A_st's
    assert trip.exps == 3 * 3 * elements + elements


def test_a_larger_budget_means_fewer_passes_of_a_composition(planned: str) -> None:
    A, B = Maps((1, 1, 100, 90, 8)).make(planned)
    R = A @ B
    least = smallest(lambda: R.plan("entropy", memory_budget=1))
    passes = [R.plan("entropy", memory_budget=times * least).passes for times in (1, 4, 16, 256)]
    assert passes[0] == 101  # each row of R asks for all of A'
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == 2
    flops = R.plan("entropy").flops - A.plan("to_dense").flops - B.plan("to_dense").flops
    assert flops == 2 * 100 * 90 * 100


def test_expected_time_comes_from_the_ceilings_and_says_what_bounds_it() -> None:
    A, _ = MAPS["square"].make("reference")
    plan = A.plan("entropy")
    assert plan.seconds is None and plan.bound is None
    cpu = fm.Ceilings(flops=plan.flops, exps=plan.exps / 2, bandwidth=1e30)
    plan = A.plan("entropy", ceilings=cpu)
    assert plan.seconds == pytest.approx(3.0)  # 1 and 2: they share units
    assert plan.bound == "exponentials"
    assert A.plan("entropy", ceilings=replace(cpu, shared=False)).seconds == pytest.approx(2.0)
    slow = replace(cpu, bandwidth=plan.traffic / 5)
    plan = A.plan("entropy", ceilings=slow)
    assert plan.seconds == pytest.approx(5.0)
    assert plan.bound == "memory traffic"
    assert "at the ceilings    5 s, bound by memory traffic" in str(plan)


@pytest.mark.usefixtures("threads")
def test_fewer_threads_are_expected_to_take_longer() -> None:
    need_cpu()
    torch.set_num_threads(4)
    A, _ = Maps((1, 2, 400, 400, 16)).make("cpu")
    ceilings = fm.Ceilings(1e9, 1e9, 1e12)
    usual = A.plan("entropy", ceilings=ceilings)
    tight = A.plan("entropy", ceilings=ceilings, memory_budget=usual.workspace // 2)
    assert (usual.share, tight.share) == (1.0, 0.5)
    assert tight.seconds == pytest.approx(2 * usual.seconds)
    assert "threads with work  50%" in str(tight)


def test_ceilings_are_measured() -> None:
    ceilings = fm.Ceilings.measure(seconds=0.01)
    assert ceilings.shared
    assert min(ceilings.flops, ceilings.exps, ceilings.bandwidth) > 1e6


def test_a_plan_reads_like_a_table(planned: str) -> None:
    A, _ = MAPS["square"].make(planned)
    lines = str(A.plan("entropy", "max", memory_budget=2**20)).splitlines()
    assert lines[0] == f"entropy, max on {planned}"
    assert lines[1].split() == ["passes", "over", "a", "map", "1"]
    assert lines[2].endswith("kB of 1.05 MB")


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        ((), {}, "reduce() needs at least one of entropy"),
        (("median",), {}, "reduction 'median' is unknown"),
        (("entropy", "topk"), {}, "reduction 'topk' is unknown"),
        (("topk",), {"k": 10**6}, "k = 1000000 is more than the"),
        (("diagonal",), {}, "diagonal needs a square map"),
        (("pool",), {"query_to": (99, 1)}, "query_to = (99, 1) must lie between"),
        (("product",), {"columns": 0}, "columns must be a whole number >= 1, got 0"),
        (("rows",), {"count": True}, "count must be a whole number >= 1, got True"),
        (("entropy",), {"memory_budget": 1}, "memory_budget = 1 bytes is too small for entropy"),
    ],
)
def test_what_cannot_run_cannot_be_planned(
    names: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    A, _ = MAPS["rows"].make("reference")
    with pytest.raises(ValueError, match=re.escape(words)):
        A.plan(*names, **options)


def test_a_backend_without_a_plan_is_taken_to_keep_a_log_sum_exp_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(reference, "plan")
    A, _ = Maps((2, 3, 64, 100, 16)).make("reference")
    found = {
        names: plan_pass("reference", A.problem, Request(names))
        for names in (("lse",), ("entropy",), ("entropy", "column_sum"), ("lse", "column_max"))
    }
    assert [cost.passes for cost in found.values()] == [1, 2, 3, 2]
    assert [cost.workspace for cost in found.values()] == [0, 2 * 3 * 64 * 4, 2 * 3 * 64 * 4, 0]
    with pytest.raises(ValueError, match="the smallest that works is 1536"):
        A.reduce("entropy", memory_budget=1)


def test_every_field_has_its_arithmetic() -> None:
    """A new statistic says what it costs, and its plan what its reducers take."""
    A, B = MAPS["square"].make("reference")
    operand = torch.empty(2, 25, 3, device="meta")
    partner = B.problem._replace(lse=B.lse)
    for name in _problem.FIELDS:
        cells = torch.zeros(25, dtype=torch.int64)
        request = Request((name,), operand, operand, 2, cells, 4, partner)
        cost = reference.plan(A.problem, request)
        assert cost.flops > 0 and cost.exps > 0 and cost.workspace > 0, name


@pytest.mark.usefixtures("threads")
def test_a_composition_is_split_alike_on_any_number_of_threads() -> None:
    """The order of its sums depends on how it is split."""
    need_cpu()
    A, B = Maps((1, 2, 400, 400, 16)).make("cpu")
    sizes = strips._Sizes(A.problem, B.problem, Request(("entropy",)), ("cpu", "cpu"))
    budget = 1_500_000
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append((sizes.split(budget), sizes.passes(budget // 4)[0].workspace))
    (alone, takes_less), (together, takes_more) = found
    assert takes_less < takes_more
    assert alone.strip < 400
    assert together._replace(total=0) == alone._replace(total=0)
