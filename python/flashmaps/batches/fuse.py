"""A match fused over paths through other images of a collection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor

from flashmaps.arguments import number
from flashmaps.diffusion.features import Features
from flashmaps.maps.grids import centres
from flashmaps.matching.confidence import Calibration
from flashmaps.matching.cross_map import at_points, cross_map
from flashmaps.matching.options import MatchKeywords, MatchOptions
from flashmaps.matching.readout import read, without_neighbours

HOWS = ("mean", "sharp", "product", "meet")
# What a fused match can be judged by: of its row, and of the direct way back from where it points.
FUSED_SCORES = ("max_probability", "entropy", "spread", "hard_distance", "soft_distance")
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class FusedPoints:
    """Where n points lie in another image, and how far to trust that.

    Attributes:
        places: [n, 2], (x, y) in the unit square of the target.
        scores: each of FUSED_SCORES, [n]: of the fused row its maximum and entropy (nats); of the
            direct row back from the place that was found, how far its largest entry, its mean and
            (spread, root mean square) all of it lie from the point, in the unit square.
        confidence: [n], the probability that the place is right; None without a calibration.
    """

    places: Tensor
    scores: dict[str, Tensor]
    confidence: Tensor | None


def paths(
    here: Features,
    target: Features,
    through: Sequence[Features],
    options: MatchOptions,
    *,
    meet: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rows of points over the target, by way of each of k images: [k, n, N_t], each sums to 1.

    Args:
        here: features at n points of the source.
        meet: A_sm A_tm^T, where source and target look at the same places of image m, with rows
            scaled to sum to 1; else A_sm A_mt, two steps of a walk.
    """
    found = []
    for image in through:
        first = cross_map(here, image, options, backend=backend).to_dense().mT.contiguous()
        if meet:  # [1, N_t, n]
            there = cross_map(target, image, options, backend=backend) @ first
            there = there / there.sum(1, keepdim=True).clamp_min(_TINY)
        else:
            there = cross_map(image, target, options, backend=backend).mT @ first
        found.append(there[0].mT)
    return torch.stack(found)


def fuse(direct: Tensor, between: Tensor, weight: float, how: str = "mean") -> Tensor:
    """One row for each point: [n, N_t] from direct ones [n, N_t] and k paths' [k, n, N_t].

    With D the direct rows, P_m the paths' and w the weight:

        "mean", "meet"   (D + w mean_m P_m) / (1 + w)
        "sharp"          the same, each P_m counting as much as its largest entry of that point
        "product"        D (mean_m P_m)^w, scaled to sum to 1

    "meet" differs in what the paths are, see :func:`paths`.
    """
    if how == "sharp":
        trust = between.amax(-1, keepdim=True)
        mixed = (trust * between).sum(0) / trust.sum(0).clamp_min(_TINY)
    else:
        mixed = between.mean(0)
    if how == "product":
        rows = direct * mixed.clamp_min(_TINY) ** weight
        return rows / rows.sum(-1, keepdim=True).clamp_min(_TINY)
    return (direct + weight * mixed) / (1 + weight)


def fused_rows(
    source: Features,
    target: Features,
    through: Sequence[Features],
    points: Tensor,
    options: MatchOptions | None = None,
    *,
    weight: float = 0.5,
    how: str = "mean",
    backend: str = "auto",
    **given: Unpack[MatchKeywords],
) -> Tensor:
    """Rows of the direct map and of paths through other images, fused: [n, N_t].

    Args:
        source, target: features of the pair.
        through: features of the images that paths lead through.
        points: [n, 2], (x, y) in the unit square; the features are interpolated there.
        weight: w of :func:`fuse`, at least 0; 0 is the direct match.
        how: one of HOWS, see :func:`fuse`.
        options: how the maps are made; its fields may be given as keywords.
    """
    options = replace(options or MatchOptions(), **given)
    weight = number("weight", weight, least=0)
    if how not in HOWS:
        raise ValueError(f"how={how!r}; wanted {', '.join(HOWS)}")
    here = at_points(source, points[None])
    direct = cross_map(here, target, options, backend=backend).to_dense()[0]
    if not through or weight == 0:
        return direct
    between = paths(here, target, through, options, meet=how == "meet", backend=backend)
    return fuse(direct, between, weight, how)


def fused_places(
    source: Features,
    target: Features,
    through: Sequence[Features],
    points: Tensor,
    options: MatchOptions | None = None,
    *,
    weight: float = 0.5,
    how: str = "mean",
    fused_calibration: Calibration | None = None,
    backend: str = "auto",
    **given: Unpack[MatchKeywords],
) -> FusedPoints:
    """Where points lie by :func:`fused_rows`, read as the options say, with scores.

    Args:
        fused_calibration: of fused matches made this very way, as
            ``python -m flashmaps.evaluation.fused`` fits and writes it. That of direct matches is
            fitted to other rows and does not hold for these.
    """
    options = replace(options or MatchOptions(), **given)
    rows = fused_rows(
        source, target, through, points, options, weight=weight, how=how, backend=backend
    )  # fmt: skip
    return judged(source, target, points, rows, options, fused_calibration, backend=backend)


def judged(
    source: Features,
    target: Features,
    points: Tensor,
    rows: Tensor,
    options: MatchOptions,
    calibration: Calibration | None = None,
    *,
    backend: str = "auto",
) -> FusedPoints:
    """Places and scores of rows [n, N_t] of points [n, 2]."""
    places = read(rows[None], target.grid, without_neighbours(options.readout), options.window)[0]
    back = at_points(target, places[None].double().clamp(0, 1))
    home = cross_map(back, source, options, backend=backend).to_dense()[0]  # [n, N_s]
    at = centres(source.grid, dtype=rows.dtype)
    from_here = points.to(rows)
    away = (at - from_here[:, None]).square().sum(-1)  # [n, N_s]
    scores = {
        "max_probability": rows.amax(-1),
        "entropy": -torch.special.xlogy(rows, rows).sum(-1),
        "spread": (home * away).sum(-1).sqrt(),
        "hard_distance": (at[home.argmax(-1)] - from_here).norm(dim=-1),
        "soft_distance": (home @ at - from_here).norm(dim=-1),
    }
    confidence = None if calibration is None else calibration.probability(scores)
    return FusedPoints(places, scores, confidence)
