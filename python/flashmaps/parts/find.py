"""Which parts of a thing are seen in an image, and of the others which must be hidden, and where.

found = fm.find_parts("bird-behind-a-tree.jpg", parts)
found.state          # ("present", "hidden", "absent", ...)
found.probability    # [P] of being seen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from flashmaps.arguments import number
from flashmaps.diffusion.images import Image, load_image, resize
from flashmaps.diffusion.latents import encode
from flashmaps.files import whole_folder, write_json
from flashmaps.parts.places import expected_places
from flashmaps.parts.presence import beside, raw_evidence
from flashmaps.parts.result import Parts
from flashmaps.parts.sight import sight_of
from flashmaps.segmentation import pictures
from flashmaps.segmentation.segment import see

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESENT, HIDDEN, ABSENT = "present", "hidden", "absent"


@dataclass(frozen=True, eq=False)
class FoundParts:
    """What is seen of each part in one image; made by :func:`flashmaps.find_parts`.

    Attributes:
        image: [h, w, 3] as given. names: of the parts.
        masks: [P, h, w] float32, how probable each part is seen at each pixel, read from features
            (:mod:`flashmaps.parts.sight`).
        probability: [P] that it is seen: at least half of it, where it is in the picture.
        evidence: [P, 4], see :mod:`flashmaps.parts.presence`.
        state: "present" where the probability is one half or more; else "hidden" where the parts
            that are seen say that it lies within the picture, "absent" where they say that it lies
            outside, or nothing is seen.
        places: [P, 2], (x, y) in pixels of the middle of each part: seen, or where it must be; NaN
            where nothing says.
    """

    image: Image
    names: tuple[str, ...]
    masks: np.ndarray
    probability: np.ndarray
    evidence: np.ndarray
    state: tuple[str, ...]
    places: np.ndarray

    @property
    def labels(self) -> np.ndarray:  # [h, w] int64
        """The most probable part of each pixel, -1 where none is more probable than no part."""
        rest = 1 - self.masks.sum(0)
        return np.where(self.masks.max(0) > rest, self.masks.argmax(0), -1).astype(np.int64)

    def missing(self) -> tuple[int, ...]:
        """Parts that are hidden."""
        return tuple(p for p, state in enumerate(self.state) if state == HIDDEN)

    def plot(self) -> Figure:
        """The image, its parts, and where those that are hidden must be."""
        from matplotlib.figure import Figure

        height, width = self.image.shape[:2]
        figure = Figure(figsize=(8, 4 * height / width + 0.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.imshow(self.image)
        right.imshow(pictures.painted(self.image, self.labels))
        colours = pictures.palette(len(self.names)) / 255.0
        for p, (x, y) in enumerate(self.places):
            if self.state[p] == HIDDEN:
                left.plot(x, y, "o", color=colours[p], markeredgecolor="white")
        told = [
            f"{name.strip('<>')} {state} {p:.2f}"
            for name, state, p in zip(self.names, self.state, self.probability, strict=True)
        ]
        right.set_title("\n".join(told), fontsize=7, loc="left")
        for ax in (left, right):
            ax.set_axis_off()
        return figure

    def summary(self) -> dict[str, Any]:
        """The numbers on one page, with plain Python values."""
        return {
            "parts": [
                {
                    "name": name,
                    "state": self.state[p],
                    "probability": float(self.probability[p]),
                    "share_of_image": float(self.masks[p].mean()),
                    "place": None if np.isnan(self.places[p, 0]) else self.places[p].tolist(),
                }
                for p, name in enumerate(self.names)
            ]
        }

    def write(self, folder: Path) -> None:
        """Write the files of :meth:`save` to a folder that is there."""
        write_json(folder / "found.json", self.summary())
        pictures.write_labels(folder / "labels.png", self.labels)
        self.plot().savefig(folder / "found.png", dpi=120)
        pictures.write_page(folder / "index.html", "Parts found", ["found.png"], self.summary())

    def save(self, folder: str | Path) -> Path:
        """Write found.json, the labels, a picture and a page, or nothing."""
        with whole_folder(folder, "found-parts") as new:
            self.write(new)
        return Path(folder)

    def __repr__(self) -> str:
        told = ", ".join(f"{n} {s}" for n, s in zip(self.names, self.state, strict=True))
        return f"FoundParts({told})"


def find_parts(
    image: Any, parts: Parts, *, model: Any = None, threshold: float = 0.5
) -> FoundParts:
    """Find learned parts in an image: where each is, and whether it is seen at all.

    Of the model one pass for features, two for where words are attended to, and one for each part
    for how much worse the noise is explained without its word. The first call with a collection
    also looks at its images, three times each (:mod:`flashmaps.parts.sight`).

    Args:
        image: as for :func:`flashmaps.match`.
        parts: what :func:`flashmaps.learn_parts` gave, or ``Parts.load`` read.
        model: None: the one that they were learned with, by its name.
        threshold: of the probability, from which a part is "present".

    Raises ValueError for parts of another model, and as :func:`flashmaps.match` does.
    """
    number("threshold", threshold, least=0, most=1)
    if not isinstance(parts, Parts):
        raise ValueError(f"parts is a {type(parts).__name__}; wanted what fm.learn_parts gives")
    picture = load_image(image)
    return find_each([picture], parts, parts.pipeline(model), threshold=threshold)[0]


@torch.no_grad()
def find_each(
    images: Sequence[Image], parts: Parts, pipe: Any, *, threshold: float = 0.5
) -> list[FoundParts]:
    """As :func:`find_parts`, of images that are read, with a model that is loaded."""
    made, sight = [], sight_of(parts, pipe)
    for picture in images:
        latent = encode(pipe, [resize(picture, parts.fitted(pipe, picture))])
        raw, _ = raw_evidence(
            pipe, latent, parts.words, tuple(parts.words), parts.layers, parts.timestep, parts.head
        )
        planes = sight.read(pipe, see(pipe, [picture])[0])
        told, peak = sight.probability(planes)
        evidence = torch.cat((beside(raw, parts.norms)[0], peak[:, None]), 1).numpy()
        probability = told.numpy()
        height, width = picture.shape[:2]
        full = F.interpolate(
            planes[None, :-2], (height, width), mode="bilinear", align_corners=False
        )
        masks = full[0].numpy()
        seen = probability >= threshold
        places = expected_places(masks, seen, parts.labels)
        state = tuple(_state(bool(s), place) for s, place in zip(seen, places, strict=True))
        pixels = places * (width, height) - 0.5
        made.append(FoundParts(picture, parts.names, masks, probability, evidence, state, pixels))
    return made


def _state(seen: bool, place: np.ndarray) -> str:
    if seen:
        return PRESENT
    return HIDDEN if bool(((place >= 0) & (place <= 1)).all()) else ABSENT
