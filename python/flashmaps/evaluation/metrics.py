"""How good matches are, against known correspondences; and how well a score tells which are wrong.

Functions that take ``weights`` [R, n], float32, compute R resamples at once: weight w of a point is
as w copies of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

PCK_THRESHOLDS = (0.01, 0.02, 0.05, 0.1)

_CHUNK_ELEMENTS = 2**22  # of weights at a time: 17 MB, and a few temporaries alike


def endpoint_errors(field: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distance in target pixels between found and true places, [...], NaN where unknown.

    Both are [..., 2] of (x, y) target pixels, ``truth`` NaN where there is none.
    """
    if field.shape != truth.shape:
        raise ValueError(f"field has shape {field.shape} but truth {truth.shape}")
    return np.linalg.norm(field - truth, axis=-1)


def pck(
    errors: np.ndarray,
    base: float | np.ndarray,
    thresholds: Sequence[float] = PCK_THRESHOLDS,
) -> list[float]:
    """Percentage of correct keypoints: the share of errors at most threshold * base pixels.

    Every point with a known error counts once, NaN are left out; ``base`` is in pixels, one for all
    or one each (which side of what is the benchmark's convention).
    """
    known = np.isfinite(errors)
    if not known.any():
        raise ValueError("no pixel has a known correspondence, so there is nothing to score")
    relative = (errors / base)[known]
    return [float((relative <= threshold).mean()) for threshold in thresholds]


def score_field(field: np.ndarray, truth: np.ndarray, base: float) -> dict[str, float]:
    """PCK at every threshold, and mean and median error in pixels, of one [h, w, 2] field."""
    errors = endpoint_errors(field, truth)
    known = errors[np.isfinite(errors)]
    shares = pck(errors, base)
    return {
        **{f"pck@{t:g}": share for t, share in zip(PCK_THRESHOLDS, shares, strict=True)},
        "median_error_px": float(np.median(known)),
        "mean_error_px": float(known.mean()),
    }


def auroc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half.

    0.5 is no better than chance; below it the score points the other way. Where the score is NaN it
    says nothing and the point is left out. None if positives or negatives are missing.
    """
    from sklearn.metrics import roc_auc_score

    keep = np.isfinite(score)
    score, positive = score[keep], positive[keep].astype(bool)
    if positive.all() or not positive.any():
        return None
    return float(roc_auc_score(positive, score))


def resampled_auroc(
    score: np.ndarray,  # [n], finite
    positive: np.ndarray,  # [n] bool
    weights: np.ndarray,  # [R, n]
) -> np.ndarray:
    """:func:`auroc` of each resample, [R]; NaN where one has no positive or no negative.

    scikit-learn takes weights too, but one row at a time, sorting anew for each. This is the area
    under the polygon through the counts at the end of each run of equal scores.
    """
    order, starts = _ties(score)
    ends = np.append(starts[1:], len(order)) - 1
    positive = positive[order].astype(np.float32)

    def part(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, order]
        above = (weights * positive).cumsum(axis=1)[:, ends]
        both = weights.cumsum(axis=1)[:, ends]
        ones, zeros = above[:, -1], both[:, -1] - above[:, -1]
        below = both - above  # negatives at or below each run
        below[:, 1:] += below[:, :-1].copy()  # and below it: twice the mean height of a step
        steps = np.diff(above, axis=1, prepend=np.float32(0))
        area = np.einsum("rg,rg->r", steps, below, dtype=np.float64) / 2
        with np.errstate(invalid="ignore"):
            return area / (ones.astype(float) * zeros)

    return _by_rows(part, weights)


def risk_coverage(score: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and risk, [n] each, when the points with the lowest scores are kept first.

    Risk at coverage k / n is the mean loss of the k points of the lowest score, and the mean over
    all orders where scores are equal. ``score`` must be finite.
    """
    order, starts = _ties(score)
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), _shared(loss[order], starts).cumsum() / kept


def aurc(score: np.ndarray, loss: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean over k of the risk of the k lowest scores.

    0 is perfect; the mean loss is what a score that knows nothing gets.
    """
    return float(risk_coverage(score, loss)[1].mean())


def resampled_aurc(score: np.ndarray, loss: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """:func:`aurc` of each resample, [R].

    Copies of a point come at once and count once each with the risk after them; points of equal
    score share the mean loss that they have in the sample.
    """
    order, starts = _ties(score)
    shared = _shared(loss[order], starts).astype(np.float32)

    def part(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, order]
        held = weights.cumsum(axis=1)
        # Before the first copy of any point there is nothing to have a risk, and no weight.
        risk = (weights * shared).cumsum(axis=1) / np.maximum(held, 1)
        return np.einsum("rn,rn->r", weights, risk, dtype=np.float64) / held[:, -1]

    return _by_rows(part, weights)


def resampled_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median of ``values`` [n] in each resample, [R]: the lowest value with half the weight."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]

    def part(weights: np.ndarray) -> np.ndarray:
        reached = weights[:, order].cumsum(axis=1)
        return ordered[(reached >= reached[:, -1:] / 2).argmax(axis=1)]

    return _by_rows(part, weights)


def reliability(score: np.ndarray, right: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Share of right matches in bins of equally many points, from low to high scores.

    Each bin: mean score, share right, and count. Points of equal score are never parted, so that
    there may be fewer bins. ``score`` must be finite.
    """
    order, starts = _ties(score)
    # The bin of a run of equal scores is that of its middle point.
    sizes = np.diff(starts, append=len(order))
    middle = starts + (sizes - 1) / 2
    of_run = np.minimum((middle / max(len(order), 1) * bins).astype(int), bins - 1)
    which = np.repeat(of_run, sizes)
    score, right = score[order], right[order]
    return [
        {
            "score": float(score[which == b].mean()),
            "right": float(right[which == b].mean()),
            "count": int((which == b).sum()),
        }
        for b in np.unique(which)
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Expected calibration error of :func:`reliability`'s bins: sum of share |score - right|."""
    total = sum(each["count"] for each in bins)
    return float(sum(each["count"] * abs(each["score"] - each["right"]) for each in bins) / total)


def _ties(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of rising score, and where each run of equal scores starts in it."""
    order = np.argsort(score, kind="stable")
    ordered = score[order]
    fresh = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    return order, np.flatnonzero(fresh)


def _shared(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The mean of each run in place of its values."""
    sizes = np.diff(starts, append=len(values))
    return np.repeat(np.add.reduceat(values.astype(float), starts) / sizes, sizes)


def _by_rows(part: Callable[[np.ndarray], np.ndarray], weights: np.ndarray) -> np.ndarray:
    """``part`` of a few rows of weights at a time, so that temporaries stay small."""
    if len(weights) == 0:
        return np.empty(0)
    rows = max(1, _CHUNK_ELEMENTS // max(weights.shape[1], 1))
    return np.concatenate([part(weights[i : i + rows]) for i in range(0, len(weights), rows)])
