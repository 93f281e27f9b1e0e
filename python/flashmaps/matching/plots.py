"""Pictures of a match that explain themselves: titles, units, colour bars, both images named.

Every function returns a matplotlib Figure of its own (pyplot's global state is not touched), to be
saved with ``figure.savefig(path)`` or shown by a notebook.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmaps.arguments import number, whole
from flashmaps.diffusion.images import Image
from flashmaps.maps.grids import centres
from flashmaps.matching.points import token_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flashmaps.matching.result import Match

TALLEST = 24.0  # inches; a picture of 1 x 240 would be 2500, and take gigabytes to draw
GOOD, BAD = "#1a9850", "#d73027"
_GOLDEN = 0.618034  # multiples of it, modulo 1, keep apart


def matches(
    match: Match,
    *,
    count: int = 60,
    kind: str | None = None,
    truth: np.ndarray | None = None,  # [h_s, w_s, 2], NaN where unknown
    tolerance: float | None = None,
) -> Figure:
    """Both images side by side, with lines between matched points.

    Args:
        count: about how many source points, spread evenly over the image.
        kind: as in :meth:`flashmaps.matching.result.Match.transfer`; default the match's own.
        truth: the true (x, y) target pixel of every source pixel. With it lines are green where the
            match is within ``tolerance`` pixels of it and red elsewhere, where a dashed line leads
            on to a ring at the true place; points without truth are left out. Without it lines are
            coloured by cycle error.
        tolerance: pixels; default 5 % of the target's longer side.
    """
    whole("count", count, 1)
    if tolerance is not None:
        number("tolerance", tolerance, least=0)
    source, target = match.source.image, match.target.image
    points = _spread_points(match.source.grid, source.shape[:2], count)
    if truth is not None:
        x, y = np.rint(points).astype(int).T
        points = points[np.isfinite(truth[y, x]).all(axis=1)]
    found = match.transfer(points, kind)
    figure, axes = new_figure(1, 1, source.shape[0] / (2.06 * source.shape[1]), bar=truth is None)
    ax = axes[0]
    gap = round(0.06 * source.shape[1])
    height = max(source.shape[0], target.shape[0])
    canvas = np.ones((height, source.shape[1] + gap + target.shape[1], 3), dtype=np.float32)
    canvas[: source.shape[0], : source.shape[1]] = source
    canvas[: target.shape[0], source.shape[1] + gap :] = target
    ax.imshow(canvas)
    shift = source.shape[1] + gap
    if truth is not None:
        limit = 0.05 * max(target.shape[:2]) if tolerance is None else tolerance
        x, y = np.rint(points).astype(int).T
        right = np.linalg.norm(found - truth[y, x], axis=1) <= limit
        colours: Any = [GOOD if ok else BAD for ok in right]
        title = (
            f"{right.sum()} of {len(points)} sampled points are found within {limit:.0f} pixels of "
            "their true place (green); the others are red, and a ring marks where they truly lie"
        )
        for (x1, y1), (x0, y0) in zip(found[~right], truth[y, x][~right], strict=True):
            ax.plot([x1 + shift, x0 + shift], [y1, y0], color=BAD, linewidth=1.1, linestyle="--")
            for width, edge in ((3.4, "white"), (1.6, BAD)):
                ax.plot(x0 + shift, y0, "o", markersize=8, mfc="none", mec=edge, mew=width)
    else:
        errors = match.round_trip.hard_distance[0].cpu().numpy()
        tokens = [match.token_at(point) for point in points]
        scale = _colour_scale(0.0, max(float(errors.max()), 1e-6), "viridis_r")
        colours = scale.to_rgba(errors[tokens])
        title = f"{len(points)} matches, coloured by their cycle error"
        _colour_bar(figure, ax, scale, "cycle error (1 = side of the image)")
    for (x0, y0), (x1, y1), colour in zip(points, found, colours, strict=True):
        ax.plot([x0, x1 + shift], [y0, y1], color=colour, linewidth=0.9, alpha=0.75)
        ax.plot([x0, x1 + shift], [y0, y1], "o", color=colour, markersize=3.5, mec="white", mew=0.5)
    figure.suptitle(title, x=0.006, ha="left", fontsize=10)
    ax.set_axis_off()
    for name, left in (("source", 0), ("target", shift)):
        ax.annotate(name, (left, 0), (0, 3), textcoords="offset points", fontsize=10, va="bottom")
    return figure


def heatmap(
    match: Match, point: Sequence[float], *, truth: Sequence[float] | None = None
) -> Figure:
    """The source with one marked (x, y) pixel, and where its token looks in the target.

    The right picture shows that row of A_st, with its maximum and mean marked, and the true place
    if ``truth`` gives one.
    """
    token = token_at(point, match.source.grid, match.source.image.shape[:2])
    row = match.forward_map.rows([token]).reshape(match.target.grid).float().cpu().numpy()
    figure, (left, right) = new_figure(1, 2, _aspect(match.source.image))
    left.imshow(match.source.image)
    left.plot(*point, "o", markersize=12, markerfacecolor="none", markeredgecolor="white", mew=3.5)
    left.plot(*point, "o", markersize=12, markerfacecolor="none", markeredgecolor=BAD, mew=1.8)
    _name(left, f"source: the chosen point, pixel ({point[0]:.0f}, {point[1]:.0f})")
    _overlay(
        figure,
        right,
        match.target.image,
        row,
        "magma",
        "probability of each token (square-root scale)",
        norm=_norms().PowerNorm(0.5, 0, float(row.max())),
        alpha=0.3 + 0.6 * np.sqrt(row / max(float(row.max()), 1e-12)),
    )
    best, mean = match.transfer([point], "hard")[0], match.transfer([point], "soft")[0]
    marks = [(best, "x", "the largest (hard match)"), (mean, "+", "mean (soft match)")]
    for (x, y), sign, label in marks:
        right.plot(x, y, sign, color="black", markersize=13, mew=4.5)
        right.plot(x, y, sign, color="white", markersize=12, mew=2.2, label=label)
    if truth is not None:
        right.plot(*truth, "o", markersize=12, markerfacecolor="none", mec="black", mew=4)
        right.plot(
            *truth, "o", markersize=12, markerfacecolor="none", mec="#4dff4d", mew=2, label="truth"
        )
    right.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=3,
        fontsize=9,
        facecolor="0.45",
        labelcolor="white",
    )
    _name(right, "target: how likely each token is to be the same point")
    return figure


def entropy(match: Match) -> Figure:
    """Inverse mapping entropy of every target token, over the target."""
    values = match.round_trip.inverse_entropy[0].float().cpu().numpy()
    top = float(np.log(len(match.forward)))
    figure, (left, right) = new_figure(1, 2, _aspect(match.target.image))
    left.imshow(match.target.image)
    _name(left, "target")
    _overlay(
        figure, right, match.target.image, values.reshape(match.target.grid), "viridis", "nats"
    )
    _name(
        right,
        "Inverse mapping entropy: how undecided each target token is\n"
        "about its place in the source "
        f"(mean {values.mean():.2f}; {top:.2f} = knows nothing)",
    )
    return figure


def density(match: Match) -> Figure:
    """Mapping density of every target token, over the target."""
    values = match.round_trip.density[0].float().cpu().numpy()
    figure, (left, right) = new_figure(1, 2, _aspect(match.target.image))
    left.imshow(match.target.image)
    _name(left, "target")
    highest = float(values.max())
    bar = _overlay(
        figure,
        right,
        match.target.image,
        values.reshape(match.target.grid),
        "inferno",
        "source tokens",
        norm=_norms().SymLogNorm(1.0, vmin=0, vmax=max(highest, 1), base=10),
    )
    ticks = [n for n in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if n <= highest]
    bar.set_ticks(ticks, labels=[str(n) for n in ticks])
    bar.minorticks_off()
    _name(
        right,
        "Mapping density: how many source tokens chose each target token\n"
        f"(0 to {values.max():.0f}; {(values > 0).mean():.0%} of the target is chosen at all; "
        "1 everywhere = one to one)",
    )
    return figure


def cycle_error(match: Match) -> Figure:
    """Cycle error of every source token, hard, over the source."""
    values = match.round_trip.hard_distance[0].float().cpu().numpy()
    figure, (left, right) = new_figure(1, 2, _aspect(match.source.image))
    left.imshow(match.source.image)
    _name(left, "source")
    _overlay(
        figure,
        right,
        match.source.image,
        values.reshape(match.source.grid),
        "viridis",
        "distance (1 = side of the image)",
    )
    _name(
        right,
        "Cycle error: how far from home each source token lands after\n"
        f"going to the target and back (mean = hard IMS = {values.mean():.3f}; "
        f"{float(match.mutual.float().mean()):.0%} come back exactly)",
    )
    return figure


def shifts(fields: dict[str, np.ndarray], image: Image, *, limits: tuple[float, float]) -> Figure:
    """Horizontal shift, in pixels, that each named [h, w, 2] field gives every pixel of ``image``.

    Unknown pixels (NaN) are white. ``limits`` are the ends of the one colour scale for all.
    """
    columns = np.arange(image.shape[1], dtype=np.float32)[None, :]
    rows = -(-(len(fields) + 1) // 2)
    figure, axes = new_figure(rows, 2, _aspect(image), bar=True)
    axes[0].imshow(image)
    _name(axes[0], "the left photograph")
    scale = _colour_scale(*limits, "turbo")
    for ax, (name, field) in zip(axes[1:], fields.items(), strict=False):
        ax.imshow(columns - field[:, :, 0], cmap=scale.cmap, norm=scale.norm)
        _name(ax, name)
    for ax in axes[len(fields) + 1 :]:
        ax.set_axis_off()
    figure.colorbar(
        scale, ax=axes, shrink=0.8, label="pixels moved to the left (more: nearer)", extend="both"
    )
    return figure


def bars(
    values: dict[str, float], title: str, unit: str, *, highlighted: Collection[str] = ()
) -> Figure:
    """Horizontal bars by name, first on top, each with its value written beside it."""
    names = list(values)
    figure, axes = new_figure(1, 1, 0.03 + 0.028 * len(names), bar=False)
    ax = axes[0]
    colours = ["#d97706" if name in highlighted else "#7f97b8" for name in names]
    drawn = ax.barh(range(len(names)), list(values.values()), color=colours)
    ax.bar_label(drawn, labels=[f"{value:.1f}" for value in values.values()], padding=3, fontsize=9)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    ax.set_xlabel(unit, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10, loc="left")
    return figure


def _spread_points(grid: tuple[int, int], size: tuple[int, int], count: int) -> np.ndarray:
    """About ``count`` token centres, [n, 2] in pixels, spread evenly over the tokens.

    Neighbouring columns are staggered, so that lines to the same place in another image do not lie
    on top of each other.
    """
    rows, columns = grid
    step = max(1.0, (rows * columns / max(count, 1)) ** 0.5)
    some_rows = np.arange(step / 2, rows, step)
    some_columns = np.arange(step / 2, columns, step).astype(int)
    stagger = (np.arange(len(some_columns)) * _GOLDEN % 1 - 0.5) * step
    staggered = (some_rows[:, None] + stagger[None, :]).clip(0, rows - 1).astype(int)
    tokens = (staggered * columns + some_columns[None, :]).ravel()
    height, width = size
    return centres(grid)[tokens].numpy().astype(float) * (width, height) - 0.5


def _aspect(image: Image) -> float:
    return image.shape[0] / image.shape[1]


def new_figure(
    rows: int, columns: int, aspect: float, *, bar: bool = True
) -> tuple[Figure, np.ndarray]:
    """A figure 12 inches wide whose axes have the given height / width; axes as a flat array.

    It is at most TALLEST inches high: higher ones have room at the sides of their axes.
    """
    from matplotlib.figure import Figure

    width = 12.0
    room = 0.86 if bar else 0.96  # the rest of the width is for colour bars and margins
    height = rows * (width * room / columns * aspect + 0.75)
    figure = Figure(figsize=(width, min(height, TALLEST)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes.ravel()


def _name(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_axis_off()


def _norms() -> Any:
    from matplotlib import colors

    return colors


def _colour_scale(low: float, high: float, colours: str) -> Any:
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(norm=_norms().Normalize(low, high), cmap=colours)


def _colour_bar(figure: Figure, ax: Axes, scale: Any, label: str) -> Any:
    return figure.colorbar(scale, ax=ax, shrink=0.85, pad=0.015, label=label)


def _overlay(
    figure: Figure,
    ax: Axes,
    image: Image,
    values: np.ndarray,  # [rows, columns]
    colours: str,
    label: str,
    *,
    norm: Any = None,
    alpha: Any = 0.8,
) -> Any:
    """Token values over a faint grey version of the image, each token a flat cell; its colour bar.

    ``norm`` scales values to colours; default linear between their extremes. ``alpha`` is how much
    of the image they hide, one number or one for each token.
    """
    height, width = image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=1, extent=extent)
    drawn = ax.imshow(
        values, cmap=colours, norm=norm, extent=extent, alpha=alpha, interpolation="nearest"
    )
    # A bar of the plain colours: one of what is drawn would be as faint as that is.
    from matplotlib.cm import ScalarMappable

    scale = ScalarMappable(norm=drawn.norm, cmap=colours)
    return _colour_bar(figure, ax, scale, label)
