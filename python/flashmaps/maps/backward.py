"""The operators' way back: what autograd and torch.compile see of gradients.

`flashmaps::reduce_backward` is one pass over one map going backwards, `flashmaps::compose_backward`
the same for a product of two maps. The formulas of `gradients` turn the gradients of results into
what they are told. What is kept between the ways is inputs, the log-sum-exp, and results of a few
numbers a row or column. Second derivatives raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from flashmaps.maps import gradients, strips, strips_backward
from flashmaps.maps.backends.choice import plan_backward_pass, run_backward
from flashmaps.maps.budget import budget_of_context, too_small
from flashmaps.maps.modes import exact
from flashmaps.maps.planning import left
from flashmaps.maps.problem import Gradient, Problem, Request, empty_gradients
from flashmaps.maps.signatures import COMPOSE, PROBLEM, REDUCE, ROUND_TRIP, problem_schema

# The tensors of a `Problem` that have gradients, and where they stand.
DIFFERENTIABLE = {"query": 0, "key": 1, "bias": 2, "head_weights": 3, "lse": 5}

# The tensors of a `Gradient`, in the order of the operator's arguments.
_TERMS = tuple(f.name for f in fields(Gradient) if f.type == "Tensor | None")


def _schema(*arguments: str) -> str:
    return f"({', '.join(arguments)}, SymInt? memory_budget) -> Tensor[]"


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "flashmaps: second derivatives of attention maps are not implemented. This backward pass "
        "went through the gradient of a map: leave out create_graph=True, or detach the gradient "
        "(a gradient penalty needs to_dense() of a small map computed with torch)"
    )


@torch.library.custom_op(
    "flashmaps::reduce_backward",
    mutates_args=(),
    schema=_schema(
        *problem_schema(),
        *(f"Tensor? d_{name}" for name in _TERMS),
        # The map back, if there is one.
        *(each.replace("Tensor ", "Tensor? ") for each in problem_schema("back_")),
        "str wanted",
        "str backend",
    ),
)
def _reduce_backward(*args: Any) -> list[Tensor]:
    problem, gradient, backend = _from_arguments(args)
    budget = gradient.memory_budget
    if budget is None:
        budget = budget_of_context()
    if budget is not None:
        gradient = replace(gradient, memory_budget=budget)
        least = plan_backward_pass(backend, problem, gradient).workspace
        if least > budget:
            raise too_small(budget, least, "the gradient of this map")
    with exact(problem.query.device):
        found = run_backward(backend, problem, gradient)
    return [found[name] for name in gradient.wanted]


@_reduce_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    problem, gradient, _ = _from_arguments(args)
    return list(empty_gradients(problem, gradient).values())


_reduce_backward.register_autograd(_no_second)


def _from_arguments(args: Sequence[Any]) -> tuple[Problem, Gradient, str]:
    problem, rest = Problem(*args[:PROBLEM]), args[PROBLEM:]
    terms, rest = rest[: len(_TERMS)], rest[len(_TERMS) :]
    partner = None if rest[0] is None else Problem(*rest[:PROBLEM])
    wanted, backend, budget = rest[PROBLEM:]
    gradient = Gradient(
        tuple(wanted.split(",")),
        **dict(zip(_TERMS, terms, strict=True)),
        partner=partner,
        memory_budget=budget,
    )
    return problem, gradient, backend


_NO_PARTNER = (None,) * 6 + (0.0, "", 0, 0)


def reduce_backward(problem: Problem, gradient: Gradient, backend: str) -> dict[str, Tensor]:
    """The gradients that are wanted, by name, in the compute dtype."""
    partner = _NO_PARTNER if gradient.partner is None else gradient.partner
    terms = (getattr(gradient, name) for name in _TERMS)
    outputs = torch.ops.flashmaps.reduce_backward(
        *problem, *terms, *partner, ",".join(gradient.wanted), backend, gradient.memory_budget
    )
    return dict(zip(gradient.wanted, outputs, strict=True))


_COMPOSED = tuple(
    name for name in _TERMS if name not in ("row_back", "column_back", "pooled", "cells", "lse")
)


@torch.library.custom_op(
    "flashmaps::compose_backward",
    mutates_args=(),
    schema=_schema(
        *problem_schema(),
        *problem_schema("then_"),
        *(f"Tensor? d_{name}" for name in _COMPOSED),
        *(f"str {name}" for name in ("wanted", "then_wanted", "backend", "then_backend")),
    ),
)
def _compose_backward(*args: Any) -> list[Tensor]:
    first, second, gradient, wanted, backends = _composed(args)
    budget = gradient.memory_budget
    if budget is None:
        gradient = replace(gradient, memory_budget=budget_of_context())
    with exact(first.query.device):
        one, two = strips_backward.backward(first, second, gradient, wanted, backends)
    return [one[name] for name in wanted[0]] + [two[name] for name in wanted[1]]


@_compose_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    first, second, gradient, wanted, _ = _composed(args)
    found: list[Tensor] = []
    for problem, names in zip((first, second), wanted, strict=True):
        found += empty_gradients(problem, replace(gradient, wanted=names)).values()
    return found


_compose_backward.register_autograd(_no_second)


def _names(joined: str) -> tuple[str, ...]:
    return tuple(joined.split(",")) if joined else ()


def _composed(args: Sequence[Any]) -> tuple[Problem, Problem, Gradient, Any, tuple[str, str]]:
    first, second = Problem(*args[:PROBLEM]), Problem(*args[PROBLEM : 2 * PROBLEM])
    rest = args[2 * PROBLEM :]
    terms, rest = rest[: len(_COMPOSED)], rest[len(_COMPOSED) :]
    wanted, then_wanted, backend, then_backend, budget = rest
    gradient = Gradient(
        (),
        **dict(zip(_COMPOSED, terms, strict=True)),
        memory_budget=budget,
    )
    return first, second, gradient, (_names(wanted), _names(then_wanted)), (backend, then_backend)


# What autograd keeps, and does with it. ctx.needs_input_grad has an entry for each argument.


def _wanted(needs: Sequence[bool], offset: int = 0) -> tuple[str, ...]:
    return tuple(name for name, at in DIFFERENTIABLE.items() if needs[offset + at])


def _upstream(
    names: Sequence[str], grads: Sequence[Tensor | None], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The gradients of the float results that the loss depends on."""
    return {
        name: g.to(dtype)
        for name, g in zip(names, grads, strict=True)
        if g is not None and gradients.is_float(name)
    }


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor], names: str) -> None:
    """Tensors by autograd's own means, which checkpointing and its checks rely on."""
    ctx.set_materialize_grads(False)
    results = dict(zip(names.split(","), output, strict=True))
    kept = (results[name] for name in gradients.saved(names.split(",")))
    tensors = [*(x for x in inputs if isinstance(x, Tensor)), *kept]
    ctx.save_for_backward(*tensors)
    ctx.fm_inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.fm_is_tensor = [isinstance(x, Tensor) for x in inputs]


def _kept(ctx: Any, names: Sequence[str]) -> tuple[list[Any], dict[str, Tensor]]:
    """The inputs, and the results that were kept."""
    tensors = list(ctx.saved_tensors)
    inputs = [
        tensors.pop(0) if is_tensor else x
        for x, is_tensor in zip(ctx.fm_inputs, ctx.fm_is_tensor, strict=True)
    ]
    return inputs, dict(zip(gradients.saved(names), tensors, strict=True))


def _with_lse(problem: Problem, results: dict[str, Tensor]) -> Problem:
    return problem if problem.lse is not None else problem._replace(lse=results.get("lse"))


def _fill(
    into: list[Tensor | None], problem: Problem, found: dict[str, Tensor], offset: int = 0
) -> None:
    for name, gradient in found.items():
        at = DIFFERENTIABLE[name]
        into[offset + at] = gradient.to(getattr(problem, name).dtype)


def keep_reduce(ctx: Any, inputs: Sequence[Any], output: list[Tensor]) -> None:
    """What ``flashmaps::reduce`` keeps for its way back."""
    _keep(ctx, inputs, output, inputs[PROBLEM])


def of_reduce(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Of ``flashmaps::reduce``."""
    names = ctx.fm_inputs[PROBLEM].split(",")
    inputs, results = _kept(ctx, names)
    (problem,), request, (backend,) = REDUCE.unpack(inputs)
    right, other, budget = request.right, request.left, request.memory_budget
    into: list[Tensor | None] = [None] * len(inputs)
    upstream = _upstream(names, grads, problem.compute_dtype)
    known = _with_lse(problem, results)
    wanted = _wanted(ctx.needs_input_grad)
    if wanted and upstream:
        gradient = gradients.of_results(known, request, results, upstream, wanted)
        gradient = _within(gradient, budget)
        _fill(into, problem, reduce_backward(known, gradient, backend))
    if right is not None and ctx.needs_input_grad[PROBLEM + 1] and "product" in upstream:
        into[PROBLEM + 1] = _other_product(known, upstream, "product", backend, budget)
    if other is not None and ctx.needs_input_grad[PROBLEM + 2] and "transposed_product" in upstream:
        into[PROBLEM + 2] = _other_product(known, upstream, "transposed_product", backend, budget)
    return tuple(into)


def _within(gradient: Gradient, budget: int | None) -> Gradient:
    """Under what a budget leaves beside the terms themselves."""
    return replace(gradient, memory_budget=left(budget, gradients.held_bytes(gradient)))


def _other_product(
    problem: Problem, upstream: dict[str, Tensor], name: str, backend: str, budget: int | None
) -> Tensor:
    """L's gradient with respect to x of A x is A^T g, and that of y in A^T y is A g."""
    g = upstream[name].contiguous()
    request = Request(("transposed_product",), left=g, memory_budget=budget)
    if name != "product":
        request = Request(("product",), right=g, memory_budget=budget)
    (found,) = torch.ops.flashmaps.reduce(*REDUCE.pack((problem,), request, (backend,)))
    return found


def keep_round_trip(ctx: Any, inputs: Sequence[Any], output: list[Tensor]) -> None:
    """What ``flashmaps::round_trip`` keeps for its way back."""
    _keep(ctx, inputs, output, inputs[2 * PROBLEM])


def of_round_trip(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Of ``flashmaps::round_trip``: both maps."""
    names = ctx.fm_inputs[2 * PROBLEM].split(",")
    inputs, results = _kept(ctx, names)
    (problem, partner), request, (backend,) = ROUND_TRIP.unpack(inputs)
    request = replace(request, partner=partner)
    right, budget = request.right, request.memory_budget
    into: list[Tensor | None] = [None] * len(inputs)
    upstream = _upstream(names, grads, problem.compute_dtype)
    known = _with_lse(problem, results)
    needs = ctx.needs_input_grad
    wanted, back_wanted = _wanted(needs), _wanted(needs, PROBLEM)
    if wanted and upstream:
        gradient = gradients.of_results(known, request, results, upstream, wanted)
        gradient = _within(gradient, budget)
        _fill(into, problem, reduce_backward(known, gradient, backend))
    if back_wanted and "return_probability" in upstream:
        gradient = gradients.of_partner(known, request, upstream, back_wanted)
        gradient = _within(gradient, budget)
        _fill(into, partner, reduce_backward(partner, gradient, backend), PROBLEM)
    if right is not None and needs[2 * PROBLEM + 1] and "product" in upstream:
        into[2 * PROBLEM + 1] = _other_product(known, upstream, "product", backend, budget)
    return tuple(into)


def keep_compose(ctx: Any, inputs: Sequence[Any], output: list[Tensor]) -> None:
    """What ``flashmaps::compose`` keeps for its way back."""
    _keep(ctx, inputs, output, inputs[2 * PROBLEM])


def of_compose(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Of ``flashmaps::compose``: both maps."""
    names = ctx.fm_inputs[2 * PROBLEM].split(",")
    inputs, results = _kept(ctx, names)
    (first, second), request, backends = COMPOSE.unpack(inputs)
    into: list[Tensor | None] = [None] * len(inputs)
    upstream = _upstream(names, grads, first.compute_dtype)
    wanted = _wanted(ctx.needs_input_grad), _wanted(ctx.needs_input_grad, PROBLEM)
    if not upstream or not any(wanted):
        return tuple(into)
    shape = strips.result(first, second)._replace(normalize="block")
    gradient = gradients.of_results(
        shape, request, results, upstream, (), lines=first.lines * second.lines
    )
    terms = (getattr(gradient, name) for name in _COMPOSED)
    outputs = torch.ops.flashmaps.compose_backward(
        *first, *second, *terms, *(",".join(each) for each in wanted), *backends,
        request.memory_budget,
    )  # fmt: skip
    count = len(wanted[0])
    _fill(into, first, dict(zip(wanted[0], outputs[:count], strict=True)))
    _fill(into, second, dict(zip(wanted[1], outputs[count:], strict=True)), PROBLEM)
    return tuple(into)
