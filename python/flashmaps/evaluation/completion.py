"""``flashmaps eval completion``: the whole of hidden objects, beside rivals, against the truth.

Every method is given the same masks of what is seen and of what is in front, but for the row that
finds its own, and the same collections. An answer is what is seen and, of what is in front, where
the method says that the object goes on. Scores of an object: the IoU of the whole, and of the
hidden region alone; and, where the truth is known, the mean difference from the true pixels in the
region that is truly hidden and was imagined.

The first objects (``imagined``) are also filled by inpainting: from noise with an empty prompt and
with the category's word, read as the neighbours' row reads the image itself; and, for the pixels,
as :func:`flashmaps.complete` does, with the category's word in place of learned ones, alone and
with the keys and values of the best exemplar injected.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.arguments import whole
from flashmaps.diffusion.features import Features
from flashmaps.diffusion.images import Image, load_image
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.bootstrap import RESAMPLES, check_resampling, resample
from flashmaps.evaluation.hidden_objects import HiddenObject, HiddenObjects
from flashmaps.evaluation.segments import shown, told, write_results
from flashmaps.files import check_folder, open_run
from flashmaps.matching.options import MatchOptions
from flashmaps.matching.settings import fingerprint, settings_of
from flashmaps.parts.completion import GUIDANCE, SAMPLES, STEPS, STRENGTH, round_trips
from flashmaps.parts.inpaint import inpaint, rough_fill
from flashmaps.parts.masks import find_masks, likeness, neighbours_mask
from flashmaps.parts.shapes import Exemplar, whole_shape
from flashmaps.segmentation.segment import see

KIND = "completion-evaluation"
OURS = "FlashMaps"
OWN = f"{OURS}, own masks"
IMAGINED = 24
_SCORES = {"iou": "IoU of the whole", "hidden": "IoU of the hidden region"}

Row = dict[str, dict[str, float | None]]  # method, score


def evaluate_completion(
    objects: HiddenObjects,
    out: str | Path,
    *,
    model: Any = "builtin",
    imagined: int = IMAGINED,
    samples: int = SAMPLES,
    resamples: int = RESAMPLES,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Complete every object, score it beside its rivals, and write a folder that grows.

    An interrupted run goes on where it was. Returns what results.json holds: for each method the
    mean of each score with its 95 % interval over objects, and what ours has more.
    """
    from tqdm.auto import tqdm

    from flashmaps.diffusion.loading import load_model, name_of

    check_resampling(resamples, seed)
    whole("imagined", imagined, 0)
    whole("samples", samples, 1, 64)
    check_folder(out, KIND, grows=True)
    pipe = load_model(model)
    asked = {
        "flashmaps": metadata.version("flashmaps"), "images": objects.what, "model": name_of(model),
        "weights": fingerprint(pipe), "imagined": imagined, "samples": samples,
    }  # fmt: skip
    judge = _Judge(pipe, objects, samples)
    found: list[Row] = []
    with open_run(out, KIND, asked, overwrite=overwrite) as run, fit_threads(pipe):
        for index in tqdm(range(len(objects)), desc="objects", disable=not progress):
            name = f"parts/{index:06d}.json"
            if not run.whole(name):
                with torch.no_grad():
                    run.write_json(name, {"row": judge.row(objects[index], index < imagined)})
            found.append(json.loads((run.folder / name).read_text("utf-8"))["row"])
        results = {**asked, **summarise(found, resamples, seed)}
        write_results(run, results, "Completion", tables)
    return results


class _Judge:
    """Rows of objects by one model; collections are seen once."""

    def __init__(self, pipe: Any, objects: HiddenObjects, samples: int) -> None:
        self._pipe, self._objects, self._samples = pipe, objects, samples
        self._options: MatchOptions = settings_of(pipe).options
        self._seen: dict[str, list[Exemplar]] = {}

    def _exemplars(self, category: str) -> list[Exemplar]:
        if category not in self._seen:
            given = self._objects.exemplars(category)
            sets = see(self._pipe, [image for image, _ in given])
            self._seen[category] = [
                Exemplar(found, mask) for found, (_, mask) in zip(sets, given, strict=True)
            ]
        return self._seen[category]

    def row(self, one: HiddenObject, imagined: bool) -> Row:
        exemplars, image = self._exemplars(one.category), load_image(one.image)
        (found,) = see(self._pipe, [image])
        row: Row = {}
        for name, guess in (
            ("what is seen", one.visible), ("and all that is in front", np.ones_like(one.front)),
            ("convex hull", convex_hull(one.visible)),
            ("nearest neighbours", self._neighbours(found, exemplars)),
        ):  # fmt: skip
            row[name] = _score(one, one.visible | (one.front & guess))
        shape = whole_shape(found, one.visible, one.front, exemplars, self._options)
        row[OURS] = _score(one, shape.amodal > 0.5)
        row[OWN] = _score(one, self._own(found, exemplars))
        if imagined:
            best = exemplars[int(shape.weights.argmax())]
            row.update(self._imagine(one, image, shape.amodal > 0.5, exemplars, best))
        return row

    def _neighbours(self, found: Features, exemplars: Sequence[Exemplar]) -> np.ndarray:
        return neighbours_mask(likeness(found, exemplars, self._options), found)

    def _own(self, found: Features, exemplars: Sequence[Exemplar]) -> np.ndarray:
        try:
            seen, front = find_masks(found, exemplars, self._options)
            return whole_shape(found, seen, front, exemplars, self._options).amodal > 0.5
        except ValueError:  # none of it was found
            return np.zeros(found.image.shape[:2], dtype=bool)

    def _imagine(
        self, one: HiddenObject, image: Image, answer: np.ndarray,
        exemplars: Sequence[Exemplar], best: Exemplar,
    ) -> Row:  # fmt: skip
        pipe, row, region = self._pipe, Row(), one.front & ~one.visible
        empty, word = (_states(pipe, text) for text in ("", f"a {one.category}"))
        hidden = answer & ~one.visible
        for name, states in (("empty prompt", empty), ("the word", word)):
            made = inpaint(
                pipe, image, region, states, empty, seeds=(0,), steps=STEPS,
                guidance=1.0 if states is empty else GUIDANCE, strength=1.0,
            )  # fmt: skip
            (seen,) = see(pipe, made)
            there = one.visible | (one.front & self._neighbours(seen, exemplars))
            row[f"inpainting, {name}"] = {**_score(one, there), **_pixels(one, made, hidden)}
        rough = rough_fill(image, one.visible, one.front, hidden)
        row["rough fill"] = _pixels(one, [rough], hidden)
        for name, beside in ((OURS, None), (f"{OURS}, exemplar injected", best.features.image)):
            made = inpaint(
                pipe, rough, region, word, empty, seeds=range(self._samples), steps=STEPS,
                guidance=GUIDANCE, strength=STRENGTH, beside=beside,
            )  # fmt: skip
            row[f"{name}: mean of samples"] = _pixels(one, made, hidden)
            if beside is None:
                whole_ones = [np.where(hidden[..., None], each, image) for each in made]
                trips = round_trips(see(pipe, whole_ones), hidden, best, self._options)
                row[f"{name}: best by round trip"] = _pixels(
                    one, [made[int(np.argmax(trips))]], hidden
                )
        return row


def _states(pipe: Any, text: str) -> Tensor:  # [1, tokens, c]
    found: Tensor = pipe.encode_prompt(text, pipe._execution_device, 1, False)[0]
    return found


def convex_hull(mask: np.ndarray) -> np.ndarray:
    """[h, w] bool: the convex hull of a mask's pixels."""
    from skimage.morphology import convex_hull_image

    return np.asarray(convex_hull_image(mask)) if mask.any() else mask


def _score(one: HiddenObject, answer: np.ndarray) -> dict[str, float | None]:
    return {
        "iou": _iou(answer, one.whole),
        "hidden": _iou(answer & ~one.visible, one.hidden),
    }


def _pixels(
    one: HiddenObject, made: Sequence[Image], hidden: np.ndarray
) -> dict[str, float | None]:
    """Mean difference of colours, 0 to 1, where it is truly hidden and imagined; over samples."""
    both = hidden & one.hidden
    if one.uncovered is None or not both.any():
        return {"difference": None}
    truth = load_image(one.uncovered)[both]
    return {"difference": float(np.mean([np.abs(each[both] - truth).mean() for each in made]))}


def _iou(a: np.ndarray, b: np.ndarray) -> float | None:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else None


def summarise(found: list[Row], resamples: int, seed: int) -> dict[str, Any]:
    """Means with intervals over objects, and paired differences from ours."""
    counts = resample(len(found), resamples, seed)
    methods: dict[str, Any] = {}
    for name in {name: None for row in found for name in row}:
        values = {
            key: np.array([_number(row.get(name, {}).get(key)) for row in found])
            for key in (*_SCORES, "difference")
        }
        ours = {key: np.array([_number(row[OURS].get(key)) for row in found]) for key in _SCORES}
        methods[name] = {
            **{key: told(each, counts) for key, each in values.items()},
            "ours_minus_this": {key: told(ours[key] - values[key], counts) for key in _SCORES},
        }
    return {"scored": len(found), "methods": methods}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows): shapes, and pixels."""
    shapes = [
        [name, *(shown(row[key], 3) for key in _SCORES),
         *("" if name == OURS else shown(row["ours_minus_this"][key], 3, "+") for key in _SCORES)]
        for name, row in results["methods"].items()
        if row["iou"]["mean"] is not None
    ]  # fmt: skip
    pixels = [
        [name, shown(row["difference"], 4)]
        for name, row in results["methods"].items()
        if row["difference"]["mean"] is not None
    ]
    made = [
        (
            f"shape: {results['scored']} objects, inpainting of the first {results['imagined']}",
            ["method", *_SCORES.values(), "ours minus it: whole", "hidden"],
            shapes,
        )
    ]
    if pixels:
        title = f"pixels: the first {results['imagined']} objects, {results['samples']} samples"
        made.append((title, ["method", "difference from the truth where hidden, 0 to 1"], pixels))
    return made
