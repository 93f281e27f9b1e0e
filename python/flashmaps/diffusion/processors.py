"""An attention processor that records: for those who use diffusers' ``set_attn_processor``.

    record = fm.Record()
    unet.set_attn_processor(fm.MapAttnProcessor.for_layers(unet, "*.attn1", record=record))

For models whose attention layers are diffusers' ``Attention`` with its stock processor: UNets,
ControlNets, PixArt, and VAEs. Other models, and processors of other kinds, are for `capture`.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from flashmaps.arguments import sides
from flashmaps.diffusion.called import called_with
from flashmaps.diffusion.capture import denoisers, step_filter
from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.graph import source_of
from flashmaps.diffusion.known import plan_of, tokens_of
from flashmaps.diffusion.layouts import Layout, Layouts, Plan, Rule, Tokens, layout
from flashmaps.diffusion.observe import (
    attention_layers,
    choose_layers,
    is_stand_in,
    key_mask,
    refuse_unobservable,
)
from flashmaps.diffusion.record import Record
from flashmaps.diffusion.recorder import Recorder
from flashmaps.maps.grids import Grid, square_grid

# What these processors can stand in for, since they compute the same.
_STOCK = {"AttnProcessor2_0": False, "FusedAttnProcessor2_0": True}  # whether projections are fused
# Of a layer whose model is not known: what stock processors attend to in UNets and PixArt.
_STOCK_PLAN = Plan(Rule("*", ("image -> text*",), alone=("image",)), name="AttnProcessor2_0")
_FLASH = SDPBackend.FLASH_ATTENTION.value
_ROW_STATISTICS = {"entropy", "max", "argmax", "expectation", "diagonal", "density"}


@functools.lru_cache(maxsize=256)
def _stock_tokens(grid: Grid | None, queries: int | None) -> Tokens:
    """On a grid that is known, or on a square one if there are as many queries."""
    if grid is not None or queries is None:
        return Tokens(grid, levels=True)
    square = square_grid(queries)
    return Tokens(square, sizes={} if square else {"image": queries})


@dataclass
class Layer:
    """What a processor knows of a layer that it runs."""

    name: str
    calls: int = 0
    worked: set[bool] = field(default_factory=set)  # what was decided, call by call


class MapAttnProcessor:
    """diffusers' ``AttnProcessor2_0``, which also records the layer's attention map.

    The output is that of ``AttnProcessor2_0`` to the last bit. One processor may serve one layer or
    many: ``unet.set_attn_processor(fm.MapAttnProcessor())`` records all, named "attention 0",
    "attention 1", ... in the order in which they first run. `for_layers` and `on` choose layers and
    give entries their full names.

    Args:
        reduce, keep, pool_to, block: what is computed of each map, and what is kept; see
            :class:`flashmaps.diffusion.recorder.Recorder`. By default each layer's entropy,
            averaged over calls. ``reduce=(), keep="qk"`` keeps Q and K, of which lazy maps are made
            later.
        grid: (height, width) of the model's finest tokens: of the latents, divided by the patch
            size if there is one. None: with `on`, what the model is called with; else square grids,
            where a number of tokens is a square number. Layers that see a picture (4-D) have its
            grid in any case.
        steps: which calls of each layer to record, from 0: an int, ints, or a function of the
            index; None: all. Each layer counts its own calls, one a step: see `reset`.
        layer: the name of its entries, for a processor of one layer.
        record: where entries go, so that several processors share one; None: a new one.
        dtype, device: of Q and K that are kept; device also of statistics.

    Attributes:
        record: the :class:`flashmaps.Record`.

    Statistics are computed when the layer runs, from the log-sum-exp that attention itself
    computed, where it gives one and they gain by it. With gradient checkpointing layers run a
    second time, in backward: that is not recorded. Under torch.compile attention and record run
    uncompiled: a graph break in each layer, so not with ``fullgraph=True`` (`capture` has none).
    Both halves of a batch with classifier-free guidance are recorded (`capture` tells them apart).
    One run of the model at a time.

    Raises, when a layer runs: RuntimeError for a layer that is not ``Attention``, for joint
    attention, for a tuple of contexts (IP-Adapter), naming what to use instead; ValueError where a
    statistic needs what the map has not.
    """

    _fused = False  # whether to use the layer's fused projections, as FusedAttnProcessor2_0 does
    _plan: Plan | None = None  # what is known of the layer, where the model is known
    _tokens: Tokens | None = None  # what the model was called with, likewise

    def __init__(
        self,
        *,
        reduce: Any = ("entropy",),
        keep: str | None = None,
        pool_to: Grid = (16, 16),
        block: str | None = None,
        grid: Grid | None = None,
        steps: int | Iterable[int] | Callable[[int], bool] | None = None,
        layer: str | None = None,
        record: Record | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._recorder = Recorder(
            keep=keep,
            reduce=reduce,
            pool_to=pool_to,
            block=block,
            dtype=dtype,
            device=device,
            record=record,
        )
        self.record = self._recorder.record
        if grid is not None and (sides(grid) is None or min(grid) < 1):
            raise ValueError(f"grid={grid!r}; wanted (height, width), both at least 1")
        self._grid = grid
        self._wanted_step = step_filter(steps)
        self._name = layer
        self._layouts = Layouts()
        self._layers: weakref.WeakKeyDictionary[nn.Module, Layer] = weakref.WeakKeyDictionary()
        _exempt_from_compilation()

    @classmethod
    def for_layers(
        cls, model: Any, layers: str | Iterable[str] = "*", **options: Any
    ) -> dict[str, Any]:
        """A processor of its own for each chosen layer, in the form that diffusers takes.

            unet.set_attn_processor(fm.MapAttnProcessor.for_layers(unet, "*.attn1", record=record))

        The other layers have the processor they have now. ``set_attn_processor`` empties the
        dictionary. ``options`` are those of the class; all share one record.

        Raises ValueError when no layer matches, RuntimeError for a layer whose processor computes
        something else than ``AttnProcessor2_0``, naming the layer and the remedy.
        """
        if options.get("record") is None:
            options["record"] = Record()
        chosen = cls._for(attention_layers(model), layers, type(model).__name__, options)
        names = {f"{name}.processor": made for name, (_, made) in chosen.items()}
        return {**model.attn_processors, **names}

    @classmethod
    @contextlib.contextmanager
    def on(
        cls, pipe_or_model: Any, layers: str | Iterable[str] = "*", **options: Any
    ) -> Iterator[Record]:
        """Put a processor on each chosen layer; at the end the very ones that were there are back.

            with fm.MapAttnProcessor.on(pipe, "*.attn1", reduce=("entropy",)) as record:
                pipe("a photo of a cat")

        Also after an exception. A processor that was replaced meanwhile is left alone.
        ``pipe_or_model`` and ``layers`` are those of `capture`, ``options`` those of the class.

        Raises as `for_layers` does.
        """
        models = denoisers(pipe_or_model)
        available: dict[str, nn.Module] = {}
        of: dict[str, dict[str, nn.Module]] = {}
        for prefix, model in models.items():
            of[prefix] = {prefix + n: layer for n, layer in attention_layers(model).items()}
            available |= of[prefix]
        if options.get("record") is None:
            options["record"] = Record()
        where = type(next(iter(models.values()))).__name__
        chosen = cls._for(available, layers, where, options)
        with contextlib.ExitStack() as undo:
            if options.get("grid") is None:
                for prefix, model in models.items():
                    own = {name: each for name, each in chosen.items() if name in of[prefix]}
                    undo.callback(_tell_tokens(model, prefix, own).remove)
            undo.enter_context(cls._told([made for _, made in chosen.values()], pipe_or_model))
            for layer, made in chosen.values():
                undo.callback(_put_back, layer, made, layer.processor)
                layer.processor = made
            yield options["record"]

    @classmethod
    def _told(cls, processors: list[Any], pipe_or_model: Any) -> contextlib.AbstractContextManager:
        """What `on` does besides, while its processors are in place."""
        return contextlib.nullcontext()

    @classmethod
    def _for(
        cls,
        available: dict[str, nn.Module],
        layers: str | Iterable[str],
        where: str,
        options: dict[str, Any],
    ) -> dict[str, tuple[Any, MapAttnProcessor]]:
        """Each chosen layer and the processor made for it, by name."""
        found: dict[str, tuple[Any, MapAttnProcessor]] = {}
        for name, layer in cls._among(choose_layers(available, layers, where)).items():
            fused = _is_fused(name, layer.processor, cls.__name__)
            made = cls(**{**options, "layer": name})
            made._fused = fused
            found[name] = layer, made
        return found

    @classmethod
    def _among(cls, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Those of the layers that this processor is for."""
        return layers

    def reset(self) -> None:
        """Count steps from 0 again, as before another run of the pipeline. The record stays."""
        for layer in self._layers.values():
            layer.calls = 0
            layer.worked.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has other layers; those of the original are not to be copied along.
        return {name: value for name, value in self.__dict__.items() if name != "_layers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._layers = weakref.WeakKeyDictionary()

    # -- what AttnProcessor2_0 does, in its order --------------------------------------------------

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What the layer ``attn`` makes of its input, [B, N, C] or [B, C, height, width]."""
        self._refuse(attn, encoder_hidden_states)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:  # [B, C, height, width] -> [B, N, C]
            hidden_states = hidden_states.view(*shape[:2], -1).transpose(1, 2)
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, keys, _ = seen.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = encoder_hidden_states
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        projected = self._project(attn, hidden_states, context)
        query, key, value = (
            x.view(batch, -1, attn.heads, projected[1].shape[-1] // attn.heads).transpose(1, 2)
            for x in projected
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        grid = (shape[2], shape[3]) if len(shape) == 4 else None
        attended = self._attend(
            attn, query, key, value, attention_mask, encoder_hidden_states, grid
        )
        hidden_states = attended.transpose(1, 2).flatten(2).to(query.dtype)  # [B, N, H * d]
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)  # dropout
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(batch, *shape[1:])
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _project(
        self, attn: Any, hidden_states: Tensor, context: Tensor | None
    ) -> tuple[Tensor, ...]:
        # As modules, never by their weights: LoRA and offloading act on the modules' calls.
        if self._fused and context is None:
            return attn.to_qkv(hidden_states).chunk(3, dim=-1)
        if self._fused:
            return attn.to_q(hidden_states), *attn.to_kv(context).chunk(2, dim=-1)
        context = hidden_states if context is None else context
        return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)

    def _refuse(self, attn: Any, context: Any) -> None:
        what = None
        if isinstance(context, (tuple, list)):
            what = "was given a tuple of contexts, as IP-Adapters do"
        elif not hasattr(attn, "spatial_norm"):
            what = f"was set on {type(attn).__name__}, which is not diffusers' Attention"
        elif getattr(attn, "add_k_proj", None) is not None or attn.to_out is None:
            what = "was set on a layer of joint attention"
        if what is not None:
            raise RuntimeError(
                f"{type(self).__name__} {what}; it does what AttnProcessor2_0 does, for self- and "
                "cross-attention. Leave the layer its own processor and use `fm.capture`"
            )

    # -- what it does besides ----------------------------------------------------------------------

    def _attend(
        self,
        attn: nn.Module,
        query: Tensor,  # [B, H, N, d]
        key: Tensor,  # [B, H, M, d]
        value: Tensor,  # [B, H, M, d]
        mask: Tensor | None,  # [B, H, 1 or N, M], additive
        context: Tensor | None,
        grid: Grid | None,
    ) -> Tensor:
        layer, step, first_time = self._count(attn)
        if not self._works(layer, step, first_time, context):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        own = key, value, mask
        key, value, mask, parts = self._mix(key, value, mask)
        if not first_time:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return self._blend(attended, query, *own, grid)
        attended, lse = attend(query, key, value, mask, wants_lse=self._gains_from_lse(query))
        tokens, keys = query.shape[2], key.shape[2]
        found = self._layout(grid, context is None, tokens, keys)
        first, alike = key_mask(mask, query.shape[0])
        self._recorder.source = source_of((query, key))
        self._recorder.take(
            Entry(
                layer=layer.name,
                step=step,
                kind=found.kind,
                query=query,
                key=key,
                scale=query.shape[-1] ** -0.5,
                grid=found.grid,
                queries=found.queries,
                keys=parts or found.keys,
                rows=self._tokens.rows if self._tokens is not None and found.grid else 1,
                why=found.why,
                lse=lse,
                _mask=first,
                _mask_alike=alike,
            )
        )
        return self._blend(attended, query, *own, grid)

    def _blend(
        self,
        attended: Tensor,  # [B, H, N, d]
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        grid: Grid | None,
    ) -> Tensor:
        """What the layer gives on: from what `_mix` made of keys and values, and from its own."""
        return attended

    def _layout(self, grid: Grid | None, alone: bool, queries: int, keys: int) -> Layout:
        """The layout of a layer: of its picture, of its model, or of square grids."""
        plan, tokens = self._plan, self._tokens
        if grid is not None or plan is None or tokens is None:
            plan, grid = _STOCK_PLAN, grid or self._grid
            tokens = _stock_tokens(grid, None if grid is not None else queries)
        found = self._layouts.of(tokens)
        key = plan.rule is _STOCK_PLAN.rule, alone, queries, keys
        if key not in found:
            found[key] = layout(plan, alone, 0, queries, keys, tokens)
        return found[key]

    def _mix(
        self, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, slice]]:
        """Keys, values and mask to attend with, and the names of key ranges where they changed."""
        return key, value, mask, {}

    def _count(self, attn: nn.Module) -> tuple[Layer, int, bool]:
        """The layer, the step it is in, and whether it is there for the first time.

        Gradient checkpointing calls a layer again, within backward, for a step it has had.
        """
        layer = self._layers.get(attn)
        if layer is None:
            if self._name is not None and self._layers:
                raise RuntimeError(
                    f"this {type(self).__name__} has layer={self._name!r} and was set on a second "
                    "attention layer; leave layer= out, or use for_layers"
                )
            name = f"attention {len(self._layers)}" if self._name is None else self._name
            layer = self._layers.setdefault(attn, Layer(name))
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and layer.calls:
            return layer, layer.calls - 1, False
        layer.calls += 1
        return layer, layer.calls - 1, True

    def _works(self, layer: Layer, step: int, first_time: bool, context: Tensor | None) -> bool:
        """Whether this call is one of those that it is for."""
        return self._wanted_step(step)

    def _gains_from_lse(self, query: Tensor) -> bool:
        """Whether statistics cost less with the log-sum-exp of attention than without."""
        recorder = self._recorder
        if query.is_cuda:  # not measured on hardware: it saves one of two passes
            return True
        # The CPU's kernel finds it on its way, in a single pass. Given one, rows take 0.95 of the
        # time (5 x 4096 x 64); but rows and columns together take two passes and twice the time.
        names = set(recorder.names)
        of_rows = names <= _ROW_STATISTICS and not recorder.functions
        return bool(names) and (of_rows or recorder.block is not None)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, wants_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """scaled_dot_product_attention, and the log-sum-exp of its scores: [B, H, N], or None.

    Where torch would choose its flash kernel, that kernel is called as torch calls it, so the
    output has the same bits and the same gradient; it returns log sum_j exp(scale q_i k_j + mask)
    beside. Elsewhere there is no log-sum-exp. Nor is there one while a TorchFunctionMode is active,
    such as that of `capture`: it listens for the public function, which is then what is called.
    """
    if wants_lse and _chooses_flash(query, key, value, mask):
        aten = torch.ops.aten
        if query.is_cuda:  # not measured on hardware
            found = aten._scaled_dot_product_flash_attention(query, key, value)
        else:
            found = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, attn_mask=mask
            )
        return found[0], found[1].detach()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask), None


def _chooses_flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    device = query.device.type
    if device not in ("cpu", "cuda") or torch._C._is_torch_function_mode_enabled():
        return False
    if device == "cuda" and query.shape[-1] % 8:  # torch pads it first
        return False
    if mask is not None and mask.dtype == torch.bool:  # torch makes it additive first
        return False
    if torch.is_autocast_enabled(device):
        # Autocast converts the arguments of the public function only.
        to = torch.get_autocast_dtype(device)
        if any(x is not None and x.dtype != to for x in (query, key, value, mask)):
            return False
    return torch._fused_sdp_choice(query, key, value, attn_mask=mask) == _FLASH


def _is_fused(layer: str, processor: Any, wanted: str) -> bool:
    """Whether a processor that is to be replaced uses fused projections; refuses all but stock."""
    if isinstance(processor, MapAttnProcessor):
        return processor._fused
    name = processor.__class__.__name__  # not type(): a capture's stand-in says what it stands for
    if name not in _STOCK:
        refuse_unobservable(layer, processor)
        raise RuntimeError(
            f"layer {layer!r} uses {name}; {wanted} takes the place of AttnProcessor2_0 and "
            "FusedAttnProcessor2_0 alone, since it computes what they do. Choose other layers, "
            "such as layers='*.attn1', or observe this one with `fm.capture`"
        )
    return _STOCK[name]


def _tell_tokens(
    model: nn.Module, prefix: str, chosen: dict[str, tuple[Any, MapAttnProcessor]]
) -> Any:
    """A hook on ``model`` that tells its processors what it is called with."""
    for name, (layer, made) in chosen.items():
        processor = getattr(layer.processor, "_fm_processor", layer.processor)
        made._plan = plan_of(model, name.removeprefix(prefix), layer, processor)

    def before(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found = tokens_of(model, called_with(model, args, kwargs))
        for _, made in chosen.values():
            made._tokens = found

    return model.register_forward_pre_hook(before, with_kwargs=True)


def _put_back(layer: Any, ours: MapAttnProcessor, before: Any) -> None:
    """Undo `layer.processor = ours`, unless someone has set another processor since."""
    now = layer.processor
    if now is ours:
        layer.processor = before
    elif is_stand_in(now) and now._fm_processor is ours:  # of a capture that is not over
        object.__setattr__(now, "_fm_processor", before)


def _exempt_from_compilation() -> None:
    """Have torch.compile call `_attend` instead of tracing it.

    It remembers: traced, it would be done once. This waits for the first processor, since
    torch.compiler.disable loads torch._dynamo, which takes a second and which diffusers loads too.
    """
    if not hasattr(MapAttnProcessor._attend, "_torchdynamo_orig_callable"):
        reason = "it records attention: compile without fullgraph=True, or use fm.capture"
        uncompiled = torch.compiler.disable(MapAttnProcessor._attend, reason=reason)
        setattr(MapAttnProcessor, "_attend", uncompiled)  # noqa: B010
