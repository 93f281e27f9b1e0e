"""What UNets are called with, in tokens, and how deep in one a layer is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from flashmaps.diffusion.counts import Given, length, plane, sizes_of, text_of
from flashmaps.diffusion.layouts import Tokens


def unet(model: Any, given: Given) -> Tokens:
    """Of UNets on images: the finest grid is that of the latents."""
    config = model.config
    sizes = text_of(given)
    images = getattr(getattr(model, "encoder_hid_proj", None), "num_image_text_embeds", None)
    if getattr(config, "encoder_hid_dim_type", None) == "image_proj":  # Kandinsky 2.2
        sizes = sizes_of(image_prompt=images)
    elif getattr(config, "encoder_hid_dim_type", None) == "text_image_proj":  # Kandinsky 2.1
        sizes |= sizes_of(image_prompt=images)
    return plane(given.get("sample"), 1, sizes, levels=True)


def video_unet(frames_at: int, name: str = "text") -> Callable[[Any, Given], Tokens]:
    """Of UNets that see frames as rows of the batch, and times at each place."""

    def tokens(model: Any, given: Given) -> Tokens:
        sample = given.get("sample")
        sizes = sizes_of(**{name: length(given.get("encoder_hidden_states"))})
        if not isinstance(sample, Tensor) or sample.ndim != 5:
            return Tokens(sizes=sizes)
        grid, frames = (sample.shape[3], sample.shape[4]), sample.shape[frames_at]
        sizes |= {"image": grid[0] * grid[1], "frames": frames}
        return Tokens(grid, rows=frames, levels=True, sizes=sizes)

    return tokens


def cascade(model: Any, given: Given) -> Tokens:
    """After the image: text, its pooled embedding as several tokens, and an image prompt."""
    per = model.config.clip_seq
    text, pooled, image = (given.get(f"clip_{name}") for name in ("text", "text_pooled", "img"))
    sizes = {"text": 0, "image_prompt": 0}
    if isinstance(pooled, Tensor):
        sizes["pooled_text"] = per * (pooled.shape[1] if pooled.ndim == 3 else 1)
    if isinstance(text, Tensor) and isinstance(image, Tensor):
        sizes["text"] = text.shape[1]
        sizes["image_prompt"] = per * (image.shape[1] if image.ndim == 3 else 1)
    return plane(given.get("sample"), model.config.patch_size, sizes, levels=True)


# -- how deep in a UNet a layer is -----------------------------------------------------------------

_BLOCK = re.compile(r"(?:.*\.)?(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.")


def unet_level(model: Any, layer: str) -> int | None:
    """How many times the grid was halved before a layer, from the blocks that do it."""
    found = _BLOCK.match(layer)
    if found is None:
        return None
    where, index = found.group(1), int(found.group(2) or 0)
    downs = [getattr(block, "downsamplers", None) is not None for block in model.down_blocks]
    if where == "down_blocks":
        return sum(downs[:index])
    if where == "mid_block":
        return sum(downs)
    ups = [getattr(block, "upsamplers", None) is not None for block in model.up_blocks]
    return sum(downs) - sum(ups[:index])


def cascade_level(model: Any, layer: str) -> int | None:
    """How many times Stable Cascade's grid was halved before a layer."""
    found = _BLOCK.match(layer)
    if found is None or found.group(2) is None:
        return None
    last = len(model.down_blocks) - 1
    index = int(found.group(2))
    halves = [len(scaler) > 1 and _halves(scaler[1]) for scaler in model.down_downscalers[1:]]
    return sum(halves[: index if found.group(1) == "down_blocks" else last - index])


def _halves(scaler: Any) -> bool:
    if isinstance(scaler, nn.Conv2d):
        return scaler.stride == (2, 2)
    return any(isinstance(part, nn.Upsample) for part in scaler.modules())
