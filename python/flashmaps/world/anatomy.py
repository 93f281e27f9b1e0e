"""What a category is: named parts in a kinematic tree, drawn once, posed in any number of ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from flashmaps.world.dice import Dice, Range, turn
from flashmaps.world.maps import Bend, Matrix, PartMap, product
from flashmaps.world.shapes import Box, Point, Shape

AXIS = 50.0  # symmetric categories are drawn about the line x = AXIS


@dataclass(frozen=True, eq=False)
class Mark:
    """Something painted on a part: an eye, a window, a stripe of feathers."""

    shape: Shape
    paint: str
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Part:
    """One named part of a category, in the category's drawing (100 x 100 units, y down).

    Args:
        name: what people call it; unique in its category.
        shape: its outline.
        joint: the point of the drawing that it turns about, and that sits on its parent.
        parent: the part that carries it; None for the root, which comes first.
        axis: direction in degrees (0 right, 90 down) that it is stretched and bent along.
        swing: articulation, degrees clockwise about the joint.
        curve: bending, as the sideways shift of the far end over the part's reach.
        wave: the same, of third order: an S where it meets ``curve`` with the other sign.
        taper: how much wider the far end gets, relatively.
        length, width, size: proportions; size carries over to the parts it carries.
        layer: parts are drawn in this order, low ones first.
        paint: the role of its colour, see paint.py.
        marks: painted on it, in order.
        keypoints: named points of the drawing on this part.
        alike: parts with the same word here share their proportions (the legs of one animal).
        tone: brightness; below 1 for what lies on the far side.
        twin: the part on the other side, in symmetric categories.
    """

    name: str
    shape: Shape
    joint: Point
    parent: str | None = None
    axis: float = 0.0
    swing: Range = (0.0, 0.0)
    curve: Range = (0.0, 0.0)
    wave: Range = (0.0, 0.0)
    taper: Range = (0.0, 0.0)
    length: Range = (1.0, 1.0)
    width: Range = (1.0, 1.0)
    size: Range = (1.0, 1.0)
    layer: int = 0
    paint: str = "main"
    marks: tuple[Mark, ...] = ()
    keypoints: Mapping[str, Point] = field(default_factory=dict)
    alike: str = ""
    tone: float = 1.0
    twin: str = ""

    @cached_property
    def reach(self) -> tuple[float, float]:
        """Extent of the part along its axis, from the joint."""
        c, s = turn(self.axis)
        cover = self.shape.cover
        l = c * (cover[:, 0] - self.joint[0]) + s * (cover[:, 1] - self.joint[1])
        return float(l.min()), float(l.max())

    def to_uv(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Drawing coordinates to the part's own: (0, 0) to (1, 1) over its box."""
        x0, y0, x1, y1 = self.shape.box
        return (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)

    def from_uv(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part's own coordinates to those of the drawing."""
        x0, y0, x1, y1 = self.shape.box
        return x0 + u * (x1 - x0), y0 + v * (y1 - y0)

    def reflected(self, name: str, parent: str | None = None) -> Part:
        """The same part on the other side of a symmetric category, carried by ``parent``."""
        x, y = self.joint
        return Part(
            name=name,
            shape=self.shape.reflected(AXIS),
            joint=(2 * AXIS - x, y),
            parent=parent or self.parent,
            axis=180 - self.axis,
            swing=(-self.swing[1], -self.swing[0]),
            curve=(-self.curve[1], -self.curve[0]),
            wave=(-self.wave[1], -self.wave[0]),
            taper=self.taper,
            length=self.length,
            width=self.width,
            size=self.size,
            layer=self.layer,
            paint=self.paint,
            marks=tuple(
                Mark(mark.shape.reflected(AXIS), mark.paint, mark.strength) for mark in self.marks
            ),
            keypoints={
                key.replace("left", "right"): (2 * AXIS - px, py)
                for key, (px, py) in self.keypoints.items()
            },
            alike=self.alike,
            tone=self.tone,
            twin=self.name,
        )


@dataclass(frozen=True, eq=False)
class Category:
    """A kind of creature or vehicle.

    ``symmetric`` ones are drawn with a left and a right half; they are never mirrored, see
    docs/world.md. ``rotation`` is how far, in degrees either way, it may be turned at random.
    """

    name: str
    parts: tuple[Part, ...]
    symmetric: bool = False
    rotation: float = 20.0
    ground: bool = True  # it stands on something, and throws its shadow there

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for part in self.parts:
            if part.name in seen or not (part.parent in seen or (not seen and not part.parent)):
                raise ValueError(
                    f"{self.name}: {part.name} comes twice, or before its parent {part.parent}"
                )
            seen.add(part.name)

    @cached_property
    def part_names(self) -> tuple[str, ...]:
        """Names in the order of the part labels."""
        return tuple(part.name for part in self.parts)

    @cached_property
    def keypoint_names(self) -> tuple[str, ...]:
        """Names of all keypoints, part by part."""
        return tuple(name for part in self.parts for name in part.keypoints)

    @cached_property
    def drawing_order(self) -> tuple[int, ...]:
        """Part labels, from the back to the front."""
        return tuple(sorted(range(len(self.parts)), key=lambda n: self.parts[n].layer))

    @cached_property
    def twins(self) -> tuple[int, ...]:
        """For each part the label of its mirror image: itself where it has no twin."""
        index = {name: n for n, name in enumerate(self.part_names)}
        twins = list(range(len(self.parts)))
        for n, part in enumerate(self.parts):
            if part.twin:
                twins[n], twins[index[part.twin]] = index[part.twin], n
        return tuple(twins)

    @cached_property
    def box(self) -> Box:
        """The drawing's rectangle around all parts."""
        x0, y0, x1, y1 = zip(*(part.shape.box for part in self.parts), strict=True)
        return min(x0), min(y0), max(x1), max(y1)


def pose(
    category: Category,
    root: Matrix,
    dice: Dice,
    *,
    articulation: float = 1.0,
    proportions: float = 1.0,
) -> tuple[PartMap, ...]:
    """One map for each part, the root's joint at (0, 0), scaled and turned by ``root``.

    ``articulation`` and ``proportions`` widen (above 1) or narrow (0: none) the ranges that the
    category gives.
    """
    shared: dict[tuple[str, str], float] = {}

    def draw(part: Part, what: str, strength: float, neutral: float, share: bool) -> float:
        low, high = getattr(part, what)
        if low == high:
            return low
        key = (part.alike if share and part.alike else part.name, what)
        if key not in shared:
            shared[key] = dice.near(low, high)
        return neutral + strength * (shared[key] - neutral)

    maps: dict[str, PartMap] = {}
    frames: dict[str, Matrix] = {}  # of each part: drawing directions to image directions
    for part in category.parts:
        length, width, size = (
            draw(part, what, proportions, 1.0, share=True) for what in ("length", "width", "size")
        )
        taper = draw(part, "taper", proportions, 0.0, share=True)
        swing, curve, wave = (
            draw(part, what, articulation, 0.0, share=False) for what in ("swing", "curve", "wave")
        )
        if part.parent is None:
            frame, shift = root, (0.0, 0.0)
        else:
            carrier = maps[part.parent]
            frame, shift = frames[part.parent], carrier.to_image(*part.joint)
            # Where the parent bends, its children turn with it.
            c, s = carrier.axis
            along = c * (part.joint[0] - carrier.joint[0]) + s * (part.joint[1] - carrier.joint[1])
            slope = carrier.bend.slope(along)
            norm = math.sqrt(1 + slope * slope)
            frame = product(frame, (1 / norm, -slope / norm, slope / norm, 1 / norm))
        cosine, sine = turn(swing)
        frame = product(frame, (cosine * size, -sine * size, sine * size, cosine * size))
        frames[part.name] = frame
        c, s = axis = turn(part.axis)
        reach = max(-part.reach[0], part.reach[1])
        bend = Bend(
            along=length,
            across=width,
            taper=taper / reach,
            curve=curve / reach,
            wave=wave / (reach * reach),
            reach=part.reach,
        )
        maps[part.name] = PartMap(part.joint, axis, bend, product(frame, (c, -s, s, c)), shift)
    return tuple(maps.values())
