"""Where the points of one object lie on another of its category: known, not estimated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashmaps.arguments import whole
from flashmaps.world.anatomy import AXIS
from flashmaps.world.dice import noise_bytes
from flashmaps.world.scene import Scene


@dataclass(frozen=True, eq=False)
class Correspondence:
    """The true place in scene b of every pixel of scene a.

    Args:
        field: [h, w, 2] float64, (x, y) in pixels of b, in its frame or outside; NaN if not valid.
        valid: [h, w] bool, where the pixel of a shows the object.
        visible: [h, w] bool, where that point of the object is seen in b too: ``Scene.shows``.
    """

    field: np.ndarray
    valid: np.ndarray
    visible: np.ndarray


@dataclass(frozen=True, eq=False)
class Points:
    """Points of an object seen in both scenes: (x, y) pixels [n, 2] in each, part labels [n]."""

    source: np.ndarray
    target: np.ndarray
    part: np.ndarray

    def __len__(self) -> int:
        return len(self.part)


def correspondence(
    a: Scene, instance_a: int, b: Scene, instance_b: int, *, mirrored: bool = False
) -> Correspondence:
    """Where each pixel of scene ``a`` that shows object ``instance_a`` lies in scene ``b``.

    Parts keep their identity: a left leg goes to the left leg. ``mirrored`` goes to the other side
    instead, the best that anyone can do who cannot tell left from right; only symmetric categories
    have one. See docs/world.md.

    Raises ValueError if the objects are of two categories, or a mirror image is asked of one that
    has none.
    """
    category = a.category(instance_a)
    if b.category(instance_b) is not category:
        raise ValueError(
            f"instance {instance_a} of the first scene is a {category.name}, instance {instance_b} "
            f"of the second a {b.category(instance_b).name}: they do not correspond"
        )
    if mirrored and not category.symmetric:
        raise ValueError(f"a {category.name} has no mirrored correspondence: it is not symmetric")
    valid = a.mask(instance_a)
    rows, columns = np.nonzero(valid)
    labels = a.part[rows, columns]
    drawing = np.empty((len(rows), 2))
    uv = a.coordinates[rows, columns]
    for label, part in enumerate(category.parts):
        here = labels == label
        drawing[here, 0], drawing[here, 1] = part.from_uv(uv[here, 0], uv[here, 1])
    if mirrored:
        drawing[:, 0] = 2 * AXIS - drawing[:, 0]
        labels = np.array(category.twins, dtype=labels.dtype)[labels]
    points = b.locate(instance_b, labels, drawing)
    field = np.full((*valid.shape, 2), np.nan)
    field[rows, columns] = points
    visible = np.zeros_like(valid)
    visible[rows, columns] = b.shows(points, instance_b, labels)
    return Correspondence(field, valid, visible)


def sample_points(
    a: Scene,
    instance_a: int,
    b: Scene,
    instance_b: int,
    count: int,
    *,
    seed: int = 0,
    even: bool = True,
) -> Points:
    """``count`` pixels of object ``instance_a`` that are seen in both scenes, without repeats.

    Fewer where fewer are seen in both. ``even`` gives every part that has any the same number, as
    nearly as it goes; otherwise pixels are drawn evenly over the area, so that large parts count
    more. The same arguments give the same points on every machine.
    """
    whole("count", count, 1)
    whole("seed", seed, 0)
    found = correspondence(a, instance_a, b, instance_b)
    rows, columns = np.nonzero(found.visible)
    parts = a.part[rows, columns]
    raw = noise_bytes(seed, 8 * len(rows)).view("<u8")
    order = np.lexsort((np.arange(len(rows)), raw))  # a shuffle
    if even:
        # Deal the parts out in turn: rank[i] is how many of its part come before i.
        rank = np.empty(len(rows), dtype=np.intp)
        for label in np.unique(parts):
            members = order[parts[order] == label]
            rank[members] = np.arange(len(members))
        order = np.lexsort((raw, rank))
    chosen = np.sort(order[:count])
    rows, columns = rows[chosen], columns[chosen]
    source = np.stack((columns, rows), axis=1).astype(np.float64)
    return Points(source, found.field[rows, columns], parts[chosen])
