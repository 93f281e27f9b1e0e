"""CUB-200-2011 (Wah et al., 2011) in its published layout.

    CUB_200_2011/
      images.txt                 # <image id> <path under images/>
      train_test_split.txt       # <image id> <1 for training, 0 for test>
      bounding_boxes.txt         # <image id> <x> <y> <width> <height>
      parts/part_locs.txt        # <image id> <part id> <x> <y> <visible>
      images/<class>/<image>.jpg

It comes without pairs: here they are drawn among a split's images, of any species. The points are
the parts that the source shows; those that the target hides have no match.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from flashmaps.diffusion.images import load_image
from flashmaps.evaluation.benchmark import Pair, inside, need_files

DEFAULT_PAIRS = 1000
_LISTS = (
    "images.txt", "train_test_split.txt", "bounding_boxes.txt", "parts/part_locs.txt",
)  # fmt: skip


class Cub:
    """Drawn pairs of birds, PCK on the longer side of the target's box."""

    name = "cub"
    layout = (
        "the folder CUB_200_2011 with images/, images.txt, train_test_split.txt, "
        "bounding_boxes.txt and parts/part_locs.txt"
    )
    base = "the longer side of the target bird's bounding box"
    unit = "pairs (which share images, so that intervals are somewhat too narrow)"
    headline = 0.1

    def __init__(
        self, folder: Path, *, split: str = "test", pairs: int | None = None, seed: int = 0
    ) -> None:
        if split not in ("test", "trn"):
            raise ValueError(f"split={split!r}; CUB has test and trn")
        folder = inside(folder, "CUB_200_2011")
        need_files(folder, [*_LISTS, "images"], self.layout)
        self._folder = folder
        self._paths = {i: rest[0] for i, rest in self._list("images.txt", 2)}
        self._boxes = {i: numbers(rest) for i, rest in self._list("bounding_boxes.txt", 5)}
        parts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for i, (part, *place) in self._list("parts/part_locs.txt", 5):
            x, y, visible = numbers(place)
            if visible:
                parts[i][part] = np.array([x, y])
        self._parts = parts
        wanted = "1" if split == "trn" else "0"
        images = [i for i, (flag,) in self._list("train_test_split.txt", 2) if flag == wanted]
        self._pairs = self._draw(images, DEFAULT_PAIRS if pairs is None else pairs, seed)
        if not self._pairs:
            raise ValueError(
                f"data: the {split} split of {str(folder)!r} has no two images that show a part "
                "in common"
            )
        self.what = f"CUB-200-2011, {split} split, {len(self._pairs)} drawn pairs of any species"

    def __len__(self) -> int:
        """How many pairs."""
        return len(self._pairs)

    def pair(self, index: int) -> Pair:
        """Drawn pair ``index``."""
        source, target = self._pairs[index]
        here, there = self._parts[source], self._parts[target]
        hidden = np.array([np.nan, np.nan])
        names = [self._paths[i] for i in (source, target)]
        loaded = [load_image(self._folder / "images" / name, name) for name in names]
        return Pair(
            "bird",
            names[0],
            names[1],
            loaded[0],
            loaded[1],
            np.array([here[part] for part in here]),
            np.array([there.get(part, hidden) for part in here]),
            float(max(self._boxes[target][2:])),
        )

    def _draw(self, images: list[str], count: int, seed: int) -> list[tuple[str, str]]:
        """Pairs of two different images with a visible part in common, none twice."""
        rng = np.random.default_rng(seed)
        drawn: dict[tuple[str, str], None] = {}
        if len(images) < 2:
            return []
        # Few images have few pairs: then all of them, in a drawn order.
        if len(images) * (len(images) - 1) <= 4 * count:
            every = [(s, t) for s in images for t in images if s != t]
            order = [every[i] for i in rng.permutation(len(every))]
            return [pair for pair in order if self._in_common(pair)][:count]
        for _ in range(20 * count):
            first, second = rng.choice(len(images), 2, replace=False)
            pair = (images[first], images[second])
            if self._in_common(pair):
                drawn[pair] = None
            if len(drawn) == count:
                break
        return list(drawn)

    def _in_common(self, pair: tuple[str, str]) -> bool:
        return bool(self._parts.get(pair[0], {}).keys() & self._parts.get(pair[1], {}).keys())

    def _list(self, name: str, columns: int) -> list[tuple[str, list[str]]]:
        return read_list(self._folder, name, columns)


def read_list(folder: Path, name: str, columns: int) -> list[tuple[str, list[str]]]:
    """(id, other columns) of a list's lines; paths hold no spaces."""
    found = []
    for number, line in enumerate((folder / name).read_text("utf-8").splitlines(), 1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != columns:
            raise ValueError(
                f"data: line {number} of {str(folder / name)!r} has {len(cells)} "
                f"columns; wanted {columns}"
            )
        found.append((cells[0], cells[1:]))
    return found


def numbers(cells: list[str]) -> list[float]:
    """Cells as numbers."""
    return [float(cell) for cell in cells]
