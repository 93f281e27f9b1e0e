"""What is behind the objects: plain, patterned and noisy walls, and places with a horizon."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashmaps.world.colours import COLOURS, Colour, brightness, mixed, sample_colour
from flashmaps.world.dice import Dice, turn
from flashmaps.world.textures import TEXTURES, Texture, noise_grid, sample_texture

_PLACES: dict[str, tuple[Colour, Colour, float]] = {  # ground, its other colour, size of its noise
    "grass": ((0.42, 0.66, 0.28), (0.30, 0.52, 0.22), 30),
    "sand": ((0.91, 0.81, 0.58), (0.82, 0.70, 0.47), 24),
    "snow": ((0.94, 0.96, 0.98), (0.82, 0.88, 0.95), 10),
    "water": ((0.22, 0.52, 0.70), (0.38, 0.68, 0.80), 18),
    "road": ((0.46, 0.46, 0.48), (0.38, 0.38, 0.41), 40),
}
WALLS = ("plain", "gradient", "noisy", *TEXTURES[1:])
BACKGROUNDS = (*WALLS, *_PLACES)


@dataclass(frozen=True)
class Background:
    """A background of one kind; ``colour`` is the name of its main colour, "" for places."""

    kind: str
    colour: str
    first: Colour
    second: Colour
    sky: tuple[Colour, Colour]
    texture: Texture
    direction: tuple[float, float]
    horizon: float
    features: float
    offset: tuple[float, float]

    @property
    def words(self) -> str:
        """As the end of a caption."""
        if self.kind in _PLACES:
            return f"on a {self.kind}" if self.kind == "road" else f"on {self.kind}"
        if self.kind in ("plain", "gradient"):
            return f"on a {self.colour} background"
        return f"on a {self.kind} {self.colour} background"

    def paint(self, size: int) -> np.ndarray:
        """Colours, [3, size, size]."""
        steps = (np.arange(size) + 0.5) / size
        first, second = (np.array(c)[:, None, None] for c in (self.first, self.second))
        if self.kind in _PLACES:
            return self._place(steps, size, first, second)
        if self.kind in ("plain", "gradient"):
            c, s = self.direction
            ramp = (c * (steps - 0.5))[None, :] + (s * (steps - 0.5))[:, None] + 0.5
            return first + np.minimum(np.maximum(ramp, 0.0), 1.0) * (second - first)
        if self.kind == "noisy":
            n = noise_grid(size, self.features, self.offset)
            n = 0.6 * n + 0.4 * noise_grid(size, 2.7 * self.features, self.offset)
            n = np.minimum(np.maximum(1.8 * n - 0.4, 0.0), 1.0)
            return first + n * (second - first)
        x, y = np.broadcast_arrays(100 * steps[None, :], 100 * steps[:, None])
        amount = self.texture.amount(x, y, 100 / size)
        assert amount is not None
        return first + amount * (second - first)

    def _place(
        self, steps: np.ndarray, size: int, first: np.ndarray, second: np.ndarray
    ) -> np.ndarray:
        horizon = self.horizon
        n = 0.5 * noise_grid(size, 0.4 * self.features, self.offset[::-1])
        n = n + 0.5 * noise_grid(size, self.features, self.offset)
        ground = first + n * (second - first)
        # Lighter towards the horizon, where there is air between.
        depth = np.minimum(np.maximum((steps - horizon) / (1 - horizon), 0.0), 1.0)[:, None]
        top, bottom = (np.array(colour)[:, None, None] for colour in self.sky)
        ground = ground + (1 - depth) * 0.3 * (bottom - ground)
        rise = np.minimum(steps / max(horizon, 0.05), 1.0)[:, None]
        sky = top + rise * (bottom - top)
        clouds = noise_grid(size, 5.0, self.offset[::-1])
        clouds = np.minimum(np.maximum(2.4 * clouds - 1.4, 0.0), 1.0) * (1 - rise)
        sky = sky + 0.8 * clouds * (1.0 - sky)
        edge = np.minimum(np.maximum((steps - horizon) * size + 0.5, 0.0), 1.0)[:, None]
        return sky + edge * (ground - sky)


def sample_background(dice: Dice, kind: str, avoid: str) -> Background:
    """A background of this kind, whose main colour is not ``avoid`` (that of an object)."""
    name = dice.pick([name for name in COLOURS if name != avoid])
    first = sample_colour(name, dice)
    tone = (1.0, 1.0, 1.0) if brightness(first) < 0.6 or dice.chance(0.5) else (0.1, 0.1, 0.15)
    if kind == "plain":
        second = mixed(first, tone, dice.between(0.0, 0.15))
    elif kind == "gradient":
        second = mixed(first, tone, dice.between(0.3, 0.6))
    else:
        second = mixed(first, tone, dice.between(0.2, 0.4))
    features = dice.between(3, 12)
    if kind in _PLACES:
        name = ""
        first, second, features = _PLACES[kind]
        shade = dice.between(0.0, 0.2)
        first, second = mixed(first, (0.2, 0.2, 0.2), shade), mixed(second, (0.2, 0.2, 0.2), shade)
    blue = mixed((0.42, 0.66, 0.92), (1.0, 0.75, 0.55), dice.pick((0.0, 0.0, 0.7)))
    return Background(
        kind=kind,
        colour=name,
        first=first,
        second=second,
        sky=(blue, mixed(blue, (1.0, 1.0, 1.0), dice.between(0.4, 0.7))),
        texture=sample_texture(dice, kind if kind in TEXTURES else "plain"),
        direction=turn(dice.between(0, 360)),
        horizon=dice.between(-0.1, 0.65),
        features=features,
        offset=(dice.between(0, 64), dice.between(0, 64)),
    )
