"""What an operation will take, said beforehand; and budgets for operations of several passes.

An operation is a few `Step`s, one after the other: a pass of a backend, beside what the operation
holds meanwhile. Its workspace is the largest of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from flashmaps.arguments import number
from flashmaps.maps.budget import too_small
from flashmaps.maps.problem import Cost


class Step(NamedTuple):
    """A pass: the bytes that the operation holds beside it, and its cost under a budget."""

    held: int
    cost: Callable[[int | None], Cost] = lambda budget: Cost()

    def least(self) -> int:
        return self.held + self.cost(1).workspace

    def within(self, budget: int | None) -> Cost:
        cost = self.cost(left(budget, self.held))
        return replace(cost, workspace=self.held + cost.workspace)


def left(budget: int | None, held: int) -> int | None:
    """Of a budget, beside what is held. Never nothing: the pass can then name its least."""
    return None if budget is None else max(1, budget - held)


def shares(steps: Sequence[Step], budget: int | None, what: str) -> list[int | None]:
    """What each step may take, or the ValueError that says the smallest budget for all of them.

    While torch.compile traces, nothing can be planned: each pass checks its part when it runs.
    """
    if budget is None:
        return [None] * len(steps)
    if not torch.compiler.is_compiling():
        least = max(step.least() for step in steps)
        if least > budget:
            raise too_small(budget, least, what)
    return [left(budget, step.held) for step in steps]


def portion(
    count: int, step_of: Callable[[int], Step], budget: int | None, what: str
) -> tuple[int, int | None]:
    """How many of ``count`` to do at once, halved until they fit, and the budget of their pass."""
    if budget is None:
        return count, None
    if torch.compiler.is_compiling():
        return count, left(budget, step_of(count).held)
    leasts = []
    while True:
        step = step_of(count)
        if step.within(budget).workspace <= budget:
            return count, left(budget, step.held)
        leasts.append(step.least())
        if count <= 1:
            raise too_small(budget, min(leasts), what)
        count = (count + 1) // 2


@dataclass(frozen=True)
class Ceilings:
    """The best a machine does, per second. `measure` finds them in about a second.

    ``flops`` counts multiplications and additions each as one. On a CPU both kinds of arithmetic
    share units (``shared``) and their times add; on a GPU exponentials have units of their own.
    """

    flops: float
    exps: float
    bandwidth: float  # bytes to and from main memory
    shared: bool = True

    @classmethod
    def measure(
        cls,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        seconds: float = 0.2,
    ) -> Ceilings:
        """With all of torch's threads, or on a GPU; each rate the best of so many ``seconds``.

        Multiply-adds by torch.mm in ``dtype`` (half precision is computed in float32 on a CPU),
        exponentials by torch.exp of a tensor that stays in the cache, on a GPU by exp2 of numbers
        that stay in registers (which takes triton), bandwidth by a copy.
        """
        number("seconds", seconds, above=0)
        device = torch.device(device)
        cpu = device.type == "cpu"
        if cpu and dtype != torch.float64:
            dtype = torch.float32
        side = 1024 if cpu else 8192
        a, b = torch.randn(2, side, side, dtype=dtype, device=device).unbind()
        product = torch.empty_like(a)
        flops = 2 * side**3 / _best(lambda: torch.mm(a, b, out=product), device, seconds)
        if device.type == "cuda":
            from flashmaps.kernels.rates import exp2_per_second

            exps = exp2_per_second(device, lambda run: _best(run, device, seconds))
        else:
            x = -torch.rand(2**16 * (torch.get_num_threads() if cpu else 2**9), device=device)
            x, y = x.to(dtype), torch.empty_like(x, dtype=dtype)
            exps = x.numel() / _best(lambda: torch.exp(x, out=y), device, seconds)
        source = torch.zeros(2**26 if cpu else 2**30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * source.numel() / _best(lambda: target.copy_(source), device, seconds)
        return cls(flops, exps, bandwidth, shared=cpu)


def _best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True)
class Plan:
    """What an operation will take, before it runs. Printed, it is a short table.

    ``workspace`` is an upper bound of the bytes held at once beyond inputs and outputs; the rest
    counts what will be done, recomputation included. With ``ceilings``, ``seconds`` is the time at
    those rates, which a real run comes near from above, and ``bound`` what it is spent on.
    """

    operation: str
    backend: str
    passes: int  # how often the scores Q K^T of a whole map are computed
    workspace: int  # bytes
    outputs: int  # bytes
    flops: float  # multiplications and additions
    exps: float  # exponentials and logarithms
    traffic: float  # bytes to and from main memory, at the least
    share: float  # of the machine's threads that have work
    memory_budget: int | None = None  # that this is under
    ceilings: Ceilings | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float | None:
        """At the ceilings; None where none were given."""
        times = self._times()
        if self.ceilings is None or not times:
            return None
        multiply, exponentiate, memory = times.values()
        both = (multiply, exponentiate)
        return max(sum(both) if self.ceilings.shared else max(both), memory)

    @property
    def bound(self) -> str | None:
        """ "multiply-adds", "exponentials" or "memory traffic": what takes longest."""
        times, seconds = self._times(), self.seconds
        if seconds is None:
            return None
        if times["memory traffic"] < seconds:
            del times["memory traffic"]
        return max(times, key=lambda name: times[name])

    def _times(self) -> dict[str, float]:
        if self.ceilings is None:
            return {}
        return {
            "multiply-adds": self.flops / self.ceilings.flops / self.share,
            "exponentials": self.exps / self.ceilings.exps / self.share,
            "memory traffic": self.traffic / self.ceilings.bandwidth,
        }

    def __str__(self) -> str:
        budget = "" if self.memory_budget is None else f" of {_si(self.memory_budget)}B"
        lines = [
            (f"{self.operation}", f"on {self.backend}"),
            ("passes over a map", f"{self.passes}"),
            ("workspace", f"{_si(self.workspace)}B{budget}"),
            ("outputs", f"{_si(self.outputs)}B"),
            ("multiply-adds", f"{_si(self.flops)}flop"),
            ("exponentials", _si(self.exps)),
            ("memory traffic", f"{_si(self.traffic)}B"),
        ]
        if self.share < 1:
            lines.append(("threads with work", f"{self.share:.0%}"))
        if self.seconds is not None:
            lines.append(("at the ceilings", f"{_si(self.seconds)}s, bound by {self.bound}"))
        width = max(len(name) for name, _ in lines[1:]) + 2
        head = " ".join(lines[0])
        return "\n".join([head, *(f"  {name:<{width}}{value}" for name, value in lines[1:])])


def _si(value: float) -> str:
    """Three digits and a prefix: "3.36 M", ready for a unit."""
    if value == 0:
        return "0 "
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value / 1e-6:.3g} u"


def plan(
    operation: str,
    backend: str,
    steps: Sequence[Step],
    *,
    outputs: int,
    memory_budget: int | None,
    ceilings: Ceilings | None,
) -> Plan:
    """The steps, one after the other, each under what the budget leaves for it."""
    shares(steps, memory_budget, operation)
    total = Cost()
    for step in steps:
        total = total.then(step.within(memory_budget))
    return Plan(
        operation, backend, total.passes, total.workspace, outputs, total.flops, total.exps,
        total.traffic, total.share, memory_budget, ceilings,
    )  # fmt: skip
