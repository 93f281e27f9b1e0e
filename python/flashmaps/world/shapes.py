"""Flat shapes, kept as a table of signed distances to their outline.

A shape is made of pieces (splines, polygons, ellipses, limbs) in the drawing of its category, a
square of 100 x 100 units with y pointing down. What is inside a shape is decided by one function,
:meth:`Shape.distance`: bilinear interpolation in a table of signed distances, negative inside. The
table is the definition of the shape, not an approximation of one: every label, mask and edge is
read off it, so they agree with each other everywhere and at every resolution. It costs the same for
any outline, and gives antialiased edges and rounded light for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flashmaps.world.dice import turn

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1

_CELLS = 72  # of a table, along the longer side of the shape
_BLOCK = 4  # cells a side of a block of ``Shape.cover``
_SPAN = 6  # straight pieces between two points of a spline


@dataclass(frozen=True)
class Polygon:
    """A closed outline of straight edges; inside by the even-odd rule."""

    points: tuple[Point, ...]

    def box(self) -> Box:
        """Smallest box around it."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def reflected(self, about: float) -> Polygon:
        """Its mirror image in the vertical line x = about."""
        return Polygon(tuple((2 * about - x, y) for x, y in self.points))

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance to the outline, negative inside."""
        nearest = np.full(np.broadcast(x, y).shape, np.inf)
        inside = np.zeros(nearest.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(self.points, (*self.points[1:], self.points[0]), strict=True):
            ex, ey = bx - ax, by - ay
            length = ex * ex + ey * ey
            if length == 0:
                continue
            dx, dy = x - ax, y - ay
            along = np.minimum(np.maximum((dx * ex + dy * ey) / length, 0.0), 1.0)
            px, py = dx - along * ex, dy - along * ey
            nearest = np.minimum(nearest, px * px + py * py)
            if ey != 0:
                crosses = ((ay <= y) != (by <= y)) & (dx < dy * (ex / ey))
                inside ^= crosses
        return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


@dataclass(frozen=True)
class Limb:
    """Discs (x, y, radius) in a row and all between them: legs, tails, poles."""

    discs: tuple[tuple[float, float, float], ...]

    def box(self) -> Box:
        """Smallest box around it."""
        return (
            min(x - r for x, _, r in self.discs),
            min(y - r for _, y, r in self.discs),
            max(x + r for x, _, r in self.discs),
            max(y + r for _, y, r in self.discs),
        )

    def reflected(self, about: float) -> Limb:
        """Its mirror image in the vertical line x = about."""
        return Limb(tuple((2 * about - x, y, r) for x, y, r in self.discs))

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Distance to the surface, negative inside (exact where radii are equal)."""
        nearest = np.full(np.broadcast(x, y).shape, np.inf)
        for (ax, ay, ar), (bx, by, br) in zip(self.discs, self.discs[1:], strict=False):
            ex, ey = bx - ax, by - ay
            length = ex * ex + ey * ey
            dx, dy = x - ax, y - ay
            along = np.minimum(np.maximum((dx * ex + dy * ey) / length, 0.0), 1.0)
            px, py = dx - along * ex, dy - along * ey
            nearest = np.minimum(nearest, np.sqrt(px * px + py * py) - (ar + along * (br - ar)))
        return nearest


Piece = Polygon | Limb


def polygon(*points: Point) -> Polygon:
    """Straight edges between points."""
    return Polygon(points)


def spline(*points: Point) -> Polygon:
    """A smooth closed outline through points; a point given twice in a row makes a corner."""
    count = len(points)
    outline = []
    for n in range(count):
        a, b, c, d = (points[(n + k) % count] for k in (-1, 0, 1, 2))
        if b == c:
            continue
        for step in range(_SPAN):
            t = step / _SPAN
            outline.append((_catmull_rom(a[0], b[0], c[0], d[0], t),
                            _catmull_rom(a[1], b[1], c[1], d[1], t)))  # fmt: skip
    return Polygon(tuple(outline))


def _catmull_rom(a: float, b: float, c: float, d: float, t: float) -> float:
    return b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0) -> Polygon:
    """An ellipse about (x, y), turned clockwise by ``angle`` degrees."""
    cosine, sine = turn(angle)
    points = []
    for n in range(48):
        c, s = turn(n * 7.5)
        points.append((x + cosine * rx * c - sine * ry * s, y + sine * rx * c + cosine * ry * s))
    return Polygon(tuple(points))


def box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """A rectangle."""
    return Polygon(((x0, y0), (x1, y0), (x1, y1), (x0, y1)))


def limb(*discs: tuple[float, float, float]) -> Limb:
    """Discs (x, y, radius) in a row and all between them."""
    return Limb(discs)


def ring(x: float, y: float, radius: float, thickness: float) -> Limb:
    """A circle drawn with a pen of this thickness."""
    discs = []
    for n in range(25):
        c, s = turn(n * 15.0)
        discs.append((x + radius * c, y + radius * s, thickness / 2))
    return Limb(tuple(discs))


class Shape:
    """The union of pieces, less the holes, swollen by ``round`` units.

    ``box`` is the drawing rectangle that holds the shape, and ``depth`` how far inside its deepest
    point lies.
    """

    def __init__(self, *pieces: Piece, holes: Iterable[Piece] = (), round: float = 0.0) -> None:
        self.pieces = pieces
        self.holes: tuple[Piece, ...] = tuple(holes)
        self.round = round
        boxes = [piece.box() for piece in pieces]
        self.box: Box = (
            min(b[0] for b in boxes) - round,
            min(b[1] for b in boxes) - round,
            max(b[2] for b in boxes) + round,
            max(b[3] for b in boxes) + round,
        )
        self.cell = max(self.box[2] - self.box[0], self.box[3] - self.box[1]) / _CELLS
        # Two cells of margin, so that the outermost values are outside.
        self._x0, self._y0 = self.box[0] - 2 * self.cell, self.box[1] - 2 * self.cell
        self._columns = int((self.box[2] - self.box[0]) / self.cell) + 6
        self._rows = int((self.box[3] - self.box[1]) / self.cell) + 6

    def reflected(self, about: float) -> Shape:
        """Its mirror image in the vertical line x = about."""
        return Shape(
            *(piece.reflected(about) for piece in self.pieces),
            holes=[piece.reflected(about) for piece in self.holes],
            round=self.round,
        )

    @cached_property
    def _values(self) -> np.ndarray:
        x = (self._x0 + self.cell * np.arange(self._columns))[None, :]
        y = (self._y0 + self.cell * np.arange(self._rows))[:, None]
        values = _union(self.pieces, x, y) - self.round
        if self.holes:
            values = np.maximum(values, -_union(self.holes, x, y))
        return values

    @cached_property
    def _cells(self) -> tuple[np.ndarray, ...]:
        """Per cell a, b, c, d of the bilinear a + b s + c t + d s t."""
        v = self._values
        a, right, below, across = v[:-1, :-1], v[:-1, 1:], v[1:, :-1], v[1:, 1:]
        terms = (a, right - a, below - a, across - right - below + a)
        return tuple(np.ascontiguousarray(term).ravel() for term in terms)

    @cached_property
    def depth(self) -> float:
        """Distance from the outline to the deepest point inside."""
        return float(-self._values.min())

    @cached_property
    def cover(self) -> np.ndarray:
        """[n, 2] points around all that is inside: corners of the outermost blocks."""
        # A cell can hold inside points only if one of its corners is inside. Blocks, because few
        # points are fast to map, and no part bends so much that it bulges out between them.
        blocks = np.zeros((self._rows // _BLOCK + 3, self._columns // _BLOCK + 3), dtype=bool)
        rows, columns = np.nonzero(self._values <= 0)
        for down in (-1, 0):
            for right in (-1, 0):
                blocks[(rows + down) // _BLOCK + 1, (columns + right) // _BLOCK + 1] = True
        corners = np.zeros((blocks.shape[0] + 1, blocks.shape[1] + 1), dtype=np.int8)
        for down in (0, 1):
            for right in (0, 1):
                corners[down : down + blocks.shape[0], right : right + blocks.shape[1]] += blocks
        rows, columns = np.nonzero((corners > 0) & (corners < 4))
        step = _BLOCK * self.cell
        return np.stack((self._x0 + step * (columns - 1), self._y0 + step * (rows - 1)), axis=1)

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance in drawing units, negative inside; x and y are arrays of one shape."""
        index, s, t = self._locate(x, y)
        a, b, c, d = (term.take(index) for term in self._cells)
        return a + s * b + t * (c + s * d)

    def distance_and_slope(
        self, x: np.ndarray, y: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distance, bit for bit that of :meth:`distance`, and its derivatives by x and y."""
        index, s, t = self._locate(x, y)
        a, b, c, d = (term.take(index) for term in self._cells)
        across = c + s * d
        return a + s * b + t * across, (b + t * d) / self.cell, across / self.cell

    def _locate(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Beyond the table its edge goes on, which is outside.
        s = np.minimum(np.maximum((x - self._x0) / self.cell, 0.0), self._columns - 1.5)
        t = np.minimum(np.maximum((y - self._y0) / self.cell, 0.0), self._rows - 1.5)
        column, row = s.astype(np.intp), t.astype(np.intp)
        return row * (self._columns - 1) + column, s - column, t - row


def _union(pieces: Sequence[Piece], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    nearest = pieces[0].distance(x, y)
    for piece in pieces[1:]:
        nearest = np.minimum(nearest, piece.distance(x, y))
    return nearest
