"""The way back through R = A A', a strip of rows of R at a time.

What stands below the operator `flashmaps::compose_backward`. With T = dL/dR, which `Gradient` gives
in closed form where R is known,

    dL/dA = T A'^T          dL/dA' = A^T T

A strip of r rows of R and T gives the same rows of dL/dA, [r, M], and a part of dL/dA' of rank r,
whose factors are the strip's: neither is ever whole. A' is gone back through once for each strip.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flashmaps.maps.backends import reference_backward
from flashmaps.maps.backends.choice import get, plan_backward_pass, plan_pass, run_backward
from flashmaps.maps.budget import too_small
from flashmaps.maps.problem import (
    Cost,
    Gradient,
    Problem,
    Request,
    empty_gradients,
)
from flashmaps.maps.strips import DEFAULT_MEMORY_BUDGET, Backends, one_map, result

__all__ = ["backward", "plan"]

Wanted = tuple[tuple[str, ...], tuple[str, ...]]  # of A and of A'


class _Split(NamedTuple):
    """How the budget is spent."""

    strip: int  # rows of R at once
    block: int  # rows of A' made at once
    backend: int  # bytes that each pass of a backend may take
    total: int  # bytes


class _Sizes:
    """The arithmetic of one composition's way back."""

    def __init__(
        self, first: Problem, second: Problem, gradient: Gradient, wanted: Wanted, names: Backends
    ) -> None:
        self.whole, self.gradient, self.wanted, self.names = first, gradient, wanted, names
        self.first, self.second = one_map(first, 0), one_map(second, 0)
        self.rows, self.keys, self.ends = first.num_queries, first.num_keys, second.num_keys

    def steps(self, strip: int, block: int, budget: int) -> dict[str, Cost]:
        """The passes of the backends for one strip."""
        dense = Request(("dense",), memory_budget=budget)
        some = self.first.query_rows(0, strip)
        like = {"dtype": self.first.compute_dtype, "device": "meta"}
        found = {
            "strip": plan_pass(self.names[0], some, dense),
            "block": plan_pass(self.names[1], self.second.query_rows(0, block), dense),
        }
        if self.wanted[0]:
            part = torch.empty((1, strip, self.keys), **like)  # type: ignore[call-overload]
            one = Gradient(self.wanted[0], dense=part, memory_budget=budget)
            found["first"] = plan_backward_pass(self.names[0], some, one)
        if self.wanted[1]:
            left = torch.empty((1, self.keys, strip), **like)  # type: ignore[call-overload]
            right = torch.empty((1, self.ends, strip), **like)  # type: ignore[call-overload]
            two = Gradient(self.wanted[1], left=left, right=right, memory_budget=budget)
            found["second"] = plan_backward_pass(self.names[1], self.second, two)
        return found

    def total(self, strip: int, block: int, budget: int) -> int:
        """Bytes held at most, strips in any of their states."""
        s = self.first.itemsize
        of_keys, of_ends = strip * self.keys * s, strip * self.ends * s
        costs = self.steps(strip, block, budget)
        part = block * self.ends * s
        making = of_keys + of_ends + part + max(costs["strip"].workspace, costs["block"].workspace)
        logs = 3 * of_ends + strip * self.ends  # T beside R, its logarithm, and where that is
        entries = 3 * 8 * self.ends
        going = of_keys + of_ends + of_keys  # A, T, dA
        most = max(making, of_keys + of_ends + max(logs, entries), going + part)
        if "first" in costs:
            most = max(most, going + costs["block"].workspace + part)
            grads = _gradient_bytes(self.first.query_rows(0, strip), self.wanted[0])
            most = max(most, going + grads + costs["first"].workspace)
        if "second" in costs:
            grads = _gradient_bytes(self.second, self.wanted[1])
            most = max(most, 2 * (of_keys + of_ends) + grads + costs["second"].workspace)
        return most + 2 * self.ends * s + 1024

    def split(self, budget: int) -> _Split:
        """The largest strip that fits, the rest for the backends; the least if none does."""
        strip = self.rows
        while True:
            block = max(1, min(self.keys, max(strip // 4, min(512, strip))))
            for share in (budget // 4, 1):
                total = self.total(strip, block, max(1, share))
                if total <= budget or (strip == 1 and share == 1):
                    return _Split(strip, block, max(1, share), total)
            strip = -(-strip // 2) if strip > 2 else 1


def _gradient_bytes(problem: Problem, wanted: tuple[str, ...]) -> int:
    """Of a strip's own gradients, before they are added, and of what adds them."""
    meta = replace_device(problem)
    grads = empty_gradients(meta, Gradient(wanted))
    return sum(g.numel() * g.element_size() for g in grads.values())


def replace_device(problem: Problem) -> Problem:
    """The same shapes on "meta"."""
    return problem._replace(
        query=torch.empty_like(problem.query, device="meta"),
        key=torch.empty_like(problem.key, device="meta"),
    )


def plan(
    first: Problem, second: Problem, gradient: Gradient, wanted: Wanted, names: Backends
) -> Cost:
    """What `backward` takes; a budget that is too small gives the least there is."""
    sizes = _Sizes(first, second, gradient, wanted, names)
    split = sizes.split(_budget(gradient))
    strips = -(-sizes.rows // split.strip)
    costs = sizes.steps(split.strip, split.block, split.backend)
    blocks = -(-sizes.keys // split.block)
    total = Cost()
    for name, cost in costs.items():
        times = strips * (2 * blocks if name == "block" else 1)
        total = total.then(replace(cost.times(times), passes=cost.passes * times))
    product = Cost(flops=4.0 * sizes.rows * sizes.keys * sizes.ends)
    return replace(total.then(product).times(first.batch), workspace=split.total)


def _budget(gradient: Gradient) -> int:
    return DEFAULT_MEMORY_BUDGET if gradient.memory_budget is None else gradient.memory_budget


def backward(
    first: Problem, second: Problem, gradient: Gradient, wanted: Wanted, names: Backends
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of both maps. ValueError for a budget too small for one row of R."""
    budget = _budget(gradient)
    split = _Sizes(first, second, gradient, wanted, names).split(budget)
    if split.total > budget:
        raise too_small(budget, split.total, "the gradient of one row of this composition")
    into = [
        {name: out.zero_() for name, out in empty_gradients(p, Gradient(w)).items()}
        for p, w in ((first, wanted[0]), (second, wanted[1]))
    ]
    shape = result(first, second)._replace(normalize="block")
    dense = Request(("dense",), memory_budget=split.backend)
    there, back = (get(name) for name in names)
    for index in range(first.batch):
        one, other = one_map(first, index), one_map(second, index)
        for start in range(0, first.num_queries, split.strip):
            rows = slice(start, min(start + split.strip, first.num_queries))
            some = one.query_rows(rows.start, rows.stop)
            strip = there.reduce(some, dense)["dense"]  # [1, r, M]
            values = strip.new_zeros((1, strip.shape[1], second.num_keys))
            for low in range(0, other.num_queries, split.block):
                high = min(low + split.block, other.num_queries)
                part = back.reduce(other.query_rows(low, high), dense)["dense"]
                values.baddbmm_(strip[:, :, low:high], part)
                del part
            t = reference_backward.of_map(shape, gradient, values, slice(index, index + 1), rows, 1)
            del values
            if wanted[0]:
                slope = torch.empty_like(strip)
                for low in range(0, other.num_queries, split.block):
                    high = min(low + split.block, other.num_queries)
                    part = back.reduce(other.query_rows(low, high), dense)["dense"]
                    torch.matmul(t, part.mT, out=slope[:, :, low:high])
                    del part
                told = Gradient(wanted[0], dense=slope, memory_budget=split.backend)
                _add(into[0], run_backward(names[0], some, told), first, index, rows)
                del slope, told
            if wanted[1]:
                told = Gradient(
                    wanted[1],
                    left=strip.mT.contiguous(),
                    right=t.mT.contiguous(),
                    memory_budget=split.backend,
                )
                _add(into[1], run_backward(names[1], other, told), second, index, slice(None))
                del told
            del strip, t
    return into[0], into[1]


def _add(
    into: dict[str, Tensor], found: dict[str, Tensor], whole: Problem, index: int, rows: slice
) -> None:
    """Gradients of one map, some rows of its queries, to those of the batch."""
    for name, part in found.items():
        if name == "lse":
            into[name][index : index + 1, :, rows] += part
        elif name == "query":
            which = slice(None) if whole.pairs is not None else slice(index, index + 1)
            into[name][which, :, rows] += part
        elif name == "head_weights" or whole.pairs is not None:
            into[name] += part
        else:
            into[name][index : index + 1] += part
