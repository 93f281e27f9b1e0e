"""Cycle consistency of a collection: which images, and which of their points, break cycles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Unpack

import torch
from torch import Tensor

from flashmaps.arguments import whole
from flashmaps.diffusion.features import Features
from flashmaps.maps.grids import centres
from flashmaps.matching.options import MapKeywords, MatchOptions
from flashmaps.matching.pairs import match_pairs


@dataclass(frozen=True, eq=False)
class Consistency:
    """Hard cycles through images of a collection.

    Attributes:
        cycles: [C, length], images in the order they are passed; each closes to its first one.
        error: [C], the mean distance from home of the tokens of the first image, in its unit
            square.
        closed: [C], the share of its tokens that come home exactly.
        per_image: [n], the mean error of the cycles that an image is in, wherever it stands; NaN
            for an image that is in none. The image that breaks cycles has the largest.
        per_token: for each image [N], the mean distance from home of its tokens over the cycles
            that begin there; NaN where none does.
    """

    cycles: Tensor
    error: Tensor
    closed: Tensor
    per_image: Tensor
    per_token: list[Tensor]


def consistency(
    sets: Sequence[Features],
    *,
    length: int = 3,
    count: int | None = None,
    seed: int = 0,
    options: MatchOptions | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    **given: Unpack[MapKeywords],
) -> Consistency:
    """Follow the best matches around cycles of a collection of n images.

    Every set of ``length`` images makes one cycle in the order of their numbers, which is walked
    from each of its images; or ``count`` sets that are drawn.

    Args:
        sets, options, memory_budget, backend, given: see
            :func:`flashmaps.matching.pairs.match_pairs`. Beyond the budget there are the best
            matches of each pair that a cycle takes, 8 bytes a token.
        length: images of a cycle, at least 2.
        count: how many sets; default all of them.
        seed: draws them.

    Raises ValueError for fewer images than a cycle takes.
    """
    images = len(sets)
    whole("length", length, 2)
    if images < length:
        raise ValueError(f"a cycle of {length} needs as many images; there are {images}")
    if count is None:
        chosen = list(combinations(range(images), length))
    else:
        generator = torch.Generator().manual_seed(whole("seed", seed, 0))
        chosen = [
            tuple(sorted(torch.randperm(images, generator=generator)[:length].tolist()))
            for _ in range(whole("count", count, 1))
        ]
    walks = [(*c[at:], *c[:at]) for c in chosen for at in range(length)]
    steps = sorted({pair for walk in walks for pair in _steps(walk)})
    forward: dict[tuple[int, int], Tensor] = {}
    grids = {}
    for batch in match_pairs(
        sets, steps, options, memory_budget=memory_budget, backend=backend, **given
    ):
        for row, (s, t) in enumerate(batch.pairs.tolist()):
            forward[s, t] = batch.trip.forward[row].cpu()
            grids[s], grids[t] = batch.source_grid, batch.target_grid
    total = {image: torch.zeros(grid[0] * grid[1]) for image, grid in grids.items()}
    begun = dict.fromkeys(grids, 0)
    through, passed = torch.zeros(images), torch.zeros(images)
    error, closed = [], []
    for walk in walks:
        place = torch.arange(len(total[walk[0]]))
        for step in _steps(walk):
            place = forward[step][place]
        at = centres(grids[walk[0]])
        away = (at[place] - at).norm(dim=-1)
        total[walk[0]] += away
        begun[walk[0]] += 1
        error.append(away.mean())
        closed.append((place == torch.arange(len(place))).float().mean())
        through[list(walk)] += error[-1]
        passed[list(walk)] += 1
    return Consistency(
        cycles=torch.tensor(walks),
        error=torch.stack(error),
        closed=torch.stack(closed),
        per_image=through / passed,
        per_token=[total[i] / begun[i] if i in total else torch.tensor([]) for i in range(images)],
    )


def _steps(walk: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(walk, (*walk[1:], walk[0]), strict=True))
