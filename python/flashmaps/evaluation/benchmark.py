"""What a benchmark is: pairs of images, and points whose places in both are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from flashmaps.diffusion.images import Image

NAMES = ("world", "stereo", "warps", "spair", "pf-pascal", "pf-willow", "cub")
PUBLIC = {"spair": "SPair-71k", "pf-pascal": "PF-Pascal", "pf-willow": "PF-Willow", "cub": "CUB"}


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images and n points of the source.

    Attributes:
        category: what results are also given for, for instance "car".
        source, target: what to call the images; equal names are equal images.
        source_image, target_image: [h, w, 3] float32 in [0, 1].
        source_points: [n, 2], (x, y) in source pixels, (0, 0) the centre of the top left pixel.
        target_points: [n, 2], where they truly lie in the target; NaN for a point that is known to
            have no place in the target that one can see.
        base: pixels of the target that PCK thresholds are fractions of.
        units: [n] int, what is drawn again for intervals where that is not the pair: parts of it.
        mirrored_points: [n, 2], where the same points of the other side of a symmetric object lie,
            NaN where they cannot be seen; None where there is no other side.
    """

    category: str
    source: str
    target: str
    source_image: Image
    target_image: Image
    source_points: np.ndarray
    target_points: np.ndarray
    base: float
    units: np.ndarray | None = None
    mirrored_points: np.ndarray | None = None


class Benchmark(Protocol):
    """Numbered pairs, each the same whenever it is asked for, and what to say about them."""

    name: str
    what: str  # a sentence: which images, which truth
    base: str  # what PCK thresholds are fractions of
    unit: str  # what is drawn again for intervals
    headline: float  # the PCK threshold of the plots, and of right and wrong for the scores

    def __len__(self) -> int:
        """How many pairs."""
        ...

    def pair(self, index: int) -> Pair:
        """Pair ``index``, from 0 to len - 1."""
        ...


def inside(folder: Path, *names: str) -> Path:
    """The data set's own folder, where the one that holds it was given."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def need_files(folder: Path, wanted: Sequence[str], layout: str) -> None:
    """FileNotFoundError unless ``folder`` holds everything in ``wanted``; says what it lacks."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {str(folder)!r}; wanted {layout}")
    absent = [name for name in wanted if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(
            f"data: the folder {str(folder)!r} lacks {', '.join(absent)}; wanted {layout}"
        )


def choose(count: int, wanted: int | None, seed: int) -> list[int]:
    """``wanted`` of 0 .. count - 1 drawn without repeats, in rising order; None for all."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).permutation(count)[:wanted].tolist())


def draw(rng: np.random.Generator, count: int, among: int) -> np.ndarray:
    """``count`` of 0 .. among - 1 without repeats, or all of them where there are fewer; rising."""
    return np.sort(rng.permutation(among)[:count])
