"""Patterns that lie on surfaces: how much of the second colour each drawing point has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from flashmaps.world.dice import Dice, noise_bytes, turn

TEXTURES = ("plain", "striped", "spotted", "checked", "patchy")

_TILE = 64  # side of the noise tile; a power of two


@dataclass(frozen=True)
class Texture:
    """A pattern of period ``period`` drawing units, turned and moved.

    About ``share`` of the surface has the second colour: less than half, since captions name the
    first.
    """

    kind: str
    period: float = 12.0
    direction: tuple[float, float] = (1.0, 0.0)
    offset: tuple[float, float] = (0.0, 0.0)
    share: float = 0.5
    strength: float = 1.0

    def amount(self, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray | None:
        """Share of the second colour at points (x, y), whose pixels are ``pixel`` units wide.

        None for plain surfaces.
        """
        if self.kind == "plain":
            return None
        c, s = (part / self.period for part in self.direction)
        p = x * c + y * s + self.offset[0]
        # Edges as wide as a pixel, so that the pattern is antialiased like everything else.
        sharp = self.period / max(pixel, self.period / 40)
        if self.kind == "striped":
            p = np.abs(p - np.floor(p) - 0.5)
            return _step(self.share / 2 - p, sharp) * self.strength
        q = y * c - x * s + self.offset[1]
        if self.kind == "checked":
            p = _step(self.share / 2 - np.abs(p - np.floor(p) - 0.5), sharp)
            q = _step(self.share / 2 - np.abs(q - np.floor(q) - 0.5), sharp)
            return (p + q) * (self.strength / 2)
        if self.kind == "spotted":
            row = np.floor(q)
            p = p + 0.5 * (row - 2 * np.floor(row / 2))  # every other row is shifted
            p, q = p - np.floor(p) - 0.5, q - row - 0.5
            return _step(self.share * 0.78 - np.sqrt(p * p + q * q), sharp) * self.strength
        return _step((noise(p, q) - 0.85 + 0.6 * self.share) * 0.7, sharp) * self.strength


def sample_texture(dice: Dice, kind: str) -> Texture:
    """A pattern of this kind with random size, direction and place."""
    period = {"striped": (9, 18), "spotted": (9, 16), "checked": (12, 22)}.get(kind, (8, 16))
    angle = dice.between(0, 180) if kind != "striped" else dice.pick((0, 90)) + dice.near(-40, 40)
    return Texture(
        kind=kind,
        period=dice.between(*period),
        direction=turn(angle),
        offset=(dice.between(0, _TILE), dice.between(0, _TILE)),
        share=dice.between(0.3, 0.45),
        strength=dice.between(0.75, 1.0),
    )


@cache
def noise_tile() -> np.ndarray:
    """White noise in [0, 1], one row and column repeated: [65, 65]."""
    tile = noise_bytes(20240731, _TILE * _TILE).reshape(_TILE, _TILE) / 255.0
    return np.pad(tile, ((0, 1), (0, 1)), mode="wrap")


def noise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth noise in [0, 1] with features of size 1, at any points."""
    fx, fy = np.floor(x), np.floor(y)
    s, t = x - fx, y - fy
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    column, row = fx.astype(np.intp) & (_TILE - 1), fy.astype(np.intp) & (_TILE - 1)
    index = row * (_TILE + 1) + column
    tile = noise_tile().ravel()
    a, b = tile.take(index), tile.take(index + 1)
    c, d = tile.take(index + _TILE + 1), tile.take(index + _TILE + 2)
    top = a + s * (b - a)
    return top + t * (c + s * (d - c) - top)


def noise_grid(size: int, features: float, offset: tuple[float, float]) -> np.ndarray:
    """Smooth noise [size, size] in [0, 1] with ``features`` of its features along each side."""
    steps = (np.arange(size) + 0.5) * (features / size)

    def along(start: float) -> tuple[np.ndarray, np.ndarray]:
        place = steps + start
        floor = np.floor(place)
        t = place - floor
        return floor.astype(np.intp) & (_TILE - 1), t * t * (3 - 2 * t)

    (row, t), (column, s) = along(offset[1]), along(offset[0])
    tile = noise_tile()
    upper = tile[row]
    lines = upper + t[:, None] * (tile[row + 1] - upper)
    left = lines[:, column]
    return left + s[None, :] * (lines[:, column + 1] - left)


def _step(value: np.ndarray, sharp: float) -> np.ndarray:
    return np.minimum(np.maximum(value * sharp + 0.5, 0.0), 1.0)
