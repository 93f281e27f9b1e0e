"""Closed chains of maps: what comes home, hard and soft."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmaps.maps.chain import Chain
from flashmaps.maps.composition import Composition
from flashmaps.maps.grids import centres
from flashmaps.maps.lazy import LazyMap
from flashmaps.maps.validation import need_grid


@dataclass(frozen=True, eq=False)
class Cycles:
    """A round through k maps, A_1 from an image to the next and A_k back to it; [batch, N] each.

    Attributes:
        hard: f_k(... f_1(i)), the token that the most likely steps end on.
        closed: whether that is i.
        hard_distance: of it from i, in the unit square of the image.
        return_probability: R_ii of R = A_1 ... A_k.
        soft_distance: of the mean of row i of R from i.
    """

    hard: Tensor
    closed: Tensor
    hard_distance: Tensor
    return_probability: Tensor
    soft_distance: Tensor

    @property
    def per_image(self) -> dict[str, Tensor]:
        """Means over tokens, [batch] each: share that is closed, distances, probability."""
        return {
            "closed": self.closed.float().mean(1),
            "hard_distance": self.hard_distance.mean(1),
            "soft_distance": self.soft_distance.mean(1),
            "return_probability": self.return_probability.mean(1),
        }


def cycles(*maps: LazyMap, memory_budget: int | None = None) -> Cycles:
    """Whether the tokens of an image come home through A_1 ... A_k, of two maps or more.

    With two it is the round trip (`flashmaps.round_trip` has more of it in one pass less). The
    last map's keys are the first one's queries, on one grid. See `Cycles`, and `chain` for the
    budget.

    Raises ValueError for maps that do not chain or do not close, and for a map without a grid.
    """
    closed = Chain(*maps, memory_budget=memory_budget)
    _, rows, ends = closed.shape
    if rows != ends:
        raise ValueError(f"the chain does not close: it leads from {rows} tokens to {ends}")
    grid = need_grid("key_grid", maps[-1].key_grid, ends, "cycles")
    at = centres(grid, dtype=closed.dtype, device=maps[0].device)
    hard: Tensor | None = None
    for A in maps:
        best = A._fields("argmax", memory_budget=closed._left())["argmax"]
        hard = best if hard is None else best.gather(1, hard)
    assert hard is not None
    soft = closed.reduce("expectation").expectation
    probability = (
        Composition(*maps, memory_budget=memory_budget).diagonal()  # type: ignore[arg-type]
        if len(maps) == 2
        else closed.diagonal()
    )
    return Cycles(
        hard=hard,
        closed=hard == torch.arange(rows, device=hard.device),
        hard_distance=(at[hard] - at).norm(dim=-1),
        return_probability=probability / closed.lines,
        soft_distance=(soft - at).norm(dim=-1),
    )
