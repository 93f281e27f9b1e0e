"""How good matches are, against known correspondences; and how well a score tells which are wrong.

Functions that take ``weights`` [R, n] compute R resamples at once: weight w of a point is as w
copies of it. With ``weights=None`` there is one row of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

PCK_THRESHOLDS = (0.01, 0.02, 0.05, 0.1)

_CHUNK_ELEMENTS = 2**22  # of weights at a time: 32 MB in float64, with a few temporaries alike


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

    scikit-learn takes weights too, but one row at a time, sorting anew for each.
    """
    order, starts = _ties(score)
    positive = positive[order]

    def part(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, order]
        ones = np.add.reduceat(weights * positive, starts, axis=1)
        zeros = np.add.reduceat(weights * ~positive, starts, axis=1)
        below = zeros.cumsum(axis=1) - zeros / 2
        with np.errstate(invalid="ignore"):
            return (ones * below).sum(1) / (ones.sum(1) * zeros.sum(1))

    return _by_rows(part, weights)


def risk_coverage(score: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and risk, [n] each, when the points with the lowest scores are kept first.

    Risk at coverage k / n is the mean loss of the k points of the lowest score, and the mean over
    all orders where scores are equal. ``score`` must be finite.
    """
    order, starts = _ties(score)
    sizes = np.diff(starts, append=len(order))
    shared = np.repeat(np.add.reduceat(loss[order].astype(float), starts) / sizes, sizes)
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), shared.cumsum() / kept


def aurc(
    score: np.ndarray, loss: np.ndarray, weights: np.ndarray | None = None
) -> float | np.ndarray:
    """Area under the risk-coverage curve: the mean over k of the risk of the k lowest scores.

    0 is perfect; the mean loss is what a score that knows nothing gets. With weights: [R], where a
    point's risk is taken after all of its copies.
    """
    if weights is None:
        return float(risk_coverage(score, loss)[1].mean())
    order, starts = _ties(score)
    sizes = np.diff(starts, append=len(order))
    loss = loss[order].astype(float)

    def part(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, order]
        with np.errstate(invalid="ignore", divide="ignore"):
            held = np.add.reduceat(weights, starts, axis=1)
            shared = np.nan_to_num(np.add.reduceat(weights * loss, starts, axis=1) / held)
            shared = np.repeat(shared, sizes, axis=1)
            risk = np.nan_to_num((weights * shared).cumsum(1) / weights.cumsum(1))
            return (weights * risk).sum(1) / weights.sum(1)

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


def _by_rows(part: Callable[[np.ndarray], np.ndarray], weights: np.ndarray) -> np.ndarray:
    """``part`` of a few rows of weights at a time, so that temporaries stay small."""
    rows = max(1, _CHUNK_ELEMENTS // max(weights.shape[1], 1))
    return np.concatenate([part(weights[i : i + rows]) for i in range(0, len(weights), rows)])
