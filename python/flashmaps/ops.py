"""The torch.library operators: what torch.compile sees, and the one way into a backend.

`flashmaps::reduce` is a whole pass over one map; `flashmaps::round_trip` is the same pass with the
map back at hand. Lists of names travel as one comma-separated string (operator schemas have no list
of strings); the outputs come in the order of the names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmaps._problem import Problem, Request, empty_outputs
from flashmaps.backends import get

_PROBLEM = len(Problem._fields)  # how many arguments of an operator make up one problem


def _outputs(problem: Problem, request: Request, backend: str) -> list[Tensor]:
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
) -> list[Tensor]:
    problem = Problem(
        query, key, bias, head_weights, pairs, lse, scale, normalize, grid_height, grid_width
    )
    request = Request(tuple(names.split(",")), right, left, k, cells, num_cells)
    return _outputs(problem, request, backend)


@_reduce.register_fake
def _(*args: Any) -> list[Tensor]:
    names, right, left, k, cells, num_cells, _backend = args[_PROBLEM:]
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
) -> list[Tensor]:
    problem = Problem(
        query, key, bias, head_weights, pairs, lse, scale, normalize, grid_height, grid_width
    )
    partner = Problem(
        back_query, back_key, back_bias, back_head_weights, back_pairs, back_lse, back_scale,
        back_normalize, back_grid_height, back_grid_width,
    )  # fmt: skip
    request = Request(tuple(names.split(",")), right, partner=partner)
    return _outputs(problem, request, backend)


@_round_trip.register_fake
def _(*args: Any) -> list[Tensor]:
    names, right, _backend = args[2 * _PROBLEM :]
    request = Request(tuple(names.split(",")), right)
    return list(empty_outputs(Problem(*args[:_PROBLEM]), request).values())


def reduce(problem: Problem, request: Request, backend: str) -> dict[str, Tensor]:
    """Run one pass: the fields of ``request.names``, by name."""
    names = ",".join(request.names)
    if request.partner is None:
        outputs = _reduce(
            *problem, names, request.right, request.left, request.k, request.cells,
            request.num_cells, backend,
        )  # fmt: skip
    else:
        outputs = _round_trip(*problem, *request.partner, names, request.right, backend)
    return dict(zip(request.names, outputs, strict=True))
