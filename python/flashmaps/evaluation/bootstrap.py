"""Bootstrap intervals: whole pairs are drawn again, since the points of one pair go together."""

from __future__ import annotations

import numpy as np

from flashmaps.arguments import whole

RESAMPLES = 1000
MOST_RESAMPLES = 1_000_000
LEVEL = 0.95


def check_resampling(resamples: object, seed: object) -> None:
    """ValueError, before any work, for what `resample` would not take."""
    whole("resamples", resamples, 1, MOST_RESAMPLES)
    whole("seed", seed, 0)


def resample(units: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of ``units`` is drawn in each resample: [resamples, units] float32.

    Every row draws ``units`` times with replacement, so it sums to ``units``. (Counts of points
    that are sums of these stay exact in float32 up to 2^24.) There are no rows for a single unit:
    nothing can be learnt by drawing it again.
    """
    if units < 1 or resamples < 1:
        raise ValueError(f"units = {units} and resamples = {resamples} must be at least 1")
    if units == 1:
        resamples = 0
    rng = np.random.default_rng(seed)
    return rng.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float32)


def interval(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of resampled values, [low, high]; None where most are undefined (NaN)."""
    defined = values[np.isfinite(values)]
    if len(defined) < len(values) / 2 or len(defined) == 0:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return [float(low), float(high)]
