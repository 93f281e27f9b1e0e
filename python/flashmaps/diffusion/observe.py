"""Listening to attention processors: what they attend with, without touching what comes out.

Each attention layer keeps its own processor; it is called through a transparent stand-in which, for
the time of that one call, listens for ``torch.nn.functional.scaled_dot_product_attention``. What is
seen there is final: after LoRA, normalisation of q and k, rotary embedding and fused projections.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashmaps.diffusion.selection import matches, patterns

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

# Linear attention: softmax is not taken, so there is no map.
_WITHOUT_MAPS = {
    "SanaLinearAttnProcessor2_0",
    "SanaLinearAttnProcessor3_0",
    "SanaMultiscaleAttnProcessor2_0",
    "PAGCFGSanaLinearAttnProcessor2_0",
    "PAGIdentitySanaLinearAttnProcessor2_0",
}

# Layers with a processor that diffusers has no `set_processor` for.
_PLAIN_LAYERS = {"MochiAttention"}

_attaching = threading.Lock()


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a diffusers model that has an attention processor, by full name.

    Not those of an IP-Adapter's projection: they attend within the features of its image. What
    torch.compile puts around modules is not part of their names.
    """
    found = {}
    for name, module in model.named_modules():
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if (
            hasattr(module, "processor")
            and (hasattr(module, "set_processor") or type(module).__name__ in _PLAIN_LAYERS)
            and "_orig_mod" not in module._modules  # else the layer itself comes next
            and not name.startswith(("image_proj.", "encoder_hid_proj."))
        ):
            found[name] = module
    return found


def find_layers(model: nn.Module, layers: str | Iterable[str]) -> dict[str, nn.Module]:
    """Attention layers of ``model`` whose full name matches one of the patterns, by name.

    Raises ValueError, naming the layers there are, if a pattern matches none.
    """
    return choose_layers(attention_layers(model), layers, type(model).__name__)


def choose_layers(
    available: dict[str, nn.Module], layers: str | Iterable[str], where: str
) -> dict[str, nn.Module]:
    """Those of the layers whose name matches; see `find_layers`."""
    wanted = patterns(layers)
    if not wanted:
        raise ValueError("layers is empty; give at least one pattern such as 'up_blocks.*.attn1'")
    for pattern in wanted:
        if not any(matches(name, [pattern]) for name in available):
            shown = "\n  ".join(available) or "(none: not a diffusers attention model?)"
            raise ValueError(
                f"layers={pattern!r} matches no attention layer of {where}; there are:\n  {shown}"
            )
    return {name: module for name, module in available.items() if matches(name, wanted)}


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one scaled_dot_product_attention call that decide its map."""

    query: Tensor  # [B, H, N, d]
    key: Tensor  # [B, H, M, d], or fewer heads
    mask: Tensor | None
    scale: float
    causal: bool


def attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """Same parameters as scaled_dot_product_attention, so that Python binds them for us."""
    # With enable_gqa the key has fewer heads, each for several of the query's.
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return AttentionCall(query, key, attn_mask, float(scale), is_causal)


def key_mask(mask: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """A mask as [B, M], that of the first query and head, and whether the others are alike: [].

    The answer stays on the device: reading it would make the model wait. None: there are no others.
    """
    if mask is None:
        return None, None
    mask = mask.detach()
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    # Dimensions that were expanded are alike by construction.
    for dim in (1, 2):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    first = mask[:, :1, :1]
    alike = None if mask.shape == first.shape else (mask == first).all()
    return first[:, 0, 0].expand(batch, -1).clone(), alike


# An additive mask below it hides a key: exp of it is zero in float32, and in half precision.
_HIDES = -1e4


class QueryMasks:
    """Masks that differ between queries, as [B, N, M] bool: kept once for all alike."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Let go of them."""
        self._last: tuple[Tensor, int, Tensor | None] | None = None
        self._kept: Tensor | None = None

    def of(self, mask: Tensor | None) -> Tensor | None:
        """None for a mask that is alike for all queries, differs between heads, or weighs keys."""
        if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 or mask.stride(-2) == 0:
            return None
        # The layers of a pass share one: it is read, and waited for, once. It is held meanwhile.
        version = -1 if mask.is_inference() else mask._version
        if self._last is not None:
            seen, before, found = self._last
            same = seen.data_ptr() == mask.data_ptr() and seen.stride() == mask.stride()
            if same and seen.shape == mask.shape and -1 != before == version:
                return found
        found = _query_mask(mask.detach())
        if found is not None and self._kept is not None and torch.equal(found, self._kept):
            found = self._kept
        self._kept = self._kept if found is None else found
        self._last = mask.detach(), version, found
        return found


def _query_mask(mask: Tensor) -> Tensor | None:
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[1] > 1 and mask.stride(1) != 0 and not bool((mask == mask[:, :1]).all()):
        return None
    mask = mask[:, 0]
    if mask.dtype != torch.bool:
        hides = mask <= _HIDES
        if not bool((hides | (mask == 0)).all()):
            return None
        mask = ~hides
    return None if bool((mask == mask[:, :1]).all()) else mask.clone()


@dataclass(frozen=True)
class ProcessorCall:
    """One call of an attention processor, as its listeners see it."""

    attn: nn.Module
    processor: str  # name of its class
    context: Any  # encoder_hidden_states
    arguments: dict[str, Any]


def image_prompt(call: ProcessorCall, index: int) -> tuple[int | None, int | None]:
    """Of the ``index``-th attention of a call: which IP-Adapter it is for, and which of its images.

    (None, None) where that is not known: another processor, or what compiled code does not tell.
    The image is None where all images of the adapter are attended to at once.
    """
    count = index - 1  # the text, or the joint sequence, comes first
    if call.processor == "SD3IPAdapterJointAttnProcessor2_0":
        return 0, None
    if call.processor == "FluxIPAdapterAttnProcessor" and count >= 0:
        return count, None
    if call.processor != "IPAdapterAttnProcessor2_0" or count < 0 or call.context == ():
        return None, None
    # As it attends: not for adapters of scale zero; with masks, for each image by itself.
    scales: Any = getattr(call.attn.processor, "scale", ())
    masks = call.arguments.get("ip_adapter_masks")
    masks = [None] * len(scales) if masks is None else masks
    if isinstance(masks, Tensor):  # [adapters, 1, height, width]
        masks = list(masks.unsqueeze(1))
    calls: list[tuple[int, int | None]] = []
    for adapter, (scale, mask) in enumerate(zip(scales, masks, strict=False)):
        if all(each == 0 for each in (scale if isinstance(scale, list) else [scale])):
            continue
        images = [None] if mask is None else range(mask.shape[1])
        calls += [(adapter, image) for image in images]
    return calls[count] if count < len(calls) else (None, None)


@dataclass(frozen=True)
class Listener:
    """One capture's interest in one layer."""

    owner: object
    layer: str
    wants: Callable[[], bool]
    observe: Callable[[str, ProcessorCall, int, AttentionCall], None]


class _Attentions(TorchFunctionMode):
    """Tells listeners of each scaled_dot_product_attention call made while it is active.

    Several may come: IP-Adapter attends once more per image prompt, after the text.
    """

    def __init__(self, listeners: list[Listener], call: ProcessorCall) -> None:
        super().__init__()
        self.listeners = listeners
        self.call = call
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            attention = attention_call(*args, **kwargs)
            for each in self.listeners:
                each.observe(each.layer, self.call, self.seen, attention)
            self.seen += 1
        return func(*args, **kwargs)


class StandIn:
    """Transparent stand-in for an attention processor that lets captures listen to its attention.

    It looks like the processor in every way diffusers asks: same class (IP-Adapter makes a new one
    by ``processor.__class__()``), same attributes to read and set (``_attention_backend``), and the
    same signature (diffusers drops keyword arguments that ``__call__`` does not name). It is not a
    Module and holds no buffers, so the model's state_dict has the keys it had.
    """

    def __init__(self, processor: Any) -> None:
        signature = inspect.signature(processor.__call__)

        def call(attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return hear(self, attn, *args, **kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        for name, value in (
            ("_fm_processor", processor),
            ("_fm_listeners", []),
            ("_fm_call", call),
            ("_fm_signature", signature),
        ):
            object.__setattr__(self, name, value)

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

    # A copy of the model is not captured: its layers get copies of the processors.

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._fm_processor, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._fm_processor.__reduce_ex__(protocol)


def is_stand_in(processor: Any) -> bool:
    """Whether it is a `StandIn`, or what compiled.py has in its place."""
    return hasattr(type(processor), "_fm_processor") or type(processor) is StandIn


def listening(stand_in: Any) -> list[Listener]:
    """Those who want to hear what is going on now."""
    # A copy of the list: another thread may leave its capture meanwhile.
    return [each for each in tuple(stand_in._fm_listeners) if each.wants()]


def hear(stand_in: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the processor, and tell its listeners of its attention."""
    listeners = listening(stand_in)
    processor = stand_in._fm_processor
    if not listeners:
        return processor(attn, *args, **kwargs)
    bound = stand_in._fm_signature.bind_partial(attn, *args, **kwargs)
    arguments = bound.arguments | bound.kwargs  # a Module's __call__ has (*args, **kwargs)
    name = type(processor).__name__
    context = arguments.get("encoder_hidden_states")
    with _Attentions(listeners, ProcessorCall(attn, name, context, arguments)) as attentions:
        output = processor(attn, *args, **kwargs)
    if not attentions.seen:
        refuse_unheard(listeners[0].layer, processor)
    return output


def refuse_unheard(layer: str, processor: Any) -> None:
    """Raise RuntimeError for a processor that ran without any attention that could be seen."""
    reason = "it did not call torch's scaled_dot_product_attention"
    remedy = "choose other layers, or a processor that calls it"
    if hasattr(processor, "_attention_backend"):
        backend = processor._attention_backend
        reason += f" (its attention backend is {getattr(backend, 'value', backend)!r})"
        remedy = "call `model.set_attention_backend('native')` first"
    raise RuntimeError(_unobservable_text(layer, type(processor).__name__, reason, remedy))


def attach(
    layer: nn.Module, listener: Listener, make: Callable[[nn.Module], Any] | None = None
) -> Any:
    """Put a stand-in before the layer's processor, or join the one that another capture put there.

    The stand-in goes into the instance's __dict__, which Python reads before a Module's submodules:
    a processor that is a Module stays registered, with its parameters where they were.
    ``make`` makes another stand-in for a layer than a `StandIn`.
    """
    with _attaching:
        stand_in: Any = layer.processor
        if not is_stand_in(stand_in):
            traceable = make is not None
            stand_in = make(layer) if make is not None else StandIn(stand_in)
            # A compiled model looks no further than its guards, and those only at submodules.
            registered = traceable and "processor" in layer._modules
            (layer._modules if registered else layer.__dict__)["processor"] = stand_in
        stand_in._fm_listeners.append(listener)
        return stand_in


def detach(layer: nn.Module, stand_in: Any, owner: object) -> None:
    """Undo `attach`; the last capture to leave puts the very processor back."""
    with _attaching:
        listeners = stand_in._fm_listeners
        listeners[:] = [each for each in listeners if each.owner is not owner]
        held: Any = layer.__dict__.get("processor", layer._modules.get("processor"))
        if listeners or held is not stand_in:
            return  # others still listen, or the user has set another processor: theirs stays
        if "processor" not in layer._modules:
            layer.__dict__["processor"] = stand_in._fm_processor
        elif "processor" in layer.__dict__:
            del layer.__dict__["processor"]
        else:
            layer._modules["processor"] = stand_in._fm_processor


class ContextWatch:
    """Stands before a model's ``cache_context``, with which pipelines name the passes of guidance.

    Flux, Wan and Qwen run the model twice a step, under "cond" and "uncond"; diffusers forgets the
    names unless a cache is in use.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.owners: list[object] = []
        self._now = threading.local()

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.original, memo)  # a copy of the model is not watched

    @property
    def name(self) -> str | None:
        """Of the context this thread is in."""
        return getattr(self._now, "name", None)

    @contextlib.contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        before, self._now.name = self.name, name
        try:
            with self.original(name, *args, **kwargs):
                yield
        finally:
            self._now.name = before


def watch_context(model: nn.Module, owner: object) -> ContextWatch | None:
    """Watch the model's cache contexts for ``owner``; None for a model that has none."""
    with _attaching:
        watch: Any = getattr(model, "cache_context", None)
        if watch is not None and not isinstance(watch, ContextWatch):
            model.__dict__["cache_context"] = watch = ContextWatch(watch)
        if watch is not None:
            watch.owners.append(owner)
        return watch


def unwatch_context(model: nn.Module, owner: object) -> None:
    """Undo `watch_context`; the last owner to leave takes the watch away."""
    with _attaching:
        watch = model.__dict__.get("cache_context")
        if isinstance(watch, ContextWatch):
            watch.owners = [each for each in watch.owners if each is not owner]
            if not watch.owners:
                del model.__dict__["cache_context"]


def without_maps_left_out(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that have a map; those of linear attention have none.

    Raises RuntimeError if none is left.
    """
    names = {name: layer.processor.__class__.__name__ for name, layer in layers.items()}
    left = {name: layer for name, layer in layers.items() if names[name] not in _WITHOUT_MAPS}
    if layers and not left:
        name, processor = next(iter(names.items()))
        raise RuntimeError(
            f"layer {name!r} uses {processor}: linear attention takes no softmax over keys and has "
            "no map; choose other layers (in Sana layers='*.attn2', its cross-attention)"
        )
    return left


def refuse_unobservable(layer: str, processor: Any) -> None:
    """Raise RuntimeError, with the remedy, for a processor whose attention cannot be seen."""
    name = processor.__class__.__name__
    if name in _UNOBSERVABLE:
        reason = "it computes attention without torch's scaled_dot_product_attention"
        raise RuntimeError(_unobservable_text(layer, name, reason, _UNOBSERVABLE[name]))


def _unobservable_text(layer: str, processor: str, reason: str, remedy: str) -> str:
    return f"layer {layer!r} uses {processor}, which cannot be observed: {reason}; {remedy}"


def refuse_compiled(model: nn.Module) -> None:
    """Raise RuntimeError for a model of which a part is compiled."""
    for name, part in model.named_modules():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            what = f"its part {name!r}" if name else "the model"
            raise RuntimeError(
                f"{what} is compiled and cannot be observed: compiled code would not see the "
                "capture; capture the model before torch.compile"
            )
