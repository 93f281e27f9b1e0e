"""How diffusers' models lay out the tokens of an attention call: image, text, grids, positions.

An attention processor sees tokens only. Which of them are image and which text, and where the image
ones lie, follows from what the model was called with (`Forward`) and from the order in which each
family of processors concatenates them, which is written down here and nowhere else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashmaps.maps.grids import Grid

KINDS = ("self", "cross", "joint", "image_prompt")

# What joint processors attend to, in the order of their concatenation.
_TEXT_FIRST = {
    "FluxAttnProcessor",
    "FluxAttnProcessor2_0",
    "FluxIPAdapterAttnProcessor",
    "FusedFluxAttnProcessor2_0",
    "QwenDoubleStreamAttnProcessor2_0",
    "AttnAddedKVProcessor2_0",
}
_IMAGE_FIRST = {
    "JointAttnProcessor2_0",
    "FusedJointAttnProcessor2_0",
    "SD3IPAdapterJointAttnProcessor2_0",
}
# Processors that rotate pairs of neighbouring channels (2i, 2i + 1) by the angles they are given.
_ROTATES_NEIGHBOURS = {"FluxAttnProcessor", "FluxIPAdapterAttnProcessor", "WanAttnProcessor"}


# Their pipelines guide in two forward passes a step, first with the prompt: never in one batch.
_TWO_PASSES = {
    "FluxTransformer2DModel",
    "ChromaTransformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
    "WanAnimateTransformer3DModel",
}


@dataclass(frozen=True)
class Forward:
    """One call of the denoiser: what its layers are told apart by, and never see themselves.

    Attributes:
        step: index of the denoising step, from 0; the two calls of separate guidance share one.
        timestep: what the model was called with; a [1] tensor, read when it is asked for.
        frames, grid: image tokens of the finest level: frames * height * width.
        levels: whether layers may run on coarser grids (UNets), each half of the last.
        tokens: image tokens of the finest level, those without a grid (reference images) included.
        text: text tokens, None without text.
        guidance, batch: which part of guidance this is, or which parts its batch holds; see
            `flashmaps.diffusion.record.Entry`.
    """

    step: int
    timestep: Any = None
    frames: int = 1
    grid: Grid | None = None
    levels: bool = False
    tokens: int | None = None
    text: int | None = None
    guidance: str | None = None
    batch: tuple[str, ...] = ()


def called_with(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What a model was called with, by name."""
    parameters = inspect.signature(model.forward).parameters
    names = list(parameters)
    if any(each.kind is each.VAR_POSITIONAL for each in parameters.values()):
        # Someone's `forward(*args, **kwargs)` before the model's own, as DeepCache has it.
        names = list(inspect.signature(type(model).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def image_tokens(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """``frames``, ``grid``, ``levels`` and ``tokens`` of `Forward` from a model's arguments."""
    latent = given.get("sample", given.get("hidden_states"))
    if not isinstance(latent, Tensor):
        return {}
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if latent.ndim == 4 and isinstance(patch, int):  # SD3, PixArt
        grid = (latent.shape[2] // patch, latent.shape[3] // patch)
        return {"grid": grid, "tokens": math.prod(grid)}
    if latent.ndim == 4:
        height, width = latent.shape[2:]
        return {"grid": (height, width), "levels": True, "tokens": height * width}
    if latent.ndim == 5 and isinstance(patch, (tuple, list)) and len(patch) == 3:  # Wan
        frames, height, width = (n // p for n, p in zip(latent.shape[2:], patch, strict=True))
        return {"frames": frames, "grid": (height, width), "tokens": frames * height * width}
    if latent.ndim == 3:  # packed: Flux says by ids where tokens lie, Qwen by shapes
        of_ids, of_shapes = _grid_of_ids(given.get("img_ids")), given.get("img_shapes")
        return {"grid": of_ids or _grid_of_shapes(of_shapes), "tokens": latent.shape[1]}
    return {}


def _grid_of_ids(ids: Any) -> Grid | None:
    """(height, width) of the first image in Flux's ids: (image, row, column) of each token.

    [N, 3] or [B, N, 3]. Reference images (Kontext) follow with another first id.
    """
    if not isinstance(ids, Tensor) or ids.shape[-1] != 3:
        return None
    ids = (ids[0] if ids.ndim == 3 else ids).float().cpu()
    first = ids[ids[:, 0] == ids[0, 0]]
    height, width = (int(n) + 1 for n in first[:, 1:].max(0).values)
    return (height, width) if height * width == len(first) else None


def _grid_of_shapes(shapes: Any) -> Grid | None:
    """(height, width) of the first image in Qwen's shapes: (frames, height, width) of each."""
    try:
        first = shapes[0][0] if isinstance(shapes[0], (list, tuple)) else shapes[0]
        if len(first) == 3 and isinstance(first[0], (list, tuple)):
            first = first[0]
        frames, height, width = (int(n) for n in first)
    except (TypeError, ValueError, IndexError, KeyError):
        return None
    return (height, width) if frames == 1 else None


def guides_in_two_passes(model: nn.Module) -> bool:
    """Whether the model's pipelines run it twice a step for guidance, rather than on one batch."""
    return any(kind.__name__ in _TWO_PASSES for kind in type(model).__mro__)


def text_tokens(given: Mapping[str, Any]) -> int | None:
    """Length of the text that the model was given; None without one."""
    text = given.get("encoder_hidden_states")
    return text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else None


@dataclass(frozen=True)
class Layout:
    """The tokens of one attention call.

    Attributes:
        kind: "self"; "cross": keys are text; "joint": queries, keys or both are image and text;
            "image_prompt": keys are an image prompt (IP-Adapter, image-to-video).
        grid, frames: of the image queries; frames * height * width of them.
        queries, keys: token range of each part by name: "image", "text", "reference" (further
            images), "image_prompt". Empty where the processor's order is not known.
    """

    kind: str
    grid: Grid | None
    frames: int
    queries: dict[str, slice]
    keys: dict[str, slice]


def layout(
    attn: nn.Module, processor: str, context: Any, call: int, queries: int, keys: int, at: Forward
) -> Layout:
    """The layout of the ``call``-th attention (from 0) of one processor call.

    ``context`` is the processor's encoder_hidden_states; IP-Adapter's is a tuple.
    """
    kind = _kind(attn, context, call, queries, at)
    grid = _level(at, queries) if kind != "joint" else at.grid
    frames = at.frames if grid is not None else 1
    everything = slice(0, queries)
    if kind == "self":
        image = {"image": everything}
        return Layout(kind, grid, frames, image, image)
    if kind == "cross" and at.text not in (None, keys):
        # A processor that joins text and image (CogVideoX), or a context that is not the text
        # (reference images, as some put them there): what stands where is not known.
        if keys == queries:
            return Layout("joint", None, 1, {}, {})
        return Layout(kind, grid, frames, {"image": everything}, {})
    if kind == "cross":
        return Layout(kind, grid, frames, {"image": everything}, {"text": slice(0, keys)})
    if kind == "image_prompt":
        own = queries if processor.startswith("SD3IPAdapter") else 0  # its own keys come first
        of_keys = {"image": slice(0, own)} if own else {}
        of_keys["image_prompt"] = slice(own, keys)
        return Layout(kind, grid, frames, {"image": everything}, of_keys)
    # What keys have over the image tokens is text; queries have it too, or are image tokens alone.
    text = at.text if at.text is not None else keys - (at.tokens or keys)
    image_only = queries == keys - text
    if image_only:
        grid = _level(at, queries)
    if not 0 < text < keys or processor not in _TEXT_FIRST | _IMAGE_FIRST:
        return Layout(kind, None, 1, {}, {})
    first = processor in _TEXT_FIRST
    of_keys = _joint_parts(keys, text, first, grid, frames)
    of_queries = of_keys if not image_only else _joint_parts(queries, 0, first, grid, frames)
    return Layout(kind, grid, frames, of_queries, of_keys)


def _kind(attn: nn.Module, context: Any, call: int, queries: int, at: Forward) -> str:
    joins = getattr(attn, "add_q_proj", None) is not None
    if context is None and call > 0:  # SD3's IP-Adapter, in layers that see the image alone
        return "image_prompt"
    if context is None:
        # Flux's single blocks: text and image went into one sequence before the layer.
        whole = None if at.levels or at.text is None else (at.tokens or 0) + at.text
        return "joint" if queries == whole else "self"
    if joins or (getattr(attn, "add_k_proj", None) is not None and _appends_text(attn)):
        return "joint" if call == 0 else "image_prompt"
    if getattr(attn, "add_k_proj", None) is not None:  # Wan, image to video: its image comes first
        return "image_prompt" if call == 0 else "cross"
    return "cross" if call == 0 else "image_prompt"


def _appends_text(attn: nn.Module) -> bool:
    """diffusers' `Attention` with added keys attends to text and itself; Wan's to two contexts."""
    return type(attn).__name__ == "Attention"


def _joint_parts(
    tokens: int, text: int, text_first: bool, grid: Grid | None, frames: int
) -> dict[str, slice]:
    start = text if text_first else 0
    stop = tokens if text_first else tokens - text
    parts = {"image": slice(start, stop)}
    if grid is not None and (own := math.prod(grid) * frames) < stop - start:
        parts = {"image": slice(start, start + own), "reference": slice(start + own, stop)}
    if text:
        parts["text"] = slice(0, text) if text_first else slice(stop, tokens)
    return parts


def _level(at: Forward, tokens: int) -> Grid | None:
    """(height, width) of ``tokens`` tokens: the finest grid or, in a UNet, a level below it."""
    if at.grid is None:
        return None
    height, width = at.grid
    while at.levels and height * width > tokens and (height > 1 or width > 1):
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if at.frames * height * width == tokens else None


def rotary(
    processor: str, arguments: Mapping[str, Any], tokens: int, width: int
) -> tuple[Tensor, Tensor] | None:
    """(cos, sin), [tokens, width] each, by which a processor rotates q and k; None if it does not.

    Angles of channels 2i and 2i + 1 are equal. None, too, for a form that is not known here.
    """
    angles = arguments.get("image_rotary_emb", arguments.get("rotary_emb"))
    if processor not in _ROTATES_NEIGHBOURS or not isinstance(angles, (tuple, list)):
        return None
    cos, sin = (each.reshape(-1, each.shape[-1]) for each in angles)
    return (cos, sin) if cos.shape == sin.shape == (tokens, width) else None


def rotates(arguments: Mapping[str, Any]) -> bool:
    """Whether a processor was given a rotary embedding, in whatever form."""
    return arguments.get("image_rotary_emb", arguments.get("rotary_emb")) is not None


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Q or K [B, H, N, d] before its rotary embedding: R(-angle) x, in float32, rounded as x is."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (each[:, 0::2].to(device=x.device, dtype=torch.float32) for each in (cos, sin))
    return torch.stack((even * cos + odd * sin, odd * cos - even * sin), -1).flatten(-2).to(x.dtype)
