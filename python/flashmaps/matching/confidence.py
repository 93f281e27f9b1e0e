"""How far to trust a match: scores of the map itself, and a probability made from them.

A score says something about one source token: of its own row of A_st, of its way there and back,
or of the target token that it is matched to. A :class:`Calibration` turns scores into the
probability that the match is right, by a logistic function that was fitted where the truth is
known (``flashmaps study``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flashmaps.arguments import number
from flashmaps.maps.grids import Grid
from flashmaps.maps.statistics import RoundTrip
from flashmaps.matching.consensus import spacing
from flashmaps.matching.support import support

# What a source token's match can be judged by: scores of the source token itself, and scores of the
# target token f(i) that it is matched to. ``support`` is of both (flashmaps.matching.support),
# and ``local_ims`` of the source tokens around.
SOURCE_SCORES = (
    "return_probability",
    "max_probability",
    "hard_distance",
    "soft_distance",
    "spread",
    "entropy",
)
TARGET_SCORES = ("inverse_entropy", "density", "nims", "nims_log1p")
SCORES = (*SOURCE_SCORES, *TARGET_SCORES, "local_ims", "support")

# What a score is taken as: itself, or its logarithm where it spans orders of magnitude.
_LEAST = {
    "return_probability": 1e-6,
    "max_probability": 1e-6,
    "hard_distance": 1e-2,
    "soft_distance": 1e-2,
    "spread": 1e-2,
    "local_ims": 1e-2,
    "density": 1.0,
}


def score(
    name: str, trip: RoundTrip, max_probability: Tensor, entropy: Tensor, grids: tuple[Grid, Grid]
) -> Tensor:
    """One of SCORES at every source token, [batch, N_s] float; target scores are read at f(i).

    Args:
        trip: of A_st and A_ts.
        max_probability, entropy: [batch, N_s], of the rows of A_st.
        grids: the source's and the target's, (height, width) of tokens.

    NaN where a score is undefined (``nims`` where fewer than two sources chose the target).
    Raises ValueError for another name.
    """
    if name == "max_probability":
        return max_probability
    if name == "entropy":
        return entropy
    if name == "local_ims":
        return local_ims(trip.hard_distance, grids[0])
    if name == "support":
        return support(trip.forward, trip.backward, *grids)
    if name in SOURCE_SCORES:
        return getattr(trip, name)
    if name in TARGET_SCORES:
        return getattr(trip, name).to(entropy.dtype).gather(1, trip.forward)
    raise ValueError(f"score {name!r} is unknown; choose from {', '.join(SCORES)}")


def local_ims(hard_distance: Tensor, grid: Grid) -> Tensor:
    """IMS (note, eq. 2.8) of the tokens around each, [batch, N_s] in the unit square.

    The mean of their hard cycle errors (eq. 2.7) over a square of about a tenth of the grid's
    longer side: 5 x 5 of 56 x 56 tokens; at the border, over what of it lies inside.
    """
    reach = max(1, spacing(grid) - 1)
    mean = torch.nn.functional.avg_pool2d(
        hard_distance.unflatten(1, grid), 2 * reach + 1, 1, reach, count_include_pad=False
    )
    return mean.flatten(1)


def term(name: str, values: Tensor) -> Tensor:
    """A score as it enters the sum: log(max(s, least)), log(s + least) of distances, or s itself.

    Distances and counts can be 0, so that something is added to them (a hundredth of the image's
    side, one).
    """
    least = _LEAST.get(name)
    if least is None:
        return values
    if name.endswith("probability"):
        return values.clamp_min(least).log()
    return (values + least).log()


@dataclass(frozen=True)
class Term:
    """One score's part of the sum: weight * (term(score) - mean) / deviation."""

    score: str
    weight: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class Calibration:
    """p = 1 / (1 + exp(-(bias + sum of terms))), the probability that a match is right.

    Attributes:
        terms, bias: of the sum.
        tolerance: a match is right when it is off by at most ``tolerance`` times ``of``.
        of: what the tolerance is a share of.
        fitted_on: which points it was fitted to.
    """

    terms: tuple[Term, ...]
    bias: float
    tolerance: float
    of: str
    fitted_on: str = ""

    def probability(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The probability from a tensor of each score that is in ``terms``, all of one shape."""
        total: Tensor | float = self.bias
        for each in self.terms:
            values = term(each.score, scores[each.score].double())
            total = total + each.weight * (values - each.mean) / each.deviation
        assert isinstance(total, Tensor)  # there is at least one term
        return torch.sigmoid(total).float()

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that it takes."""
        return tuple(each.score for each in self.terms)

    def to_json(self) -> dict[str, Any]:
        """As plain values, for :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Calibration:
        """From plain values. Raises ValueError that says what is wrong with them."""
        try:
            terms = tuple(Term(**each) for each in found["terms"])
            made = cls(**{**found, "terms": terms})
            for name, value in (
                ("bias", made.bias), ("tolerance", made.tolerance),
                *((key, getattr(each, key)) for each in terms for key in ("weight", "mean")),
            ):  # fmt: skip
                number(name, value)
            for each in terms:
                number("deviation", each.deviation, above=0)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"it is no calibration: {error}") from None
        unknown = [each.score for each in terms if each.score not in SCORES]
        if unknown or not terms:
            raise ValueError(
                f"its terms are of {unknown or 'nothing'}; wanted some of {', '.join(SCORES)}"
            )
        return made


def judged(
    calibration: Calibration,
    trip: RoundTrip,
    max_probability: Tensor,
    entropy: Tensor,
    grids: tuple[Grid, Grid],
    tokens: Tensor | None = None,
    placed: Tensor | None = None,
) -> Tensor:
    """The probability that matches are right: of each source token with f(i), [batch, N_s].

    With ``tokens``, [batch, n] int64, of these alone, each said to lie at the target token that
    ``placed``, [batch, n], names: all scores but the support are of the token, wherever it lies.
    The others are as for :func:`score`.
    """
    found = {}
    for name in calibration.scores:
        if name == "support" and tokens is not None:
            found[name] = support(trip.forward, trip.backward, *grids, tokens, placed)
        else:
            values = score(name, trip, max_probability, entropy, grids)
            found[name] = values if tokens is None else values.gather(1, tokens)
    return calibration.probability(found)
