"""The model card that travels with the weights: what was trained, on what, and how far."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .architecture import Parts
from .photos import SKIMAGE_PHOTOS, SKLEARN_PHOTOS
from .pictures import Pictures
from .unet import DROPPED

TEMPLATE = """\
---
library_name: diffusers
pipeline_tag: text-to-image
---

# FlashMaps builtin: a miniature Stable Diffusion 2

The classes and block structure of Stable Diffusion 2 with a hundred-and-fiftieth of its parameters
({sizes}), small enough to ship inside a
Python package. It exists so that attention maps of a latent diffusion pipeline can be captured,
matched and looked at without a download.

    from diffusers import StableDiffusionPipeline
    from flashmaps.models import builtin_folder
    pipe = StableDiffusionPipeline.from_pretrained(builtin_folder())
    pipe("a striped red bird on grass", guidance_scale=3).images[0]

Pictures are 128 x 128 pixels, latents 4 x 32 x 32, self-attention runs at 32 x 32, 16 x 16 and
8 x 8 tokens; the UNet predicts {prediction}. Weights are stored in float16; load them with any
dtype.

## Training

| | VAE | UNet and text encoder |
| --- | --- | --- |
| iterations | {vae[step]} | {unet[step]} |
| pictures seen, with repetition | {vae[samples]} | {unet[samples]} |
| hours | {vae_hours:.2f} | {unet_hours:.2f} |
| loss, mean of the last tenth | {vae_loss:.4f} (L1 {vae_l1:.4f}) | {unet_loss:.4f} |
| held out | {psnr} | loss {held_out} |

Seed {seed}; on {hardware}.{init}
AdamW, warm-up, then a constant learning rate with a cosine fall in the last part, bfloat16
autocast, exponential moving average of the weights. VAE loss: L1 + MSE + L1 of the differences
between neighbours + 1e-5 KL. UNet loss: squared error times min(1, 5 / SNR);
{dropped:.0%} of captions dropped.{alignment}
`python -m flashmaps.models.train` trains it anew, with options for each of these numbers; where a
stage was ended by the clock, the learning rate followed the clock, and the result is alike but not
the same to the bit.

## Data

{bank} pictures, drawn once: {world:.0%} scenes of `flashmaps.world`, training split, half of them
with one object alone, with the world's captions; and {photos:.0%} random crops, flips and colour
jitter of photos that the installed packages carry:

- scikit-image: {skimage};
- scikit-learn: {sklearn}.

`stereo_motorcycle` was held out: matching is demonstrated on it. No photo is
redistributed here. The docstrings of `skimage.data` name the sources of its photos: public domain,
CC0 or no known restrictions wherever a licence is stated. scikit-learn's are CC BY 2.0, china.jpg
by danielbuechele and flower.jpg by vultilion.

## What it can do

{check}

It knows the drawn world and {count} photos, and the words of their captions; of anything else it
has no idea. Not for producing images.
"""

ALIGNMENT = """
To it is added {:g} times the alignment loss of `flashmaps.models.alignment`: linear layers, thrown
away afterwards, read from two of the decoder's blocks which part of which object each token shows,
and where on it. That is supervision by the drawn world's truth (its training split): how well this
model matches scenes of the world is not what diffusion alone teaches."""


def model_card(parts: Parts, work: Path, args: argparse.Namespace) -> str:
    """The card's markdown, with all numbers from the training's own files in ``work``."""
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    vae, unet = (_stage(lines, name) for name in ("vae", "unet"))
    facts = json.loads((work / "vae-done" / "facts.json").read_text())
    counts = {
        name: sum(p.numel() for p in getattr(parts, name).parameters())
        for name in ("unet", "vae", "text_encoder")
    }
    pictures = Pictures()
    kinds = {"psnr_world": "scenes", "psnr_photos": "photos"}
    held_out = [line["held_out_loss"] for line in unet if "held_out_loss" in line]
    return TEMPLATE.format(
        sizes=", ".join(f"{n.replace('_', ' ')} {c / 1e6:.2f} M" for n, c in counts.items()),
        prediction={"v_prediction": "velocity", "epsilon": "noise"}[
            parts.scheduler.config.prediction_type
        ],
        vae=_last(vae),
        unet=_last(unet),
        vae_hours=_last(vae)["seconds"] / 3600,
        unet_hours=_last(unet)["seconds"] / 3600,
        vae_loss=_recent(vae, "loss"),
        vae_l1=_recent(vae, "l1"),
        unet_loss=_recent(unet, "loss"),
        psnr=", ".join(f"{facts[key]:.1f} dB PSNR ({name})" for key, name in kinds.items()),
        held_out=f"{held_out[-1]:.4f}" if held_out else "not measured",
        seed=args.seed,
        hardware=" and ".join(dict.fromkeys(x["hardware"] for x in lines if x["stage"] == "run")),
        init=_init(lines),
        bank=args.bank,
        world=1 - pictures.photo_share,
        photos=pictures.photo_share,
        skimage=", ".join(SKIMAGE_PHOTOS),
        sklearn=" and ".join(SKLEARN_PHOTOS),
        check=_check(work / "check.json"),
        dropped=DROPPED,
        alignment=ALIGNMENT.format(args.alignment) * (args.alignment > 0),
        count=len(SKIMAGE_PHOTOS) + len(SKLEARN_PHOTOS),
    )


def _stage(lines: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """A stage's lines in order; a resumed run repeats steps, and the last line wins."""
    merged: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["stage"] == name:
            merged.setdefault(line["step"], {}).update(line)
    return [merged[step] for step in sorted(merged)]


def _init(lines: list[dict[str, Any]]) -> str:
    names = dict.fromkeys(line["init"] for line in lines if "init" in line)
    return f" Started from the weights of an earlier training ({', '.join(names)})." * bool(names)


def _last(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return entries[-1] if entries else {"step": 0, "samples": 0, "seconds": 0.0}


def _recent(entries: list[dict[str, Any]], key: str) -> float:
    values = [entry[key] for entry in entries if key in entry]
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")


def _check(path: Path) -> str:
    if not path.is_file():
        return "Whether its pictures can be told apart was not checked (`flashmaps.models.check`)."
    found = json.loads(path.read_text())
    return (
        f"A classifier trained on the world's scenes, right about {found['scenes']:.1%} of scenes\n"
        f"it had not seen and {found['reconstructions']:.1%} of those after the VAE, names the\n"
        f"category that the caption asked for in {found['generated']:.1%} of {found['count']}\n"
        f"generated pictures ({found['steps']} steps, guidance {found['guidance']:g}).\n"
        "`python -m flashmaps.models.check` does this."
    )
