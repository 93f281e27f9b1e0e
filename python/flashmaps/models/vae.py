"""Stage one: the VAE, fitted to pictures pixel by pixel and edge by edge."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from flashmaps.files import whole_folder, write_json

from .bank import Bank, as_input
from .loop import Loop

_KL = 1e-5  # times the divergence of each latent number; more would blur, less lets them scatter


def train_vae(
    vae: AutoencoderKL, bank: Bank, held_out: dict[str, Tensor], args: argparse.Namespace,
    deadline: float,
) -> AutoencoderKL:  # fmt: skip
    """Fit the VAE and set its scaling factor so that latents have deviation one.

    ``held_out``: pictures that are not in the bank, uint8 [n, h, w, 3], by their kind.

    Returns the averaged VAE, frozen. It is kept in ``args.work / "vae-done"``, from where a resumed
    run takes it, with ``facts.json``: steps, scaling factor, and for each kind of held-out pictures
    the peak signal-to-noise ratio of reconstructions in decibels.
    """
    done = args.work / "vae-done"
    if args.resume and done.is_dir():
        return _frozen(done)
    loop = Loop("vae", {"vae": vae}, args, deadline)
    images = bank.pixels(loop.device)

    def reconstruct(pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        latent = vae.encode(pixels).latent_dist
        decoded = vae.decode(latent.mean + latent.std * noise).sample.float()
        difference = decoded - pixels
        # Pixel error alone is content with blur, so edges count too; no perceptual network is at
        # hand. The square keeps flat colours right while the absolute error looks at medians.
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        absolute, square = difference.abs().mean(), difference.square().mean()
        divergence = latent.kl().float().mean() / noise[0].numel()
        loss = absolute + square + edges + _KL * divergence
        return {"loss": loss, "l1": absolute, "mse": square, "kl": divergence}

    step_of = torch.compile(reconstruct, dynamic=False) if args.compile else reconstruct
    side = min(args.vae_crop, images.shape[1])
    cells = side // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (loop.batch, vae.config.latent_channels, cells, cells)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator, where = loop.generator(), {"device": loop.device}
        chosen = torch.randint(len(images), shape[:1], generator=generator, **where)
        noise = torch.randn(shape, generator=generator, **where)
        # Many small crops scatter less than a few whole pictures of as many pixels.
        corner = torch.randint(images.shape[1] - side + 1, (2,), generator=generator, **where)
        top, left = corner.tolist() if side < images.shape[1] else (0, 0)
        pixels = images[chosen, top : top + side, left : left + side]
        found = step_of(as_input(pixels), noise)
        return found["loss"], {k: v.detach() for k, v in found.items() if k != "loss"}

    def quality() -> dict[str, float]:
        return {f"psnr_{kind}": psnr(vae, pictures) for kind, pictures in held_out.items()}

    loop.run(loss, quality)
    with loop.averaged():
        scale = 1 / _deviation(vae, images[: min(len(images), 512)])
        facts = {"steps": loop.step, "scale": scale, **quality()}
        vae.register_to_config(scaling_factor=scale)
        with whole_folder(done, "vae") as new:
            vae.save_pretrained(new)
            write_json(new / "facts.json", facts)
    return _frozen(done)


def _frozen(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor, chunk: int = 16) -> float:
    """Peak signal-to-noise ratio of reconstructions of uint8 [n, h, w, 3], in decibels."""
    errors = [
        (reconstruction(vae, part) - as_input(part.to(vae.device))).square().mean(dim=(1, 2, 3))
        for part in images.split(chunk)
    ]
    return 10 * math.log10(4 / torch.cat(errors).mean().item())


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """What remains of uint8 [n, h, w, 3] in the latents: float32 [n, 3, h, w] in [-1, 1]."""
    mean = vae.encode(as_input(images.to(vae.device))).latent_dist.mean
    return vae.decode(mean).sample.float().clamp(-1, 1)


@torch.no_grad()
def _deviation(vae: AutoencoderKL, images: Tensor, chunk: int = 16) -> float:
    parts = (as_input(part.to(vae.device)) for part in images.split(chunk))
    return torch.cat([vae.encode(part).latent_dist.mean for part in parts]).std().item()
