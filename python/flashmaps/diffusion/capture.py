"""Observe the attention of a diffusers model while it runs, without touching its output.

    with fm.capture(pipe, kind="self", reduce=("entropy", "argmax")) as rec:
        pipe("a photo of a cat")
    for entry in rec:
        print(entry.layer, entry.grid, entry.entropy.mean())

Q and K are seen as the attention sees them, layer by layer, and either kept (O(N d) numbers, from
which lazy maps are made later) or reduced at once to statistics of the map. The N x M map is never
built.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashmaps.diffusion.absence import LeftOut, why_nothing
from flashmaps.diffusion.called import called_with, latents_of, timestep_of
from flashmaps.diffusion.compiled import (
    attach_traceable,
    compiled_modules,
    refuse_checkpointing,
    uncompiled,
)
from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.graph import check_followed, source_of
from flashmaps.diffusion.guidance import GUIDANCE, Passes
from flashmaps.diffusion.known import (
    plan_of,
    said,
    said_grid,
    tokens_of,
    with_grid,
)
from flashmaps.diffusion.layouts import KINDS, Forward, Layout, Layouts, Plan, layout
from flashmaps.diffusion.observe import (
    AttentionCall,
    Listener,
    ProcessorCall,
    QueryMasks,
    attach,
    attention_layers,
    choose_layers,
    detach,
    find_layers,
    image_prompt,
    key_mask,
    refuse_unobservable,
    without_maps_left_out,
)
from flashmaps.diffusion.positions import rotary, rotates
from flashmaps.diffusion.record import Record
from flashmaps.diffusion.recorder import Recorder, Tally
from flashmaps.diffusion.selection import of_guidance, resolutions, whole_numbers
from flashmaps.maps.grids import Grid

__all__ = ["Entry", "Record", "capture", "denoisers", "find_layers"]


class Estimate(NamedTuple):
    """What a capture would keep: bytes in all, bytes for each step (0 for means), and entries."""

    bytes: int
    bytes_per_step: int
    entries: int


_numbers = itertools.count()
# Those captures that were entered in this context, by number.
_entered: ContextVar[frozenset[int]] = ContextVar("flashmaps_captures", default=frozenset())


class capture:
    """Context manager that records chosen attention layers of a running model (example above).

    Args:
        pipe_or_model: a diffusers pipeline (its ``unet`` or ``transformer`` is observed; layers of
            a second one, ``transformer_2``, have that name before theirs), or such a model.
        layers: one or several patterns in the manner of :mod:`fnmatch` on full layer names.
        kind: "self", "cross", "joint", "temporal", "image_prompt" or "unknown", or several; None
            records all.
        resolution: image grids of the layers to record: n for (n, n), a tuple (height, width), or
            a list of these; None records all.
        steps: which denoising steps to record, counted from 0: an int, a collection or a range of
            ints, or a function of the index; None records all. Guidance in two forward passes
            counts as one step.
        keep, reduce, pool_to, block: what is kept, and what is computed at once; see
            :class:`flashmaps.diffusion.recorder.Recorder`. ``keep="qk"`` keeps Q and K of every
            pass; ``reduce=("entropy", "argmax", "density", ...)`` keeps for each layer the mean of
            these statistics over passes, and ``keep="statistics"`` with it those of each pass.
        per_head: statistics of each head by itself, ``[B, H, ...]``; then ``reduce`` may also name
            "max_logit", the largest scaled score of a row.
        grad: keep Q and K with the graph that they were computed in (``keep="qk"``), so that losses
            of ``entry.map()`` have gradients, also under gradient checkpointing. Without it, a
            gradient that comes to what was captured raises.
        guidance: with classifier-free guidance, record only the ``"conditional"`` or the
            ``"unconditional"`` part. A run without guidance is conditional. Guidance is told from
            the pipeline, which must be the one that runs (or its guider), and from the batch
            holding the same latents twice; docs/models.md has the exceptions.
        batch: the parts of guidance that a batch holds, in order, where the pipeline does not tell:
            ``("unconditional", "conditional")``. Names are free; the batch divides by them evenly.
        dtype, device: convert the recorded Q and K, for instance ``device="cpu"``.
        to: a folder to write what is kept to while the model runs, in parts of 256 MB, so that
            memory does not grow with the steps (``keep="qk"`` or ``"statistics"``). The record is
            then read from there when it is used, on the CPU; later, ``fm.Record.load(folder)``.
        parts: which tokens are image and which text, where that is not known here (docs/models.md)
            or otherwise than it says: names in the order in which they stand, ``"text + image"``,
            or ``"image -> text"`` where the keys are others than the queries; ranges by name,
            ``{"text": slice(0, 77), "image": slice(77, 333)}``; ``{"queries": ..., "keys": ...}``
            with ranges of each; or one of these by pattern of layers. See also
            :func:`flashmaps.register_layout`.
        grid: (height, width) of the finest image tokens, or (frames, height, width) of a video's
            in one sequence, where that is not known here.

    Yields a :class:`Record`. Forward passes in the thread and asyncio task that entered, and in
    tasks it has started since, are recorded, those of others are not. On exit every processor is
    the very object it was before, also after an exception; captures may be nested, may be left in
    any order, and may be entered again.

    Raises ValueError when no layer matches, and RuntimeError when an attention path cannot be
    observed (it does not call scaled_dot_product_attention), naming the layer and the remedy. Warns
    when the model ran and nothing was recorded.

    A compiled model is compiled once more for captures, and its first graph is used again after
    them. Give the compiled one: ``capture(torch.compile(unet))``, not ``capture(unet)``. CUDA
    graphs, and attention that is not compiled in one piece, are refused.
    """

    def __init__(
        self,
        pipe_or_model: Any,
        layers: str | Iterable[str] = "*",
        *,
        kind: str | Iterable[str] | None = None,
        resolution: Any = None,
        steps: int | Iterable[int] | Callable[[int], bool] | None = None,
        keep: str | None = None,
        reduce: Any = (),
        pool_to: Grid = (16, 16),
        block: str | None = None,
        per_head: bool = False,
        grad: bool = False,
        guidance: str | None = None,
        batch: Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        to: str | Path | None = None,
        parts: Any = None,
        grid: Any = None,
    ) -> None:
        self._given = denoisers(pipe_or_model)
        self._models = {name: uncompiled(model) for name, model in self._given.items()}
        compiled_modules(self._given.values())  # refuses CUDA graphs
        self._layers = without_maps_left_out(_find_layers(self._models, layers))
        for name, layer in self._layers.items():
            refuse_unobservable(name, layer.processor)
        self._parts, self._said_grid = said(parts), said_grid(grid)
        self._kinds = _kinds(kind)
        self._grids = None if resolution is None else resolutions(resolution)
        self._wanted_step = step_filter(steps)
        if guidance is not None and guidance not in GUIDANCE:
            raise ValueError(
                f"guidance={guidance!r}; choose 'conditional', 'unconditional' or None (both)"
            )
        self._guidance = guidance
        self._recorder = Recorder(
            keep=keep,
            reduce=reduce,
            pool_to=pool_to,
            block=block,
            dtype=dtype,
            device=device,
            to=to,
            per_head=per_head,
            grad=grad,
        )
        self._thread: int | None = None
        self._number = next(_numbers)
        self._passes = Passes(
            pipe_or_model, self._models.values(), asked=guidance is not None, batch=batch
        )
        self._forward: Forward | None = None
        self._plans: dict[str, Plan] = {}
        self._query_masks = QueryMasks()
        self._layouts = Layouts()
        # What happened, to say why nothing was recorded.
        self._recorded = self._ran = self._ran_elsewhere = False
        self._left: dict[str, LeftOut] = {}
        self._asked = {"kind": kind, "resolution": resolution, "guidance": guidance}
        self._undo = contextlib.ExitStack()
        self._stand_ins: dict[str, Any] = {}
        self._compiled: set[nn.Module] = set()

    def __enter__(self) -> Record:
        if self._thread is not None:
            raise RuntimeError("this capture is already active; make a second one to nest them")
        self._compiled = compiled_modules(self._given.values())
        if self._compiled and self._recorder.grad:
            raise RuntimeError(
                "grad=True cannot see the graph within a compiled model: capture the model that "
                "torch.compile was given"
            )
        self._thread = threading.get_ident()
        _entered.set(_entered.get() | {self._number})
        try:
            self._attach(self._compiled)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self._recorder.record

    def _attach(self, compiled: set[nn.Module]) -> None:
        # torch.compile leaves the hooks of a model outside, but would compile their functions too.
        # (Only where there is need: this loads torch._dynamo, which takes a second.)
        outside = torch.compiler.disable if compiled else lambda hook: hook
        for model in self._models.values():
            before = model.register_forward_pre_hook(
                outside(self._before_forward), with_kwargs=True
            )
            after = model.register_forward_hook(outside(self._after_forward), always_call=True)
            self._undo.callback(before.remove)
            self._undo.callback(after.remove)
        self._passes.watch(self, self._undo)
        for name, layer in self._layers.items():
            listener = Listener(self, name, self._is_wanted, self._observe)
            put = attach_traceable if layer in compiled else attach
            self._stand_ins[name] = stand_in = put(layer, listener)
            self._undo.callback(detach, layer, stand_in, self)
            self._plans[name] = self._plan(name, layer, stand_in._fm_processor)
        # The other compiled layers too, so that the graph is the same whichever are chosen.
        for name, layer in _find_layers(self._models, "*").items() if compiled else ():
            if layer in compiled and name not in self._layers:
                stand_in = attach_traceable(layer, Listener(self, name, _never, self._observe))
                self._undo.callback(detach, layer, stand_in, self)

    def _plan(self, name: str, layer: nn.Module, processor: Any) -> Plan:
        prefix = max((each for each in self._models if name.startswith(each)), key=len)
        own = name.removeprefix(prefix)
        return plan_of(self._models[prefix], own, layer, processor, self._parts, full=name)

    def __exit__(self, *exception: object) -> None:
        self._undo.close()
        self._stand_ins.clear()
        self._compiled.clear()
        self._thread = self._forward = None
        _entered.set(_entered.get() - {self._number})
        self._plans.clear()
        self._query_masks.forget()
        self._layouts.clear()
        self._recorder.end()
        if not any(exception) and not self._recorded and (why := self._why_nothing()):
            warnings.warn(f"nothing was recorded: {why}", stacklevel=2)

    def _why_nothing(self) -> str | None:
        """Why there are no entries; None where the model did not run."""
        if self._left:
            return why_nothing(self._left, self._asked)
        if self._ran:
            return "the model ran, but none of the chosen layers did"
        if self._passes.step >= 0:
            return f"the model ran {self._passes.step + 1} steps, of which steps= chose none"
        if self._ran_elsewhere:
            return "the model ran in another thread or task than the one that entered the capture"
        return None

    def estimate(self, run_one_step: Callable[[], Any], *, steps: int = 1) -> Estimate:
        """How many bytes a run of ``steps`` steps would keep, from running one of them.

            cap = fm.capture(pipe, kind="self", keep="qk", dtype=torch.float16)
            cap.estimate(lambda: pipe("a cat", num_inference_steps=1), steps=50).bytes

        Nothing is kept of this run. It takes the layers, kinds, grids, guidance and ``steps=`` of
        the capture into account, not passes that other steps have and the first has not.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        recorder, wanted = self._recorder, self._wanted_step
        tally: Any = Tally(recorder)
        tally.grad = False
        self._recorder, self._wanted_step = tally, lambda step: True
        try:
            with self:
                run_one_step()
        finally:
            self._recorder, self._wanted_step = recorder, wanted
            ran = self._passes.step + 1
            self._passes.forget()
            self._recorded = self._ran = False
            self._left.clear()
        if ran < 1:
            raise ValueError("the model did not run: give a function that runs the pipeline")
        per_step = round(sum(size for _, size in tally.each) / ran)
        chosen = sum(map(bool, map(wanted, range(steps))))
        constant = sum(tally.means.values())
        entries = round(len(tally.each) / ran * chosen) + len(tally.means)
        return Estimate(per_step * chosen + constant, per_step, entries)

    def __deepcopy__(self, memo: Any) -> capture:
        return self  # a copy of a captured model has its hooks, but is another model: see below

    # -- the model's forward passes ----------------------------------------------------------------

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if model not in self._passes:  # a copy that was made within
            return
        # Coroutines share a thread, but each has a context of its own; what they start inherits it.
        if threading.get_ident() != self._thread or self._number not in _entered.get():
            self._ran_elsewhere = True
            return
        refuse_checkpointing(self._compiled)
        for name, stand_in in self._stand_ins.items():
            if self._layers[name].processor is not stand_in:
                raise RuntimeError(
                    f"the processor of layer {name!r} was replaced while it was captured "
                    "(attention slicing, fuse_qkv_projections and load_ip_adapter do that; do it "
                    "before `fm.capture`. Pipelines with perturbed attention guidance do it to "
                    "their pag_applied_layers: choose other layers)"
                )
        given = called_with(model, args, kwargs)
        guidance, batch = self._passes.begin(model, given)
        step = self._passes.step
        if not self._wanted_step(step):
            self._forward = None
            return
        self._ran = True
        self._recorder.source = source_of((args, kwargs), model)
        timestep = timestep_of(given)
        if isinstance(timestep, Tensor):  # a copy: the pipeline's own would keep all of them alive
            timestep = timestep.detach().flatten()[:1].clone()
        latents = latents_of(given)
        tokens = with_grid(tokens_of(model, given), self._said_grid)
        if tokens.items and self._guidance in batch:
            part = len(tokens.items) // len(batch)
            start = part * batch.index(self._guidance)
            tokens = tokens.of_items(start, start + part)
        self._forward = Forward(
            step=step,
            timestep=timestep,
            tokens=tokens,
            guidance=guidance,
            batch=batch,
            images=None if latents is None else len(latents),
            found=self._layouts.of(tokens),
        )

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        # Gradient checkpointing runs layers a second time, in backward: that is not recorded.
        if threading.get_ident() == self._thread and model in self._passes:
            self._forward = None

    # -- the layers --------------------------------------------------------------------------------

    def _is_wanted(self) -> bool:
        return self._forward is not None and threading.get_ident() == self._thread

    def _layout(
        self, layer: str, plan: Plan, alone: bool, index: int, queries: int, keys: int, at: Forward
    ) -> Layout:
        try:
            found = layout(plan, alone, index, queries, keys, at.tokens)
        except ValueError as error:
            error.add_note(f"Raised for layer {layer!r}.")
            raise
        at.found[layer, alone, index, queries, keys] = found
        return found

    def _observe(
        self, layer: str, call: ProcessorCall, index: int, attention: AttentionCall
    ) -> None:
        at = self._forward
        assert at is not None
        if self._recorder.grad:
            check_followed(layer)
        query, key = attention.query, attention.key
        tokens, keys = query.shape[-2], key.shape[-2]
        plan, alone = self._plans[layer], call.context is None
        found = at.found.get((layer, alone, index, tokens, keys))
        if found is None:
            found = self._layout(layer, plan, alone, index, tokens, keys, at)
        if self._kinds is not None and found.kind not in self._kinds:
            self._left[layer] = LeftOut.of(found, at.guidance, "kind")
            return
        if self._grids is not None and found.grid not in self._grids:
            self._left[layer] = LeftOut.of(found, at.guidance, "resolution")
            return
        guidance, batch = at.guidance, at.batch
        if plan.rule is not None and plan.rule.each and batch and at.images:
            guidance, batch = batch[index * len(batch) // at.images], ()
        by_query = self._query_masks.of(attention.mask)
        if by_query is None:
            mask, alike = key_mask(attention.mask, query.shape[0])
        else:
            mask, alike = by_query.expand(query.shape[0], -1, -1), None
        prompted = found.kind == "image_prompt"
        adapter, picture = image_prompt(call, index) if prompted else (None, None)
        entry = Entry(
            layer=layer,
            step=at.step,
            kind=found.kind,
            query=query,
            key=key,
            scale=attention.scale,
            grid=found.grid,
            frames=found.frames,
            queries=found.queries,
            keys=found.keys,
            guidance=guidance,
            batch=batch,
            call=index,
            adapter=adapter,
            adapter_image=picture,
            rows=at.tokens.rows if found.grid is not None else 1,
            why=found.why,
            causal=attention.causal,
            rotary=rotary(call.processor, call.arguments, tokens, query.shape[-1]),
            rotated=rotates(call.arguments) and found.kind != "image_prompt",
            _mask=mask,
            _mask_alike=alike,
            _timestep=at.timestep,
        )
        chosen = entry if self._guidance is None else of_guidance(entry, self._guidance)
        if chosen is None:
            self._left[layer] = LeftOut.of(found, at.guidance, "guidance")
            return
        self._recorder.take(chosen)
        self._recorded = self._recorded or len(self._recorder.record) > 0
        if not self._recorded:
            self._left[layer] = LeftOut.of(found, at.guidance, "text")


def denoisers(pipe_or_model: Any) -> dict[str, nn.Module]:
    """The models that denoise, each with what its layers' names begin with.

    A pipeline's ``unet`` or ``transformer``, and a second one where it has it; or the model itself.
    """
    if isinstance(pipe_or_model, nn.Module):
        return {"": pipe_or_model}
    found = {}
    for name, prefix in (
        ("unet", ""),
        ("transformer", ""),
        ("transformer_2", "transformer_2."),
    ):
        model = getattr(pipe_or_model, name, None)
        if isinstance(model, nn.Module):
            found[prefix] = model
    if not found:
        raise TypeError(
            "capture needs a diffusers pipeline with a `unet` or `transformer`, or such a model; "
            f"got {type(pipe_or_model).__name__}"
        )
    return found


def _never() -> bool:
    return False


def _find_layers(models: dict[str, nn.Module], layers: str | Iterable[str]) -> dict[str, nn.Module]:
    available = {
        prefix + name: layer
        for prefix, model in models.items()
        for name, layer in attention_layers(model).items()
    }
    return choose_layers(available, layers, type(next(iter(models.values()))).__name__)


def _kinds(kind: str | Iterable[str] | None) -> set[str] | None:
    if kind is None:
        return None
    kinds = {kind} if isinstance(kind, str) else set(kind)
    if not kinds or not kinds <= set(KINDS):
        raise ValueError(f"kind={kind!r}; choose from {', '.join(KINDS)}")
    return kinds


def step_filter(
    steps: int | Iterable[int] | Callable[[int], bool] | None,
) -> Callable[[int], bool]:
    """``steps=`` as a function of a step's index; see `capture`."""
    if steps is None:
        return lambda step: True
    if callable(steps):
        return steps
    return whole_numbers("steps", steps).__contains__
