"""Guidance by attention while a picture is made: latents follow the gradient of a loss of maps.

    def attended(record):  # Attend-and-Excite (Chefer et al. 2023): some place looks at the word
        return sum(1 - entry.map().column_max()[:, 2].mean() for entry in record)

    with fm.guide(pipe, attended, layers="*.attn2", resolution=16, steps=range(25), scale=20.0):
        image = pipe("a cat and a frog").images[0]

The maps are lazy and their gradients are too, so a loss may be of self-attention at 64 x 64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashmaps.arguments import number, whole
from flashmaps.diffusion.capture import capture, denoisers, step_filter
from flashmaps.diffusion.record import Record

__all__ = ["Guidance", "guide"]

_INPUTS = ("sample", "hidden_states")  # what denoisers call the latents


class Guidance:
    """What `guide` yields: ``losses``, (step, loss) of each move that was made."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []


@contextlib.contextmanager
def guide(
    pipe: Any,
    loss: Callable[[Record], Tensor],
    *,
    layers: str | Iterable[str] = "*",
    kind: str | Iterable[str] | None = None,
    resolution: Any = None,
    steps: int | Iterable[int] | Callable[[int], bool] | None = None,
    scale: float | Callable[[int], float] = 20.0,
    iterations: int = 1,
) -> Iterator[Guidance]:
    """Move the latents of every chosen step against the gradient of ``loss``, then denoise.

        latents <- latents - scale * d loss / d latents

    Each move is one more forward and one backward pass of the denoiser. The pipeline's latents are
    moved, in what its denoiser and its scheduler are given; nothing else of it is touched, and on
    leaving everything is what it was.

    Args:
        pipe: a diffusers pipeline with a ``unet`` or ``transformer`` and a ``scheduler``, of any
            family that `flashmaps.capture` knows.
        loss: a function of the `Record` of one pass, the conditional part of guidance, to a tensor
            of one number. Entries come in the order of the layers; ``entry.map()`` has gradients.
        layers, kind, resolution: which layers are in the record, as in `flashmaps.capture`.
        steps: which denoising steps are guided, counted from 0, as there; None: all.
        scale: a number, or a function of the step's index. Of loss per latent: published recipes
            use 10 to 40 for losses of order 1.
        iterations: moves in each step.

    Raises ValueError for a loss that is not one number, that does not depend on the maps, or is not
    finite; TypeError for a pipeline without a scheduler.
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function of the record, got {type(loss).__name__}")
    scheduler = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "step"):
        raise TypeError(f"guide needs a pipeline with a scheduler, got {type(pipe).__name__}")
    whole("iterations", iterations, 1)
    scale_of = scale if callable(scale) else _constant(number("scale", scale))
    chosen = {"layers": layers, "kind": kind, "resolution": resolution}
    guided = _Guided(pipe, loss, chosen, step_filter(steps), scale_of, iterations)
    with contextlib.ExitStack() as undo:
        for model in denoisers(pipe).values():
            hook = model.register_forward_pre_hook(guided.before, with_kwargs=True, prepend=True)
            undo.callback(hook.remove)
        for name in ("step", "scale_model_input"):
            if hasattr(scheduler, name):
                _replace(undo, scheduler, name, getattr(guided, name))
        yield guided.told


def _constant(value: float) -> Callable[[int], float]:
    return lambda step: value


def _replace(
    undo: contextlib.ExitStack, owner: Any, name: str, function: Callable[..., Any]
) -> None:
    """Put a function around a method of one object."""
    original = getattr(owner, name)
    own = name in vars(owner)

    def instead(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    def back() -> None:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    setattr(owner, name, instead)
    undo.callback(back)


class _Guided:
    """The state of one `guide`."""

    def __init__(
        self,
        pipe: Any,
        loss: Callable[[Record], Tensor],
        chosen: dict[str, Any],
        wanted: Callable[[int], bool],
        scale_of: Callable[[int], float],
        iterations: int,
    ) -> None:
        self.pipe, self.loss, self.chosen = pipe, loss, chosen
        self.wanted, self.scale_of, self.iterations = wanted, scale_of, iterations
        self.told = Guidance()
        self.at = -1  # step
        self.new_step = True  # whether the next pass begins one
        self.input_scale = 1.0  # model input / latents
        self.channels: int | None = None  # of the latents; a model may be given more beside them
        self.move: Tensor | None = None  # of the latents in this step

    def scale_model_input(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the latents are multiplied by before the model sees them."""
        found = original(*args, **kwargs)
        sample = args[0] if args else kwargs["sample"]
        one = torch.ones((1,) * sample.ndim, dtype=sample.dtype, device=sample.device)
        times = args[1:] if args else ()
        rest = {name: x for name, x in kwargs.items() if name != "sample"}
        self.input_scale = float(original(one, *times, **rest).flatten()[0])
        self.channels = sample.shape[1]
        return found

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's step, from the latents that the model saw."""
        self.new_step = True
        if self.move is not None:
            given = list(args)
            if "sample" in kwargs:
                kwargs["sample"] = _moved(kwargs["sample"], self.move)
            else:
                given[2] = _moved(given[2], self.move)
            args, self.move = tuple(given), None
        return original(*args, **kwargs)

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before a pass of the pipeline: its inputs, moved."""
        if not self.new_step:  # the other part of guidance, in a pass of its own
            if self.move is not None:
                return self._given(model, args, kwargs, self.move)
            return None
        self.new_step, self.move = False, None
        self.at += 1
        if not self.wanted(self.at):
            return None
        step = self.at
        for _ in range(self.iterations):
            slope, loss = self._slope(model, args, kwargs)
            move = -self.scale_of(step) * slope
            self.told.losses.append((step, loss))
            self.move = move if self.move is None else self.move + move
            args, kwargs = self._given(model, args, kwargs, move)
        return args, kwargs

    def _given(
        self, model: nn.Module, args: tuple, kwargs: dict, move: Tensor
    ) -> tuple[tuple, dict]:
        """The model's arguments, for moved latents."""
        name = _input_name(model, args, kwargs)
        x = args[0] if name is None else kwargs[name]
        part = move * self.input_scale
        part = part.repeat(x.shape[0] // part.shape[0], *(1,) * (part.ndim - 1))
        moved = x.clone()
        moved[:, : part.shape[1]] += part.to(x.dtype)
        if name is None:
            return (moved, *args[1:]), kwargs
        return args, {**kwargs, name: moved}

    def _slope(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, float]:
        """d loss / d latents, and the loss, from a pass of its own."""
        name = _input_name(model, args, kwargs)
        x = (args[0] if name is None else kwargs[name]).detach().clone().requires_grad_()
        if name is None:
            args = (x, *args[1:])
        else:
            kwargs = {**kwargs, name: x}
        recording = capture(self.pipe, **self.chosen, keep="qk", grad=True, guidance="conditional")
        with torch.enable_grad(), frozen(model):
            # Not model(...): its hooks, and others' captures, are for the pipeline's pass.
            with recording as record:
                recording._before_forward(model, args, kwargs)
                at = recording._forward
                parts = 1 if at is None else max(1, len(at.batch))
                try:
                    model.forward(*args, **kwargs)
                finally:
                    recording._after_forward(model, args, None)
            value = self.loss(record)
            self._check(value, record)
            (slope,) = torch.autograd.grad(value.sum(), x)
        slope = slope.unflatten(0, (parts, -1)).sum(0)
        if self.channels is not None:
            slope = slope[:, : self.channels]
        return slope * self.input_scale, float(value.detach().sum())

    def _check(self, value: Any, record: Record) -> None:
        if not len(record):
            raise ValueError("guide: no layer was recorded; choose others by layers=, kind=")
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return a tensor of one number, got {got}")
        if not value.requires_grad:
            raise ValueError(
                "loss does not depend on the maps in a way that has a gradient: indices (argmax), "
                "detached tensors and layers before the latents have none"
            )
        if not bool(torch.isfinite(value)):
            raise ValueError(f"loss is {float(value.detach())} in step {self.at}")


def _moved(latents: Tensor, move: Tensor) -> Tensor:
    if latents.shape != move.shape:
        raise RuntimeError(
            f"guide: the scheduler is given latents of shape {tuple(latents.shape)}, but the model "
            f"was moved by {tuple(move.shape)}: this pipeline's latents are not known here"
        )
    return latents + move.to(latents.dtype)


def _input_name(model: nn.Module, args: tuple, kwargs: dict) -> str | None:
    """The keyword of the latents; None where they are the first positional argument."""
    if args:
        return None
    for name in _INPUTS:
        if isinstance(kwargs.get(name), Tensor):
            return name
    raise TypeError(f"guide: {type(model).__name__} is called without {' or '.join(_INPUTS)}")


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Weights want no gradients meanwhile: nothing is kept for them."""
    followed = [p for p in model.parameters() if p.requires_grad]
    for p in followed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in followed:
            p.requires_grad_(True)
