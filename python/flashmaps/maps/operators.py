"""The torch.library operators: what torch.compile sees, and the one way into a backend.

`flashmaps::reduce` is a whole pass over one map; `flashmaps::round_trip` is the same pass with the
map back at hand; `flashmaps::compose` is everything that needs whole rows of a product of two maps.
Lists of names travel as one comma-separated string (operator schemas have no list of strings); the
outputs come in the order of the names.

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
from flashmaps.maps.problem import Problem, Request, empty_outputs

_PROBLEM = len(Problem._fields)  # how many arguments of an operator make up one problem


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
    fields = get(backend).reduce(problem, request)
    return [fields[name] for name in request.names]


@torch.library.custom_op("flashmaps::reduce", mutates_args=())
def _reduce(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    head_weights: Tensor | None,
    pairs: Tensor | None,
    lse: Tensor | None,
    scale: float,
    normalize: str,
    grid_height: int,
    grid_width: int,
    names: str,
    right: Tensor | None,
    left: Tensor | None,
    k: int,
    cells: Tensor | None,
    num_cells: int,
    backend: str,
    memory_budget: int | None = None,
) -> list[Tensor]:
    problem = Problem(
        query, key, bias, head_weights, pairs, lse, scale, normalize, grid_height, grid_width
    )
    request = Request(
        tuple(names.split(",")), right, left, k, cells, num_cells, memory_budget=memory_budget
    )
    return _outputs(problem, request, backend)


@_reduce.register_fake
def _(*args: Any) -> list[Tensor]:
    names, right, left, k, cells, num_cells, *_ = args[_PROBLEM:]
    request = Request(tuple(names.split(",")), right, left, k, cells, num_cells)
    return list(empty_outputs(Problem(*args[:_PROBLEM]), request).values())


@torch.library.custom_op("flashmaps::round_trip", mutates_args=())
def _round_trip(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    head_weights: Tensor | None,
    pairs: Tensor | None,
    lse: Tensor | None,
    scale: float,
    normalize: str,
    grid_height: int,
    grid_width: int,
    back_query: Tensor,
    back_key: Tensor,
    back_bias: Tensor | None,
    back_head_weights: Tensor | None,
    back_pairs: Tensor | None,
    back_lse: Tensor | None,
    back_scale: float,
    back_normalize: str,
    back_grid_height: int,
    back_grid_width: int,
    names: str,
    right: Tensor | None,
    backend: str,
    memory_budget: int | None = None,
) -> list[Tensor]:
    problem = Problem(
        query, key, bias, head_weights, pairs, lse, scale, normalize, grid_height, grid_width
    )
    partner = Problem(
        back_query, back_key, back_bias, back_head_weights, back_pairs, back_lse, back_scale,
        back_normalize, back_grid_height, back_grid_width,
    )  # fmt: skip
    request = Request(tuple(names.split(",")), right, partner=partner, memory_budget=memory_budget)
    return _outputs(problem, request, backend)


@_round_trip.register_fake
def _(*args: Any) -> list[Tensor]:
    names, right, *_ = args[2 * _PROBLEM :]
    request = Request(tuple(names.split(",")), right)
    return list(empty_outputs(Problem(*args[:_PROBLEM]), request).values())


@torch.library.custom_op("flashmaps::compose", mutates_args=())
def _compose(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    head_weights: Tensor | None,
    pairs: Tensor | None,
    lse: Tensor | None,
    scale: float,
    normalize: str,
    grid_height: int,
    grid_width: int,
    then_query: Tensor,
    then_key: Tensor,
    then_bias: Tensor | None,
    then_head_weights: Tensor | None,
    then_pairs: Tensor | None,
    then_lse: Tensor | None,
    then_scale: float,
    then_normalize: str,
    then_grid_height: int,
    then_grid_width: int,
    names: str,
    k: int,
    backend: str,
    then_backend: str,
    memory_budget: int | None = None,
) -> list[Tensor]:
    first = Problem(
        query, key, bias, head_weights, pairs, lse, scale, normalize, grid_height, grid_width
    )
    second = Problem(
        then_query, then_key, then_bias, then_head_weights, then_pairs, then_lse, then_scale,
        then_normalize, then_grid_height, then_grid_width,
    )  # fmt: skip
    request = _in_force(Request(tuple(names.split(",")), k=k, memory_budget=memory_budget))
    fields = strips.reduce(first, second, request, (backend, then_backend))
    return [fields[name] for name in request.names]


@_compose.register_fake
def _(*args: Any) -> list[Tensor]:
    first, second = Problem(*args[:_PROBLEM]), Problem(*args[_PROBLEM : 2 * _PROBLEM])
    names, k, *_ = args[2 * _PROBLEM :]
    request = Request(tuple(names.split(",")), k=k)
    return list(empty_outputs(strips.result(first, second), request).values())


def reduce(problem: Problem, request: Request, backend: str) -> dict[str, Tensor]:
    """Run one pass: the fields of ``request.names``, by name."""
    names = ",".join(request.names)
    if request.partner is None:
        outputs = _reduce(
            *problem, names, request.right, request.left, request.k, request.cells,
            request.num_cells, backend, request.memory_budget,
        )  # fmt: skip
    else:
        outputs = _round_trip(
            *problem, *request.partner, names, request.right, backend, request.memory_budget
        )
    return dict(zip(request.names, outputs, strict=True))


def compose(
    first: Problem, second: Problem, request: Request, backends: tuple[str, str]
) -> dict[str, Tensor]:
    """Fields of the product of two maps that need whole rows of it, by name."""
    outputs = _compose(
        *first, *second, ",".join(request.names), request.k, *backends, request.memory_budget
    )
    return dict(zip(request.names, outputs, strict=True))
