"""The model card that travels with the weights: what was trained, on what, and how far."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from .architecture import Parts
from .batch import DROPPED
from .export import LINES, LOGS
from .photos import SKIMAGE_PHOTOS, SKLEARN_PHOTOS
from .pictures import COLOURS_OF_VIEWS, REDUCTION, Pictures
from .unet import LOSS_WEIGHT

NOTES = "notes.md"  # in the working folder: what whoever trained has to say, for the card
TEMPLATE = """\
---
library_name: diffusers
pipeline_tag: text-to-image
---

# FlashMaps {name}: a miniature Stable Diffusion 2

The classes and block structure of Stable Diffusion 2 with a hundred-and-fiftieth of its parameters
({sizes}), small enough to ship inside a
Python package. It exists so that attention maps of a latent diffusion pipeline can be captured,
matched and looked at without a download.

    from diffusers import StableDiffusionPipeline
    {loading}
    pipe("a striped red bird on grass", guidance_scale=3).images[0]

Pictures are {size} x {size} pixels, latents 4 x {side} x {side}, self-attention runs at {grids}
tokens; the UNet predicts {prediction}. Weights are stored in float16; load them with any
dtype.

## Training

VAE: {vae}; held out,
{psnr}. The loss is L1 + MSE + L1 of the differences
between neighbours + 1e-5 KL.

UNet and text encoder{trainings}:

{unet}

Seed {seed}; on {hardware}.
{optimizer}, warm-up, then a constant learning rate with a cosine fall in the last part, bfloat16
autocast, exponential moving average of the weights. UNet loss: squared error, times the weight in
the table.{losses}
`python -m flashmaps.models.train` trains it anew, with options for each of these numbers; where a
stage was ended by the clock, the learning rate followed the clock, and the result is alike but not
the same to the bit.

## Data

Drawn once: {world:.0%} scenes of `flashmaps.world`, training split, half of them with one object
alone, with the world's captions; and {photos:.0%} random crops, flips and colour jitter of photos
that the installed packages carry:

- scikit-image: {skimage};
- scikit-learn: {sklearn}.

`stereo_motorcycle` was held out: matching is demonstrated on it. No photo is
redistributed here. The docstrings of `skimage.data` name the sources of its photos: public domain,
CC0 or no known restrictions wherever a licence is stated. scikit-learn's are CC BY 2.0, china.jpg
by danielbuechele and flower.jpg by vultilion.

## What it can do

{check}
{sheet}
{notes}
It knows the drawn world and {count} photos, and the words of their captions; of anything else it
has no idea. Not for producing images.
"""

BUILTIN = """\
from flashmaps.models import builtin_folder
    pipe = StableDiffusionPipeline.from_pretrained(builtin_folder())"""
ELSEWHERE = 'pipe = StableDiffusionPipeline.from_pretrained("FOLDER")  # where this card is'

MUTUAL = """
A share of {:g} of each batch are pairs of pictures of one object, in other poses and places, one
noisier than the other: the decoder's self-attention sees the keys and values of both
(`flashmaps.models.mutual`)."""
AGREEMENT = """
A share of {:g} of each batch is seen without captions in views: a picture, and the same one warped
and in other colours. Cosines of block outputs, and the attention of one view's queries to the
other's keys, have to find what the warp says (weight {:g}): `flashmaps.models.agreement`."""
SHIFTS = """
Each is shifted on its own, by up to {:g} of a side, so that place is no help."""
WALKS = """
Also by way of a third view, another picture of the same object, and back (weight {:g})."""
KIN = """
A share of {:g} of those other pictures show another object of the same category, as their captions
say."""
FREE = """
No label of the world takes part: of its scenes the training knows the pixels, the captions, and
which two pictures show one object. Other colours are made from the pixels alone, or, where the
table says "redrawn", by the world drawing the objects of a picture once more where they stand, in
other paint, before another ground and in another light."""
ALIGNMENT = """
To it is added {:g} times the alignment loss of `flashmaps.models.alignment`: linear layers, thrown
away afterwards, read from two of the decoder's blocks which part of which object each token shows,
and where on it. That is supervision by the drawn world's truth (its training split): how well this
model matches scenes of the world is not what diffusion alone teaches."""

_OPTIMIZERS = {
    "adamw": "AdamW",
    "muon": "Muon (convolutions and matrices) and AdamW (the rest)",
}


def _losses(rows: list[dict[str, Any]]) -> str:
    """What is added to the diffusion loss, by the last training; labels by any of them."""
    last = rows[-1]
    found = MUTUAL.format(last["mutual"]) if last["mutual"] > 0 else ""
    if last["agreement"] > 0 or last["walks"] > 0:
        found += AGREEMENT.format(last["views"], last["agreement"])
        if last.get("shift", 0) > 0:
            found += SHIFTS.format(last["shift"])
    if last["walks"] > 0:
        found += WALKS.format(last["walks"])
    if found and last.get("kin", 0) > 0:
        found += KIN.format(last["kin"])
    told = max(row.get("alignment", 0) for row in rows)
    return found + (ALIGNMENT.format(told) if told > 0 else FREE)


def _vae_facts(vae: list[dict[str, Any]]) -> str:
    last = _last(vae)
    if not last["step"]:
        return "as it was in the weights that the training started from, not trained again"
    return (
        f"{last['step']} iterations, {last['samples']} pictures with repetition, "
        f"{last['seconds'] / 3600:.2f} hours; loss\n{_recent(vae, 'loss'):.4f} (mean of the last "
        f"tenth), L1 {_recent(vae, 'l1'):.4f}"
    )


def trainings(work: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the UNet and the text encoder went through, one after the other; the last is this one.

    The earlier ones are those of the weights that ``--init`` started from, if they tell.
    """
    lines = _lines(work)
    earlier = [line["earlier"] for line in lines if line.get("earlier")]
    unet = _stage(lines, "unet")
    held_out = [line["held_out_loss"] for line in unet if "held_out_loss" in line]
    loss = _recent(unet, "noise")
    this = {
        "pixels": args.size,
        "iterations": _last(unet)["step"],
        "batch": args.unet_batch,
        "pictures drawn": round(_last(unet).get("drawn", args.bank)),
        "pictures seen": _last(unet)["samples"],
        "captions dropped": DROPPED,
        "hours": round(_last(unet)["seconds"] / 3600, 2),
        "optimizer": args.unet_optimizer,
        "learning rate": args.unet_lr,
        "weight": LOSS_WEIGHT,
        "mutual": args.mutual,
        "views": args.views,
        "views' colours": COLOURS_OF_VIEWS,
        "shift": args.shift,
        "agreement": args.agreement,
        "walks": args.walks,
        "kin": args.kin,
        "alignment": args.alignment,
        "loss": round(loss, 4) if math.isfinite(loss) else None,
        "held out": round(held_out[-1], 4) if held_out else None,
    }
    return [*(earlier[-1] if earlier else []), this]


def model_card(parts: Parts, work: Path, args: argparse.Namespace) -> str:
    """The card's markdown, with all numbers from the training's own files in ``work``."""
    lines = _lines(work)
    vae, unet = _stage(lines, "vae"), trainings(work, args)
    facts = json.loads((work / "vae-done" / "facts.json").read_text())
    counts = {
        name: sum(p.numel() for p in getattr(parts, name).parameters())
        for name in ("unet", "vae", "text_encoder")
    }
    pictures = Pictures()
    side = parts.unet.config.sample_size
    kinds = {"psnr_world": "scenes", "psnr_photos": "photos"}
    return TEMPLATE.format(
        sizes=", ".join(f"{n.replace('_', ' ')} {c / 1e6:.2f} M" for n, c in counts.items()),
        size=side * REDUCTION,
        side=side,
        grids=", ".join(f"{side // factor} x {side // factor}" for factor in (1, 2, 4)),
        prediction={"v_prediction": "velocity", "epsilon": "noise"}[
            parts.scheduler.config.prediction_type
        ],
        name=args.name,
        loading=BUILTIN if args.name == "builtin" else ELSEWHERE,
        vae=_vae_facts(vae),
        trainings=", one training after the other" * (len(unet) > 1),
        unet=_table(unet),
        psnr=", ".join(f"{facts[key]:.1f} dB PSNR ({name})" for key, name in kinds.items()),
        seed=args.seed,
        hardware=" and ".join(dict.fromkeys(x["hardware"] for x in lines if x["stage"] == "run")),
        world=1 - pictures.photo_share,
        photos=pictures.photo_share,
        skimage=", ".join(SKIMAGE_PHOTOS),
        sklearn=" and ".join(SKLEARN_PHOTOS),
        check=_check(work / "check.json"),
        notes=_notes(work / NOTES),
        sheet="`docs/samples.jpg` of FlashMaps' sources is its sheet of samples."
        if args.name == "builtin"
        else "`--work` of the training keeps its sheets of samples.",
        losses=_losses(unet),
        optimizer=_OPTIMIZERS[args.unet_optimizer],
        count=len(SKIMAGE_PHOTOS) + len(SKLEARN_PHOTOS),
    )


def _stage(lines: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """A stage's lines in order; a resumed run repeats steps, and the last line wins."""
    merged: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["stage"] == name:
            merged.setdefault(line["step"], {}).update(line)
    return [merged[step] for step in sorted(merged)]


def _table(rows: list[dict[str, Any]]) -> str:
    """One column for each training, its numbers below each other."""
    head = f"| | {' | '.join(f'{i}.' for i in range(1, len(rows) + 1))} |"
    names = list(dict.fromkeys(name for row in rows for name in row))
    body = []
    for name in names:
        values = (row.get(name) for row in rows)
        body.append(f"| {name} | {' | '.join('' if v is None else str(v) for v in values)} |")
    return "\n".join([head, "| --- |" + " --- |" * len(rows), *body])


def _lines(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / LOGS / LINES).read_text().splitlines()]


def _last(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return entries[-1] if entries else {"step": 0, "samples": 0, "seconds": 0.0}


def _recent(entries: list[dict[str, Any]], key: str) -> float:
    values = [entry[key] for entry in entries if key in entry]
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")


def _notes(path: Path) -> str:
    return f"\n{path.read_text().strip()}\n" if path.is_file() else ""


def _check(path: Path) -> str:
    if not path.is_file():
        return "Whether its pictures can be told apart was not checked (`flashmaps.models.check`)."
    found = json.loads(path.read_text())
    return (
        f"A classifier trained on the world's scenes, right about {found['scenes']:.1%} of scenes\n"
        f"it had not seen and {found['reconstructions']:.1%} of those after the VAE, names the\n"
        f"category that the caption asked for in {found['generated']:.1%} of {found['count']}\n"
        f"generated pictures ({found['steps']} steps, guidance {found['guidance']:g})"
        f"{_colours(found)}.\n"
        "`python -m flashmaps.models.check` does this."
    )


def _colours(found: dict[str, Any]) -> str:
    if "colours" not in found:
        return ""
    share = found["colours"]
    return (
        f", and\nthe colour in {share['generated']:.1%} (of scenes it is right about "
        f"{share['scenes']:.1%} of the colours)"
    )
