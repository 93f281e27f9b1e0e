"""Trained parts as a pipeline, and as a half-precision pipeline folder, whole or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from flashmaps.files import whole_folder, write_json

from .architecture import Parts
from .vocabulary import write_vocabulary

HISTORY = "training.json"
LOG = "training.jsonl"
LOGS = "log"  # folder in --work: this training's lines, and LOG, those before it
LINES = "log.jsonl"
KIND = "model"  # of the folder


def as_pipeline(parts: Parts) -> Any:
    """The parts themselves, not copies, as a `StableDiffusionPipeline`."""
    pipe = StableDiffusionPipeline(
        vae=parts.vae,
        unet=parts.unet,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(
    parts: Parts, folder: Path, card: str, trainings: Sequence[dict[str, Any]], log: str = ""
) -> None:
    """Save copies of `parts` in float16 to `folder`, with `card` as its README.md.

    ``trainings`` goes to training.json, for the card of whoever trains on from there, and ``log``,
    the losses of all of them, to training.jsonl.

    The folder is written under a temporary name beside its place and then renamed, so a reader
    never meets half a model.
    """
    halves = {
        name: copy.deepcopy(getattr(parts, name)).to("cpu", torch.float16)
        for name in ("vae", "unet", "text_encoder")
    }
    pipeline = as_pipeline(Parts(**halves, tokenizer=parts.tokenizer, scheduler=parts.scheduler))
    with whole_folder(folder, KIND) as staging:
        pipeline.save_pretrained(staging)
        write_vocabulary(staging / "tokenizer")
        _load_in_float32_unless_asked(staging / "text_encoder" / "config.json")
        for config in staging.glob("*/config.json"):
            _forget_origin(config)
        (staging / "README.md").write_text(card)
        write_json(staging / HISTORY, list(trainings))
        if log:
            (staging / LOG).write_text(log)


def read_trainings(folder: Path) -> list[dict[str, Any]]:
    """What the weights in an exported folder went through; nothing if it does not say."""
    path = folder / HISTORY
    return json.loads(path.read_text()) if path.is_file() else []


def read_log(folder: Path) -> str:
    """The losses of the trainings that :func:`read_trainings` tells of; nothing if not kept."""
    path = folder / LOG
    return path.read_text() if path.is_file() else ""


def _forget_origin(config: Path) -> None:
    """diffusers writes down which folder a part was loaded from; nobody else has that folder."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")


def _load_in_float32_unless_asked(config: Path) -> None:
    """transformers loads the dtype that a model's config names, diffusers float32.

    Left at float16 the text encoder would not fit the rest of a pipeline loaded without a dtype.
    """
    values = json.loads(config.read_text())
    values["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2) + "\n")
