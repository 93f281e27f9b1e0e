"""Backend "cpu", backwards: hands pointers, sizes and strides to csrc/cpu/backward_kernel.cpp."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashmaps.maps.backends import cpu
from flashmaps.maps.problem import (
    Cost,
    Gradient,
    Problem,
    Request,
    backward_cost,
    gradient_shapes,
)


def backward(problem: Problem, gradient: Gradient) -> dict[str, Tensor]:
    """Every gradient that is wanted; `reference_backward.backward` defines them."""
    shapes = gradient_shapes(problem)
    into = {
        name: torch.zeros(shapes[name], dtype=problem.compute_dtype) for name in gradient.wanted
    }
    native, _ = _call(problem, gradient, into)
    cpu._last.workspace = native.workspace
    return into


def plan_backward(problem: Problem, gradient: Gradient) -> Cost:
    """What `backward` takes: C++ by its own account, and what is made for it."""
    native, held = _call(problem, gradient, None)
    cost = backward_cost(problem, gradient, passes=native.passes, workspace=held + native.workspace)
    cost = replace(cost, share=native.threads / torch.get_num_threads())
    for one, request, beside in _before(problem, gradient):
        first = cpu.plan(one, request)
        cost = replace(first, workspace=first.workspace + beside).then(cost)
    return cost


def _lse_bytes(problem: Problem) -> int:
    known = problem.lse is not None
    return 0 if known else problem.batch * problem.heads * problem.num_queries * problem.itemsize


def _before(problem: Problem, gradient: Gradient) -> list[tuple[Problem, Request, int]]:
    """Passes that have to come first, and what is held beside each."""
    found: list[tuple[Problem, Request, int]] = []
    budget, partner, lse = gradient.memory_budget, gradient.partner, _lse_bytes(problem)
    if lse:
        left = None if budget is None else max(1, budget - lse)
        found.append((problem, Request(("lse",), memory_budget=left), lse))
    if partner is not None and partner.normalize != "block":
        left = None if budget is None else max(1, budget - lse)
        one, request = cpu._line_mass_request(partner, left)
        found.append((one, request, lse + cpu._line_mass_bytes(partner, index=True)))
    return found


def _call(problem: Problem, gradient: Gradient, into: dict[str, Tensor] | None) -> tuple[Any, int]:
    """What the C++ call took, and what Python holds for it; without ``into`` only planned."""
    planning = into is None
    pointer = cpu._Pointers(planning=planning)
    held, budget, partner = _lse_bytes(problem), gradient.memory_budget, gradient.partner
    if held:
        shape = (problem.batch, problem.heads, problem.num_queries)
        lse = torch.empty(shape, dtype=problem.compute_dtype, device="meta")
        if not planning:
            lse = cpu.reduce(*_before(problem, gradient)[0][:2])["lse"]
        problem = problem._replace(lse=lse)
    native_gradient = cpu._C.Gradient()
    if partner is not None:
        native_gradient.partner = cpu._native(partner, pointer)
        if partner.normalize != "block":
            held += cpu._line_mass_bytes(partner)
            left = None if budget is None else max(1, budget - held)
            native_gradient.partner_line_mass = (
                1 if planning else pointer(cpu._line_mass(partner, left))
            )
    native = cpu._native(problem, pointer)
    terms = {name: pointer(t) for name, t in gradient.tensors().items()}
    for size, name in (("columns", "left"), ("entries", "row_index"), ("num_cells", "pooled")):
        tensor = getattr(gradient, name)
        setattr(native_gradient, size, 0 if tensor is None else tensor.shape[2])
    out = {name: 1 if into is None else into[name].data_ptr() for name in gradient.wanted}
    held += pointer.copied
    left = 0 if budget is None else max(1, budget - held)
    threads = torch.get_num_threads()
    return cpu._C.backward(native, native_gradient, terms, out, threads, left, planning), held
