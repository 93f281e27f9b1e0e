"""What a model was called with: its arguments by name, its timestep, its latents."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Given = Mapping[str, Any]  # by name


def called_with(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What a model was called with, by name."""
    kind: Any = type(model)
    if "forward" not in vars(model):
        return dict(zip(_parameters(kind), args, strict=False)) | kwargs
    parameters = inspect.signature(model.forward).parameters
    names: Iterable[str] = parameters
    if any(each.kind is each.VAR_POSITIONAL for each in parameters.values()):
        # Someone's `forward(*args, **kwargs)` before the model's own, as DeepCache has it.
        names = _parameters(kind)
    return dict(zip(names, args, strict=False)) | kwargs


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """Of a class of models: the parameters of its ``forward``, without self."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def timestep_of(given: Given) -> Any:
    """The timestep, by whichever name the model has for it."""
    names = ("timestep", "timesteps", "t", "timestep_ratio")
    return next((given[name] for name in names if given.get(name) is not None), None)


def latents_of(given: Given) -> Tensor | None:
    """The latents, batch first; None if they are not one tensor, nor several alike (Z-Image)."""
    found = given.get("sample", given.get("hidden_states", given.get("x")))
    if isinstance(found, (list, tuple)) and found and all(isinstance(x, Tensor) for x in found):
        alike = all(x.shape == found[0].shape for x in found)
        return torch.stack(list(found)) if alike else None
    return found if isinstance(found, Tensor) else None
