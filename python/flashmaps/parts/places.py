"""Where a part that is not seen must be, told by those that are: the collection's own geometry.

Each image of the collection that shows them says where it has the missing part, carried over by the
similarity (with or without a mirror) that brings its own parts nearest to those that are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_NEAREST = 3  # images of the collection whose answers are averaged


def middles(labels: np.ndarray, count: int) -> np.ndarray:  # [P, 2]
    """(x, y) of the middle of each part in labels [h, w], in the unit square; NaN: not shown."""
    height, width = labels.shape
    out = np.full((count, 2), np.nan)
    for part in range(count):
        rows, columns = np.nonzero(labels == part)
        if len(rows):
            out[part] = (columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height
    return out


def expected_places(
    masks: np.ndarray, seen: np.ndarray, collection: Sequence[np.ndarray]
) -> np.ndarray:  # [P, 2]
    """The middle of each part in the unit square: of its mask where it is ``seen`` [P], else told.

    masks: [P, h, w]. collection: labels [h, w] of each image. NaN where nothing says.
    """
    count, height, width = masks.shape
    x = (np.arange(width) + 0.5) / width
    y = (np.arange(height) + 0.5) / height
    out = np.full((count, 2), np.nan)
    for part in np.flatnonzero(seen):
        weight = masks[part] ** 2  # the surest cells count most
        total = max(float(weight.sum()), 1e-12)
        out[part] = (weight.sum(0) @ x) / total, (weight.sum(1) @ y) / total
    if seen.all() or not seen.any():
        return out
    told: list[tuple[float, np.ndarray]] = []
    for labels in collection:
        theirs = middles(labels, count)
        common = seen & ~np.isnan(theirs[:, 0])
        if not common.any():
            continue
        move, error = similarity(theirs[common], out[common])
        told.append((error + 0.1 * float((seen & ~common).sum()), move(theirs)))
    told.sort(key=lambda each: each[0])
    for part in np.flatnonzero(~seen):
        known = [p[part] for _, p in told if not np.isnan(p[part, 0])][:_NEAREST]
        if known:
            out[part] = np.mean(known, 0)
    return out


def similarity(a: np.ndarray, b: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """(the map of points [n, 2], its root mean square error): turn, scale, shift, maybe mirror.

    Least squares over z -> u z + v of complex numbers, or of their conjugates, whichever is nearer;
    of a single point a shift.
    """
    z, w = a[:, 0] + 1j * a[:, 1], b[:, 0] + 1j * b[:, 1]
    fits = []
    for mirrored in (False, True):
        source = z.conj() if mirrored else z
        mean, to = source.mean(), w.mean()
        spread = float((np.abs(source - mean) ** 2).sum())
        u = ((source - mean).conj() @ (w - to)) / spread if spread > 1e-12 else 1.0 + 0j
        error = float(np.sqrt((np.abs(u * (source - mean) + to - w) ** 2).mean()))
        fits.append((error, mirrored, u, mean, to))
    # Of two points a mirror is as good as none: it has to be better.
    error, mirrored, u, mean, to = fits[1] if fits[1][0] < fits[0][0] - 1e-9 else fits[0]

    def move(points: np.ndarray) -> np.ndarray:
        p = points[:, 0] + 1j * points[:, 1]
        q = u * ((p.conj() if mirrored else p) - mean) + to
        return np.stack((q.real, q.imag), -1)

    return move, error
