"""Gradients through captured layers: kept on request, and otherwise refused, never silently zero.

What a capture keeps is a copy without a graph, so a loss of it would have no gradient: a wrong
answer without an error where other terms of the loss have one. So copies that are made while
autograd follows the model carry a node that raises when a gradient comes to it. It hangs on the
model's inputs and weights, not on its activations, which no record keeps alive.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NO_GRAPH = (
    "this loss depends on what fm.capture recorded, which is a copy without a graph: its gradient "
    "would be zero. Capture with fm.capture(..., keep='qk', grad=True) to have gradients through "
    "entry.map(), or .detach() the captured tensors to leave them out"
)


class _Source(torch.autograd.Function):
    """What the model's output depends on, as one number."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_NO_GRAPH)


class _Refusing(torch.autograd.Function):
    """A copy whose gradient is an error."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, source: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_NO_GRAPH)


def source_of(given: Iterable[object], model: nn.Module | None = None) -> Tensor | None:
    """What `refusing` hangs copies on; None where autograd is off, or follows nothing here."""
    if not torch.is_grad_enabled():
        return None
    tensors = [x for x in _flat(given) if isinstance(x, Tensor) and x.requires_grad]
    if model is not None:
        tensors += [x for x in model.parameters() if x.requires_grad]
    return _Source.apply(*tensors) if tensors else None


def refusing(copy: Any, source: Tensor | None) -> Any:
    """The same numbers; a gradient that comes to them raises."""
    if source is None or not isinstance(copy, Tensor) or not copy.is_floating_point():
        return copy
    with torch.enable_grad():
        return _Refusing.apply(copy, source)


def check_followed(layer: str) -> None:
    """RuntimeError where Q and K have no graph because autograd is off."""
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"grad=True: autograd is off where layer {layer!r} runs. Call the model outside of "
            "torch.no_grad() and inference mode (pipelines are inside; fm.guide is not), and with "
            "gradient checkpointing of use_reentrant=False, whose graph can be seen"
        )


def _flat(given: Any) -> Iterable[object]:
    if isinstance(given, dict):
        given = given.values()
    if isinstance(given, Tensor) or not isinstance(given, Iterable) or isinstance(given, str):
        yield given
        return
    for each in given:
        yield from _flat(each)
