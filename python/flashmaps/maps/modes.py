"""What torch's modes do around an operator: autocast does nothing, forward mode is refused.

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
