"""Which part of guidance a forward pass is, or which parts its batch holds.

Stable Diffusion runs [unconditional, conditional] as one batch, Flux and the guiders of modular
pipelines run one pass after another, perturbed attention and InstructPix2Pix have three parts. What
a layer sees tells nothing of this; it is read from the pipeline, and stated only where it is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashmaps.diffusion.called import latents_of, timestep_of
from flashmaps.diffusion.known import guides_in_two_passes
from flashmaps.diffusion.observe import ContextWatch, unwatch_context, watch_context

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
GUIDANCE = (CONDITIONAL, UNCONDITIONAL)
HALVES = (UNCONDITIONAL, CONDITIONAL)  # the order of most of diffusers' pipelines

# A pass by its name: that of its cache context, of the guider's prediction, or, where the pipeline
# gives it none, ours for a further pass of a step.
_AGAIN, _SKIPS = "the same latents again", "with layers skipped"
_PASSES = {
    "cond": CONDITIONAL,
    "uncond": UNCONDITIONAL,
    "pred_cond": CONDITIONAL,
    "pred_uncond": UNCONDITIONAL,
}
_ONE_BATCH = {"cond_uncond"}  # names of a context that holds all parts in one batch

_REVERSED: dict[int, tuple[str, ...]] = {2: (CONDITIONAL, UNCONDITIONAL)}
_EDITS: dict[int, tuple[str, ...]] = {3: (CONDITIONAL, "image", UNCONDITIONAL)}
# Pipelines of diffusers whose batch is not [unconditional, conditional]: parts by their number.
# Empty: there are parts, but how many depends on what no model is told.
ORDERS: dict[str, dict[int, tuple[str, ...]]] = {
    "PAGMixin": {
        2: (CONDITIONAL, "perturbed"),
        3: (UNCONDITIONAL, CONDITIONAL, "perturbed"),
    },
    "StableDiffusionInstructPix2PixPipeline": _EDITS,
    "StableDiffusionXLInstructPix2PixPipeline": _EDITS,
    "DreamLitePipeline": {2: HALVES, 3: (UNCONDITIONAL, "image", CONDITIONAL)},
    "OmniGenPipeline": {**_REVERSED, 3: (CONDITIONAL, UNCONDITIONAL, "image")},
    "LuminaPipeline": _REVERSED,
    "ZImagePipeline": _REVERSED,
    "StableCascadeDecoderPipeline": _REVERSED,
    "StableCascadePriorPipeline": _REVERSED,
    "WuerstchenDecoderPipeline": _REVERSED,
    "WuerstchenPriorPipeline": _REVERSED,
    "StableDiffusionPipelineSafe": {2: HALVES, 3: (UNCONDITIONAL, CONDITIONAL, "safety")},
    "SemanticStableDiffusionPipeline": {},
    "LEditsPPPipelineStableDiffusion": {},
    "LEditsPPPipelineStableDiffusionXL": {},
    "StableDiffusionDiffEditPipeline": {},
    "StableDiffusionGLIGENTextImagePipeline": {},
}
# Models beyond the families whose layout is known that are run twice a step, first with the prompt.
_TWO_PASSES = {
    "BriaFibo2Transformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "JoyImageEditTransformer3DModel",
    "Krea2Transformer2DModel",
    "NucleusMoEImageTransformer2DModel",
}
# Their pipelines convert the latents for each pass, and say nothing of guidance but its scale.
_CAST = {"Kandinsky5Transformer3DModel", "HunyuanVideoFramepackTransformer3DModel"}
# Models whose latents have frames before channels: [B, F, C, height, width].
_FRAMES_FIRST = {"UNetSpatioTemporalConditionModel", "CogVideoXTransformer3DModel"}


def label_of(parts: tuple[str, ...]) -> str | None:
    """`Entry.guidance` of a batch of these parts."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return "both" if len(parts) == 2 and set(parts) == set(GUIDANCE) else "several"


class GuiderWatch:
    """Stands before a guider's ``prepare_inputs``, which names the passes that are to come.

    The pipelines that diffusers calls modular, and some others, leave guidance to a guider: it
    makes a list of inputs ("pred_cond", "pred_uncond", "pred_cond_skip", ...), and the model runs
    once for each, in their order.
    """

    def __init__(self, guider: Any) -> None:
        self._guider = guider
        self._names: list[str] | None = None
        self._at = 0

    def attach(self, undo: contextlib.ExitStack) -> None:
        """Watch the guider until ``undo`` is closed."""
        for name in ("prepare_inputs", "prepare_inputs_from_block_state"):
            original = getattr(self._guider, name, None)
            if original is None:
                continue
            ours = self._watching(original)
            # diffusers' configs refuse no attribute, but warn: hence by the dictionary.
            before = self._guider.__dict__.get(name)
            self._guider.__dict__[name] = ours
            undo.callback(self._restore, name, ours, before)

    def _restore(self, name: str, ours: Any, before: Any) -> None:
        if self._guider.__dict__.get(name) is not ours:
            return  # another capture's watch stands before this one, and calls on through it
        if before is None:
            del self._guider.__dict__[name]
        else:
            self._guider.__dict__[name] = before

    def _watching(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(*args: Any, **kwargs: Any) -> Any:
            batches = original(*args, **kwargs)
            key = getattr(self._guider, "_identifier_key", "")
            self._names = [str(getattr(each, key, None)) for each in batches]
            self._at = 0
            return batches

        return prepare

    def next(self) -> tuple[str, bool] | None:
        """Name of the pass that begins, and whether it is its step's first; None: none planned."""
        if self._names is None or self._at >= len(self._names):
            return None
        self._at += 1
        return self._names[self._at - 1], self._at == 1


class Passes:
    """Tells the forward passes of a running model apart: steps, and parts of guidance.

    Args:
        pipe: the pipeline that runs, or a bare model.
        models: its denoisers.
        asked: whether one part of guidance was asked for. Of a bare model nothing is read else.
        batch: the parts of a batch in order, as the user gives them; None: what the pipeline tells.
    """

    def __init__(
        self,
        pipe: Any,
        models: Iterable[nn.Module],
        *,
        asked: bool = False,
        batch: Iterable[str] | None = None,
    ) -> None:
        self._pipe = None if isinstance(pipe, nn.Module) else pipe
        self._models = list(models)
        self._asked = asked
        self._given = None if batch is None else _checked(batch)
        self._order = _order(self._pipe)
        self._contexts: dict[nn.Module, ContextWatch | None] = {}
        self._guiders: list[GuiderWatch] = []
        self.forget()

    def forget(self) -> None:
        """Begin anew, as for another run."""
        self.step = -1
        self._seen: set[str | None] = set()  # names of this step's passes
        self._shown: tuple[Any, Any] = (None, None)  # last: latents, timestep

    def watch(self, owner: object, undo: contextlib.ExitStack) -> None:
        """Listen to cache contexts and guiders until ``undo`` is closed."""
        for model in self._models:
            self._contexts[model] = watch_context(model, owner)
            undo.callback(unwatch_context, model, owner)
        self._guiders = [GuiderWatch(each) for each in guiders(self._pipe)]
        for watch in self._guiders:
            watch.attach(undo)
        undo.callback(self._let_go)

    def _let_go(self) -> None:
        self._contexts.clear()
        self._guiders = []
        self._shown = (None, None)

    def __contains__(self, model: object) -> bool:
        return model in self._contexts

    def begin(
        self, model: nn.Module, given: Mapping[str, Any]
    ) -> tuple[str | None, tuple[str, ...]]:
        """A forward pass begins: `Entry.guidance` and `Entry.batch` of it. Counts steps.

        A step may have several passes, each with a name; one without a name begins a step.
        """
        name: str | None
        planned = next((found for each in self._guiders if (found := each.next())), None)
        if planned is not None:
            name, first = planned
            self._count(first)
        else:
            name = self._name(model, given)
            ours = name in (_AGAIN, _SKIPS)
            another = name not in self._seen and (ours or None not in self._seen | {name})
            self._count(not (self._seen and another))
        self._seen.add(name)
        parts = self._parts(model, given, name)
        if parts:
            return label_of(parts), parts if len(parts) > 1 else ()
        return self._label(model, given, name), ()

    def _count(self, begins: bool) -> None:
        if begins:
            self.step += 1
            self._seen = set()

    def _name(self, model: nn.Module, given: Mapping[str, Any]) -> str | None:
        """What tells this pass from others of its step; None: nothing does."""
        watch = self._contexts[model]
        if watch is not None and watch.name is not None:
            return watch.name
        if given.get("skip_layers"):  # SD3's skip-layer guidance
            return _SKIPS
        if self._pipe is None or self._given is not None:
            return None
        # Many pipelines with two passes do not name them (image to image, Kontext, ControlNet).
        two = _prompt_first(model)
        latent, timestep = latents_of(given), timestep_of(given)
        if not two and (not self._told() or self._repeats(model, latent)):
            return None
        last, before = self._shown
        self._shown = (latent, timestep)
        # Equal numbers in another tensor may be another run of the same seed, unless it guides.
        casts = (
            type(model).__name__ in _CAST and (getattr(self._pipe, "guidance_scale", 0) or 0) > 1
        )
        same = latent is last or ((self._told() or casts) and _equal(latent, last))
        return _AGAIN if last is not None and same and _equal(timestep, before) else None

    def _label(self, model: nn.Module, given: Mapping[str, Any], name: str | None) -> str | None:
        """Of a pass whose batch is one part, or of which no parts are known."""
        if name in _PASSES:
            return _PASSES[name]
        if self._pipe is not None and _prompt_first(model) and name in (None, _AGAIN):
            return UNCONDITIONAL if name == _AGAIN else CONDITIONAL
        if name is not None and name != _AGAIN and name not in _ONE_BATCH:
            return "other"
        if self._pipe is None or self._told() is False:
            return None
        return "unknown" if self._told() or self._repeats(model, latents_of(given)) else None

    def _told(self) -> bool | None:
        """Whether the pipeline says that it guides; None: it says nothing."""
        # Properties of a pipeline that never ran raise AttributeError.
        told = getattr(self._pipe, "do_classifier_free_guidance", None)
        perturbs = getattr(self._pipe, "do_perturbed_attention_guidance", None)
        if told is None and perturbs is None:
            return None
        return bool(told) or bool(perturbs)  # `bool`: a numpy scale makes a numpy bool

    def _parts(
        self, model: nn.Module, given: Mapping[str, Any], name: str | None
    ) -> tuple[str, ...]:
        """The equal parts that the batch holds, in order; empty: one part, or not known."""
        latent = latents_of(given)
        if self._given is not None and name is None:
            if latent is not None and len(latent) % len(self._given):
                raise ValueError(
                    f"batch={self._given}: a batch of {len(latent)} does not divide into "
                    f"{len(self._given)} parts"
                )
            return self._given
        if name is not None and name not in _ONE_BATCH:
            return ()
        if self._pipe is not None and name is None and _prompt_first(model):
            return ()
        if latent is None or self._told() is False or (self._pipe is None and not self._asked):
            return ()
        latent = self._only_latents(model, latent)
        found = [parts for n, parts in self._orders().items() if _repeats(latent, n)]
        # Two repetitions of three images look like three of two: then it is not known.
        return found[0] if len(found) == 1 else ()

    def _orders(self) -> dict[int, tuple[str, ...]]:
        """The parts that a batch of this pipeline may be made of, by their number."""
        if self._order is not ORDERS["PAGMixin"]:
            return self._order
        # It says how many they are. Without perturbation it guides as its namesake does.
        if not getattr(self._pipe, "do_perturbed_attention_guidance", False):
            return {2: HALVES}
        count = 3 if getattr(self._pipe, "do_classifier_free_guidance", False) else 2
        return {count: self._order[count]}

    def _repeats(self, model: nn.Module, latent: Tensor | None) -> bool:
        """Whether the batch holds the same latents several times."""
        if latent is None:
            return False
        return any(_repeats(self._only_latents(model, latent), n) for n in (2, 3))

    def _only_latents(self, model: nn.Module, latent: Tensor) -> Tensor:
        """Without the channels of a picture beside them, which may differ between the parts."""
        config = getattr(getattr(self._pipe, "vae", None), "config", None)
        channels = getattr(config, "latent_channels", None)
        dim = 2 if type(model).__name__ in _FRAMES_FIRST and latent.ndim == 5 else 1
        if latent.ndim >= 4 and isinstance(channels, int) and latent.shape[dim] > channels:
            return latent.narrow(dim, 0, channels)
        return latent


UNTOLD = (
    "the pipeline guides, but which part of its batch or which pass saw the prompt cannot be told; "
    "say the order with batch=, such as batch=('unconditional', 'conditional'), or record all "
    "parts with guidance=None"
)


def guiders(pipe: Any) -> list[Any]:
    """The guiders of a pipeline: modular ones have one, HunyuanImage has two."""
    if pipe is None or isinstance(pipe, nn.Module):
        return []
    found = [getattr(pipe, name, None) for name in ("guider", "ocr_guider")]
    return [each for each in found if hasattr(each, "prepare_inputs")]


def _prompt_first(model: nn.Module) -> bool:
    """Whether the model's pipelines run it twice a step for guidance, first with the prompt."""
    listed = any(each.__name__ in _TWO_PASSES for each in type(model).__mro__)
    return listed or guides_in_two_passes(model)


def _order(pipe: Any) -> dict[int, tuple[str, ...]]:
    """How a pipeline's batches may be made of parts: by their number. Empty: not known."""
    if pipe is None:
        return {2: HALVES}
    kinds = type(pipe).__mro__
    own = next((ORDERS[each.__name__] for each in kinds if each.__name__ in ORDERS), None)
    if own is not None:
        return own
    of_diffusers = any(
        each.__module__.startswith("diffusers.pipelines.")
        and not each.__module__.startswith(_BASES)
        for each in kinds
    )
    return {2: HALVES} if of_diffusers else {}


# Where diffusers keeps what pipelines are derived from: these say nothing of an order.
_BASES = ("diffusers.pipelines.pipeline_", "diffusers.pipelines.free_")


def _checked(batch: Iterable[str]) -> tuple[str, ...]:
    found = (batch,) if isinstance(batch, str) else tuple(batch)
    if not found or len(set(found)) != len(found) or not all(isinstance(p, str) for p in found):
        raise ValueError(
            f"batch={found!r}; wanted the names of the batch's equal parts in their order, such as "
            "('unconditional', 'conditional')"
        )
    return found


def _repeats(latent: Tensor, count: int) -> bool:
    """Whether a batch is ``count`` times the same latents: every part starts from them."""
    if count < 2 or len(latent) % count:
        return False
    first, *others = latent.detach().chunk(count)
    return all(torch.equal(first, each) for each in others)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
