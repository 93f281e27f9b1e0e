"""A split of `flashmaps.world`: drawn objects of one category in two scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashmaps.evaluation.benchmark import Pair, draw

if TYPE_CHECKING:
    from flashmaps.world import Correspondence

SIDE = 256  # pixels


class Worlds:
    """``pairs`` pairs of scenes, ``points`` pixels of the object in common that the source shows.

    With ``hidden=False`` the points are drawn among those that the target shows too.

    A pixel whose place on the other object is covered there, or out of the frame, has no match.
    Parts keep their identity: a left wing belongs to a left wing. What goes to the other side of a
    symmetric object is counted apart (``Pair.mirrored_points``). The box that PCK is of is around
    all of the target object, seen or not.
    """

    name = "world"
    base = "the longer side of the target object's box"
    unit = "pairs"
    headline = 0.1

    def __init__(
        self,
        pairs: int = 50,
        points: int = 256,
        seed: int = 0,
        side: int = SIDE,
        *,
        split: str = "test",
        hidden: bool = True,
    ) -> None:
        from flashmaps import world

        self._pairs = world.pairs(split, pairs, seed=seed, size=side)
        self._points, self._seed, self._hidden = points, seed, hidden
        self.what = (
            f"drawn creatures and vehicles in scenes with other objects and occluders, {side} "
            f"pixels a side, categories in turn: the {split} split of flashmaps.world"
            + ("" if hidden else f"; {points} points of each that both scenes show")
        )

    def __len__(self) -> int:
        """How many pairs."""
        return len(self._pairs)

    def pair(self, index: int) -> Pair:
        """Pair ``index`` of the world's split."""
        from flashmaps import world

        found = self._pairs[index]
        objects = (found.a, found.instance_a, found.b, found.instance_b)
        true = world.correspondence(*objects)
        rows, columns = np.nonzero(true.valid if self._hidden else true.visible)
        rng = np.random.default_rng([self._seed, index])
        chosen = draw(rng, self._points, len(rows))
        rows, columns = rows[chosen], columns[chosen]
        mirrored = None
        if found.a.category(found.instance_a).symmetric:
            mirrored = _seen(world.correspondence(*objects, mirrored=True), rows, columns)
        left, top, right, bottom = found.b.instances[found.instance_b].box
        return Pair(
            category=found.category,
            source=f"{index} a",
            target=f"{index} b",
            source_image=found.a.image.astype(np.float32) / 255,
            target_image=found.b.image.astype(np.float32) / 255,
            source_points=np.stack((columns, rows), axis=1).astype(float),
            target_points=_seen(true, rows, columns),
            base=float(max(right - left, bottom - top)),
            mirrored_points=mirrored,
        )


def _seen(true: Correspondence, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[n, 2] places in the target; NaN where they are not seen there."""
    places = true.field[rows, columns].copy()
    places[~true.visible[rows, columns]] = np.nan
    return places
