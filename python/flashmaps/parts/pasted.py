"""Things pasted over the images of a collection, of which it is known what they hide.

Two to four bars, ellipses, rectangles and blobs, plain, striped, or cut from the collection's own
pictures, some with a light and an outline, about parts drawn by chance. They hide 12 to 62 % of the
object, or as near to that as twelve tries come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmaps.diffusion.images import Image

_TRIES = 12
_LEAST, _MOST = 0.12, 0.62  # shares of the object that are hidden
_HARMONICS = (1, 2, 3, 4)  # of a blob's outline


def pasted(
    image: Image, labels: np.ndarray, others: Sequence[Image], rng: np.random.Generator
) -> tuple[Image, np.ndarray]:
    """(the image [h, w, 3] with things over it, [h, w] bool where they are).

    ``labels`` [h, w]: the part that each pixel shows, -1 for none; without a part nothing is
    pasted. ``others``: pictures that surfaces are cut from.
    """
    on = labels >= 0
    if not on.any():
        return image, np.zeros(labels.shape, dtype=bool)
    rows, columns = np.nonzero(on)
    scale = (np.ptp(rows) + np.ptp(columns) + 2) / 2
    tries = []
    for _ in range(_TRIES):
        picture, covered = image, np.zeros(labels.shape, dtype=bool)
        for _ in range(int(rng.integers(2, 5))):
            y, x = np.nonzero(labels == rng.choice(np.unique(labels[on])))
            at = int(rng.integers(len(y)))
            middle = np.array((x[at], y[at])) + rng.normal(0, 0.05 * scale, 2)
            shape = _shape(labels.shape, middle, scale, rng)
            picture = _painted(picture, shape, others, middle, scale, rng)
            covered |= shape
        share = float(covered[on].mean())
        tries.append((max(_LEAST - share, share - _MOST, 0.0), picture, covered))
        if tries[-1][0] == 0:
            break
    _, picture, covered = min(tries, key=lambda each: each[0])
    return picture, covered


def _shape(
    size: tuple[int, ...], middle: np.ndarray, scale: float, rng: np.random.Generator
) -> np.ndarray:  # [h, w] bool
    rows, columns = np.indices(size[:2])
    x, y = columns - middle[0], rows - middle[1]
    kind = rng.random()
    if kind < 0.3:  # a bar across the picture
        angle = rng.choice((0, np.pi / 2)) + rng.uniform(-0.35, 0.35)
        return np.asarray(
            abs(np.cos(angle) * y - np.sin(angle) * x) < scale * rng.uniform(0.05, 0.08)
        )
    angle, side = rng.uniform(0, np.pi), scale * rng.uniform(0.125, 0.25)
    a, b = side * rng.uniform(0.6, 1.3, 2)
    u = (np.cos(angle) * x + np.sin(angle) * y) / a
    v = (np.cos(angle) * y - np.sin(angle) * x) / b
    if kind < 0.5:
        return np.asarray(u * u + v * v < 1)
    if kind < 0.7:
        return np.asarray((abs(u) < 0.9) & (abs(v) < 0.8))
    turn, radius = np.arctan2(v, u), np.ones(size[:2])
    for k in _HARMONICS:
        radius += rng.normal(0, 0.22 / k**0.5) * np.cos(k * turn + rng.uniform(0, 2 * np.pi))
    return np.asarray(np.hypot(u, v) < radius.clip(0.35))


def _painted(
    image: Image, shape: np.ndarray, others: Sequence[Image], middle: np.ndarray, scale: float,
    rng: np.random.Generator,
) -> Image:  # fmt: skip
    from scipy.ndimage import distance_transform_edt

    rows, columns = np.indices(shape.shape)
    colours, kind = rng.random((2, 3)), rng.random()
    if kind < 0.3:
        surface = np.broadcast_to(colours[0], image.shape)
    elif kind < 0.65:
        waves = [rng.normal(0, 0.6, 2) for _ in range(1 + int(rng.random() < 0.4))]
        amount = np.prod([np.sin(a * columns + b * rows) for a, b in waves], 0)
        if rng.random() < 0.5:
            amount = (4 * amount).clip(-1, 1)
        mixed = (amount[..., None] + 1) / 2 * rng.uniform(0.3, 1)
        surface = colours[0] + mixed * (colours[1] - colours[0])
    else:
        other = others[int(rng.integers(len(others)))]
        moved = np.roll(other, tuple(rng.integers(0, shape.shape)), (0, 1))[
            :, :: rng.choice((1, -1))
        ]
        surface = moved[..., rng.permutation(3)] if rng.random() < 0.5 else moved
        surface = surface * rng.uniform(0.6, 1.2) + rng.uniform(-0.15, 0.15)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (columns - middle[0]) + np.sin(angle) * (rows - middle[1])
    surface = surface * (1 + rng.uniform(0, 0.3) * along / scale)[..., None]
    if rng.random() < 0.7:
        rim = distance_transform_edt(shape) <= rng.uniform(0.8, 2.2)
        surface = np.where(rim[..., None], surface * rng.uniform(0.25, 0.9), surface)
    return np.where(shape[..., None], surface, image).clip(0, 1).astype(np.float32)
