"""The whole of an object that is partly hidden: its shape from a collection, its pixels imagined.

    parts = fm.learn_parts("birds/*.jpg")
    whole = fm.complete("bird-behind-a-tree.jpg", parts)
    whole.missing                    # parts that are hidden
    whole.amodal                     # [h, w], the probability that it reaches this pixel
    whole.images[whole.best]         # the image with the hidden region painted in

The shape is the vote of the collection's objects, laid over what is seen
(:mod:`flashmaps.parts.shapes`). The pixels are made by inpainting with the words of the missing
parts (:mod:`flashmaps.parts.inpaint`), from a rough fill with what is seen nearby.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flashmaps.arguments import number, switch, whole
from flashmaps.diffusion.features import Features
from flashmaps.diffusion.images import Image, load_image
from flashmaps.diffusion.learned_words import prompt_states
from flashmaps.matching.match import match_features
from flashmaps.matching.options import MatchOptions
from flashmaps.matching.settings import settings_of
from flashmaps.parts.imagined import Completion
from flashmaps.parts.inpaint import inpaint, rough_fill
from flashmaps.parts.masks import find_masks
from flashmaps.parts.result import Parts
from flashmaps.parts.shapes import Exemplar, Shape, covered, whole_shape
from flashmaps.segmentation.segment import see

SAMPLES = 4
MOST_SAMPLES = 64
STEPS, GUIDANCE, STRENGTH = 20, 3.0, 0.3  # see docs/parts.md
_SEEN: weakref.WeakKeyDictionary[Parts, list[Exemplar]] = weakref.WeakKeyDictionary()
_FEW = 8  # pixels of a part where exemplars put it; fewer are no part


def complete(
    image: Any,
    parts: Parts,
    *,
    visible: Any = None,
    occluder: Any = None,
    samples: int = SAMPLES,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    strength: float = STRENGTH,
    model: Any = None,
    progress: bool = False,
) -> Completion:
    """Imagine the whole of an object that is partly hidden.

    Args:
        image: anything :func:`flashmaps.diffusion.images.load_image` takes, with one object of the
            kind of the parts' collection.
        parts: learned from a collection of its kind. Its images are the exemplars: their objects
            should be seen whole.
        visible: mask of what is seen of the object, [h, w], or a picture of it; anything but 0
            counts. None: found by likeness to the collection.
        occluder: mask of what stands in front, likewise. None: found within the outline that the
            collection gives.
        samples: how many pictures, 1 to 64.
        seed: of the noise; sample k has seed + k.
        steps, guidance, strength: of the inpainting. ``strength`` 1 begins from noise alone, less
            from a rough fill.
        model: as for :func:`flashmaps.match`; None: the one the parts were learned with.
        progress: show a bar.

    A sample's score is the sum of two shares: of the tokens in the hidden region that come back to
    their own place, within a tenth of the picture, on the round trip to the exemplar that fits
    best; and the mean probability there of the part that the exemplars have there.

    Raises ValueError for masks of another size or without a pixel, where nothing of the object is
    seen, and for parts of another model.
    """
    whole("samples", samples, 1, MOST_SAMPLES)
    whole("seed", seed, 0, 2**62)
    whole("steps", steps, 1, 1000)
    number("guidance", guidance, least=0, most=100)
    number("strength", strength, least=0.05, most=1)
    if int(steps * strength) < 1:
        raise ValueError(
            f"steps={steps} at strength={strength} leave no step to take: give more of either"
        )
    switch("progress", progress)
    if not isinstance(parts, Parts):
        raise ValueError(f"parts is a {type(parts).__name__}; wanted what fm.learn_parts gives")
    picture = load_image(image)
    seen = None if visible is None else load_mask("visible", visible, picture)
    front = None if occluder is None else load_mask("occluder", occluder, picture)
    if seen is not None and front is not None:
        seen = seen & ~front
        if not seen.any():
            raise ValueError(
                "the occluder covers all that is visible: nothing of the object is seen"
            )
    pipe = parts.pipeline(model)
    options = settings_of(pipe).options
    exemplars = exemplars_of(parts, pipe)
    with torch.no_grad():
        (found,) = see(pipe, [picture])
        seen, front = find_masks(found, exemplars, options, visible=seen, front=front)
        shape = whole_shape(found, seen, front, exemplars, options)
        labels = part_labels(shape, exemplars)
        shares = _shares_seen(labels, seen, front, parts.count)
        hidden = (shape.amodal > 0.5) & ~seen
        images: list[Image] = [picture]
        scores: list[float] = []
        if hidden.any():
            absent = [p for p in range(parts.count) if shares[p] < 0.5]
            states = prompt_states(pipe, [parts.prompt(absent), ""], parts.words)[0]
            images = inpaint(
                pipe, rough_fill(picture, seen, front, hidden), front & ~seen, states[:1],
                states[1:], seeds=range(seed, seed + samples), steps=steps, guidance=guidance,
                strength=strength, progress=progress,
            )  # fmt: skip
            images = [np.where(hidden[..., None], each, picture) for each in images]
            made = see(pipe, images)
            trips = round_trips(made, hidden, exemplars[int(shape.weights.argmax())], options)
            there = parts.read(pipe, images)
            scores = [
                trip + _present(plane.numpy(), labels, hidden)
                for trip, plane in zip(trips, there, strict=True)
            ]
    return Completion(
        image=picture, visible=seen, front=front, amodal=shape.amodal, names=parts.names,
        shares=shares, images=tuple(images), scores=tuple(scores), shape=shape,
        settings={
            "samples": samples, "seed": seed, "steps": steps, "guidance": guidance,
            "strength": strength, "model": parts.model, "weights": parts.weights,
            "masks_given": [
                name for name, mask in (("visible", visible), ("occluder", occluder))
                if mask is not None
            ],
        },
    )  # fmt: skip


def load_mask(name: str, given: Any, image: Image) -> np.ndarray:
    """[h, w] bool of a mask of ``image``: an array, or all that load_image takes.

    Raises ValueError, naming the argument, for another size and for a mask without a pixel.
    """
    array = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else given
    if not (isinstance(array, np.ndarray) and array.ndim == 2):
        array = load_image(array, name).max(2)
    mask = array != 0
    if mask.shape != image.shape[:2]:
        raise ValueError(
            f"{name} is {mask.shape[1]} x {mask.shape[0]} pixels, the image {image.shape[1]} x "
            f"{image.shape[0]}: they must be alike"
        )
    if not mask.any():
        raise ValueError(f"{name} is empty: no pixel of it is set")
    return mask


def exemplars_of(parts: Parts, pipe: Any) -> list[Exemplar]:
    """The collection's objects, seen by the model once for as long as ``parts`` lives.

    Raises ValueError where no image of it shows a part.
    """
    if parts not in _SEEN:
        shown = [
            (image, labels)
            for image, labels in zip(parts.images, parts.labels, strict=True)
            if (labels >= 0).any()
        ]
        if not shown:
            raise ValueError("no image of the parts' collection shows a part: there is no exemplar")
        sets = see(pipe, [image for image, _ in shown])
        _SEEN[parts] = [
            Exemplar(found, labels >= 0, labels.astype(np.int64))
            for found, (_, labels) in zip(sets, shown, strict=True)
        ]
    return _SEEN[parts]


def part_labels(shape: Shape, exemplars: Sequence[Exemplar]) -> np.ndarray:
    """[h, w] int64: the part that exemplars, weighed, mostly have at each pixel; -1: none."""
    count = max(int(each.labels.max()) for each in exemplars if each.labels is not None) + 2
    votes = np.zeros((count, *shape.depth.shape), dtype=np.float32)  # the first is of no part
    for each, places, inside, weight in zip(
        exemplars, shape.places, shape.inside, shape.weights, strict=True
    ):
        assert each.labels is not None
        column, row = np.rint(places).astype(np.intp).transpose(2, 0, 1)
        height, width = each.labels.shape
        label = each.labels[row.clip(0, height - 1), column.clip(0, width - 1)]
        label = np.where(inside, label, -1) + 1
        np.put_along_axis(votes, label[None], np.take_along_axis(votes, label[None], 0) + weight, 0)
    return votes.argmax(0) - 1


def _shares_seen(
    labels: np.ndarray, seen: np.ndarray, front: np.ndarray, count: int
) -> np.ndarray:  # [P]
    """Of each part, where exemplars have it and something shows it or hides it, the share seen."""
    shares = np.full(count, np.nan)
    for part in range(count):
        there = (labels == part) & (seen | front)
        if there.sum() >= _FEW:
            shares[part] = (there & seen).sum() / there.sum()
    return shares


def round_trips(
    made: Sequence[Features], hidden: np.ndarray, exemplar: Exemplar, options: MatchOptions
) -> list[float]:
    """Of each picture, the share of its tokens in ``hidden`` that come back within a tenth."""
    tokens = covered(hidden, made[0].grid) >= 0.5
    if not tokens.any():
        tokens = covered(hidden, made[0].grid) > 0
    found = []
    for each in made:
        match = match_features(each, exemplar.features, options)
        distance = match.round_trip.hard_distance[0].float().cpu().numpy()[tokens]
        found.append(float((distance <= 0.1).mean()))
    return found


def _present(planes: np.ndarray, labels: np.ndarray, hidden: np.ndarray) -> float:
    """Mean over ``hidden`` of the probability [P + 1, h', w'] of the part that belongs there."""
    plane = torch.from_numpy(planes)[None]
    full = torch.nn.functional.interpolate(
        plane, labels.shape, mode="bilinear", align_corners=False
    )[0].numpy()
    inside = hidden & (labels >= 0)
    if not inside.any():
        return 0.0
    return float(np.take_along_axis(full, labels.clip(0)[None], 0)[0][inside].mean())
