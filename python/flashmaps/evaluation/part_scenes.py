"""Collections of the world to learn parts from, and images held out to score them on.

Parts that the world calls alike, the legs of a cat or the wheels of a car, are one part here: a
word cannot tell them apart. Images to learn from show one object and nothing before it; a split's
images held out are others of the same split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmaps.world import CATEGORIES, Options, Scene, Split

IMAGES = 16  # to learn from
HELD_OUT = 12  # to score on


@dataclass(frozen=True, eq=False)
class PartImages:
    """Images of one category with their true parts.

    Attributes:
        category: its word. names: of the parts.
        images: uint8 [h, w, 3] each; labels: [h, w] int16 of each, the part that a pixel shows, -1
            for none.
        scenes: what they are of.
    """

    category: str
    names: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    scenes: tuple[Scene, ...]


def part_groups(category: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the parts of a category, alike ones as one, and which of them each part label is."""
    parts = CATEGORIES[category].parts
    called = [part.alike or part.name for part in parts]
    names = tuple(dict.fromkeys(called))
    return names, np.array([names.index(each) for each in called], dtype=np.int16)


def lone_images(
    category: str, split: str, count: int, *, first: int = 0, size: int, occluders: int = 0
) -> PartImages:
    """Scenes ``first`` to ``first + count - 1`` of a split with one object of this category."""
    options = Options(
        categories=(category,), objects=(1, 1), occluders=(occluders, occluders), clutter=(0, 3)
    )
    scenes = Split(split, size=size, count=first + count, options=options)
    return labelled(category, [scenes[i] for i in range(first, first + count)])


def labelled(category: str, scenes: Sequence[Scene]) -> PartImages:
    """The images of scenes with one object of this category, and its parts in them."""
    names, group = part_groups(category)
    labels = []
    for scene in scenes:
        own = scene.instance == scene.find(category)
        labels.append(np.where(own, group[scene.part.clip(0)], -1).astype(np.int16))
    return PartImages(
        category, names, tuple(scene.image for scene in scenes), tuple(labels), tuple(scenes)
    )
