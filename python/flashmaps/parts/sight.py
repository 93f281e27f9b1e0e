"""Which part each place shows, of which something in front is one: read from features.

A model sees through small occluders: words are attended to where the thing that they name is
hidden. So a second head, beside the one of the words, tells parts, ground, and things in front. It
is a multinomial regression on what stands at each token: the output of the matching layers (their
64 principal directions, where there are more), the latent, and the mean and spread of the pixels.
Nobody labels it: it is fitted to the collection's own images, plain, and with things pasted over
them (:mod:`flashmaps.parts.pasted`).

How probable it is that a part is seen is a logistic regression of its peak, the log-odds of the
part where it is most probable, the mean of its best cells. That is fitted on images that the head
has not been fitted to: two halves of the collection take turns.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashmaps.diffusion.features import Features
from flashmaps.diffusion.images import Image, resize
from flashmaps.diffusion.latents import encode
from flashmaps.parts.head import fit_head
from flashmaps.parts.pasted import pasted
from flashmaps.parts.presence import MISSING, SEEN, logistic, peaks
from flashmaps.parts.result import Parts
from flashmaps.segmentation.segment import see

# What is read and the decay were chosen on scenes of the world's validation split, with three
# copies and more rounds; two copies and fewer rounds are for speed, chosen on nothing.
_COPIES = 2  # of each image, with things over it
_DECAY, _ROUNDS = 1e-2, 40  # of the head's regression
_DIRECTIONS = 64
_FEW = 4  # parts that are hidden by what is pasted
_SIGHTS: weakref.WeakKeyDictionary[Parts, Sight] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Sight:
    """How the parts of one collection are seen.

    Attributes:
        directions: [c, k] of features, None: all as they are.
        head: [P + 2, k + 11]: of each part, of what stands in front, and of the rest.
        weights: [2], slope and bias: from a part's peak to the log-odds that it is seen.
    """

    directions: Tensor | None
    head: Tensor
    weights: Tensor

    def read(self, pipe: Any, found: Features) -> Tensor:
        """[P + 2, h, w] on the features' tokens: each part, what is in front, the rest; sum 1."""
        return _read(self.head, _cells(pipe, [found], self.directions))[0]

    def probability(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """([P] probability that a part is seen, [P] its peak) from what :meth:`read` gives."""
        peak = peaks(planes[None, :-2])[0]
        return torch.sigmoid(peak * self.weights[0] + self.weights[1]), peak


def sight_of(parts: Parts, pipe: Any) -> Sight:
    """How these parts are seen, fitted once for as long as ``parts`` lives."""
    if parts not in _SIGHTS:
        images = [each.astype(np.float32) / 255 for each in parts.images]
        _SIGHTS[parts] = fit_sight(pipe, images, parts.labels, parts.count)
    return _SIGHTS[parts]


@torch.no_grad()
def fit_sight(
    pipe: Any, images: Sequence[Image], labels: Sequence[np.ndarray], count: int, *, seed: int = 0
) -> Sight:
    """Fitted to images [h, w, 3] of one size, and the part that each pixel shows, [h, w]."""
    rng = np.random.default_rng(seed)
    shown, masks, shares = list(images), [], []
    owner = [*range(len(images))] * (1 + _COPIES)
    for own in labels:
        masks.append(_masks(own, np.zeros(own.shape, dtype=bool), count))
        shares.append(np.where([(own == p).any() for p in range(count)], 1.0, np.nan))
    for _ in range(_COPIES):
        for image, own in zip(images, labels, strict=True):
            changed, front = pasted(image, own, images, rng)
            shown.append(changed)
            masks.append(_masks(own, front, count))
            shares.append(_left(own, front, count))
    found = see(pipe, shown)
    directions = _principal(found[: len(images)])
    cells, truth = _cells(pipe, found, directions), torch.from_numpy(np.stack(masks))
    left, even = torch.from_numpy(np.stack(shares)), torch.tensor(owner) % 2 == 0
    planes = torch.zeros(len(cells), count, *cells.shape[2:])
    for half in (even, ~even):
        head = fit_head(cells[half, None], truth[half], decay=_DECAY, rounds=_ROUNDS)
        planes[~half] = _read(head, cells[~half])[:, :-2]
    kept = torch.isfinite(left) & ((left < MISSING) | (left >= SEEN))
    peak, seen = peaks(planes)[kept], left[kept] >= SEEN
    if int((~seen).sum()) < _FEW:  # then what is read where a part is not is one that is missing
        elsewhere = F.adaptive_max_pool2d(truth[:, :-1], cells.shape[2:]) == 0
        peak = torch.cat((peak, peaks(planes * elsewhere).flatten()))
        seen = torch.cat((seen, seen.new_zeros(planes.shape[0] * count)))
    weights = logistic(peak[:, None], seen.float())
    return Sight(directions, fit_head(cells[:, None], truth, decay=_DECAY, rounds=_ROUNDS), weights)


def _masks(labels: np.ndarray, front: np.ndarray, count: int) -> np.ndarray:  # [P + 1, h, w]
    """Where each part is seen, and what is in front."""
    parts = labels[None] == np.arange(count)[:, None, None]
    return np.concatenate((parts & ~front, front[None])).astype(np.float32)


def _left(labels: np.ndarray, front: np.ndarray, count: int) -> np.ndarray:  # [P]
    """Of each part the share that nothing is in front of; NaN where the image has none of it."""
    own = [labels == p for p in range(count)]
    return np.array([(~front[each]).mean() if each.any() else np.nan for each in own])


def _outputs(found: Features) -> Tensor:  # [N, c]
    x = found.query if found.output is None else found.output
    return x[0].transpose(0, 1).flatten(1).float().cpu()


def _principal(some: Sequence[Features]) -> Tensor | None:  # [c, k]
    x = torch.cat([_outputs(each) for each in some])
    if x.shape[1] <= _DIRECTIONS:
        return None
    values, directions = torch.linalg.eigh(torch.cov(x.T))
    return directions[:, values.argsort(descending=True)[:_DIRECTIONS]]


def _cells(pipe: Any, some: Sequence[Features], directions: Tensor | None) -> Tensor:
    """[B, k + 10, h, w]: features, latents, pixels' means and spreads, of one grid."""
    made = []
    for found in some:
        x = _outputs(found)
        x = x if directions is None else x @ directions
        image = resize(found.image, found.input_size)
        latent = F.adaptive_avg_pool2d(encode(pipe, [image]).float().cpu(), found.grid)[0]
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        mean = F.adaptive_avg_pool2d(pixels, found.grid)
        spread = (F.adaptive_avg_pool2d(pixels**2, found.grid) - mean**2).clamp_min(0).sqrt()
        made.append(torch.cat((x.T.unflatten(1, found.grid), latent, mean, spread)))
    return torch.stack(made)


def _read(head: Tensor, cells: Tensor) -> Tensor:  # [B, k, h, w] to [B, P + 2, h, w]
    scores = torch.einsum("kc,bcij->bkij", head[:, :-1], cells) + head[:, -1][:, None, None]
    return scores.softmax(1)
