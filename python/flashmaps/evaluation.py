"""How good matches are, against known correspondences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PCK_THRESHOLDS = (0.01, 0.02, 0.05, 0.1)


def endpoint_errors(field: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distance in target pixels between found and true places, [h, w], NaN where unknown.

    Both are [h, w, 2] of (x, y) target pixels, ``truth`` NaN where there is none.
    """
    if field.shape != truth.shape:
        raise ValueError(f"field has shape {field.shape} but truth {truth.shape}")
    return np.linalg.norm(field - truth, axis=-1)


def pck(
    errors: np.ndarray, base: float, thresholds: Sequence[float] = PCK_THRESHOLDS
) -> list[float]:
    """Percentage of correct keypoints: the share of errors at most threshold * base pixels.

    Every pixel with a known error counts once, NaN are left out; ``base`` is the longer side of the
    target image.
    """
    known = errors[np.isfinite(errors)]
    if known.size == 0:
        raise ValueError("no pixel has a known correspondence, so there is nothing to score")
    return [float((known <= threshold * base).mean()) for threshold in thresholds]


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
    keep = np.isfinite(score)
    score, positive = score[keep], positive[keep].astype(bool)
    count, others = int(positive.sum()), int((~positive).sum())
    if count == 0 or others == 0:
        return None
    # Mann-Whitney: from the ranks of the positives, ties sharing their mean rank.
    _, which, sizes = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(sizes) - (sizes - 1) / 2
    ranks = mean_rank[which]
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))
