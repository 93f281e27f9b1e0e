"""Latents of images, and two ways to carry them to a timestep: noise, or DDIM inversion.

Latents here are float32 [B, c, h, w] on the device where the pipeline computes, whatever precision
its parts have: a rounding error per step would add up. z is the mean of the VAE's posterior times
its scaling factor; a_t is the scheduler's cumulative product of 1 - beta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmaps.diffusion.images import Image, to_model_input

Denoise = Callable[[Tensor, int], Tensor]  # (latent, timestep) to what the UNet predicts


def encode(pipe: Any, images: Sequence[Image]) -> Tensor:  # [B, c, h, w]
    """z of images of equal size: what the VAE makes of them, scaled as the UNet expects it."""
    vae, config = pipe.vae, pipe.vae.config
    dtype = vae.dtype
    # SDXL's VAE overflows in float16, so diffusers' own pipelines run it in float32 too.
    back = {torch.float16: vae.half, torch.bfloat16: vae.bfloat16}
    upcast = dtype in back and _is_xl(pipe) and config.force_upcast
    pixels = torch.cat([to_model_input(image) for image in images])
    pixels = pixels.to(pipe._execution_device, torch.float32 if upcast else dtype)
    try:
        if upcast:
            vae.float()
        # `encode` is not `forward`, but diffusers has it run the hooks that bring the weights.
        encoded = vae.encode(pixels)
    finally:
        if upcast:
            back[dtype]()
    if hasattr(encoded, "latent_dist"):
        latent = encoded.latent_dist.mode()  # the mean: nothing is drawn, so results repeat
    else:
        latent = encoded.latents  # AutoencoderTiny has no posterior
    latent = latent.to(pipe._execution_device, torch.float32)
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:  # some VAEs of SDXL
        latent = (latent - _per_channel(mean, latent)) / _per_channel(std, latent)
    return latent * config.scaling_factor


def noised(
    pipe: Any, latent: Tensor, timesteps: Sequence[int], seeds: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Tensor]]:
    """(t, x_t) for every seed and timestep: x_t = sqrt(a_t) z + sqrt(1 - a_t) e, e normal noise.

    ``seeds`` has a row for each image. a_t is read from the pipeline's scheduler, which is not
    touched; every scheduler that can run these models has the same.
    """
    for seeds_of_images in zip(*seeds, strict=True):
        # Drawn on the CPU, image by image: the same on every device and in every batch.
        drawn = [
            torch.randn(latent.shape[1:], generator=torch.Generator("cpu").manual_seed(seed))
            for seed in seeds_of_images
        ]
        noise = torch.stack(drawn).to(latent)
        for t in timesteps:
            kept = float(pipe.scheduler.alphas_cumprod[t])
            yield t, kept**0.5 * latent + (1 - kept) ** 0.5 * noise


def to_levels(pipe: Any, latent: Tensor, noise: Tensor, timesteps: Sequence[int]) -> Tensor:
    """x_t of every image at a timestep of its own, from its noise: [B, c, h, w]."""
    kept = _kept(pipe, timesteps, latent)
    return kept.sqrt() * latent + (1 - kept).sqrt() * noise


def prediction_target(pipe: Any, latent: Tensor, noise: Tensor, timesteps: Sequence[int]) -> Tensor:
    """What a perfect model predicts for x_t: e, or sqrt(a_t) e - sqrt(1 - a_t) z, or z.

    Which of them the scheduler's prediction_type says.
    """
    kind = pipe.scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latent
    if kind != "v_prediction":
        raise ValueError(f"this model's scheduler has prediction_type={kind!r}, which is not known")
    kept = _kept(pipe, timesteps, latent)
    return kept.sqrt() * noise - (1 - kept).sqrt() * latent


def _kept(pipe: Any, timesteps: Sequence[int], like: Tensor) -> Tensor:
    values = [float(pipe.scheduler.alphas_cumprod[t]) for t in timesteps]
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Inversion:
    """The way of a DDIM inversion: every timestep it passes, and those where it is wanted."""

    scheduler: Any  # DDIMInverseScheduler
    path: tuple[int, ...]  # ascending
    stops: tuple[int, ...]  # of path; the last is where it ends


def plan_inversion(pipe: Any, timesteps: Sequence[int], steps: int) -> Inversion:
    """An inversion on the schedule of ``steps`` steps that diffusers' DDIMScheduler has.

    That schedule is (0, 1, 2, ...) * (num_train_timesteps // steps) + steps_offset. The inversion
    stops at those of its timesteps that are nearest to the wanted ones.

    Raises ValueError when the schedule ends before a wanted timestep, or the model predicts the
    sample: its noise is not defined where there is none.
    """
    from diffusers import DDIMInverseScheduler

    config = pipe.scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"inversion_steps needs a model that predicts epsilon or v; this one's scheduler has "
            f"prediction_type={prediction!r}. Leave inversion_steps out to add noise instead."
        )
    total = int(config.num_train_timesteps)
    # Not from_config: it forgets values that were defaults of the other class, and clips latents
    # to [-1, 1] unless told not to, as if they were pixels.
    scheduler = DDIMInverseScheduler(
        num_train_timesteps=total,
        trained_betas=pipe.scheduler.betas.tolist(),
        prediction_type=prediction,
        steps_offset=config.get("steps_offset", 0),
        set_alpha_to_one=config.get("set_alpha_to_one", True),
        clip_sample=False,
        # The only spacing whose timesteps are as far apart as step() takes them to be.
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    # With an offset, the last of many steps may lie beyond what the model was trained on.
    schedule = [t for t in scheduler.timesteps.tolist() if t < total]
    stops = {min(schedule, key=lambda t: abs(t - wanted)) for wanted in timesteps}
    if max(timesteps) - schedule[-1] >= total // steps:
        raise ValueError(
            f"inversion_steps={steps}: the DDIM schedule ends at timestep {schedule[-1]}, before "
            f"timestep={max(timesteps)}; choose a number of steps that divides {total}"
        )
    path = tuple(t for t in schedule if t <= max(stops))
    return Inversion(scheduler, path, tuple(sorted(stops)))


def invert(plan: Inversion, latent: Tensor, denoise: Denoise) -> Iterator[tuple[int, Tensor]]:
    """Carry z along ``plan``: (t, x_t) at each stop, x_t having the noise level of t.

    One step, for a model that predicts epsilon, with s the timestep before t:
    x_t = sqrt(a_t) (x_s - sqrt(1 - a_s) e) / sqrt(a_s) + sqrt(1 - a_t) e, e = denoise(x_s, t).
    The model is told t where it sees x_s, as in diffusers' inversion pipelines: sampling back then
    asks it at the same timesteps, and the two differ only by how far x_t is from x_s.
    """
    for t in plan.path:
        latent = plan.scheduler.step(denoise(latent, t), t, latent).prev_sample
        if t in plan.stops:
            yield t, latent


def _is_xl(pipe: Any) -> bool:
    return pipe.unet.config.addition_embed_type == "text_time"


def _per_channel(values: Sequence[float], latent: Tensor) -> Tensor:
    return torch.tensor(values, dtype=latent.dtype, device=latent.device).view(1, -1, 1, 1)
