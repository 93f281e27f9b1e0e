"""What segments are scored on: images with true labels of every pixel, objects and parts.

The world's scenes are the first of a split. Every object is a target, and so is every part of every
object, however few pixels show it; all else, occluders and clutter too, is background.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flashmaps.arguments import whole
from flashmaps.evaluation.segment_scores import BACKGROUND

SIDE = 128  # pixels, what the built-in model was trained on
_PARTS = 64  # more than any object has
COLLECTION = 8  # images


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """An image and its truth: [h, w] int64 by level, BACKGROUND and VOID among the values."""

    name: str
    image: np.ndarray
    truth: dict[str, np.ndarray]


class WorldScenes:
    """Scenes of the world with their objects and parts."""

    name = "world"
    levels = ("objects", "parts")

    def __init__(self, split: str, count: int, seed: int = 0, side: int = SIDE) -> None:
        from flashmaps import world

        self._scenes = world.Split(split, size=side, count=count, seed=whole("seed", seed, 0))
        self.what = (
            f"the first {count} scenes of the {split} split of flashmaps.world (seed {seed}), "
            f"{side} pixels a side"
        )

    def __len__(self) -> int:
        """How many images."""
        return len(self._scenes)

    def __getitem__(self, index: int) -> LabelledImage:
        scene = self._scenes[index]
        objects = scene.instance.astype(np.int64)
        parts = np.where(objects >= 0, objects * _PARTS + scene.part, BACKGROUND)
        return LabelledImage(str(index), scene.image, {"objects": objects, "parts": parts})


@dataclass(frozen=True, eq=False)
class Collection:
    """Images of one category, and the part of its object that each pixel shows; else BACKGROUND.

    What else is in a scene is background. ``keypoints``: for each image the named points of its
    object, (x, y) in pixels, NaN where they are not seen. ``bases``: the longer side of each
    object's box, in pixels.
    """

    category: str
    images: list[np.ndarray]
    truth: list[np.ndarray]
    keypoints: list[np.ndarray]
    bases: list[float]

    @property
    def targets(self) -> int:
        """How many parts are seen in at least one image."""
        seen = np.unique(np.concatenate([each.ravel() for each in self.truth]))
        return int((seen >= 0).sum())


class WorldCollections:
    """Collections of the world: for each seed and category, so many images with one such object."""

    name = "world"

    def __init__(
        self,
        split: str,
        images: int = COLLECTION,
        seeds: int = 4,
        side: int = SIDE,
        categories: tuple[str, ...] | None = None,
        count: int | None = None,
    ) -> None:
        from flashmaps import world

        if images < 2 or images % 2:
            raise ValueError(f"images={images}: wanted an even number of images, at least 2")
        self._split, self._images, self._side = split, images, side
        if count is not None:
            whole("pairs", count, 1)
        names = categories or tuple(sorted(world.CATEGORIES))
        self._places = [(name, seed) for seed in range(seeds) for name in names][:count]
        self.what = (
            f"{len(names)} categories x {images} images x {seeds} seeds of the {split} split of "
            f"flashmaps.world, {side} pixels a side"
            + ("" if count is None else f"; the first {len(self._places)} of these collections")
        )

    def __len__(self) -> int:
        """How many collections."""
        return len(self._places)

    def __iter__(self) -> Iterator[Collection]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Collection:
        from flashmaps import world

        category, seed = self._places[index]
        found = world.pairs(
            self._split, self._images // 2, seed=seed, size=self._side, category=category
        )
        images, truth, points = [], [], []
        for pair in found:
            for scene, own in ((pair.a, pair.instance_a), (pair.b, pair.instance_b)):
                images.append(scene.image)
                truth.append(
                    np.where(scene.instance == own, scene.part.astype(np.int64), BACKGROUND)
                )
                points.append(
                    np.array(
                        [
                            (p.x, p.y) if p.visible else (np.nan, np.nan)
                            for p in scene.keypoints(own)
                        ]
                    )
                )
        return Collection(category, images, truth, points, [_longer_side(each) for each in truth])


def _longer_side(truth: np.ndarray) -> float:
    """Of the box around all that is no background, in pixels."""
    rows, columns = np.nonzero(truth >= 0)
    return float(max(np.ptp(rows), np.ptp(columns)) + 1) if len(rows) else float(max(truth.shape))
