"""Fits the confidence: from a map's own scores to the probability that a match is right.

Candidates are a logistic function of each score alone and of all of them together. Each is judged
by what it says of pairs that it was not fitted to (five folds, whole pairs); the one with the least
log loss is kept, and fitted to all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flashmaps.evaluation.metrics import aurc, auroc, calibration_error, reliability
from flashmaps.matching.confidence import SCORES, Calibration, Term, term

FOLDS = 5
# NIMS is undefined for most points, and is the ratio of two others.
TAKEN = tuple(name for name in SCORES if name != "nims")
ALL = "all scores"


def fit(
    scores: dict[str, np.ndarray],
    right: np.ndarray,
    pair: np.ndarray,
    *,
    tolerance: float,
    of: str,
    fitted_on: str,
    names: Sequence[str] = TAKEN,
) -> tuple[Calibration | None, dict[str, dict[str, Any]]]:
    """The calibration, and what every candidate scored on pairs that it had not seen.

    Args:
        scores: [n] of each of ``names``, at every point.
        right: [n] bool, whether the match of the point is right.
        pair: [n], which pair a point is of.
        tolerance, of, fitted_on: see :class:`flashmaps.matching.confidence.Calibration`.

    None, and no candidates, where there are fewer than FOLDS pairs or all matches are right or all
    wrong: there is nothing to learn then.
    """
    inputs = np.stack(
        [term(name, torch.from_numpy(scores[name]).double()).numpy() for name in names], axis=1
    )
    if len(np.unique(pair)) < FOLDS or right.all() or not right.any():
        return None, {}
    mean, deviation = inputs.mean(0), np.maximum(inputs.std(0), 1e-6)
    inputs = (inputs - mean) / deviation
    chosen: dict[str, list[int]] = {name: [place] for place, name in enumerate(names)}
    chosen[ALL] = list(range(len(names)))
    found = {name: _judge(inputs[:, some], right, pair) for name, some in chosen.items()}
    best = min(found, key=lambda name: found[name]["log_loss"])
    for name, each in found.items():
        each["kept"] = name == best
    model = _logistic(inputs[:, chosen[best]], right)
    terms = tuple(
        Term(names[place], float(weight), float(mean[place]), float(deviation[place]))
        for place, weight in zip(chosen[best], model.coef_[0], strict=True)
    )
    return Calibration(terms, float(model.intercept_[0]), tolerance, of, fitted_on), found


def _logistic(inputs: np.ndarray, right: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(inputs, right)


def _judge(inputs: np.ndarray, right: np.ndarray, pair: np.ndarray) -> dict[str, Any]:
    """How good the probabilities are for pairs that were left out of the fit."""
    from sklearn.metrics import brier_score_loss, log_loss
    from sklearn.model_selection import GroupKFold

    said = np.full(len(right), right.mean())
    for seen, unseen in GroupKFold(FOLDS).split(inputs, right, pair):
        if 0 < right[seen].sum() < len(seen):
            said[unseen] = _logistic(inputs[seen], right[seen]).predict_proba(inputs[unseen])[:, 1]
    return {
        "log_loss": float(log_loss(right, said, labels=[False, True])),
        "brier": float(brier_score_loss(right, said)),
        "auroc": auroc(-said, ~right),
        "aurc": aurc(-said, ~right),
        "calibration_error": calibration_error(reliability(said, right)),
    }
