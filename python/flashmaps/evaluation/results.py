"""From the table of points to the numbers of a report: PCK, errors, and what each score is worth.

The table is a dict of columns, one entry for each point: pair, unit, category, x, y, true_x, true_y
(NaN where the point is hidden in the target), mirrored_x, mirrored_y (of the other side of a
symmetric object, NaN where there is none to be seen), base; for every method ``x: <method>`` and
``y: <method>``; for every comparison and score ``score: <compare>: <score>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashmaps.evaluation import bootstrap
from flashmaps.evaluation.metrics import (
    aurc,
    auroc,
    calibration_error,
    reliability,
    resampled_aurc,
    resampled_auroc,
    resampled_median,
    risk_coverage,
)
from flashmaps.matching.confidence import SCORES
from flashmaps.matching.options import READING

Table = dict[str, np.ndarray]

THRESHOLDS = (0.01, 0.05, 0.1)
CURVE = tuple(round(0.005 * i, 3) for i in range(41))  # thresholds of the PCK curves, 0 to 0.2
PROBABILITIES = ("confidence", "return_probability", "max_probability")
# Per target token in the note; here read at the token that a point is matched to.
TITLES = {
    "confidence": "confidence",
    "return_probability": "return probability",
    "max_probability": "max probability",
    "hard_distance": "cycle error, hard",
    "soft_distance": "cycle error, soft",
    "spread": "round-trip spread",
    "entropy": "entropy of the row",
    "inverse_entropy": "IME at the match",
    "density": "MD at the match",
    "nims": "NIMS at the match",
    "nims_log1p": "IME / log(1 + MD)",
    "local_ims": "IMS of the tokens around",
    "support": "neighbours' support",
}


def summarise(
    table: Table,
    methods: Sequence[str],
    compare: Sequence[str] | Mapping[str, str],
    *,
    headline: float = 0.1,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Every number of a report, as plain Python values.

    Args:
        table: see the top of this file.
        methods: names in the order of the report; the first is what the others are compared with.
        compare: comparisons that have scores; as a mapping, to the methods whose matches they
            judge. Those of "kk" are otherwise about "keys on keys, hard".
        headline: PCK threshold of the curves of risk and of reliability.
        resamples, seed: of the bootstrap over units.

    Raises ValueError when no point of the table is visible in its target, and for another headline
    than one of THRESHOLDS.
    """
    if headline not in THRESHOLDS:
        raise ValueError(f"headline={headline}; wanted one of {THRESHOLDS}")
    true = np.stack((table["true_x"], table["true_y"]), axis=1)
    seen = np.isfinite(true).all(axis=1)
    if not seen.any():
        raise ValueError("no point of any pair has a known place in the target: nothing to score")
    _, unit = np.unique(table["unit"], return_inverse=True)
    counts = bootstrap.resample(int(unit.max()) + 1, resamples, seed)
    found = {name: np.stack((table[f"x: {name}"], table[f"y: {name}"]), axis=1) for name in methods}
    errors = {name: np.linalg.norm(each - true, axis=1) for name, each in found.items()}
    visible = Points(table["pair"][seen], unit[seen], table["base"][seen], counts)
    scored = {name: visible.score(each[seen]) for name, each in errors.items()}
    first = methods[0]
    judged = (
        compare
        if isinstance(compare, Mapping)
        else {each: f"{READING[each]}, hard" for each in compare}
    )
    return {
        "points": int(seen.sum()),
        "hidden_points": int((~seen).sum()),
        "pairs": len(np.unique(table["pair"])),
        "units": int(unit.max()) + 1,
        "methods": scored,
        "against": {
            name: visible.difference(errors[first][seen], each[seen])
            for name, each in errors.items()
            if name != first
        },
        "mirrored": _mirrored(table, found, errors, seen),
        "categories": _categories(table["category"][seen], visible, errors, seen),
        "scores": {
            each: {
                "method": method,
                **_scores(table, each, errors[method], seen, unit, counts, headline),
            }
            for each, method in judged.items()
        },
    }


class Points:
    """The points that can be scored, and how they fall to pairs and units."""

    def __init__(
        self, pair: np.ndarray, unit: np.ndarray, base: np.ndarray, counts: np.ndarray
    ) -> None:
        self.unit, self.base, self.counts = unit, base, counts
        numbers, self.pair = np.unique(pair, return_inverse=True)
        self.sizes = np.bincount(self.pair)
        # The unit of each pair, where units are pairs; else intervals per image are not defined.
        first = np.zeros(len(numbers), dtype=int)
        first[self.pair] = unit
        self.pair_unit = first if (first[self.pair] == unit).all() else None

    def score(self, errors: np.ndarray) -> dict[str, Any]:
        relative = errors / self.base
        found: dict[str, Any] = {"pck": {}}
        for threshold in THRESHOLDS:
            right = relative <= threshold
            each = self._per_image(right)
            found["pck"][f"{threshold:g}"] = {
                "per_point": float(right.mean()),
                "per_point_interval": bootstrap.interval(self._means(right)),
                "per_image": float(each.mean()),
                "per_image_interval": self._per_image_interval(each),
            }
        weights = self.counts[:, self.unit]
        found["error"] = {
            "mean_px": float(errors.mean()),
            "mean_px_interval": bootstrap.interval(self._means(errors)),
            "median_px": float(np.median(errors)),
            "median_px_interval": bootstrap.interval(resampled_median(errors, weights)),
            "mean_of_base": float(relative.mean()),
            "median_of_base": float(np.median(relative)),
        }
        found["pck_curve"] = [round(float((relative <= t).mean()), 5) for t in CURVE]
        return found

    def difference(self, first: np.ndarray, other: np.ndarray) -> dict[str, Any]:
        """PCK of the first method minus that of another, the same points and resamples."""
        found = {}
        for threshold in THRESHOLDS:
            ahead = (first / self.base <= threshold) * 1.0 - (other / self.base <= threshold)
            found[f"{threshold:g}"] = {
                "per_point": float(ahead.mean()),
                "per_point_interval": bootstrap.interval(self._means(ahead)),
            }
        return found

    def _means(self, values: np.ndarray) -> np.ndarray:
        """Mean over points in each resample, [R]."""
        units = self.counts.shape[1]
        sums = np.bincount(self.unit, values, minlength=units)
        sizes = np.bincount(self.unit, minlength=units)
        with np.errstate(invalid="ignore"):
            return (self.counts @ sums) / (self.counts @ sizes)

    def _per_image(self, right: np.ndarray) -> np.ndarray:
        return np.bincount(self.pair, right) / self.sizes

    def _per_image_interval(self, each: np.ndarray) -> list[float] | None:
        if self.pair_unit is None or len(each) < 2:
            return None
        weights = self.counts[:, self.pair_unit]
        with np.errstate(invalid="ignore"):
            return bootstrap.interval((weights @ each) / weights.sum(1))


def _mirrored(
    table: Table, found: dict[str, np.ndarray], errors: dict[str, np.ndarray], seen: np.ndarray
) -> dict[str, Any] | None:
    """PCK on objects with a mirror image: as it is, and with either side taken for right.

    What a method gains is what it confuses left and right. None where nothing is symmetric.
    """
    other = np.stack((table["mirrored_x"], table["mirrored_y"]), axis=1)
    numbers, pair = np.unique(table["pair"], return_inverse=True)
    has_mirror = np.bincount(pair, np.isfinite(other).all(axis=1), minlength=len(numbers)) > 0
    here = seen & has_mirror[pair]
    if not here.any():
        return None
    methods: dict[str, Any] = {}
    for name, places in found.items():
        strict = errors[name][here] / table["base"][here]
        across = np.linalg.norm(places - other, axis=1)[here] / table["base"][here]
        either = np.fmin(strict, across)
        methods[name] = {
            f"{t:g}": {
                "own_side": float((strict <= t).mean()),
                "either_side": float((either <= t).mean()),
            }
            for t in THRESHOLDS
        }
    return {"points": int(here.sum()), "pairs": len(np.unique(pair[here])), "pck": methods}


def _categories(
    category: np.ndarray, points: Points, errors: dict[str, np.ndarray], seen: np.ndarray
) -> dict[str, Any]:
    """PCK of every method in every category, without intervals."""
    found: dict[str, Any] = {}
    for name in np.unique(category):
        here = category == name
        _, pair = np.unique(points.pair[here], return_inverse=True)
        sizes = np.bincount(pair)
        shares: dict[str, Any] = {}
        for method, each in errors.items():
            relative = each[seen][here] / points.base[here]
            shares[method] = {
                f"{t:g}": {
                    "per_point": float((relative <= t).mean()),
                    "per_image": float((np.bincount(pair, relative <= t) / sizes).mean()),
                }
                for t in THRESHOLDS
            }
        found[str(name)] = {"points": int(here.sum()), "pairs": len(sizes), "pck": shares}
    return found


def _scores(
    table: Table,
    compare: str,
    errors: np.ndarray,
    seen: np.ndarray,
    unit: np.ndarray,
    counts: np.ndarray,
    headline: float,
) -> dict[str, Any]:
    """How well each score of one comparison tells its wrong matches, and hidden points."""
    relative = errors[seen] / table["base"][seen]
    wrong = {f"{t:g}": relative > t for t in THRESHOLDS}
    found: dict[str, Any] = {}
    for name in ("confidence", *SCORES):
        if f"score: {compare}: {name}" not in table:  # no calibration, no confidence
            continue
        values = table[f"score: {compare}: {name}"]
        defined = np.isfinite(values)
        here = defined[seen]
        report: dict[str, Any] = {
            "defined_share": float(here.mean()),
            "wrong": {},
            "hidden": _auroc(values[defined], ~seen[defined], unit[defined], counts),
        }
        found[name] = report
        if not here.any():
            continue
        score, units = values[seen][here], unit[seen][here]
        for threshold, bad in wrong.items():
            report["wrong"][threshold] = {
                "share": float(bad[here].mean()),
                **_auroc(score, bad[here], units, counts),
                "aurc_keep_low": aurc(score, bad[here]),
                "aurc_keep_high": aurc(-score, bad[here]),
            }
        bad = relative[here] > headline
        report["risk_coverage"] = _risks(score, bad, counts[:, units])
        if name == "confidence":  # says of itself which way it points
            report["risk_coverage"]["keep_first"] = "high"
        low = report["risk_coverage"]["keep_first"] == "low"
        report["risk"] = _curve(score if low else -score, bad, float(here.mean()))
        report["reliability"] = reliability(score, ~bad)
        if name in PROBABILITIES:
            report["calibration_error"] = calibration_error(report["reliability"])
    return {
        "wrong_share": {t: float(bad.mean()) for t, bad in wrong.items()},
        "perfect_aurc": {t: _perfect(bad) for t, bad in wrong.items()},
        "hidden_share": float((~seen).mean()),
        "scores": found,
    }


def _auroc(
    score: np.ndarray, positive: np.ndarray, unit: np.ndarray, counts: np.ndarray
) -> dict[str, Any]:
    """AUROC of a score, high predicting positive, its interval, and which way it points."""
    area = auroc(score, positive)
    if area is None:
        return {"auroc": None, "auroc_interval": None, "high_means": None}
    found = bootstrap.interval(resampled_auroc(score, positive, counts[:, unit]))
    if found is None:
        means = "unknown"
    elif found[0] <= 0.5 <= found[1]:
        means = "nothing"
    else:
        means = "wrong" if found[0] > 0.5 else "right"
    return {"auroc": area, "auroc_interval": found, "high_means": means}


def _risks(score: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Areas under both risk-coverage curves, with intervals, and which is the lower."""
    found: dict[str, Any] = {}
    for first, signed in (("low", score), ("high", -score)):
        found[f"aurc_keep_{first}"] = aurc(signed, wrong)
        resampled = resampled_aurc(signed, wrong, weights)
        found[f"aurc_keep_{first}_interval"] = bootstrap.interval(resampled)
    better = found["aurc_keep_low"] <= found["aurc_keep_high"]
    return {"keep_first": "low" if better else "high", **found}


def _perfect(wrong: np.ndarray) -> float:
    """The least AURC there can be: all right matches kept before any wrong one."""
    return float(aurc(wrong.astype(float), wrong))


def _curve(score: np.ndarray, wrong: np.ndarray, share: float, steps: int = 100) -> dict[str, Any]:
    """A risk-coverage curve, thinned; coverage counts points where the score is undefined."""
    coverage, risk = risk_coverage(score, wrong)
    at = np.unique(np.linspace(0, len(coverage) - 1, min(steps, len(coverage))).round().astype(int))
    return {
        "coverage": [round(float(c) * share, 5) for c in coverage[at]],
        "risk": [round(float(r), 5) for r in risk[at]],
    }
