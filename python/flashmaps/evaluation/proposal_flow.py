"""PF-Pascal and PF-Willow (Proposal Flow, Ham et al., 2016 and 2017) in their published layouts.

    PF-dataset-PASCAL/
      JPEGImages/<image>.jpg
      Annotations/<category>/<image>.mat            # kps [n, 2], NaN where a keypoint is not there
      <trn, val or test>_pairs.csv                  # or <split>_pairs_pf_pascal.csv

    PF-dataset/
      <category>/<image>.png
      test_pairs.csv                                # or test_pairs_pf.csv

The lists of pairs are those that are handed around with the two (Han et al. 2017; Rocco et al.
2018). PF-Pascal's has the columns source_image, target_image, class (1 to 20, in VOC's order), and
for val and test also XA, YA, XB, YB with numbers between semicolons; where it lacks them, keypoints
come from the annotations. PF-Willow's has the two images and ten of each of XA, YA, XB, YB. Points
are used as they are written, as published results do.
"""

from __future__ import annotations

import csv
from pathlib import Path, PurePosixPath

import numpy as np

from flashmaps.diffusion.images import load_image
from flashmaps.evaluation.benchmark import Pair, choose, inside, need_files

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
_SHARED = "pairs (which share images, so that intervals are somewhat too narrow)"


class PFPascal:
    """Pairs of one split, PCK on the longer side of the target image."""

    name = "pf-pascal"
    layout = (
        "the folder PF-dataset-PASCAL with JPEGImages/*.jpg, Annotations/<category>/*.mat and "
        "<split>_pairs.csv (or <split>_pairs_pf_pascal.csv)"
    )
    base = "the longer side of the target image"
    unit = _SHARED
    headline = 0.1

    def __init__(
        self, folder: Path, *, split: str = "test", pairs: int | None = None, seed: int = 0
    ) -> None:
        if split not in ("test", "val", "trn"):
            raise ValueError(f"split={split!r}; PF-Pascal has test, val and trn")
        folder = inside(folder, "PF-dataset-PASCAL", "PF-PASCAL")
        need_files(folder, ["JPEGImages"], self.layout)
        names = (f"{split}_pairs.csv", f"{split}_pairs_pf_pascal.csv")
        rows = _rows(folder, names, self.layout)
        self._folder, self._rows = folder, [rows[i] for i in choose(len(rows), pairs, seed)]
        self.what = f"PF-Pascal, {split} split, {len(self._rows)} of {len(rows)} pairs"

    def __len__(self) -> int:
        """How many pairs."""
        return len(self._rows)

    def pair(self, index: int) -> Pair:
        """The pair of the list's row ``index`` (of those chosen)."""
        row = self._rows[index]
        if len(row) < 3 or not row[2].strip().isdigit() or not 1 <= int(row[2]) <= len(VOC):
            raise ValueError(
                f"data: row {row} of PF-Pascal's list of pairs; wanted source_image, target_image "
                "and class, 1 to 20"
            )
        category = VOC[int(row[2]) - 1]
        names = [PurePosixPath(name).name for name in row[:2]]
        if len(row) >= 7:
            numbers = [np.array([float(n) for n in cell.split(";")]) for cell in row[3:7]]
            source, target = np.stack(numbers[:2], axis=1), np.stack(numbers[2:], axis=1)
        else:
            source, target = (self._keypoints(category, name) for name in names)
            if source.shape != target.shape:
                raise ValueError(
                    f"data: {names[0]} has {len(source)} keypoints but {names[1]} {len(target)}"
                )
        both = np.isfinite(source).all(axis=1) & np.isfinite(target).all(axis=1)
        loaded = [load_image(self._folder / "JPEGImages" / name, name) for name in names]
        base = float(max(loaded[1].shape[:2]))
        return Pair(
            category, names[0], names[1], loaded[0], loaded[1], source[both], target[both], base
        )

    def _keypoints(self, category: str, image: str) -> np.ndarray:  # [n, 2]
        from scipy.io import loadmat

        path = self._folder / "Annotations" / category / f"{Path(image).stem}.mat"
        if not path.is_file():
            raise FileNotFoundError(f"data: there is no {str(path)!r}; wanted {self.layout}")
        try:
            points = np.asarray(loadmat(path)["kps"], float)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"data: {str(path)!r} is not an annotation of PF-Pascal ({error})"
            ) from None
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"data: {str(path)!r} has kps of shape {points.shape}; wanted [n, 2]")
        return points


class PFWillow:
    """All pairs, PCK on the longer side of the box around the target's ten keypoints."""

    name = "pf-willow"
    layout = "the folder PF-dataset with <category>/*.png and test_pairs.csv (or test_pairs_pf.csv)"
    base = "the longer side of the box around the target's keypoints"
    unit = _SHARED
    headline = 0.1

    def __init__(
        self, folder: Path, *, split: str = "test", pairs: int | None = None, seed: int = 0
    ) -> None:
        if split != "test":
            raise ValueError(f"split={split!r}; PF-Willow has test only")
        folder = inside(folder, "PF-dataset", "PF-WILLOW")
        rows = _rows(folder, ("test_pairs.csv", "test_pairs_pf.csv"), self.layout)
        self._folder, self._rows = folder, [rows[i] for i in choose(len(rows), pairs, seed)]
        self.what = f"PF-Willow, {len(self._rows)} of {len(rows)} pairs"

    def __len__(self) -> int:
        """How many pairs."""
        return len(self._rows)

    def pair(self, index: int) -> Pair:
        """The pair of the list's row ``index`` (of those chosen)."""
        row = self._rows[index]
        try:
            numbers = np.array([float(n) for n in row[2:]]).reshape(2, 2, 10)
        except ValueError:
            raise ValueError(
                f"data: row {index} of PF-Willow's list of pairs has {len(row)} columns; wanted "
                "two images and ten numbers of each of XA, YA, XB, YB"
            ) from None
        source, target = numbers[0].T, numbers[1].T
        # Written from the folder that holds PF-dataset, or from PF-dataset itself.
        names = ["/".join(PurePosixPath(name).parts[-2:]) for name in row[:2]]
        loaded = [load_image(self._folder / name, name) for name in names]
        base = float(np.ptp(target, axis=0).max())
        category = names[0].split("/")[0]
        return Pair(category, names[0], names[1], loaded[0], loaded[1], source, target, base)


def _rows(folder: Path, names: tuple[str, ...], layout: str) -> list[list[str]]:
    """Rows of the first of these lists that is there, without its header."""
    present = [name for name in names if (folder / name).is_file()]
    need_files(folder, present or names[:1], layout)
    with (folder / present[0]).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    if not rows:
        raise ValueError(f"data: {str(folder / present[0])!r} names no pairs")
    return rows
