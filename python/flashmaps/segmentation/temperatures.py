"""How sharp the walk of likeness is.

What objects are made of is told at one temperature of cosines. Parts, and what is the same part in
two images, are told at a temperature in units of the image's grain: how far tokens are from the
nearest other, one minus the cosine, at the token that nine in ten are nearer than. It is what noise
and texture make of one thing, and other models, or photographs beside paint, have another: at one
temperature for all, a photograph falls into as many parts as it has specks. Grain takes O(N d)
numbers and no map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashmaps.diffusion.features import Features
from flashmaps.matching.options import COMPARE

# Temperatures of the softmax over cosines. Chosen on the validation split of the drawn world, with
# two miniatures (one taught parts by labels, an early one without labels), and on warps of
# photographs drawn with another seed than the scored ones: the same three numbers for all images
# and models.
OBJECTS = 0.12
PARTS = 1.1  # grains
LINKS = 0.8  # grains
_MOST_NEAR = 0.9
_LEAST = 1e-4  # a thousand times what float32 rounds a cosine by: tokens that are all the same


def part_temperature(found: Features, compare: str, nearest: Tensor) -> float:
    """Of the likeness that parts are made of. ``nearest``: [N], each token's nearest other."""
    return max(_LEAST, PARTS * grain(_vectors(found, compare), nearest))


def link_temperature(sets: Sequence[Features], compare: str, nearest: Sequence[Tensor]) -> float:
    """Of the links of a collection, one for all: by the mean grain of its images."""
    grains = [grain(_vectors(f, compare), near) for f, near in zip(sets, nearest, strict=True)]
    return max(_LEAST, LINKS * sum(grains) / len(grains))


def grain(x: Tensor, nearest: Tensor) -> float:
    """How far, as one minus the cosine, nine in ten tokens are at most from the nearest other.

    ``x``: [H, N, d], of length 1; the cosine is the mean over heads.
    """
    far = 1 - (x * x[:, nearest.to(x.device)]).sum(2).mean(0)
    return float(far.double().quantile(_MOST_NEAR))


def _vectors(found: Features, compare: str) -> Tensor:
    x: Tensor = getattr(found, COMPARE[compare][1])[0]
    return torch.nn.functional.normalize(x.float(), dim=-1)
