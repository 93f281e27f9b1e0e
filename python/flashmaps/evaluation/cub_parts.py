"""CUB-200-2011 as collections of one species, for co-segmentation, in its published layout.

It has no masks of parts, but fifteen points of each bird. As Choudhury et al. (NeurIPS 2021) score
parts, labels are looked at where those points are: truth is the point's name there, and all other
pixels are not counted. NMI and ARI follow parts; landmark regression is given beside them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flashmaps.diffusion.images import load_image
from flashmaps.evaluation.benchmark import inside, need_files
from flashmaps.evaluation.cub import numbers, read_list
from flashmaps.evaluation.segment_scenes import COLLECTION, Collection
from flashmaps.evaluation.segment_scores import VOID

LAYOUT = (
    "the folder CUB_200_2011 with images/, images.txt, train_test_split.txt, "
    "bounding_boxes.txt and parts/part_locs.txt"
)
_LISTS = ("images.txt", "train_test_split.txt", "bounding_boxes.txt", "parts/part_locs.txt")


class CubCollections:
    """For each species the first images of a split.

    Args:
        folder: ``CUB_200_2011``, or the folder that it lies in.
        split: "test" or "trn".
        images: in a collection; a species with fewer gives what it has, two at least.
        count: only so many species, the first.
    """

    name = "cub"

    def __init__(
        self,
        folder: str | Path,
        *,
        split: str = "test",
        images: int = COLLECTION,
        count: int | None = None,
    ) -> None:
        if split not in ("test", "trn"):
            raise ValueError(f"split={split!r}; CUB has test and trn")
        root = inside(Path(folder), "CUB_200_2011")
        need_files(root, [*_LISTS, "images"], LAYOUT)
        self._folder = root
        paths = {i: rest[0] for i, rest in read_list(root, "images.txt", 2)}
        self._boxes = {i: numbers(rest) for i, rest in read_list(root, "bounding_boxes.txt", 5)}
        points: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        for i, (part, *place) in read_list(root, "parts/part_locs.txt", 5):
            x, y, visible = numbers(place)
            points[i][int(part) - 1] = np.array([x, y] if visible else [np.nan, np.nan])
        self._points = points
        self._parts = 1 + max((max(each) for each in points.values()), default=0)
        wanted = "1" if split == "trn" else "0"
        species: dict[str, list[str]] = defaultdict(list)
        for i, (flag,) in read_list(root, "train_test_split.txt", 2):
            if flag == wanted:
                species[paths[i].split("/")[0]].append(i)
        self._paths = paths
        groups = [(name, each[:images]) for name, each in sorted(species.items()) if len(each) > 1]
        self._groups = groups[:count]
        if not self._groups:
            raise ValueError(
                f"data: the {split} split of {str(root)!r} has no species with two images"
            )
        self.what = (
            f"CUB-200-2011, {split} split: the first {images} images of each of "
            f"{len(self._groups)} species, looked at where its {self._parts} points are"
        )

    def __len__(self) -> int:
        """How many collections."""
        return len(self._groups)

    def __iter__(self) -> Iterator[Collection]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Collection:
        species, members = self._groups[index]
        images, truth, keypoints, bases = [], [], [], []
        for i in members:
            image = load_image(self._folder / "images" / self._paths[i], self._paths[i])
            points = np.full((self._parts, 2), np.nan)
            for part, place in self._points[i].items():
                points[part] = place
            labels = np.full(image.shape[:2], VOID)
            for part in np.flatnonzero(np.isfinite(points).all(1)).tolist():
                x, y = np.rint(points[part]).astype(int)
                labels[y.clip(0, image.shape[0] - 1), x.clip(0, image.shape[1] - 1)] = part
            images.append(image)
            truth.append(labels)
            keypoints.append(points)
            bases.append(float(max(self._boxes[i][2:])))
        return Collection(species, images, truth, keypoints, bases)
