"""The whole shape of an object that is partly hidden, from a collection of its kind.

Each exemplar, an object of the collection that is seen whole, says what it can: tokens of the
image that show the object are matched to it, it is laid over the image by these matches and by its
outline (:mod:`flashmaps.parts.registration`), and its own shape, as it lies there, is its vote.
Exemplars whose shape agrees with what is seen, where nothing is in front, count more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flashmaps.diffusion.features import Features
from flashmaps.maps.grids import centres
from flashmaps.matching.match import match_features
from flashmaps.matching.options import MatchOptions
from flashmaps.matching.readout import without_neighbours
from flashmaps.parts.registration import lay, to_places

# Chosen on scenes of the world's validation split, as said in docs/parts.md.
_SHARPNESS = 30.0  # of exemplars' weights: exp(_SHARPNESS * agreement)
_FLOOR = 0.05  # of a match's weight, so that no fit is without any
_FEWEST = 4  # tokens seen: three fix an affine map
_STEEP, _SHIFT = 0.87, 0.43  # of the probability: sigmoid(_STEEP * depth + _SHIFT)


@dataclass(frozen=True, eq=False)
class Exemplar:
    """An object of a collection, seen whole: what a model made of its image, and its mask.

    ``whole``: [h, w] bool. ``labels``: [h, w] int, the part that each pixel shows, -1 for none.
    """

    features: Features
    whole: np.ndarray
    labels: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Shape:
    """Where an object reaches, as the exemplars have it.

    Attributes:
        depth: [h, w] float32, how far inside the outline a pixel is, in 128ths of the exemplars'
            longer side: the weighed mean of their votes.
        amodal: [h, w] float32, the probability that the object reaches this pixel: 1 where it is
            seen, 0 where neither it nor anything in front of it is.
        agreement: [n], of each exemplar, the IoU of its shape as it lies here with what is seen,
            where nothing is in front.
        weights: [n], of the exemplars' votes; they sum to 1.
        places: [n, h, w, 2], (x, y) in pixels of each exemplar, for every pixel of the image.
        inside: [n, h, w] bool, whether that is within the exemplar's picture.
    """

    depth: np.ndarray
    amodal: np.ndarray
    agreement: np.ndarray
    weights: np.ndarray
    places: np.ndarray
    inside: np.ndarray


def covered(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[N] float64: what share of each token's pixels a mask [h, w] covers."""
    rows = (np.arange(mask.shape[0]) * grid[0]) // mask.shape[0]
    columns = (np.arange(mask.shape[1]) * grid[1]) // mask.shape[1]
    token = (rows[:, None] * grid[1] + columns[None, :]).ravel()
    size = grid[0] * grid[1]
    count = np.bincount(token, minlength=size)
    return np.bincount(token, mask.ravel(), minlength=size) / np.maximum(count, 1)


def seen_tokens(visible: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Tokens half of whose pixels, at least, show the object. ValueError if there are too few."""
    tokens = np.flatnonzero(covered(visible, grid) >= 0.5)
    if len(tokens) < _FEWEST:
        raise ValueError(
            f"{len(tokens)} of {grid[0] * grid[1]} tokens show the object, too few to tell where "
            f"the rest of it is; wanted at least {_FEWEST}: a picture in which more of it is seen, "
            "or a larger one of it"
        )
    return tokens


def whole_shape(
    found: Features,
    visible: np.ndarray,  # [h, w] bool
    front: np.ndarray,  # [h, w] bool
    exemplars: Sequence[Exemplar],
    options: MatchOptions,
    *,
    outline: bool = True,
) -> Shape:
    """The shape of an object of which ``visible`` is seen and ``front`` may hide the rest.

    ``outline=False``: where what is in front is not known; exemplars are laid by matches alone.

    Raises ValueError where too little of it is seen.
    """
    # Every token of every exemplar's map: there neighbours' votes would take most of the time.
    options = replace(options, readout=without_neighbours(options.readout))
    size = visible.shape[0], visible.shape[1]
    tokens = seen_tokens(visible, found.grid)
    here = centres(found.grid).numpy()[tokens] * (size[1], size[0]) - 0.5
    there, trust = [], []
    for each in exemplars:
        match = match_features(found, each.features, options)
        points = match.transfer(here, between="token" if match.readout == "hard" else "bilinear")
        column, row = np.rint(points).astype(np.intp).T
        sure = match.confidence.float().cpu().numpy()[tokens]
        trust.append(np.where(each.whole[row, column], sure, 0.0) + _FLOOR)
        there.append(to_places(points, (each.whole.shape[0], each.whole.shape[1])))
    laid = lay(
        visible, ~front, [each.whole for each in exemplars], to_places(here, size),
        np.stack(there), np.stack(trust), outline=outline,
    )  # fmt: skip
    agreement = np.array([_iou((each > 0)[~front], visible[~front]) for each in laid.depth])
    weights = np.exp(_SHARPNESS * (agreement - agreement.max()))
    weights /= weights.sum()
    votes = weights[:, None, None] * (laid.inside + 1e-6)  # beyond its picture one knows nothing
    depth = (votes * laid.depth).sum(0) / votes.sum(0)
    amodal = np.where(front, 1 / (1 + np.exp(-_STEEP * depth - _SHIFT)), 0.0)
    amodal[visible] = 1.0
    return Shape(
        depth.astype(np.float32), amodal.astype(np.float32), agreement, weights, laid.places,
        laid.inside,
    )  # fmt: skip


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 0.0
