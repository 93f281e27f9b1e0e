"""The picture of scored matches of drawn scenes, beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmaps.matching.plots import BAD, GOOD, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flashmaps.evaluation.benchmark import Pair


def scene_pairs(
    pairs: Sequence[Pair],
    found: Sequence[np.ndarray],  # [n, 2] each, (x, y) in target pixels
    tolerance: float,
) -> Figure:
    """Pairs of pictures with numbered points, where they were found, and where they truly lie.

    A point has one number and one colour in both pictures. In the target a disc with a green rim is
    a match within ``tolerance`` times the pair's base of the truth; a square with a red rim is not,
    and a dashed line leads to the ring that marks the truth. Points that the target hides are left
    out.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    columns = 2 if len(pairs) > 1 else 1
    figure, axes = new_figure(
        -(-len(pairs) // columns), columns, 0.5 * max(map(_tallest, pairs)), bar=False
    )
    colours = colormaps["tab10"](range(10))
    total = right_in_all = 0
    for ax in axes:
        ax.set_axis_off()
    for ax, pair, places in zip(axes, pairs, found, strict=False):
        source, target = pair.source_image, pair.target_image
        shift = round(1.04 * source.shape[1])
        canvas = np.ones((max(source.shape[0], target.shape[0]), shift + target.shape[1], 3))
        canvas[: source.shape[0], : source.shape[1]] = source
        canvas[: target.shape[0], shift:] = target
        ax.imshow(canvas)
        seen = np.flatnonzero(np.isfinite(pair.target_points).all(axis=1))
        count = 0
        for number, i in enumerate(seen):
            colour = colours[number % len(colours)]
            true, place = pair.target_points[i], places[i]
            right = bool(np.linalg.norm(place - true) <= tolerance * pair.base)
            count += right
            if not right:
                ax.plot(
                    (place[0] + shift, true[0] + shift), (place[1], true[1]),
                    color="white", linewidth=2.4, alpha=0.8,
                )  # fmt: skip
                ax.plot(
                    (place[0] + shift, true[0] + shift), (place[1], true[1]),
                    color=BAD, linewidth=1.1, linestyle=(0, (3, 1.5)),
                )  # fmt: skip
            for width, edge in ((4.2, "white"), (2.2, colour)):
                ax.plot(true[0] + shift, true[1], "o", ms=13, mfc="none", mec=edge, mew=width)
            _numbered(ax, pair.source_points[i], number + 1, colour, "white", "o")
            rim, mark = (GOOD, "o") if right else (BAD, "s")
            _numbered(ax, (place[0] + shift, place[1]), number + 1, colour, rim, mark)
        total, right_in_all = total + len(seen), right_in_all + count
        ax.set_title(f"{pair.category}: {count} of {len(seen)} points found", fontsize=10)
        for at, text in ((0, "source"), (shift, "target")):
            ax.text(
                at + 3, canvas.shape[0] - 5, text, fontsize=8, va="bottom", color="white",
                bbox={"facecolor": "black", "alpha": 0.55, "pad": 1.5, "linewidth": 0},
            )  # fmt: skip

    def handle(label: str, **style: Any) -> Any:
        return Line2D([], [], linestyle="none", label=label, **style)

    grey = {"mfc": "0.6", "ms": 9}
    figure.legend(
        handles=[
            handle("point asked for", marker="o", mec="0.3", mew=0.6, **grey),
            handle("found, right", marker="o", mec=GOOD, mew=2.2, **grey),
            handle("found, wrong", marker="s", mec=BAD, mew=2.2, **grey),
            handle("where it truly lies", marker="o", mfc="none", mec="0.4", mew=2.2, ms=12),
        ],
        loc="outside lower center", ncols=4, fontsize=9, frameon=False,
    )  # fmt: skip
    figure.suptitle(
        f"{right_in_all} of {total} points of drawn objects are found in another drawing of the "
        f"same kind of thing\n(right: within {tolerance:.0%} of the object's longer side; one "
        "number and colour is one point)",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _tallest(pair: Pair) -> float:
    source, target = pair.source_image.shape, pair.target_image.shape
    return 2 * max(source[0], target[0]) / (1.04 * source[1] + target[1])


def _numbered(
    ax: Axes, point: Sequence[float], number: int, colour: Any, rim: str, marker: str
) -> None:
    ax.plot(*point, marker, markersize=9.5, mfc=colour, mec="white", mew=3.4)
    ax.plot(*point, marker, markersize=9.5, mfc=colour, mec=rim, mew=2.0)
    ax.text(
        point[0], point[1], str(number), fontsize=6.5, fontweight="bold", color="white",
        ha="center", va="center_baseline",
    )  # fmt: skip
