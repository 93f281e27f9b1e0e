"""The model card that travels with the weights: what was trained, on what, and how far."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .architecture import Parts
from .photos import SKIMAGE_PHOTOS, SKLEARN_PHOTOS

TEMPLATE = """\
---
library_name: diffusers
pipeline_tag: text-to-image
---

# FlashMaps builtin: a miniature Stable Diffusion 2

The classes and block structure of Stable Diffusion 2 with a two-hundredth of its parameters
({sizes}), small enough to ship inside a
Python package. It exists so that attention maps of a latent diffusion pipeline can be captured and
matched without a download.

    from diffusers import StableDiffusionPipeline
    from flashmaps.models import builtin_folder
    pipe = StableDiffusionPipeline.from_pretrained(builtin_folder())

Pictures are 128 x 128 pixels, latents 4 x 32 x 32, self-attention runs at 32 x 32, 16 x 16 and
8 x 8 tokens. Weights are stored in float16; load them with any dtype.

## Training

| | VAE | UNet and text encoder |
| --- | --- | --- |
| iterations | {vae_steps} | {unet_steps} |
| batch | {vae_batch} | {unet_batch} |
| hours | {vae_hours:.2f} | {unet_hours:.2f} |
| loss, mean of the last 200 iterations | {vae_loss:.4f} (L1 {vae_l1:.4f}) | {unet_loss:.4f} \
(plain MSE {unet_mse:.4f}) |

Seed {seed}; AdamW, warm-up then cosine decay, bfloat16 autocast, on 2 CPU cores or fewer, shared
with other work. VAE loss: L1 + MSE + L1 of the differences between neighbours + 1e-5 KL;
reconstruction {psnr:.1f} dB PSNR on fresh crops of the training photos. UNet loss: epsilon
prediction with min-SNR weighting (gamma 5), 10 % of captions dropped, exponential moving average
of the weights.
`python -m flashmaps.models.train` trains it anew, with options for each of these numbers; where a
stage was ended by the clock, the learning rate followed the clock, and the result is alike but not
the same to the bit.

## Data

Random crops, flips and colour jitter of photos that the installed packages carry, {crops} crops
for the UNet:

- scikit-image: {skimage};
- scikit-learn: {sklearn}.

`stereo_motorcycle` was held out: matching is demonstrated on it. No photo is
redistributed here. The docstrings of `skimage.data` name the sources of its photos: public domain,
CC0 or no known restrictions wherever a licence is stated. scikit-learn's are CC BY 2.0, china.jpg
by danielbuechele and flower.jpg by vultilion.

## Limits

A first short training on {photos} photos. What it generates are hazy textures in their colours, no
objects, and captions hardly steer it. The VAE blurs fine detail and mutes colours. Not for
producing images. Its features are made for trying attention maps out, not for good matching.
"""


def model_card(parts: Parts, log: Path, psnr: float, args: argparse.Namespace) -> str:
    """The card's markdown, with the losses read from the JSONL training log."""
    stages: dict[str, dict[int, dict]] = {"vae": {}, "unet": {}}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        stages[entry["stage"]][entry["step"]] = entry  # a resumed run repeats steps: last wins
    vae, unet = (list(stage.values()) for stage in stages.values())
    counts = {
        name: sum(p.numel() for p in getattr(parts, name).parameters())
        for name in ("unet", "vae", "text_encoder")
    }
    return TEMPLATE.format(
        sizes=", ".join(f"{n.replace('_', ' ')} {c / 1e6:.2f} M" for n, c in counts.items()),
        vae_steps=len(vae),
        unet_steps=len(unet),
        vae_batch=args.vae_batch,
        unet_batch=args.unet_batch,
        vae_hours=vae[-1]["seconds"] / 3600,
        unet_hours=unet[-1]["seconds"] / 3600,
        vae_loss=_recent(vae, "loss"),
        vae_l1=_recent(vae, "l1"),
        unet_loss=_recent(unet, "loss"),
        unet_mse=_recent(unet, "mse"),
        psnr=psnr,
        seed=args.seed,
        crops=args.bank,
        skimage=", ".join(SKIMAGE_PHOTOS),
        sklearn=" and ".join(SKLEARN_PHOTOS),
        photos=len(SKIMAGE_PHOTOS) + len(SKLEARN_PHOTOS),
    )


def _recent(entries: list[dict], key: str) -> float:
    tail = entries[-200:]
    return sum(entry[key] for entry in tail) / len(tail)
