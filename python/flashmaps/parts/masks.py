"""Where an object is seen, and what stands in front of it, when nobody says.

Tokens are compared with those of the collection. What is most alike to tokens that show its object
is the object, or stands in front of it: a model sees through small occluders. The outline of the
exemplars, laid over that, says where the object should be. Within it the patches of like colour
whose tokens are less alike to the object's than the collection's own are to each other, and on the
lower side of Otsu's threshold, are in front.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.features import Features
from flashmaps.matching.options import COMPARE, MatchOptions
from flashmaps.parts.shapes import Exemplar, covered, whole_shape
from flashmaps.segmentation.boundaries import patches, to_pixels

# Chosen on scenes of the world's validation split, as said in docs/parts.md.
_NEAREST = 5  # tokens of the collection that vote
_UNLIKE = 0.1  # of the collection's own tokens are as little alike to the other exemplars'
_ROWS = 1024  # of tokens compared at a time


def likeness(found: Features, exemplars: Sequence[Exemplar], options: MatchOptions) -> np.ndarray:
    """[N] float32: of the most alike tokens of the collection, how much shows its object."""
    keys = torch.cat([_vectors(each.features, options) for each in exemplars])
    own = torch.from_numpy(
        np.concatenate([covered(each.whole, each.features.grid) for each in exemplars])
    ).float()
    shares = []
    for block in _vectors(found, options).split(_ROWS):
        index = (block @ keys.T).topk(min(_NEAREST, len(keys)), dim=1).indices
        shares.append(own[index].mean(1))
    return torch.cat(shares).numpy()


def neighbours_mask(share: np.ndarray, found: Features) -> np.ndarray:
    """[h, w] bool: pixels where the interpolated likeness is over a half."""
    return _pixels(share, found) > 0.5


def find_masks(
    found: Features,
    exemplars: Sequence[Exemplar],
    options: MatchOptions,
    *,
    visible: np.ndarray | None = None,
    front: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Where the object is seen and what is in front of it, [h, w] bool each; those given stay.

    Raises ValueError where no object of the collection's kind is seen.
    """
    from skimage.filters import threshold_otsu

    there = neighbours_mask(likeness(found, exemplars, options), found)
    if front is not None:
        there &= ~front
    if visible is not None:
        there |= visible
    if not there.any():
        raise ValueError(
            "no object of the collection's kind is seen in this image: none of its tokens is most "
            "like one of theirs; give visible=, the mask of what is seen of it"
        )
    if visible is not None and front is not None:
        return visible, front
    nothing = np.zeros_like(there)
    outline = whole_shape(found, there, nothing if front is None else front, exemplars, options)
    inside = (outline.depth > 0) | there
    alike, usual = _alike(found, exemplars, options)
    own = patches(found.image)
    plane = np.bincount(own.ravel(), _pixels(alike, found).ravel()) / np.bincount(own.ravel())
    unlike = plane[own] < min(usual, threshold_otsu(plane[own][inside]))
    if visible is None:
        visible = inside & ~unlike if front is None else there
    if front is None:
        front = (inside & unlike) & ~visible
    return visible, front


def _alike(
    found: Features, exemplars: Sequence[Exemplar], options: MatchOptions
) -> tuple[np.ndarray, float]:
    """[N], each token's largest cosine with the tokens that show each exemplar, mean over them; and
    what a share of _UNLIKE of the exemplars' own tokens stay below, each among the others."""
    sets = []
    for each in exemplars:
        shown = torch.from_numpy(covered(each.whole, each.features.grid) >= 0.5)
        sets.append(_vectors(each.features, options)[shown])

    def mean(of: Tensor, others: Sequence[Tensor]) -> Tensor:
        best = [torch.cat([(b @ o.T).amax(1) for b in of.split(_ROWS)]) for o in others if len(o)]
        return torch.stack(best).mean(0)

    usual = [mean(x, [*sets[:i], *sets[i + 1 :]]) for i, x in enumerate(sets) if len(x)]
    alike = mean(_vectors(found, options), sets).numpy()
    return alike, float(torch.cat(usual).quantile(_UNLIKE))


def _vectors(of: Features, options: MatchOptions) -> Tensor:  # [N, c], of length 1
    x = getattr(of, COMPARE[options.compare][1])
    flat = x[0].transpose(0, 1).flatten(1).float().cpu()
    return torch.nn.functional.normalize(flat, dim=1)


def _pixels(values: np.ndarray, found: Features) -> np.ndarray:  # [h, w]
    size = (int(found.image.shape[0]), int(found.image.shape[1]))
    return to_pixels(torch.from_numpy(values)[:, None], found.grid, size)[0]
