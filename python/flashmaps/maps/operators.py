"""The torch.library operators: what torch.compile sees, and the one way into a backend.

`flashmaps::reduce` is a whole pass over one map; `flashmaps::round_trip` is the same pass with the
map back at hand; `flashmaps::compose` is everything that needs whole rows of a product of two maps.
`signatures` has their arguments; the outputs come in the order of the names.

The memory budget is an argument, or else what `flashmaps.memory_budget` says where the operator
runs: a compiled graph obeys the context it is called in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashmaps.maps import strips
from flashmaps.maps.backends.choice import get, plan_pass
from flashmaps.maps.budget import budget_of_context, too_small
from flashmaps.maps.modes import exact, refuse_forward_mode
from flashmaps.maps.problem import Problem, Request, empty_outputs
from flashmaps.maps.signatures import COMPOSE, REDUCE, ROUND_TRIP


def _in_force(request: Request) -> Request:
    budget = budget_of_context() if request.memory_budget is None else None
    return request if budget is None else replace(request, memory_budget=budget)


def _outputs(problem: Problem, request: Request, backend: str) -> list[Tensor]:
    request = _in_force(request)
    budget = request.memory_budget
    if budget is not None:
        least = plan_pass(backend, problem, request).workspace
        if least > budget:
            raise too_small(budget, least, ", ".join(request.names))
    with exact(problem.query.device):
        fields = get(backend).reduce(problem, request)
    return [fields[name] for name in request.names]


@torch.library.custom_op("flashmaps::reduce", mutates_args=(), schema=REDUCE.schema)
def _reduce(*args: Any) -> list[Tensor]:
    (problem,), request, (backend,) = REDUCE.unpack(args)
    return _outputs(problem, request, backend)


@_reduce.register_fake
def _(*args: Any) -> list[Tensor]:
    (problem,), request, _ = REDUCE.unpack(args)
    return list(empty_outputs(problem, request).values())


@torch.library.custom_op("flashmaps::round_trip", mutates_args=(), schema=ROUND_TRIP.schema)
def _round_trip(*args: Any) -> list[Tensor]:
    (problem, partner), request, (backend,) = ROUND_TRIP.unpack(args)
    return _outputs(problem, replace(request, partner=partner), backend)


@_round_trip.register_fake
def _(*args: Any) -> list[Tensor]:
    (problem, _), request, _ = ROUND_TRIP.unpack(args)
    return list(empty_outputs(problem, request).values())


@torch.library.custom_op("flashmaps::compose", mutates_args=(), schema=COMPOSE.schema)
def _compose(*args: Any) -> list[Tensor]:
    (first, second), request, (backend, then_backend) = COMPOSE.unpack(args)
    request = _in_force(request)
    with exact(first.query.device):
        fields = strips.reduce(first, second, request, (backend, then_backend))
    return [fields[name] for name in request.names]


@_compose.register_fake
def _(*args: Any) -> list[Tensor]:
    (first, second), request, _ = COMPOSE.unpack(args)
    return list(empty_outputs(strips.result(first, second), request).values())


def reduce(problem: Problem, request: Request, backend: str) -> dict[str, Tensor]:
    """Run one pass: the fields of ``request.names``, by name."""
    if request.partner is None:
        arguments = REDUCE.pack((problem,), request, (backend,))
        refuse_forward_mode(arguments)
        outputs = _reduce(*arguments)
    else:
        arguments = ROUND_TRIP.pack((problem, request.partner), request, (backend,))
        refuse_forward_mode(arguments)
        outputs = _round_trip(*arguments)
    return dict(zip(request.names, outputs, strict=True))


def compose(
    first: Problem, second: Problem, request: Request, backends: tuple[str, str]
) -> dict[str, Tensor]:
    """Fields of the product of two maps that need whole rows of it, by name."""
    arguments = COMPOSE.pack((first, second), request, backends)
    refuse_forward_mode(arguments)
    outputs = _compose(*arguments)
    return dict(zip(request.names, outputs, strict=True))
