"""A match fused over paths through other images of a collection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from flashmaps.arguments import number
from flashmaps.diffusion.features import Features
from flashmaps.maps.composition import compose
from flashmaps.matching.cross_map import at_points, cross_map
from flashmaps.matching.options import MatchKeywords, MatchOptions
from flashmaps.matching.readout import read


def fused_rows(
    source: Features,
    target: Features,
    through: Sequence[Features],
    points: Tensor,
    options: MatchOptions | None = None,
    *,
    weight: float = 0.5,
    backend: str = "auto",
    **given: Unpack[MatchKeywords],
) -> Tensor:
    """Rows of (A_st + w mean_m A_sm A_mt) / (1 + w) for points of the source: [n, N_t].

    Args:
        source, target: features of the pair.
        through: features of the images that paths lead through.
        points: [n, 2], (x, y) in the unit square; the features are interpolated there.
        weight: w, at least 0; 0 is the direct match.
        options: how the maps are made; its fields may be given as keywords.
    """
    options = replace(options or MatchOptions(), **given)
    weight = number("weight", weight, least=0)
    here = at_points(source, points[None])
    direct = cross_map(here, target, options, backend=backend).to_dense()  # [1, n, N_t]
    if not through or weight == 0:
        return direct[0]
    paths = torch.zeros_like(direct)
    for image in through:
        first = cross_map(here, image, options, backend=backend)
        paths += compose(first, cross_map(image, target, options, backend=backend)).to_dense()
    return ((direct + weight / len(through) * paths) / (1 + weight))[0]


def fused_places(
    source: Features,
    target: Features,
    through: Sequence[Features],
    points: Tensor,
    options: MatchOptions | None = None,
    *,
    weight: float = 0.5,
    backend: str = "auto",
    **given: Unpack[MatchKeywords],
) -> tuple[Tensor, Tensor]:
    """Where points lie by :func:`fused_rows`, read as the options say, and the rows' maxima.

    Returns ([n, 2] in the unit square of the target, [n]). The confidence of a direct match is
    fitted to other rows, and does not hold for these.
    """
    options = replace(options or MatchOptions(), **given)
    rows = fused_rows(
        source, target, through, points, options, weight=weight, backend=backend
    )  # fmt: skip
    return read(rows[None], target.grid, options.readout, options.window)[0], rows.amax(-1)
