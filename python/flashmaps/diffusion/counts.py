"""How many tokens of each part diffusers' models are called with, and on which grid."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from flashmaps.diffusion.called import Given
from flashmaps.diffusion.layouts import Tokens, common
from flashmaps.maps.grids import Grid

_LENGTHS = (
    "the texts of this batch have different lengths, so the text has no place in common; capture "
    "one part of guidance (guidance='conditional'), run one prompt at a time, or leave the layer "
    "out"
)


def length(x: Any, dim: int = 1) -> int | None:
    """Of a tensor [B, N, C] along ``dim``; None for anything else."""
    return x.shape[dim] if isinstance(x, Tensor) and x.ndim == 3 else None


def sizes_of(**sizes: int | None) -> dict[str, int]:
    """Those that are known."""
    return {name: n for name, n in sizes.items() if n is not None}


def text_of(given: Given) -> dict[str, int]:
    """The size of the text that a model is given as encoder_hidden_states."""
    return sizes_of(text=length(given.get("encoder_hidden_states")))


def _once(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Reading a tensor makes a GPU wait: each is read once, unless it is written to."""
    read: Any = WeakIdKeyDictionary()

    @functools.wraps(function)
    def of(x: Tensor) -> Any:
        found = read.get(x)
        version = None if x.is_inference() else x._version
        if found is None or found[0] != version:
            found = read[x] = (version, function(x))
        return found[1]

    return of


@_once
def _counts(mask: Tensor) -> list[int]:
    """How many tokens of each row of a mask [B, N] are there."""
    return [int(n) for n in mask.bool().sum(1).tolist()]


@_once
def _first_grid(ids: Tensor) -> Grid | None:
    """(height, width) of the first image in ids (image, row, column, ...) of each token.

    [N, 3 or 4] or [B, N, ...]. Reference images follow with another first id. None where the first
    image's tokens do not stand row by row.
    """
    if ids.shape[-1] not in (3, 4):
        return None
    return _grid_in(ids[0] if ids.ndim == 3 else ids)


def _grid_in(ids: Tensor) -> Grid | None:
    ids = ids.detach().float().cpu()
    others = (ids[:, 0] != ids[0, 0]).nonzero()
    first = ids[: int(others[0])] if len(others) else ids
    places = first[:, 1:3] - first[0, 1:3]
    height, width = (int(n) + 1 for n in places[-1])
    if height < 1 or width < 1 or height * width != len(first):
        return None
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    return (height, width) if torch.equal(places, torch.stack([rows, columns], 1).float()) else None


# -- tokens of each kind of model ------------------------------------------------------------------


def plane(latent: Any, patch: Any, sizes: Mapping[str, int], **more: Any) -> Tokens:
    """Of latents [B, C, height, width] in square patches."""
    if not isinstance(latent, Tensor) or latent.ndim != 4:
        return Tokens(sizes=sizes)
    grid = (latent.shape[2] // patch, latent.shape[3] // patch)
    return Tokens(grid, sizes={**sizes, "image": grid[0] * grid[1]}, **more)


def _video(latent: Any, patch: Any, sizes: Mapping[str, int], frames_at: int = 2) -> Tokens:
    """Of latents [B, C, frames, height, width] in patches (time, height, width)."""
    if not isinstance(latent, Tensor) or latent.ndim != 5:
        return Tokens(sizes=sizes)
    shape = (latent.shape[frames_at], *latent.shape[3:])
    frames, height, width = (n // p for n, p in zip(shape, patch, strict=True))
    return Tokens((height, width), frames, sizes={**sizes, "image": frames * height * width})


def patched(model: Any, given: Given) -> Tokens:
    """Of latents [B, C, height, width] in patches, and a text beside them: PixArt, SD3, DiT."""
    return plane(given.get("hidden_states"), model.config.patch_size, text_of(given))


def latte(model: Any, given: Given) -> Tokens:
    """Of Latte, whose blocks see frames and places in turn."""
    latent, patch = given.get("hidden_states"), model.config.patch_size
    if not isinstance(latent, Tensor) or latent.ndim != 5:
        return Tokens(sizes=text_of(given))
    grid, frames = (latent.shape[3] // patch, latent.shape[4] // patch), latent.shape[2]
    sizes = text_of(given) | {"image": grid[0] * grid[1], "frames": frames}
    return Tokens(grid, rows=frames, sizes=sizes)


def packed(model: Any, given: Given) -> Tokens:
    """Of latents [B, N, C] with the place of each token as ids: Flux, Chroma."""
    latent, ids = given.get("hidden_states"), given.get("img_ids")
    sizes, tokens = text_of(given), length(latent)
    if tokens is None:
        return Tokens(sizes=sizes)
    before = given.get("num_ref_tokens", 0) if given.get("kv_cache_mode") == "extract" else 0
    cache = given.get("kv_cache") if given.get("kv_cache_mode") == "cached" else None
    grid = None
    if isinstance(ids, Tensor):
        grid = _first_grid(ids if not before else ids[..., before:, :])
    own = tokens - before if grid is None else grid[0] * grid[1]
    sizes |= {"image": own, "reference": tokens - before - own}
    sizes |= {"cached": before or getattr(cache, "num_ref_tokens", 0)}
    return Tokens(grid, sizes=sizes)


def qwen(model: Any, given: Given) -> Tokens:
    """Of packed latents with the shapes of the images beside them; the first is the one made."""
    tokens, shapes = length(given.get("hidden_states")), given.get("img_shapes")
    sizes = text_of(given)
    if tokens is None:
        return Tokens(sizes=sizes)
    if getattr(model.config, "use_layer3d_rope", False):  # Qwen-Image-Layered makes several
        return Tokens(sizes={**sizes, "image": tokens, "reference": 0})
    try:
        first: Any = shapes[0] if shapes is not None else None
        while isinstance(first[0], (list, tuple)):
            first = first[0]
        frames, height, width = (int(n) for n in first)
    except (TypeError, ValueError, IndexError, KeyError):
        return Tokens(sizes={**sizes, "image": tokens, "reference": 0})
    if frames != 1:
        return Tokens(sizes={**sizes, "image": tokens, "reference": 0})
    own = height * width
    return Tokens((height, width), sizes={**sizes, "image": own, "reference": tokens - own})


def z_image(model: Any, given: Given) -> Tokens:
    """Each image, then its text, both filled up to a multiple of 32 tokens."""
    images, texts = given.get("x"), given.get("cap_feats")
    patch, times = given.get("patch_size", 2), given.get("f_patch_size", 1)
    if not (isinstance(images, (list, tuple)) and isinstance(texts, (list, tuple))):
        return Tokens()
    if not all(isinstance(x, Tensor) for x in (*images, *texts)):  # several images in each
        return Tokens()
    shapes = [(x.shape[1] // times, x.shape[2] // patch, x.shape[3] // patch) for x in images]
    items = []
    for (frames, height, width), text in zip(shapes, texts, strict=True):
        image = frames * height * width
        more = {"fill": -image % 32, "text_fill": -len(text) % 32}
        items.append({"image": image, "text": len(text), **more})
    frames, *place = shapes[0]
    one = all(shape == shapes[0] for shape in shapes)
    sizes = common(items)
    differ = tuple(items) if len(sizes) < len(items[0]) else ()
    grid = (place[0], place[1]) if one else None
    note = _LENGTHS if differ else ""
    return Tokens(grid, frames if one else 1, sizes=sizes, items=differ, note=note)


def krea(model: Any, given: Given) -> Tokens:
    """Of packed latents, with the places of text and image beside them."""
    text, tokens = given.get("encoder_hidden_states"), length(given.get("hidden_states"))
    ids = given.get("position_ids")
    if not isinstance(text, Tensor) or tokens is None:
        return Tokens()
    grid = _grid_after(text.shape[1])(ids) if isinstance(ids, Tensor) and ids.ndim == 2 else None
    return Tokens(grid, sizes={"text": text.shape[1], "image": tokens})


@functools.lru_cache(maxsize=16)
def _grid_after(text: int) -> Callable[[Tensor], Grid | None]:
    return _once(lambda ids: _grid_in(ids[text:]))


def ernie(model: Any, given: Given) -> Tokens:
    """The image, then a text padded to one length."""
    sizes = sizes_of(text=length(given.get("text_bth")))
    return plane(given.get("hidden_states"), model.config.patch_size, sizes)


def lumina(model: Any, given: Given) -> Tokens:
    """The text that its mask leaves of each prompt, then the image."""
    mask = given.get("encoder_attention_mask")
    sizes: dict[str, int] = {}
    counts = _counts(mask) if isinstance(mask, Tensor) and mask.ndim == 2 else []
    if counts and len(set(counts)) == 1:
        sizes["text"] = counts[0]
    note = _LENGTHS if len(set(counts)) > 1 else ""
    return plane(given.get("hidden_states"), model.config.patch_size, sizes, note=note)


def aura_flow(model: Any, given: Given) -> Tokens:
    """Learned register tokens before the text, then the image."""
    sizes = text_of(given) | {"register": model.register_tokens.shape[1]}
    return plane(given.get("hidden_states"), model.config.patch_size, sizes)


def cogvideox(model: Any, given: Given) -> Tokens:
    """Of latents [B, frames, C, height, width]."""
    patch = model.config.patch_size
    patches = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    return _video(given.get("hidden_states"), patches, text_of(given), frames_at=1)


def hunyuan_video(model: Any, given: Given) -> Tokens:
    """Of latents [B, C, frames, height, width], with a text padded to one length."""
    patch = model.config.patch_size
    patches = (model.config.patch_size_t, patch, patch)
    return _video(given.get("hidden_states"), patches, text_of(given))


def hunyuan_video15(model: Any, given: Given) -> Tokens:
    """The video, an image prompt if there is one, the text that masks leave, and what they hide."""
    patch = model.config.patch_size
    sizes = sizes_of(padded_text=length(given.get("encoder_hidden_states")))
    images, masks = given.get("image_embeds"), []
    for name in ("encoder_attention_mask_2", "encoder_attention_mask"):
        if isinstance(mask := given.get(name), Tensor) and mask.ndim == 2:
            masks.append(mask)
    counts = [sum(each) for each in zip(*map(_counts, masks), strict=True)]
    # Every image's text must be as long, or they stand at different places.
    if len(masks) == 2 and isinstance(images, Tensor) and len(set(counts)) == 1:
        sizes["text"] = counts[0]
        sizes["image_prompt"] = images.shape[1] if _any(images) else 0
    note = _LENGTHS if len(set(counts)) > 1 else ""
    patches = (model.config.patch_size_t, patch, patch)
    found = _video(given.get("hidden_states"), patches, sizes)
    return dataclasses.replace(found, note=note)


@_once
def _any(x: Tensor) -> bool:
    return bool((x != 0).any())


def hunyuan_image(model: Any, given: Given) -> Tokens:
    """The image, then both texts together."""
    latent = given.get("hidden_states")
    first = length(given.get("encoder_hidden_states"))
    second = length(given.get("encoder_hidden_states_2"))
    if getattr(model, "context_embedder_2", None) is None:
        second = 0
    sizes = sizes_of(first_text=first)
    if first is not None:
        sizes["text"] = first + (second or 0)
    patch = tuple(model.config.patch_size)
    if len(patch) == 3:
        return _video(latent, patch, sizes)
    if not isinstance(latent, Tensor) or latent.ndim != 4:
        return Tokens(sizes=sizes)
    grid = (latent.shape[2] // patch[0], latent.shape[3] // patch[1])
    return Tokens(grid, sizes={**sizes, "image": grid[0] * grid[1]})


def hidream(model: Any, given: Given) -> Tokens:
    """The image, filled up to ``max_seq`` where it is not square; then three texts."""
    latent, sizes = given.get("hidden_states"), {}
    t5, llama = given.get("encoder_hidden_states_t5"), given.get("encoder_hidden_states_llama3")
    if length(t5) is not None and isinstance(llama, Tensor) and llama.ndim == 4:
        sizes["text"] = t5.shape[1] + 2 * llama.shape[2]  # type: ignore[union-attr]
    found = plane(latent, model.config.patch_size, sizes)
    if found.grid is None:
        return found
    square = latent.shape[2] == latent.shape[3]  # type: ignore[union-attr]
    fill = 0 if square else model.max_seq - found.sizes["image"]
    return Tokens(found.grid, sizes={**found.sizes, "fill": fill})


def omnigen(model: Any, given: Given) -> Tokens:
    """The text, with the images that it speaks of inside; the time; the image."""
    ids, images = given.get("input_ids"), given.get("input_image_sizes")
    sizes = {"before": 0, "text": 0}
    if isinstance(ids, Tensor):
        sizes["before" if images else "text"] = ids.shape[1]
    return plane(given.get("hidden_states"), model.config.patch_size, {**sizes, "time": 1})


def ltx(model: Any, given: Given) -> Tokens:
    """Packed latents, with the numbers of frames, rows and columns beside them."""
    tokens, sizes = length(given.get("hidden_states")), text_of(given)
    shape = [given.get(name) for name in ("num_frames", "height", "width")]
    if tokens is None or not all(isinstance(n, int) for n in shape):
        return Tokens(sizes=sizes)
    frames, height, width = shape
    if frames * height * width != tokens:  # type: ignore[operator]
        return Tokens(sizes=sizes)
    return Tokens((height, width), frames, sizes={**sizes, "image": tokens})  # type: ignore[arg-type]


def ltx2(model: Any, given: Given) -> Tokens:
    """As LTX-Video's, and the tokens of its sound and of the text for it."""
    found = ltx(model, given)
    sound = sizes_of(
        audio=length(given.get("audio_hidden_states")),
        audio_text=length(given.get("audio_encoder_hidden_states")),
    )
    return dataclasses.replace(found, sizes={**found.sizes, **sound})


def mochi(model: Any, given: Given) -> Tokens:
    """The video; how much of each text is left, its calls tell."""
    patch = model.config.patch_size
    return _video(given.get("hidden_states"), (1, patch, patch), {})


def kandinsky5(model: Any, given: Given) -> Tokens:
    """Latents with the channels last; in blocks of 8 x 8 where attention is sparse."""
    latent, sizes = given.get("hidden_states"), text_of(given)
    if not isinstance(latent, Tensor) or latent.ndim != 5:
        return Tokens(sizes=sizes)
    patch = model.config.patch_size
    frames, height, width = (n // p for n, p in zip(latent.shape[1:4], patch, strict=True))
    sizes |= {"image": frames * height * width}
    sparse = given.get("sparse_params")
    if sparse is not None and sparse.get("to_fractal"):
        return Tokens(sizes=sizes)
    return Tokens((height, width), frames, sizes=sizes)


def wan(model: Any, given: Given) -> Tokens:
    """Of latents [B, C, frames, height, width] in patches (time, height, width): Wan, Cosmos."""
    found = _video(given.get("hidden_states"), model.config.patch_size, text_of(given))
    # Its processor takes the last 512 tokens of image and text for the text.
    told = {"told_text": 512} if found.sizes.get("text") == 512 else {}
    return Tokens(found.grid, found.frames, sizes={**found.sizes, **told})


def allegro(model: Any, given: Given) -> Tokens:
    """Of latents [B, C, frames, height, width], with a patch of time apart."""
    patch = model.config.patch_size
    patches = (model.config.patch_size_t, patch, patch)
    return _video(given.get("hidden_states"), patches, text_of(given))


def hunyuan_dit(model: Any, given: Given) -> Tokens:
    """The texts of CLIP and of T5, one after the other."""
    clip = length(given.get("encoder_hidden_states"))
    t5 = length(given.get("encoder_hidden_states_t5"))
    sizes = {} if clip is None or t5 is None else {"text": clip + t5}
    return plane(given.get("hidden_states"), model.config.patch_size, sizes)
