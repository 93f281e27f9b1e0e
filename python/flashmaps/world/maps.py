"""From a part's place in the drawing to its place in the image, and exactly back.

A part is bent, stretched and tapered along its own axis, then turned, skewed and moved. With the
drawing's point p, the joint o and the unit axis a (b is a turned clockwise by 90 degrees):

    l = a.(p - o),  w = b.(p - o)                             along and across the limb
    l' = s_l l,     w' = s_w w (1 + k l) + (c_2 + c_3 l) l^2  stretched, tapered, bent
    image = N (l', w') + t                                    turned, skewed, scaled, moved

Each line has an inverse in closed form, so the drawing's point that any image point shows is known
to rounding error (about 1e-13 units), and nothing is ever searched for or interpolated. Images are
the unit square here; a pixel (column, row) of a side of n pixels has its centre at
((column + 0.5) / n, (row + 0.5) / n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from flashmaps.world.shapes import Box, Point

Matrix = tuple[float, float, float, float]  # a, b, c, d of [[a, b], [c, d]]
Number = TypeVar("Number", float, np.ndarray)


def product(m: Matrix, n: Matrix) -> Matrix:
    """The matrix m n."""
    return (
        m[0] * n[0] + m[1] * n[2],
        m[0] * n[1] + m[1] * n[3],
        m[2] * n[0] + m[3] * n[2],
        m[2] * n[1] + m[3] * n[3],
    )


def inverse(m: Matrix) -> Matrix:
    """The inverse matrix."""
    determinant = m[0] * m[3] - m[1] * m[2]
    return m[3] / determinant, -m[1] / determinant, -m[2] / determinant, m[0] / determinant


@dataclass(frozen=True)
class Bend:
    """What a part's own shape goes through, along its axis: see the top of this file."""

    along: float = 1.0  # s_l
    across: float = 1.0  # s_w
    taper: float = 0.0  # k, per unit of l
    curve: float = 0.0  # c_2
    wave: float = 0.0  # c_3
    reach: tuple[float, float] = (-100.0, 100.0)  # l beyond which the taper stays as it is

    def forward(self, l: Number, w: Number) -> tuple[Number, Number]:
        """(l, w) to (l', w')."""
        return l * self.along, w * self._width(l) + (self.curve + self.wave * l) * (l * l)

    def backward(self, l: Number, w: Number) -> tuple[Number, Number]:
        """(l', w') to (l, w)."""
        l = l / self.along
        return l, (w - (self.curve + self.wave * l) * (l * l)) / self._width(l)

    def _width(self, l: Number) -> Number:
        if self.taper == 0:
            return l * 0.0 + self.across
        low, high = self.reach
        if isinstance(l, np.ndarray):
            inner = np.minimum(np.maximum(l, low), high)
        else:
            inner = min(max(l, low), high)
        return self.across * (1.0 + self.taper * inner)

    def slope(self, l: float) -> float:
        """dw' / dl' on the axis: where a child of the part turns to."""
        return (2 * self.curve + 3 * self.wave * l) * l / self.along


@dataclass(frozen=True)
class PartMap:
    """Drawing to image and back, for one part of one object. All methods take floats or arrays."""

    joint: Point
    axis: tuple[float, float]  # cos and sin of the limb's direction in the drawing
    bend: Bend
    matrix: Matrix  # N
    shift: Point  # t

    def to_image(self, x: Number, y: Number) -> tuple[Number, Number]:
        """Where the image shows the drawing's point (x, y); in units of the image's side."""
        (jx, jy), (c, s), (na, nb, nc, nd) = self.joint, self.axis, self.matrix
        dx, dy = x - jx, y - jy
        l, w = self.bend.forward(c * dx + s * dy, c * dy - s * dx)
        return na * l + nb * w + self.shift[0], nc * l + nd * w + self.shift[1]

    def to_drawing(self, x: Number, y: Number) -> tuple[Number, Number]:
        """The drawing's point that lies at (x, y) of the image; x and y may broadcast."""
        (jx, jy), (c, s) = self.joint, self.axis
        na, nb, nc, nd = inverse(self.matrix)
        dx, dy = x - self.shift[0], y - self.shift[1]
        l, w = self.bend.backward(na * dx + nb * dy, nc * dx + nd * dy)
        return jx + (c * l - s * w), jy + (s * l + c * w)

    def slopes(self) -> Matrix:
        """d drawing / d image of the affine part, for light and edges (where exactness is idle)."""
        (c, s), (na, nb, nc, nd) = self.axis, inverse(self.matrix)
        along, across = self.bend.along, self.bend.across
        return product((c, -s, s, c), (na / along, nb / along, nc / across, nd / across))

    def scale(self) -> float:
        """Image sides per drawing unit: the square root of the map's area factor."""
        a, b, c, d = self.slopes()
        return 1 / math.sqrt(abs(a * d - b * c))

    def box(self, cover: np.ndarray) -> Box:
        """The image rectangle around these points of the drawing, [n, 2]."""
        x, y = self.to_image(cover[:, 0], cover[:, 1])
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())

    def placed(self, scale: float, shift: Point) -> PartMap:
        """This map, then scale, then shift."""
        a, b, c, d = self.matrix
        return PartMap(
            self.joint,
            self.axis,
            self.bend,
            (a * scale, b * scale, c * scale, d * scale),
            (self.shift[0] * scale + shift[0], self.shift[1] * scale + shift[1]),
        )
