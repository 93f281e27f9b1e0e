"""Matches of many pairs at once, and what of them goes into a table."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flashmaps.maps.grids import Grid, centres
from flashmaps.maps.statistics import RoundTrip
from flashmaps.matching.confidence import SCORES, Calibration, judged, score


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Matches of P pairs of images whose token grids are alike.

    Attributes:
        pairs: [P, 2] int64, (source, target) indices into the feature sets.
        numbers: [P] int64, the positions of these pairs among those that were given.
        source_grid, target_grid: (height, width) of the tokens.
        trip: every statistic of the note, [P, N_s], [P, N_t] or [P]; see ``RoundTrip``.
        expected_target: [P, N_s, 2], mean of each row of A_st, (x, y) in the unit square.
        max_probability: [P, N_s], max_j A_st[i, j].
        entropy: [P, N_s], of the rows of A_st, nats.
    """

    pairs: Tensor
    numbers: Tensor
    source_grid: Grid
    target_grid: Grid
    trip: RoundTrip
    expected_target: Tensor
    max_probability: Tensor
    entropy: Tensor

    @property
    def mutual(self) -> Tensor:  # [P, N_s] bool
        """Whether g(f(i)) = i."""
        forward = self.trip.forward
        here = torch.arange(forward.shape[1], device=forward.device)
        return self.trip.backward.gather(1, forward) == here

    def score(self, name: str) -> Tensor:
        """One of SCORES at every source token, [P, N_s] float; target scores read at f(i).

        NaN where a score is undefined (``nims`` where fewer than two sources chose the target).
        """
        grids = self.source_grid, self.target_grid
        return score(name, self.trip, self.max_probability, self.entropy, grids)

    def confidence(
        self, calibration: Calibration, tokens: Tensor, placed: Tensor, row: int
    ) -> Tensor:
        """Of one pair's tokens [n], said to lie at target tokens ``placed`` [n]: [n]."""
        one = slice(row, row + 1)
        trip = RoundTrip(
            **{each.name: getattr(self.trip, each.name)[one] for each in fields(RoundTrip)}
        )
        return judged(
            calibration, trip, self.max_probability[one], self.entropy[one],
            (self.source_grid, self.target_grid),
            *(x[None].to(trip.forward.device) for x in (tokens, placed)),
        )[0]  # fmt: skip


def token_columns(chunk: PairBatch) -> dict[str, Tensor]:
    """One row for each source token of each pair of a chunk, [P N_s] each.

    pair (its position among those given), source, target (images), token, x, y (its centre in the
    unit square), target_token, target_x, target_y (hard match), soft_x, soft_y (soft match),
    mutual, and SCORES.
    """
    count, tokens = chunk.trip.forward.shape
    here = centres(chunk.source_grid).repeat(count, 1)
    forward = chunk.trip.forward.cpu()
    there = centres(chunk.target_grid)[forward.flatten()]
    soft = chunk.expected_target.float().cpu().flatten(0, 1)

    def for_all_tokens(values: Tensor) -> Tensor:  # [P] to [P N_s]
        return values.to(torch.int32).repeat_interleave(tokens)

    return {
        "pair": for_all_tokens(chunk.numbers),
        "source": for_all_tokens(chunk.pairs[:, 0]),
        "target": for_all_tokens(chunk.pairs[:, 1]),
        "token": torch.arange(tokens, dtype=torch.int32).repeat(count),
        "x": here[:, 0].contiguous(),
        "y": here[:, 1].contiguous(),
        "target_token": forward.flatten().to(torch.int32),
        "target_x": there[:, 0].contiguous(),
        "target_y": there[:, 1].contiguous(),
        "soft_x": soft[:, 0].contiguous(),
        "soft_y": soft[:, 1].contiguous(),
        "mutual": chunk.mutual.cpu().flatten(),
        **{name: chunk.score(name).float().cpu().flatten() for name in SCORES},
    }


def pair_columns(chunk: PairBatch) -> dict[str, Tensor]:
    """One row for each pair of a chunk, [P] each.

    pair, source, target, tokens, hard_ims, soft_ims, mutual_share, targets_hit_share (of target
    tokens that some source token chose), density_max, and means of return_probability,
    max_probability, spread, entropy (of A_st's rows) and inverse_entropy.
    """
    trip = chunk.trip
    count, tokens = trip.forward.shape
    columns = {
        "pair": chunk.numbers.to(torch.int32),
        "source": chunk.pairs[:, 0].to(torch.int32),
        "target": chunk.pairs[:, 1].to(torch.int32),
        "tokens": torch.full((count,), tokens, dtype=torch.int32),
        "hard_ims": trip.hard_ims,
        "soft_ims": trip.soft_ims,
        "mutual_share": chunk.mutual.float().mean(1),
        "targets_hit_share": (trip.density > 0).float().mean(1),
        "density_max": trip.density.amax(1).to(torch.int32),
        "mean_return_probability": trip.return_probability.mean(1),
        "mean_max_probability": chunk.max_probability.mean(1),
        "mean_spread": trip.spread.mean(1),
        "mean_entropy": chunk.entropy.mean(1),
        "mean_inverse_entropy": trip.inverse_entropy.mean(1),
    }
    return {name: values.cpu().contiguous() for name, values in columns.items()}


def need_pyarrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet), or an ImportError that says how to get them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f"Parquet files need the package pyarrow ({error}); "
            "install it with: pip install pyarrow"
        ) from error
    return pyarrow, parquet
