"""Listening to attention from within code that torch.compile made.

A stand-in for a processor (see observe.py) makes Dynamo's guards fail, so the model is compiled
once more, with the stand-in traced; without it the first graph fits again. What the traced stand-in
leaves in the graph is one operator before each scaled_dot_product_attention, which hands q and k,
materialised for the attention anyway, to the captures of that layer.

- Which layer, a tensor tells, not a number: guards hold numbers to be constant, but compiled blocks
  of one class share a graph. With a tensor they still do, and so do all captures of a model.
- The operator says that it writes to ``_order``, one tensor for all. It does not; but so it is
  neither left out, for having no result, nor put after the observation of a later layer.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashmaps.diffusion.observe import (
    Listener,
    ProcessorCall,
    StandIn,
    attach,
    attention_call,
    listening,
    refuse_unheard,
)

_order = torch.zeros(1, dtype=torch.int64)
_numbers = itertools.count()
_stand_ins: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

# Within a CUDA graph nothing could listen: it is cut in two here.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("flashmaps::observe", mutates_args=("order",), tags=_TAGS)
def _observe(
    order: Tensor,
    layer: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    grouped: bool,
    index: int,
    has_context: bool,
    rotates: bool,
    angles: list[Tensor],
) -> None:
    """The ``index``-th attention of a processor call; see `attention_call` and `ProcessorCall`."""
    stand_in = _stand_ins.get(int(layer))
    if stand_in is None or not (listeners := listening(stand_in)):
        return
    call = ProcessorCall(
        attn=stand_in._fm_layer(),
        processor=type(stand_in._fm_processor).__name__,
        context=() if has_context else None,  # what it holds does not matter, only whether it is
        arguments={"image_rotary_emb": tuple(angles) or "unknown"} if rotates else {},
    )
    attention = attention_call(query, key, key, mask, 0.0, causal, scale, grouped)
    for each in listeners:
        each.observe(each.layer, call, index, attention)


@torch.library.custom_op("flashmaps::unheard", mutates_args=("order",), tags=_TAGS)
def _unheard(order: Tensor, layer: Tensor) -> None:
    """A processor call without any attention that could be observed: refused if one listens."""
    stand_in = _stand_ins.get(int(layer))
    if stand_in is not None and (listeners := listening(stand_in)):
        refuse_unheard(listeners[0].layer, stand_in._fm_processor)


@_observe.register_fake
@_unheard.register_fake
def _(*args: Any) -> None:
    return None


def _refuse_uncompiled(stand_in: Any) -> None:
    """Raise RuntimeError if somebody wants to hear of a layer that compiled code does not run.

    Its output may differ in the last bits from that of the graph without a capture.
    """
    if listeners := listening(stand_in):
        raise RuntimeError(
            f"layer {listeners[0].layer!r} belongs to a compiled part of the model, but this time "
            "it, or its attention, is not run by compiled code: torch.compile breaks the graph "
            "there (`fullgraph=True` tells why), or gave up at "
            "`torch._dynamo.config.recompile_limit`, or was bypassed. Remove the cause, or capture "
            "a model that is not compiled"
        )


class _TracedAttentions(TorchFunctionMode):
    """Puts an operator into the graph before each scaled_dot_product_attention."""

    def __init__(self, stand_in: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.stand_in = stand_in
        self.has_context = arguments.get("encoder_hidden_states") is not None
        angles = arguments.get("image_rotary_emb", arguments.get("rotary_emb"))
        self.rotates = angles is not None
        self.angles: list[Tensor] = []
        # cos and sin, as `layouts.rotary` wants them; of other forms it only asks whether they are.
        if isinstance(angles, (tuple, list)):
            tensors = [each.detach() for each in angles if isinstance(each, Tensor)]
            self.angles = [each for each in tensors if each.is_floating_point()]
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if not torch.compiler.is_compiling():
                _refuse_uncompiled(self.stand_in)
            self.observe(*args, **kwargs)
            self.seen += 1
        if func is Tensor.unflatten:  # in Python, with a `super()` that Dynamo cannot trace here
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        mask = None if attn_mask is None else attn_mask.detach()
        _observe(
            _order, self.stand_in._fm_number, query.detach(), key.detach(), mask, scale, is_causal,
            enable_gqa, self.seen, self.has_context, self.rotates, self.angles,
        )  # fmt: skip


@functools.cache  # one class for each: Dynamo's guards look at types
def _traceable(kind: type) -> type | None:
    """A subclass of the processor's class that listens; None if it cannot have one.

    Its instances share the processor's attributes. Dynamo asks objects for their ``__class__``, so
    unlike `observe.StandIn` it cannot say that it is the processor's own.
    """
    names = list(inspect.signature(kind.__call__).parameters)[2:]  # without self and attn

    @functools.wraps(kind.__call__)  # Dynamo finds the signature by it, but not by __signature__
    def call(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _refuse_uncompiled(self)
            return self._fm_processor(attn, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        attentions = _TracedAttentions(self, arguments)
        with attentions:
            output = self._fm_processor(attn, *args, **kwargs)
        if not attentions.seen:
            _unheard(_order, self._fm_number)
        return output

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return kind(*args, **kwargs)  # processor.__class__() makes a processor, not a stand-in

    slots = ["_fm_processor", "_fm_listeners", "_fm_number", "_fm_layer"]
    if not hasattr(kind, "__weakref__"):
        slots.append("__weakref__")
    body = {
        "__slots__": slots,
        "__module__": kind.__module__,
        "__call__": call,
        "__new__": new,
        # A copy of the model is not captured, as with `observe.StandIn`.
        "__deepcopy__": lambda self, memo: copy.deepcopy(self._fm_processor, memo),
        "__reduce_ex__": lambda self, protocol: self._fm_processor.__reduce_ex__(protocol),
    }
    try:
        return types.new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(body))
    except TypeError:
        return None


def attach_traceable(layer: nn.Module, listener: Listener) -> Any:
    """`observe.attach` for a layer of a compiled model.

    Raises RuntimeError for a processor whose class cannot have a subclass, and while a capture is
    active that began before the model was compiled.
    """
    if type(layer.processor) is StandIn:
        raise RuntimeError(
            f"layer {listener.layer!r} is being captured since before the model was compiled; "
            "leave that capture first"
        )
    return attach(layer, listener, _stand_in)


def _stand_in(layer: nn.Module) -> Any:
    processor: Any = layer.processor
    kind: Any = _traceable(type(processor))  # type: ignore[arg-type]
    if kind is None or not hasattr(processor, "__dict__"):
        raise RuntimeError(
            f"{type(processor).__name__} cannot be observed in a compiled model: it is no instance "
            "of an ordinary class; make it one, or capture the model before torch.compile"
        )
    number = next(_numbers)
    with torch.inference_mode(False):
        tensor = torch.tensor([number], dtype=torch.int64, device="cpu")
    stand_in: Any = object.__new__(kind)
    for name, value in (
        ("__dict__", processor.__dict__),
        ("_fm_processor", processor),
        ("_fm_listeners", []),
        ("_fm_number", tensor),
        ("_fm_layer", weakref.ref(layer)),
    ):
        object.__setattr__(stand_in, name, value)
    _stand_ins[number] = stand_in
    return stand_in


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile wrapped, or the model itself."""
    while isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    return model


def compiled_modules(models: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules in compiled parts of these models, in whichever of the ways they were compiled.

    ``torch.compile(model)``, ``model.compile()``, ``model.compile_repeated_blocks()``. Raises
    RuntimeError if one is compiled to CUDA graphs.
    """
    found: set[nn.Module] = set()
    for model in models:
        for name, part in model.named_modules():
            compiled: Any = part if "_orig_mod" in part._modules else part._compiled_call_impl
            if compiled is None:
                continue
            found.update(part.modules())
            # What torch.compile tells of its backend; there is no public way to ask.
            config: Callable[[], Any] | None = getattr(compiled, "get_compiler_config", None)
            if config is not None and (config() or {}).get("triton.cudagraphs"):
                raise RuntimeError(
                    f"{f'part {name!r} of the model' if name else 'the model'} is compiled to CUDA "
                    "graphs, which replay kernels without Python and cannot be observed; compile "
                    "it with mode='default' in place of 'reduce-overhead', or "
                    "'max-autotune-no-cudagraphs' in place of 'max-autotune'"
                )
    return found


def refuse_checkpointing(compiled: Iterable[nn.Module]) -> None:
    """Raise RuntimeError for gradient checkpointing within compiled code: nothing can listen there.

    Around compiled blocks, as after ``compile_repeated_blocks()``, it can.
    """
    if torch.is_grad_enabled() and any(
        getattr(m, "gradient_checkpointing", False) for m in compiled
    ):
        raise RuntimeError(
            "attention under gradient checkpointing cannot be observed in a model that is compiled "
            "as a whole; run it under torch.no_grad(), call `disable_gradient_checkpointing()`, or "
            "compile it with `compile_repeated_blocks()`"
        )
