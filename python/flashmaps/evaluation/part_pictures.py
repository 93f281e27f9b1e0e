"""Pictures generated from learned words, named by a classifier that was trained on the world."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from flashmaps.files import Run
from flashmaps.parts.result import Parts

STEPS, GUIDANCE = 15, 3.0
_TRAINING, _EPOCHS, _HELD_OUT, _SIDE = 3_000, 8, 200, 64
_FILE = "classifier.safetensors"


class Judge:
    """The classifier of :mod:`flashmaps.models.check`, trained once and kept in the run.

    Attributes:
        right: what share of held-out scenes of the validation split it names right.
    """

    def __init__(self, run: Run) -> None:
        from safetensors.torch import load_file, save_file

        from flashmaps.models.bank import as_input
        from flashmaps.models.check import Classifier, fit, named, scenes

        if not run.whole(_FILE):
            images, labels = scenes("train", _TRAINING, _SIDE, 1, 0)
            model = fit(images, labels, epochs=_EPOCHS, seed=0, device=torch.device("cpu"))
            images, labels = scenes("validation", _HELD_OUT, _SIDE, 0, 0)
            found = named(model, as_input(images))
            right = (found[:, 0] == labels[:, 0]).float().mean()
            with run.file(_FILE) as new:
                save_file({**model.state_dict(), "right": right}, new)
        weights = load_file(run.folder / _FILE)
        self.right = float(weights.pop("right"))
        self.model = Classifier()
        self.model.load_state_dict(weights)
        self.model.eval()

    def name(self, pictures: list[Any]) -> list[str]:
        """The category that each picture shows, most likely."""
        from flashmaps.models.bank import as_input
        from flashmaps.models.check import NAMES, named

        pixels = as_input(torch.from_numpy(np.stack([np.asarray(each) for each in pictures])))
        small = F.interpolate(pixels, size=(_SIDE, _SIDE), mode="area")
        return [NAMES[int(i)] for i in named(self.model, small)[:, 0]]


def picture_scores(
    pipe: Any, parts: Parts, category: str, judge: Judge, count: int, run: Run, name: str
) -> dict[str, Any]:
    """What share of ``count`` pictures is named right: from the category's word, with all parts.

    The same noise for both. The pictures are kept beside the scores as one PNG: a row each.
    """
    from PIL import Image

    prompts = {"named": parts.prompt(()), "named_parts": parts.prompt()}
    out: dict[str, Any] = {"count": count, "judge": judge.right}
    rows = []
    for key, prompt in prompts.items():
        drawn = generated(pipe, parts, prompt, count)
        found = judge.name(drawn)
        out[key] = sum(each == category for each in found) / count
        out[f"{key}_as"] = found
        rows.append(np.concatenate([np.asarray(each) for each in drawn], 1))
    with run.file(f"{name}.png") as new:
        Image.fromarray(np.concatenate(rows)).save(new, format="PNG")
    return out


def generated(pipe: Any, parts: Parts, prompt: str, count: int) -> list[Any]:
    """``count`` pictures from a prompt with learned words; picture i always has the same noise."""
    from flashmaps.diffusion.learned_words import prompt_states

    with torch.no_grad():
        told, _ = prompt_states(pipe, [prompt], parts.words)
        nothing, _ = prompt_states(pipe, [""], {})
    height, width = parts.size
    return list(
        pipe(
            prompt_embeds=told.expand(count, -1, -1),
            negative_prompt_embeds=nothing.expand(count, -1, -1),
            generator=[torch.Generator("cpu").manual_seed(i) for i in range(count)],
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=height, width=width,
        ).images
    )  # fmt: skip
