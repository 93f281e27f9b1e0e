"""What torch's modes do around an operator: autocast does nothing, forward mode is refused.

Where none of them is on, an operator is called without torch's dispatcher, which takes as long as
all the rest that the host does for a small map.

Autocast would round the products of a map to half precision. Forward-mode derivatives have no
formula here, and torch takes the tangent of an operator without one for zero, silently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def exact(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast within."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def refuse_forward_mode(arguments: Iterable[object]) -> None:
    """NotImplementedError where an argument carries a tangent.

    Within torch.compile, where tangents cannot be seen, wherever forward mode is on.
    """
    if forward_ad._current_level < 0:  # nowhere near forward mode
        return
    if torch.compiler.is_compiling() or any(
        _has_tangent(each) for each in arguments if isinstance(each, Tensor)
    ):
        raise NotImplementedError(
            "forward-mode derivatives of maps (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad) are not implemented: their tangents would be taken for "
            "zero. Detach the inputs, or use reverse mode"
        )


def unwatched(arguments: Iterable[object]) -> bool:
    """Whether nothing but these plain tensors is at work: nobody would see an operator's call.

    No compiler, no mode (fake tensors, counters of operations), no transform of torch.func, no
    profiler, and no autograd that follows one of them.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    ):
        return False
    follows = torch.is_grad_enabled()
    for each in arguments:
        if isinstance(each, Tensor) and (
            (type(each) is not Tensor and type(each) is not Parameter)
            or (follows and each.requires_grad)
        ):
            return False
    return True


def _has_tangent(tensor: Tensor) -> bool:
    """Also of a tensor that further transforms of torch.func have wrapped (as in a hessian)."""
    if forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    functorch = torch._C._functorch
    *outer, _ = functorch.get_interpreter_stack() or (None,)
    forward = {each.level() for each in outer if each.key() == functorch.TransformType.Jvp}
    while forward and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.maybe_get_level(tensor) in forward:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
