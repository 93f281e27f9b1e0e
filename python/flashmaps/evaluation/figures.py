"""The plots of an evaluation, as matplotlib figures of their own (no global state)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmaps.evaluation.benchmark import Pair
from flashmaps.evaluation.methods import CEILING, DEFAULT, FREE
from flashmaps.evaluation.results import PROBABILITIES, THRESHOLDS, TITLES
from flashmaps.matching.options import READING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GOOD, _BAD = "#1a9850", "#d73027"
_SHOWN = 40  # points of an example
# The ways of matching in warm colours, baselines in cool ones, what looks at no image in grey.
_WARM = ("#b2182b", "#ef8a62", "#8c510a", "#dfa04e", "#762a83", "#c2a5cf")
_COOL = ("#2166ac", "#67a9cf", "#01665e", "#5ab4ac", "#4d9221", "#a1d76a", "#35978f", "#80cdc1")


def draw(results: dict[str, Any]) -> dict[str, Figure]:
    """Every plot of the numbers, by the name of its file."""
    return {
        "pck": pck_curves(results),
        "scores": score_areas(results),
        "risk": risk_curves(results),
        "reliability": reliability_curves(results),
    }


def pck_curves(results: dict[str, Any]) -> Figure:
    """PCK per point of every method over the threshold."""
    figure, (ax,) = _figure(9, 5.5, 1, 1)
    curves = {name: found["pck_curve"] for name, found in results["methods"].items()}
    styles = _styles(list(curves))
    for name, shares in curves.items():
        ax.plot(results["curve_thresholds"], shares, label=name, **styles[name])
    for threshold in THRESHOLDS:
        ax.axvline(threshold, color="0.85", linewidth=0.8, zorder=0)
    about = results["benchmark"]
    ax.set_xlabel(f"threshold, as a share of {about['pck_base']}")
    ax.set_ylabel("share of points found within it")
    ax.set_xlim(0, results["curve_thresholds"][-1])
    # Where all methods are far below what tokens allow, that one may leave the frame.
    top = max(share for name, shares in curves.items() if name != CEILING for share in shares)
    ax.set_ylim(0, 1 if top > 0.6 else 1.1 * top)
    ax.set_title(
        f"{about['name']}: {results['points']} points of {results['pairs']} pairs", loc="left"
    )
    # In the order of the curves at the right end.
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -curves[labels[i]][-1])
    ax.legend(
        [handles[i] for i in order], [labels[i] for i in order],
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def score_areas(results: dict[str, Any]) -> Figure:
    """AUROC of every score at every threshold with its interval, for each comparison."""
    several = results["scores"]
    figure, axes = _figure(4.2 + 4.4 * len(several), 5, 1, len(several))
    marks = ("o", "s", "D")
    for ax, (compare, found) in zip(axes, several.items(), strict=True):
        names = list(found["scores"])
        for shift, (threshold, mark) in enumerate(zip(THRESHOLDS, marks, strict=True)):
            colour = ("#b2182b", "#ef8a62", "#2166ac")[shift]
            ax.plot([], [], mark, color=colour, markersize=4.5, label=f"off by over {threshold:g}")
            for row, name in enumerate(names):
                wrong = found["scores"][name]["wrong"].get(f"{threshold:g}")
                if wrong is None or wrong["auroc"] is None:
                    continue
                y = row + 0.22 * (shift - 1)
                if wrong["auroc_interval"] is not None:
                    ax.plot(wrong["auroc_interval"], (y, y), color=colour, linewidth=1.6)
                ax.plot(wrong["auroc"], y, mark, color=colour, markersize=4.5)
        ax.axvline(0.5, color="0.4", linewidth=0.9, linestyle="--")
        ax.set_yticks(range(len(names)), [TITLES[name] for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlim(0, 1)
        ax.set_xlabel("high means right  <  AUROC of wrong matches  >  high means wrong")
        ax.set_title(f"{results['benchmark']['name']}: scores of {READING[compare]}", loc="left")
        ax.legend(frameon=False, fontsize=8, loc="best")
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def risk_curves(results: dict[str, Any]) -> Figure:
    """Share of wrong matches among the kept, over how many are kept, for every score."""
    several, headline = results["scores"], results["benchmark"]["headline"]
    figure, axes = _figure(4.2 + 5 * len(several), 5, 1, len(several))
    for ax, (compare, found) in zip(axes, several.items(), strict=True):
        share = top = found["wrong_share"][f"{headline:g}"]
        for name, one in found["scores"].items():
            style = _score_styles()[name]
            if "risk" not in one:
                continue
            label = f"{TITLES[name]} ({one['risk_coverage']['keep_first']} first)"
            coverage, risk = (np.array(one["risk"][axis]) for axis in ("coverage", "risk"))
            ax.plot(coverage, risk, label=label, **style)
            top = max(top, float(risk[coverage >= 0.02].max(initial=0)))  # the start is ragged
        ax.axhline(share, color="0.4", linestyle="--", linewidth=0.9, label="knowing nothing")
        kept = np.linspace(0.005, 1, 200)
        ax.plot(
            kept, np.maximum(0, 1 - (1 - share) / kept), color="0.4", linewidth=0.9, label="perfect"
        )
        ax.set_xlim(0, 1)
        ax.set_ylim(0, max(0.05, min(1, 1.05 * top)))
        ax.set_xlabel("coverage: share of matches kept")
        ax.set_ylabel(f"risk: share of the kept that are off by over {headline:g}")
        ax.set_title(f"{results['benchmark']['name']}: {READING[compare]}", loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def reliability_curves(results: dict[str, Any]) -> Figure:
    """Share of right matches in bins of equally many points, for every score."""
    several, headline = results["scores"], results["benchmark"]["headline"]
    names = [n for n in TITLES if any(n in found["scores"] for found in several.values())]
    columns = 5
    rows = -(-len(names) // columns) * len(several)
    figure, axes = _figure(13, 2.75 * rows, rows, columns)
    for ax in axes:
        ax.set_visible(False)
    for block, (compare, found) in enumerate(several.items()):
        right = 1 - found["wrong_share"][f"{headline:g}"]
        shares = [
            each["right"] for one in found["scores"].values() for each in one.get("reliability", [])
        ]
        top = max(0.05, 1.08 * max(shares, default=1))  # one scale for all scores of a comparison
        for place, name in enumerate(names):
            one = found["scores"].get(name, {})
            if "reliability" not in one:
                continue
            ax = axes[block * (rows // len(several)) * columns + place]
            ax.set_visible(True)
            _bins(ax, one, name, right, top)
            if place % columns == 0:
                ax.set_ylabel(f"{READING[compare]}\nshare right", fontsize=8)
    figure.suptitle(
        f"{results['benchmark']['name']}: share of matches within {headline:g}, in ten bins of "
        "each score (dashed: of all; dotted: what a probability promises)",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def examples(
    pairs: Sequence[Pair], found: Sequence[np.ndarray], headline: float, method: str
) -> Figure:
    """Some pairs with lines from points to where ``method`` found them, and to the truth."""
    columns = min(2, len(pairs))
    shapes = [_side_by_side(pair)[0].shape for pair in pairs]
    aspects = [height / width for height, width, _ in shapes]
    tallest = [max(aspects[i : i + columns]) for i in range(0, len(aspects), columns)]
    height = sum(12 / columns * each + 0.3 for each in tallest) + 0.4
    figure, axes = _figure(12, height, len(tallest), columns, height_ratios=tallest)
    for ax in axes:
        ax.set_axis_off()
    for ax, pair, places in zip(axes, pairs, found, strict=False):
        _example(ax, pair, places, headline)
    figure.suptitle(
        f"{method}: green within {headline:g} of the base, red not; circles: the truth",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _example(ax: Axes, pair: Pair, found: np.ndarray, headline: float) -> None:
    canvas, shift = _side_by_side(pair)
    ax.imshow(canvas)
    seen = np.flatnonzero(np.isfinite(pair.target_points).all(axis=1))
    step = max(1, len(seen) // _SHOWN)
    for i in seen[::step]:
        (x0, y0), (x1, y1), (x, y) = pair.source_points[i], found[i], pair.target_points[i]
        right = np.hypot(x1 - x, y1 - y) <= headline * pair.base
        colour = _GOOD if right else _BAD
        ax.plot([x0, x1 + shift], [y0, y1], color=colour, linewidth=0.7, alpha=0.8)
        ax.plot(x0, y0, "o", color=colour, markersize=3, mec="white", mew=0.4)
        ax.plot(x + shift, y, "o", markersize=4, mfc="none", mec="white", mew=1.4)
        ax.plot(x + shift, y, "o", markersize=4, mfc="none", mec=colour, mew=0.8)
    ax.set_xlim(-0.5, canvas.shape[1] - 0.5)
    ax.set_ylim(canvas.shape[0] - 0.5, -0.5)
    ax.set_title(f"{pair.category}: {pair.source} to {pair.target}", fontsize=8, loc="left")


def _side_by_side(pair: Pair) -> tuple[np.ndarray, int]:
    """Both images on white, and how far to the right the target begins."""
    source, target = pair.source_image, pair.target_image
    shift = round(1.05 * source.shape[1])
    height = max(source.shape[0], target.shape[0])
    canvas = np.ones((height, shift + target.shape[1], 3), dtype=np.float32)
    canvas[: source.shape[0], : source.shape[1]] = source
    canvas[: target.shape[0], shift:] = target
    return canvas, shift


def _bins(ax: Axes, one: dict[str, Any], name: str, right: float, top: float) -> None:
    bins = one["reliability"]
    values, shares = [each["score"] for each in bins], [each["right"] for each in bins]
    ax.axhline(right, color="0.6", linestyle="--", linewidth=0.8)
    title = TITLES[name]
    if name in PROBABILITIES:
        ax.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1)
        ax.set_xlim(-0.03 * max(values), 1.05 * max(values))
        title += f" (ECE {one['calibration_error']:.2f})"
    ax.plot(values, shares, "o-", color="#2166ac", markersize=3.5, linewidth=1.2)
    ax.set_ylim(-0.03 * top, top)
    ax.locator_params(axis="x", nbins=4)
    ax.set_title(title, fontsize=9, loc="left")
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    warm, cool = iter(_WARM), iter(_COOL * 2)
    readings = tuple(READING.values())
    for name in names:
        if name == DEFAULT:
            styles[name] = {"color": "black", "linewidth": 2.6}
        elif name.startswith(readings):
            styles[name] = {"color": next(warm), "linewidth": 2.2}
        elif name in FREE:
            dashes = {"identity": ":", "random": "--", CEILING: "-."}
            styles[name] = {"color": "0.35", "linewidth": 1.2, "linestyle": dashes[name]}
        else:
            styles[name] = {"color": next(cool), "linewidth": 1.4}
    return styles


def _score_styles() -> dict[str, dict[str, Any]]:
    colours = ("black", *_WARM[:6], *_COOL[:6])
    return {
        name: {"color": colour, "linewidth": 2.6 if name == "confidence" else 1.4}
        for name, colour in zip(TITLES, colours, strict=True)
    }


def _figure(
    width: float, height: float, rows: int, columns: int, **options: Any
) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()
