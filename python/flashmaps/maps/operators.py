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

from flashmaps.maps import backward, gradients, strips
from flashmaps.maps.backends.choice import get, plan_pass
from flashmaps.maps.budget import budget_in_force, budget_of_context, too_small
from flashmaps.maps.modes import exact, refuse_forward_mode, unwatched
from flashmaps.maps.problem import Problem, Request, empty_outputs
from flashmaps.maps.signatures import COMPOSE, REDUCE, ROUND_TRIP


def _in_force(request: Request) -> Request:
    budget = budget_of_context() if request.memory_budget is None else None
    return request if budget is None else replace(request, memory_budget=budget)


def _fields(problem: Problem, request: Request, backend: str) -> dict[str, Tensor]:
    request = _in_force(request)
    budget = request.memory_budget
    if budget is not None:
        least = plan_pass(backend, problem, request).workspace
        if least > budget:
            raise too_small(budget, least, ", ".join(request.names))
    with exact(problem.query.device):
        fields: dict[str, Tensor] = get(backend).reduce(problem, request)
    return fields


def _outputs(problem: Problem, request: Request, backend: str) -> list[Tensor]:
    fields = _fields(problem, request, backend)
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


_reduce.register_autograd(backward.of_reduce, setup_context=backward.keep_reduce)
_round_trip.register_autograd(backward.of_round_trip, setup_context=backward.keep_round_trip)
_compose.register_autograd(backward.of_compose, setup_context=backward.keep_compose)


def wants_gradients(*arguments: object) -> bool:
    """Whether autograd is on and one of these is a tensor that it follows."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in arguments
    )


def _with_way_back(request: Request, *more: str) -> Request:
    """The same with the fields that the way back needs. The budget in force now holds then."""
    names = tuple(dict.fromkeys((*gradients.with_companions(request.names), *more)))
    return replace(request, names=names, memory_budget=budget_in_force(request.memory_budget))


def reduce(problem: Problem, request: Request, backend: str) -> dict[str, Tensor]:
    """Run one pass: the fields of ``request.names``, by name."""
    asked, partner = request.names, request.partner
    tensors = (*problem, *(partner or ()), request.right, request.left)
    if unwatched(tensors):
        refuse_forward_mode(tensors)
        found = _fields(problem, request, backend)
        return {name: found[name] for name in asked}
    if wants_gradients(*tensors):
        # Found on the way, the log-sum-exp spares the way back a pass.
        request = _with_way_back(request, *(("lse",) if problem.lse is None else ()))
    if partner is None:
        arguments = REDUCE.pack((problem,), request, (backend,))
        refuse_forward_mode(arguments)
        outputs = _reduce(*arguments)
    else:
        arguments = ROUND_TRIP.pack((problem, partner), request, (backend,))
        refuse_forward_mode(arguments)
        outputs = _round_trip(*arguments)
    fields = dict(zip(request.names, outputs, strict=True))
    return {name: fields[name] for name in asked}


def compose(
    first: Problem, second: Problem, request: Request, backends: tuple[str, str]
) -> dict[str, Tensor]:
    """Fields of the product of two maps that need whole rows of it, by name."""
    asked = request.names
    if wants_gradients(*first, *second):
        request = _with_way_back(request)
    arguments = COMPOSE.pack((first, second), request, backends)
    refuse_forward_mode(arguments)
    outputs = _compose(*arguments)
    fields = dict(zip(request.names, outputs, strict=True))
    return {name: fields[name] for name in asked}
