"""Observe the queries and keys of a diffusers model while it runs, without touching its output.

    with fm.capture(pipe, layers="up_blocks.*.attn1") as rec:
        pipe("a photo of a cat")
    for entry in rec:
        print(entry.layer, entry.timestep, entry.map().entropy())

Each attention layer keeps its own processor; it is called through a transparent stand-in which, for
the time of that one call, listens for ``torch.nn.functional.scaled_dot_product_attention``. What is
seen there is final: after LoRA, normalisation of q and k, rotary embedding and fused projections.
Only Q and K are kept, O(N d) numbers per layer and step; the N x M map is never built.
"""

from __future__ import annotations

import fnmatch
import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from flashmaps.attention_map import AttentionMap

# Processors whose attention never calls scaled_dot_product_attention, and what to do about each.
_USE_DEFAULT = "call `model.set_attn_processor(AttnProcessor2_0())` first"
_UNSLICE = "call `pipe.disable_attention_slicing()` first"
_NO_XFORMERS = "call `pipe.disable_xformers_memory_efficient_attention()` first"
_UNOBSERVABLE = {
    "AttnProcessor": _USE_DEFAULT,
    "AttnAddedKVProcessor": "use AttnAddedKVProcessor2_0 instead",
    "SlicedAttnProcessor": _UNSLICE,
    "SlicedAttnAddedKVProcessor": _UNSLICE,
    "XFormersAttnProcessor": _NO_XFORMERS,
    "XFormersAttnAddedKVProcessor": _NO_XFORMERS,
    "XFormersJointAttnProcessor": _NO_XFORMERS,
    "CustomDiffusionXFormersAttnProcessor": _NO_XFORMERS,
    "IPAdapterXFormersAttnProcessor": _NO_XFORMERS,
    "CustomDiffusionAttnProcessor": "use CustomDiffusionAttnProcessor2_0 instead",
    "IPAdapterAttnProcessor": "use IPAdapterAttnProcessor2_0 instead",
    "AttnProcessorNPU": _USE_DEFAULT,
    "XLAFlashAttnProcessor2_0": _USE_DEFAULT,
}


@dataclass(frozen=True, eq=False)
class Entry:
    """Q and K of one attention layer in one forward pass of the model.

    Attributes:
        layer: full name, such as ``up_blocks.1.attentions.0.transformer_blocks.0.attn1``.
        step: index of the model's forward pass, counted from 0 since the capture began.
        kind: ``"self"``, ``"cross"`` (keys from another sequence) or ``"joint"`` (both in one).
        query: ``[B, H, N, d]``; key: ``[B, H, M, d]``, as the attention saw them.
        scale: what the scores are multiplied by before the softmax.
        mask: the attention's own mask (boolean, or additive bias), or None.
        grid: (height, width) of the query tokens with height * width = N, or None when unknown.
        heads: number of attention heads H.
    """

    layer: str
    step: int
    kind: str
    query: Tensor  # [B, H, N, d]
    key: Tensor  # [B, H, M, d]
    scale: float
    mask: Tensor | None
    grid: tuple[int, int] | None
    causal: bool = False
    _timestep: Any = None

    @property
    def timestep(self) -> float | None:
        """The timestep the model was called with; None when the model takes none.

        Converted on demand, since reading it from a GPU would make the model wait.
        """
        if self._timestep is None:
            return None
        if isinstance(self._timestep, Tensor):
            return float(self._timestep.flatten()[0].item())
        return float(self._timestep)

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_grid(self) -> tuple[int, int] | None:
        """(height, width) of the key tokens; None for text."""
        return self.grid if self.kind == "self" else None

    def key_mask(self) -> Tensor | None:  # [B, M]
        """The mask as one value per key, [B, M] (True attends, or additive bias); None if none.

        Raises ValueError for a mask that differs between queries or heads.
        """
        if self.mask is None:
            return None
        mask = self.mask
        while mask.ndim < 4:
            mask = mask.unsqueeze(0)
        of_keys = mask[:, :1, :1, :]
        if not bool((mask == of_keys).all()):
            raise ValueError(
                f"layer {self.layer!r}: its mask {tuple(self.mask.shape)} differs between queries "
                "or heads; a map takes one mask over keys, [batch, M]"
            )
        return of_keys[:, 0, 0, :].expand(self.key.shape[0], -1)

    def map(self, **options: Any) -> AttentionMap:
        """The layer's attention map, lazily: ``fm.AttentionMap`` with scale, mask and grids set.

        ``options`` go to :class:`flashmaps.AttentionMap` and win over what was recorded.
        """
        from flashmaps.attention_map import AttentionMap

        if self.causal:
            raise ValueError(
                f"layer {self.layer!r} is causal; maps of causal layers are not offered"
            )
        settings: dict[str, Any] = {"scale": self.scale}
        mask = self.key_mask() if "key_mask" not in options else None
        if mask is not None:
            settings["key_mask"] = mask
        if self.grid is not None:
            settings["query_grid"] = self.grid
        if self.key_grid is not None:
            settings["key_grid"] = self.key_grid
        return AttentionMap(self.query, self.key, **{**settings, **options})

    def __repr__(self) -> str:
        q, k = tuple(self.query.shape), tuple(self.key.shape)
        return (
            f"Entry({self.layer}, {self.kind}, step={self.step}, timestep={self.timestep}, "
            f"grid={self.grid}, query={q}, key={k})"
        )


class Record:
    """What a capture has seen, in order of execution: a read-only sequence of :class:`Entry`."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __getitem__(self, index: int) -> Entry:
        return self._entries[index]

    def __repr__(self) -> str:
        return f"Record({len(self)} entries of {len(self.layers)} layers)"

    @property
    def layers(self) -> list[str]:
        """Names of the layers seen, in order of first execution."""
        return list(dict.fromkeys(entry.layer for entry in self._entries))

    def select(
        self,
        layers: str | Iterable[str] | None = None,
        *,
        step: int | None = None,
        kind: str | None = None,
    ) -> list[Entry]:
        """Entries whose layer matches a pattern and whose step and kind are the ones given."""
        return [
            entry
            for entry in self._entries
            if (layers is None or _matches(entry.layer, _patterns(layers)))
            and (step is None or entry.step == step)
            and (kind is None or entry.kind == kind)
        ]

    def clear(self) -> None:
        """Forget everything seen so far, to bound memory in a long run."""
        self._entries.clear()


@dataclass
class _Forward:
    """What the model was called with, for the layers that run inside this call."""

    step: int
    wanted: bool
    timestep: Any
    size: tuple[int, int] | None  # latent (height, width)


class capture:
    """Context manager that records Q and K of chosen attention layers (example at the top).

    Args:
        pipe_or_model: a diffusers pipeline (its ``unet`` or ``transformer`` is observed), or such
            a model.
        layers: one or several patterns in the manner of :mod:`fnmatch` on full layer names.
        steps: which forward passes of the model to record, counted from 0: an int, a collection or
            a range of ints, or a function of the index; None records all.
        keep: ``"qk"``; nothing else exists yet.
        dtype, device: convert the recorded Q and K, for instance ``device="cpu"``.

    Yields a :class:`Record`. On exit every processor is the very object it was before, also after
    an exception; captures may be nested and may be left in any order.

    Raises ValueError when no layer matches, and RuntimeError when an attention path cannot be
    observed (it does not call scaled_dot_product_attention), naming the layer and the remedy.
    """

    def __init__(
        self,
        pipe_or_model: Any,
        layers: str | Iterable[str] = "up_blocks.*.attn1",
        *,
        steps: int | Iterable[int] | Callable[[int], bool] | None = None,
        keep: str = "qk",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if keep != "qk":
            raise ValueError(f'keep={keep!r} is not known; what can be kept now is "qk"')
        self._model = denoiser(pipe_or_model)
        self._layers = find_layers(self._model, layers)
        for name, layer in self._layers.items():
            _refuse_unobservable(name, layer.processor)
        self._wanted = _step_filter(steps)
        self._dtype = dtype
        self._device = device
        self._record = Record()
        self._now = threading.local()
        self._forward_names = list(inspect.signature(self._model.forward).parameters)
        self._counter = itertools.count()
        self._hooks: list[Any] = []
        self._stand_ins: dict[str, _StandIn] = {}

    def __enter__(self) -> Record:
        if self._hooks:
            raise RuntimeError("this capture is already active; make a second one to nest them")
        self._hooks = [
            self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self._model.register_forward_hook(self._after_forward, always_call=True),
        ]
        for name, layer in self._layers.items():
            self._stand_ins[name] = _attach(layer, _Listener(name, self._observe, self._is_wanted))
        return self._record

    def __exit__(self, *exception: object) -> None:
        for name, stand_in in self._stand_ins.items():
            _detach(self._layers[name], stand_in, self._observe)
        self._stand_ins.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        for name, stand_in in self._stand_ins.items():
            if self._layers[name].processor is not stand_in:
                raise RuntimeError(
                    f"the processor of layer {name!r} was replaced while it was captured "
                    "(attention slicing, fuse_qkv_projections and load_ip_adapter do that); "
                    "do it before `fm.capture`"
                )
        given = dict(zip(self._forward_names, args, strict=False)) | kwargs
        latent = given.get("sample", given.get("hidden_states"))
        size = None
        if isinstance(latent, Tensor) and latent.ndim == 4:
            size = (latent.shape[2], latent.shape[3])
        step = next(self._counter)
        self._now.forward = _Forward(
            step=step,
            wanted=self._wanted(step),
            timestep=given.get("timestep"),
            size=size,
        )

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        # Gradient checkpointing runs layers a second time, in backward: that is not recorded.
        self._now.forward = None

    def _is_wanted(self) -> bool:
        forward = getattr(self._now, "forward", None)
        return forward is not None and forward.wanted

    def _observe(self, name: str, kind: str, call: _AttentionCall) -> None:
        forward: _Forward = self._now.forward
        tokens = call.query.shape[-2]
        self._record._entries.append(
            Entry(
                layer=name,
                step=forward.step,
                kind=kind,
                query=self._copy(call.query),
                key=self._copy(call.key),
                scale=call.scale,
                mask=None if call.mask is None else call.mask.detach(),
                grid=_grid(forward.size, tokens),
                causal=call.causal,
                _timestep=forward.timestep,
            )
        )

    def _copy(self, tensor: Tensor) -> Tensor:
        # Always a copy: a view of a fused projection would keep V alive too, and a processor that
        # works in place would change what was recorded.
        return tensor.detach().to(device=self._device, dtype=self._dtype, copy=True)


def denoiser(pipe_or_model: Any) -> nn.Module:
    """The model that denoises: the pipeline's ``unet`` or ``transformer``, or the model itself."""
    model: Any = pipe_or_model
    if not isinstance(model, nn.Module):
        for name in ("unet", "transformer"):
            model = getattr(pipe_or_model, name, None)
            if isinstance(model, nn.Module):
                break
        else:
            raise TypeError(
                "capture needs a diffusers pipeline with a `unet` or `transformer`, or such a "
                f"model; got {type(pipe_or_model).__name__}"
            )
    for name, part in model.named_modules():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            what = f"its part {name!r}" if name else "the model"
            raise RuntimeError(
                f"{what} is compiled and cannot be observed: compiled code would not see the "
                "capture; capture the model before torch.compile"
            )
    return model


def find_layers(model: nn.Module, layers: str | Iterable[str]) -> dict[str, nn.Module]:
    """Attention layers of ``model`` whose full name matches one of the patterns, by name.

    Raises ValueError, naming the layers there are, if a pattern matches none.
    """
    available = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "processor") and hasattr(module, "set_processor")
    }
    patterns = _patterns(layers)
    if not patterns:
        raise ValueError("layers is empty; give at least one pattern such as 'up_blocks.*.attn1'")
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in available):
            shown = "\n  ".join(available) or "(none: not a diffusers attention model?)"
            raise ValueError(
                f"layers={pattern!r} matches no attention layer of {type(model).__name__}; "
                f"there are:\n  {shown}"
            )
    return {name: module for name, module in available.items() if _matches(name, patterns)}


@dataclass(frozen=True)
class _AttentionCall:
    """The arguments of one scaled_dot_product_attention call that decide its map."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    causal: bool


def _attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _AttentionCall:
    """Same parameters as scaled_dot_product_attention, so that Python binds them for us."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _AttentionCall(query, key, attn_mask, float(scale), is_causal)


class _FirstAttention(TorchFunctionMode):
    """Notes the first scaled_dot_product_attention call made while it is active.

    The first, because IP-Adapter calls it once more per image prompt, after the text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call: _AttentionCall | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.call is None:
            self.call = _attention_call(*args, **kwargs)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Listener:
    """One capture's interest in one layer."""

    layer: str
    observe: Callable[[str, str, _AttentionCall], None]
    wants: Callable[[], bool]


class _StandIn:
    """Transparent stand-in for an attention processor that lets captures listen to its attention.

    It looks like the processor in every way diffusers asks: same class (IP-Adapter makes a new one
    by ``processor.__class__()``), same attributes to read and set (``_attention_backend``), and the
    same signature (diffusers drops keyword arguments that ``__call__`` does not name). It is not a
    Module and holds no buffers, so the model's state_dict has the keys it had.
    """

    def __init__(self, processor: Any) -> None:
        object.__setattr__(self, "_fm_processor", processor)
        object.__setattr__(self, "_fm_listeners", [])

        def call(attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._fm_run(attn, *args, **kwargs)

        call.__signature__ = inspect.signature(processor.__call__)  # type: ignore[attr-defined]
        object.__setattr__(self, "_fm_call", call)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(object.__getattribute__(self, "_fm_processor"))

    @property
    def __call__(self) -> Callable[..., Any]:
        return object.__getattribute__(self, "_fm_call")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fm_processor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._fm_processor, name, value)

    def _fm_run(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        listeners = [each for each in self._fm_listeners if each.wants()]
        if not listeners:
            return self._fm_processor(attn, *args, **kwargs)
        attention = _FirstAttention()
        with attention:
            output = self._fm_processor(attn, *args, **kwargs)
        if attention.call is None:
            raise RuntimeError(
                _unobservable_text(
                    listeners[0].layer,
                    type(self._fm_processor).__name__,
                    "it did not call torch's scaled_dot_product_attention",
                    "choose other layers, or another attention backend "
                    "(`model.set_attention_backend('native')`)",
                )
            )
        context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        kind = _kind(attn, context)
        for each in listeners:
            each.observe(each.layer, kind, attention.call)
        return output


def _attach(layer: nn.Module, listener: _Listener) -> _StandIn:
    """Put a stand-in before the layer's processor, or join the one that another capture put there.

    The stand-in goes into the instance's __dict__, which Python reads before a Module's submodules:
    a processor that is a Module stays registered, with its parameters where they were.
    """
    stand_in: Any = layer.processor
    if type(stand_in) is not _StandIn:
        stand_in = _StandIn(layer.processor)
        layer.__dict__["processor"] = stand_in
    stand_in._fm_listeners.append(listener)
    return stand_in


def _detach(layer: nn.Module, stand_in: _StandIn, observe: Callable) -> None:
    """Undo _attach; the last capture to leave puts the very processor back."""
    listeners = stand_in._fm_listeners
    listeners[:] = [each for each in listeners if each.observe != observe]
    if listeners or layer.__dict__.get("processor") is not stand_in:
        return  # others still listen, or the user has set another processor: theirs stays
    if "processor" in layer._modules:
        del layer.__dict__["processor"]
    else:
        layer.__dict__["processor"] = stand_in._fm_processor


def _kind(attn: nn.Module, context: Any) -> str:
    if context is None:
        return "self"
    return "joint" if getattr(attn, "add_k_proj", None) is not None else "cross"


def _grid(size: tuple[int, int] | None, tokens: int) -> tuple[int, int] | None:
    """(height, width) of ``tokens`` tokens in a model that halves its latent, rounding up."""
    if size is None:
        return None
    height, width = size
    while height * width > tokens and (height > 1 or width > 1):
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == tokens else None


def _step_filter(
    steps: int | Iterable[int] | Callable[[int], bool] | None,
) -> Callable[[int], bool]:
    if steps is None:
        return lambda step: True
    if callable(steps):
        return steps
    wanted = {steps} if isinstance(steps, int) else set(steps)
    if not all(isinstance(step, int) and step >= 0 for step in wanted):
        raise ValueError(f"steps must be indices of forward passes, 0 or more; got {steps!r}")
    return wanted.__contains__


def _patterns(layers: str | Iterable[str]) -> list[str]:
    patterns = [layers] if isinstance(layers, str) else list(layers)
    # `model.attn_processors` names layers with this ending; take its names too.
    return [pattern.removesuffix(".processor") for pattern in patterns]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unobservable(layer: str, processor: Any) -> None:
    name = processor.__class__.__name__
    if name in _UNOBSERVABLE:
        reason = "it computes attention without torch's scaled_dot_product_attention"
        raise RuntimeError(_unobservable_text(layer, name, reason, _UNOBSERVABLE[name]))


def _unobservable_text(layer: str, processor: str, reason: str, remedy: str) -> str:
    return f"layer {layer!r} uses {processor}, which cannot be observed: {reason}; {remedy}"
