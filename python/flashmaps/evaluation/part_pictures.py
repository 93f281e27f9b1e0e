"""Pictures generated from learned words, named by a classifier that was trained on the world."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from flashmaps.files import Run
from flashmaps.parts.result import Parts

STEPS, GUIDANCE = 15, 3.0
_TRAINING, _EPOCHS, _HELD_OUT, _SIDE = 8_000, 10, 300, 32
_SHOWN = 128  # pixels a side of what is judged
_FILE = "judge.safetensors"


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
            images, labels = scenes("validation", _HELD_OUT, _SHOWN, 0, 0)
            found = named(model, _smaller(as_input(images)))
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
        return [NAMES[int(i)] for i in named(self.model, _smaller(pixels))[:, 0]]


def _smaller(pixels: torch.Tensor) -> torch.Tensor:
    return F.interpolate(pixels, size=(_SIDE, _SIDE), mode="area")


def draw_pictures(pipe: Any, parts: Parts, category: str, count: int, run: Run, name: str) -> None:
    """NAME.png: ``count`` pictures from the category's word, below them with all parts' words."""
    _write(
        run, name, [generated(pipe, parts, p, count) for p in (parts.prompt(()), parts.prompt())]
    )


def draw_of_word(pipe: Any, parts: Parts, category: str, count: int, run: Run, name: str) -> None:
    """NAME.png: ``count`` pictures of the same noise from the category's own, true word."""
    _write(run, name, [generated(pipe, parts, f"a {category}", count)])


def _write(run: Run, name: str, rows: list[list[Any]]) -> None:
    from PIL import Image

    whole = np.concatenate([np.concatenate([np.asarray(x) for x in row], 1) for row in rows])
    with run.file(f"{name}.png") as new:
        Image.fromarray(whole).save(new, format="PNG")


def read_pictures(run: Run, name: str, size: tuple[int, int]) -> list[list[np.ndarray]]:
    """The pictures of NAME.png, of ``size`` (height, width), row by row: uint8 [h, w, 3] each."""
    from PIL import Image

    with Image.open(run.folder / f"{name}.png") as opened:
        whole = np.asarray(opened.convert("RGB"))
    height, width = size
    return [
        [whole[y : y + height, x : x + width] for x in range(0, whole.shape[1], width)]
        for y in range(0, whole.shape[0], height)
    ]


def picture_scores(
    pipe: Any, parts: Parts, category: str, judge: Judge, run: Run, names: dict[str, str]
) -> dict[str, Any]:
    """What share of pictures is named right, and what share of the parts is read in them.

    ``names``: of the files, "learned" and "word". Rows are "named", from the learned word;
    "named_parts", with all parts' words; and "named_word", from the true word. A part is read in a
    picture where :mod:`flashmaps.parts.sight`, fitted to the masks that the words were learned
    from, says that it is more probably seen than not.
    """
    from flashmaps.diffusion.images import load_image
    from flashmaps.parts.sight import sight_of
    from flashmaps.segmentation.segment import see

    rows = read_pictures(run, names["learned"], parts.size)
    rows += read_pictures(run, names["word"], parts.size)
    out: dict[str, Any] = {"count": len(rows[0]), "judge": judge.right}
    sight = sight_of(parts, pipe)
    for key, drawn in zip(("named", "named_parts", "named_word"), rows, strict=True):
        found = judge.name(drawn)
        out[key] = sum(each == category for each in found) / len(found)
        out[f"{key}_as"] = found
        told = [
            sight.probability(sight.read(pipe, seen))[0] >= 0.5
            for seen in see(pipe, [load_image(each) for each in drawn])
        ]
        out[f"read_{key.removeprefix('named').strip('_') or 'category'}"] = float(
            torch.stack(told).float().mean()
        )
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
