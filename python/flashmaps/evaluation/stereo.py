"""A real stereo pair with true disparity: scikit-image's ``stereo_motorcycle`` (Middlebury 2014).

It shows one scene from two places. A point at (x, y) in the left view lies at (x - d, y) in the
right one, and the disparity d is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashmaps.diffusion.images import Image
from flashmaps.evaluation.benchmark import Pair, draw

TILES = (6, 8)  # rows and columns of tiles of the left view, which intervals draw again


@dataclass(frozen=True)
class StereoPair:
    """Two views and where each left pixel truly lies in the right view."""

    left: Image  # [h, w, 3]
    right: Image  # [h, w, 3]
    truth: np.ndarray  # [h, w, 2], (x, y) in the right view; NaN where unknown or out of view


def load_pair() -> StereoPair:
    """The stereo pair; pixels without disparity, or that leave the right view, have no truth.

    Raises ImportError when scikit-image, which carries the photographs, is not installed.
    """
    try:
        from skimage.data import stereo_motorcycle
    except ImportError as error:
        raise ImportError(
            f"the stereo photographs come with scikit-image ({error}); "
            "install it with: pip install scikit-image"
        ) from error
    left, right, disparity = stereo_motorcycle()
    height, width = disparity.shape
    columns = np.arange(width, dtype=np.float32)[None, :] - disparity
    rows = np.broadcast_to(np.arange(height, dtype=np.float32)[:, None], disparity.shape)
    truth = np.stack((columns, rows), axis=-1)
    truth[~np.isfinite(disparity) | ~(columns >= -0.5)] = np.nan
    return StereoPair(
        left.astype(np.float32) / 255, right.astype(np.float32) / 255, truth.astype(np.float32)
    )


class Stereo:
    """``points`` pixels of the left view, drawn among those with a true place in the right one."""

    name = "stereo"
    what = (
        "scikit-image's stereo_motorcycle, left view to right view, with its true disparity; "
        "pixels without one, and those that leave the right view, are left out"
    )
    base = "the longer side of the target image"
    unit = f"tiles of the left view, {TILES[0]} x {TILES[1]}: there is only one pair"
    headline = 0.05

    def __init__(self, points: int = 4096, seed: int = 0) -> None:
        self._found = load_pair()
        self._points, self._seed = points, seed

    def __len__(self) -> int:
        """One pair."""
        return 1

    def pair(self, index: int) -> Pair:
        """The pair."""
        truth = self._found.truth
        height, width = truth.shape[:2]
        rows, columns = np.nonzero(np.isfinite(truth).all(axis=-1))
        chosen = draw(np.random.default_rng(self._seed), self._points, len(rows))
        rows, columns = rows[chosen], columns[chosen]
        tiles = rows * TILES[0] // height * TILES[1] + columns * TILES[1] // width
        return Pair(
            category="motorcycle",
            source="left",
            target="right",
            source_image=self._found.left,
            target_image=self._found.right,
            source_points=np.stack((columns, rows), axis=1).astype(float),
            target_points=truth[rows, columns].astype(float),
            base=float(max(self._found.right.shape[:2])),
            units=tiles,
        )
