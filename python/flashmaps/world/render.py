"""From a plan to pixels: colours, labels and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flashmaps.world.anatomy import Mark
from flashmaps.world.categories import CATEGORIES
from flashmaps.world.colours import Colour
from flashmaps.world.dice import noise_bytes
from flashmaps.world.maps import PartMap
from flashmaps.world.plan import Flat, Light, Plan, Thing
from flashmaps.world.shapes import Shape
from flashmaps.world.textures import Texture

_RIM = 11.0  # drawing units from the outline within which surfaces curve

Window = tuple[slice, slice]  # rows, columns


@dataclass
class Patch:
    """The pixels around one shape: which drawing points they show, and how far from its edge."""

    window: Window
    x: np.ndarray  # [h, w] drawing coordinates
    y: np.ndarray
    distance: np.ndarray  # drawing units, negative inside
    slope_x: np.ndarray
    slope_y: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """[h, w] whether the pixel's centre lies in the shape."""
        return self.distance <= 0


def window_of(shape: Shape, map: PartMap, size: int) -> Window | None:
    """Rows and columns of all pixels whose centre can lie in the shape; None if there are none."""
    x0, y0, x1, y1 = map.box(shape.cover)
    # A pixel more on each side: for antialiased edges, and for bends between the points of cover.
    columns = max(math.floor(x0 * size - 0.5), 0), min(math.ceil(x1 * size + 1.5), size)
    rows = max(math.floor(y0 * size - 0.5), 0), min(math.ceil(y1 * size + 1.5), size)
    if columns[0] >= columns[1] or rows[0] >= rows[1]:
        return None
    return slice(*rows), slice(*columns)


def cut(shape: Shape, map: PartMap, size: int) -> Patch | None:
    """The patch of one shape in an image of ``size`` pixels a side."""
    window = window_of(shape, map, size)
    if window is None:
        return None
    x, y = map.to_drawing(*_centres(window, size))
    return Patch(window, x, y, *shape.distance_and_slope(x, y))


def mark_inside(mask: np.ndarray, shape: Shape, map: PartMap) -> None:
    """Set the pixels of a square mask whose centre lies in the shape."""
    window = window_of(shape, map, len(mask))
    if window is not None:
        x, y = map.to_drawing(*_centres(window, len(mask)))
        mask[window] |= shape.distance(x, y) <= 0


def _centres(window: Window, size: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = window
    x = (np.arange(columns.start, columns.stop) + 0.5)[None, :] / size
    y = (np.arange(rows.start, rows.stop) + 0.5)[:, None] / size
    return x, y


def thing_patches(thing: Thing, size: int) -> Iterator[tuple[int, Patch]]:
    """(part label, patch) of each part of an object, from the back to the front."""
    category = CATEGORIES[thing.category]
    for label in category.drawing_order:
        patch = cut(category.parts[label].shape, thing.maps[label], size)
        if patch is not None:
            yield label, patch


def paint(plan: Plan, size: int, patches: list[list[tuple[int, Patch]]]) -> np.ndarray:
    """The image [size, size, 3] uint8; ``patches`` are those of each thing."""
    canvas = plan.background.paint(size)
    light = plan.light
    for flat in plan.clutter:
        _paint_flat(canvas, flat, light, size)
    for thing, its_patches in zip(plan.things, patches, strict=True):
        _paint_thing(canvas, thing, its_patches, light, size)
    for flat in plan.occluders:
        _paint_flat(canvas, flat, light, size)
    canvas *= np.array(light.tint)[:, None, None] * 255
    if light.grain:
        raw = noise_bytes(plan.grain_seed, 6 * size * size).reshape(2, 3, size, size)
        canvas += (raw[0].astype(np.int16) - raw[1]) * light.grain
    image = np.floor(np.minimum(np.maximum(canvas + 0.5, 0.0), 255.0)).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0))


class _Edge:
    """What the distance and its slope say about a patch's pixels: cover, depth, normals."""

    def __init__(self, patch: Patch, map: PartMap, size: int) -> None:
        a, b, c, d = map.slopes()
        nx = patch.slope_x * a + patch.slope_y * c
        ny = patch.slope_x * b + patch.slope_y * d
        norm = 1 / np.sqrt(nx * nx + ny * ny + 1e-12)
        self.pixels = patch.distance * norm * size  # from the outline
        self.alpha = np.minimum(np.maximum(0.5 - self.pixels, 0.0), 1.0)
        self.nx, self.ny = nx * norm, ny * norm


def _paint_thing(
    canvas: np.ndarray, thing: Thing, patches: list[tuple[int, Patch]], light: Light, size: int
) -> None:
    category = CATEGORIES[thing.category]
    edges = [_Edge(patch, thing.maps[label], size) for label, patch in patches]
    if light.shadow:
        _paint_shadow(canvas, thing, patches, edges, light, size, category.ground)
    roles = thing.palette.roles
    for (label, patch), edge in zip(patches, edges, strict=True):
        part, map = category.parts[label], thing.maps[label]
        textured = part.paint in ("main", "limbs", "sail")
        colour = _surface(
            patch, roles[part.paint], roles["second"], thing.texture if textured else None, map,
            size,
        )  # fmt: skip
        for mark in part.marks:
            _paint_mark(colour, mark, roles[mark.paint], patch, map, size)
        _finish(canvas, colour, patch, edge, light, size, part.shape.depth, part.tone, thing.box)


def _paint_flat(canvas: np.ndarray, flat: Flat, light: Light, size: int) -> None:
    patch = cut(flat.shape, flat.map, size)
    if patch is None:
        return
    edge = _Edge(patch, flat.map, size)
    colour = _surface(patch, flat.colour, flat.second, flat.texture, flat.map, size)
    x0, y0, x1, y1 = flat.map.box(flat.shape.cover)
    _finish(canvas, colour, patch, edge, light, size, flat.shape.depth, 1.0, (x0, y0, x1, y1))


def _surface(
    patch: Patch, first: Colour, second: Colour, texture: Texture | None, map: PartMap, size: int
) -> np.ndarray:
    """Colours of a surface before light, [3, h, w]."""
    base = np.array(first)[:, None, None]
    amount = None
    if texture is not None:
        amount = texture.amount(patch.x, patch.y, 1 / (size * map.scale()))
    if amount is None:
        return np.repeat(np.repeat(base, patch.x.shape[0], axis=1), patch.x.shape[1], axis=2)
    return base + amount * (np.array(second)[:, None, None] - base)


def _paint_mark(
    colour: np.ndarray, mark: Mark, paint: Colour, patch: Patch, map: PartMap, size: int
) -> None:
    window = window_of(mark.shape, map, size)
    if window is None:
        return
    rows, columns = (
        slice(max(own.start - all_.start, 0), max(min(own.stop, all_.stop) - all_.start, 0))
        for own, all_ in zip(window, patch.window, strict=True)
    )
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    distance = mark.shape.distance(patch.x[rows, columns], patch.y[rows, columns])
    alpha = np.minimum(np.maximum(0.5 - distance * (map.scale() * size), 0.0), mark.strength)
    there = colour[:, rows, columns]
    there += alpha * (np.array(paint)[:, None, None] - there)


def _finish(
    canvas: np.ndarray,
    colour: np.ndarray,
    patch: Patch,
    edge: _Edge,
    light: Light,
    size: int,
    depth: float,
    tone: float,
    around: tuple[float, float, float, float],
) -> None:
    """Light, outline, and onto the canvas."""
    rows, columns = patch.window
    lx, ly = light.direction
    # Rounded at the rim: brighter where the outline faces the light.
    rim = np.minimum(np.maximum(1 + patch.distance / min(depth, _RIM), 0.0), 1.0)
    shade = tone + (light.relief * tone) * (rim * rim) * (edge.nx * lx + edge.ny * ly)
    # And brighter on the whole towards it.
    extent = max(around[2] - around[0], around[3] - around[1], 1e-6)
    x = (np.arange(columns.start, columns.stop) + 0.5) / size - (around[0] + around[2]) / 2
    y = (np.arange(rows.start, rows.stop) + 0.5) / size - (around[1] + around[3]) / 2
    shade += (light.slope * tone / extent) * ((x * lx)[None, :] + (y * ly)[:, None])
    width = 0.4 + 0.012 * size * extent
    shade *= 1 - light.outline * np.minimum(np.maximum(edge.pixels + width, 0.0), 1.0)
    colour *= shade
    there = canvas[:, rows, columns]
    there += edge.alpha * (np.minimum(colour, 1.0) - there)


def _paint_shadow(
    canvas: np.ndarray,
    thing: Thing,
    patches: list[tuple[int, Patch]],
    edges: list[_Edge],
    light: Light,
    size: int,
    ground: bool,
) -> None:
    x0, y0, x1, y1 = thing.box
    if ground:  # a soft ellipse underneath
        rx, ry = 0.55 * (x1 - x0), 0.09 * (x1 - x0)
        steps = (np.arange(size) + 0.5) / size
        x = (steps - (x0 + x1) / 2 + 0.05 * light.direction[0]) / rx
        y = (steps - y1 + 0.25 * ry) / ry
        inside_x, inside_y = x * x < 1, y * y < 1
        x, y = x[inside_x], y[inside_y]
        dark = np.maximum(1 - (x * x)[None, :] - (y * y)[:, None], 0.0)
        canvas[:, np.flatnonzero(inside_y)[:, None], np.flatnonzero(inside_x)] *= (
            1 - 1.3 * light.shadow * dark
        )
        return
    # Cast on the wall behind: the silhouette, moved away from the light.
    shadow = np.zeros(canvas.shape[1:])
    move = 0.06 * max(x1 - x0, y1 - y0) * size
    dx, dy = (-math.floor(move * part + 0.5) for part in light.direction)
    for (_, patch), edge in zip(patches, edges, strict=True):
        rows, columns = patch.window
        top, left = max(rows.start + dy, 0), max(columns.start + dx, 0)
        bottom, right = min(rows.stop + dy, size), min(columns.stop + dx, size)
        if top < bottom and left < right:
            part = edge.alpha[top - rows.start - dy : bottom - rows.start - dy,
                              left - columns.start - dx : right - columns.start - dx]  # fmt: skip
            there = shadow[top:bottom, left:right]
            np.maximum(there, part, out=there)
    canvas *= 1 - light.shadow * shadow
