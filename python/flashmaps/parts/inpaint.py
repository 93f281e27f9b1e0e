"""New pixels for a region of an image, several times over: latents of the rest are kept.

diffusers' inpainting pipeline does it, with the modules of a loaded one. At every step the latents
outside the region are those of the image, noised; inside, the model goes on from what it made. It
begins from the image as it is given: whoever has a rough idea of what is hidden paints it there
first, and ``strength`` says how far the model may leave it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.cross_self import CrossSelfAttnProcessor
from flashmaps.diffusion.features import default_size, fit_size, size_multiple, vae_factor
from flashmaps.diffusion.images import Image, resize


def inpainting_pipeline(pipe: Any, progress: bool = False) -> Any:
    """The modules of ``pipe`` as diffusers' StableDiffusionInpaintPipeline, with a scheduler of its
    own. ValueError for what is no Stable Diffusion 1 or 2."""
    from diffusers import StableDiffusionInpaintPipeline

    if getattr(pipe, "text_encoder_2", None) is not None or getattr(pipe, "unet", None) is None:
        raise ValueError(
            f"completion needs Stable Diffusion 1 or 2, with one text encoder and a UNet; got "
            f"{type(pipe).__name__}"
        )
    made = StableDiffusionInpaintPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=pipe.unet,
        scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=not progress, desc="imagining")
    return made


@torch.no_grad()
def inpaint(
    pipe: Any,
    image: Image,
    region: np.ndarray,  # [h, w] bool
    states: Tensor,  # [1, tokens, c], what the prompt tells the UNet
    empty: Tensor,  # [1, tokens, c], what the empty one does
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    strength: float,
    beside: Image | None = None,
    progress: bool = False,
) -> list[Image]:
    """A picture for each seed, in the image's own size, with new pixels in ``region`` alone.

    Everywhere else a picture is the image to the bit. Each seed's picture is the same whatever the
    other seeds are, but for rounding. ``beside``: another image, kept as it is, whose keys and
    values the decoder's self-attention sees besides those of the picture
    (:class:`flashmaps.CrossSelfAttnProcessor`).
    """
    height, width = fit_size(
        image.shape[0], image.shape[1], default_size(pipe), size_multiple(pipe)
    )
    cells = _grown(region, (height, width), vae_factor(pipe))
    shown = [resize(image, (height, width))] * len(seeds)
    masks, drawn = [cells] * len(seeds), list(seeds)
    if beside is not None:
        shown.insert(0, resize(beside, (height, width)))
        masks.insert(0, np.zeros_like(cells))
        drawn.insert(0, drawn[0])
    made = inpainting_pipeline(pipe, progress)
    with _evaluating(pipe), _seeing_the_first(made, beside is not None):
        found = made(
            prompt_embeds=states.expand(len(shown), -1, -1),
            negative_prompt_embeds=empty.expand(len(shown), -1, -1),
            image=np.stack(shown),
            mask_image=torch.from_numpy(np.stack(masks)).float()[:, None],
            height=height,
            width=width,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in drawn],
            output_type="np",
        ).images[len(shown) - len(seeds) :]
    inside = region[:, :, None]
    return [
        np.where(inside, resize(each.astype(np.float32), image.shape[:2]), image) for each in found
    ]


def _grown(region: np.ndarray, size: tuple[int, int], factor: int) -> np.ndarray:
    """[height, width] bool: every cell of the latent that has a pixel of the region, whole."""
    plane = torch.from_numpy(region).float()[None, None]
    there = torch.nn.functional.adaptive_max_pool2d(plane, (size[0] // factor, size[1] // factor))
    cells = there[0, 0].numpy() > 0
    return cells.repeat(factor, 0).repeat(factor, 1)


def _seeing_the_first(pipe: Any, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """The decoder's self-attention of every image also sees the first one's keys and values."""
    if not wanted:
        return contextlib.nullcontext()
    return CrossSelfAttnProcessor.on(
        pipe, "up_blocks.*.attn1", keys="both", sources="first", reduce=("max",)
    )


@contextlib.contextmanager
def _evaluating(pipe: Any) -> Iterator[None]:
    """Modules without dropout, as they were afterwards."""
    parts = [pipe.vae, pipe.text_encoder, pipe.unet]
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.train(mode)


def rough_fill(image: Image, visible: np.ndarray, front: np.ndarray, hidden: np.ndarray) -> Image:
    """The image with what is in front painted over: where the object is hidden, with its nearest
    pixel that is seen; elsewhere, with the nearest of what is neither."""
    from scipy.ndimage import distance_transform_edt

    made = image.copy()
    around = ~(visible | front)
    for inside, source in ((front & hidden, visible), (front & ~hidden, around)):
        if inside.any() and source.any():
            nearest = distance_transform_edt(~source, return_distances=False, return_indices=True)
            made[inside] = image[tuple(nearest[:, inside])]
    return made
