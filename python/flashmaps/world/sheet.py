"""A contact sheet: scenes with their truth, and pairs with lines between true matches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flashmaps.files import whole_file
from flashmaps.world.colours import from_hsv
from flashmaps.world.correspondences import sample_points
from flashmaps.world.scene import Scene
from flashmaps.world.splits import Pair, Pairs, Split

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_GAP = 4
_PAPER = (250, 250, 248)
_INK = (40, 40, 44)
_LINE = 13  # pixels of a line of text
_CAPTION_LINES = 3
_GOLDEN = 0.618034  # multiples of it, modulo 1, keep apart
_ROWS = ("image", "parts", "coordinates", "objects", "keypoints")

LARGEST = 2**27  # pixels of a sheet
_WRITER = "Software", "flashmaps"  # a sheet says who drew it


def contact_sheet(split: Split, count: int, pairs: Pairs | None = None, columns: int = 8) -> Image:
    """The first ``count`` scenes of a split, and pairs of scenes, as one PIL image.

    Under each scene: its parts; where each pixel lies on the object at rest, as colour; its
    objects, hidden parts paler; its keypoints, hollow where they are hidden. Then the pairs, with
    lines between ten points that both scenes show.
    """
    from PIL import Image as Pil
    from PIL import ImageDraw as Draw

    columns = min(columns, count)
    size, margin = split.size, 74
    strip = _CAPTION_LINES * _LINE + len(_ROWS) * (size + _GAP) + 2 * _GAP
    strips = -(-count // columns)
    width = margin + columns * (size + _GAP)
    across = max((width - margin) // (2 * size + 2 * _GAP), 1)
    pair_rows = -(-len(pairs) // across) if pairs else 0
    height = strips * strip + pair_rows * (size + _LINE + 2 * _GAP) + _GAP
    width = max(width, margin + across * (2 * size + 2 * _GAP) if pairs else 0)
    if width * height > LARGEST:
        raise ValueError(
            f"{count} scenes and {len(pairs) if pairs else 0} pairs of {size} pixels make a sheet "
            f"of {width} x {height}; at most {LARGEST} pixels: ask for fewer, or smaller ones"
        )
    sheet = Pil.new("RGB", (width, height), _PAPER)
    draw = Draw.Draw(sheet)
    for n in range(count):
        scene = split[n]
        left = margin + (n % columns) * (size + _GAP)
        top = (n // columns) * strip + _GAP
        _write(draw, scene.caption, left, top, size)
        top += _CAPTION_LINES * _LINE
        for row, (name, tile) in enumerate(zip(_ROWS, _tiles(scene), strict=True)):
            y = top + row * (size + _GAP)
            sheet.paste(Pil.fromarray(tile), (left, y))
            if n % columns == 0:
                draw.text((4, y + size // 2 - 6), name, fill=_INK)
        _draw_keypoints(draw, scene, left, top + (len(_ROWS) - 1) * (size + _GAP))
    for n in range(len(pairs) if pairs else 0):
        assert pairs is not None
        left = margin + (n % across) * (2 * size + 2 * _GAP)
        top = strips * strip + (n // across) * (size + _LINE + 2 * _GAP) + _GAP
        if n % across == 0:
            draw.text((4, top + _LINE + size // 2 - 6), "pairs", fill=_INK)
        _draw_pair(sheet, draw, pairs[n], left, top)
    return sheet


def _check_place(path: Path) -> None:
    """ValueError where a file is in the way that is no sheet: a photograph may be PNG too."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        return
    try:
        with Image.open(path) as there:
            if there.info.get(_WRITER[0]) == _WRITER[1]:
                return
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        pass  # not ours, whatever it is
    raise ValueError(
        f"--out {str(path)!r} is there already, and flashmaps has not written it; give another "
        "name, or delete it"
    )


def write_sheet(path: Path, split: Split, count: int, pairs: Pairs | None = None) -> None:
    """Write a contact sheet as PNG, whole or not at all, in place of nothing but another one."""
    from PIL.PngImagePlugin import PngInfo

    said = PngInfo()
    said.add_text(*_WRITER)
    _check_place(path)
    with whole_file(path) as new:
        contact_sheet(split, count, pairs).save(new, format="PNG", pnginfo=said)


def _tiles(scene: Scene) -> Sequence[np.ndarray]:
    grey = np.repeat(scene.image.mean(axis=2, keepdims=True), 3, axis=2)
    pale = (0.35 * grey + 150).clip(0, 255)
    parts, objects = pale.copy(), pale.copy()
    for each in scene.instances:
        hue = 360 * ((each.index * _GOLDEN) % 1)
        hidden = scene.amodal(each.index) & ~scene.mask(each.index)
        objects[hidden] = 0.35 * 255 * np.array(from_hsv(hue, 0.8, 0.9)) + 0.65 * objects[hidden]
        objects[scene.mask(each.index)] = 255 * np.array(from_hsv(hue, 0.75, 0.85))
        for label, name in enumerate(each.parts):
            colour = from_hsv(360 * ((label * _GOLDEN) % 1), 0.65, 0.95)
            parts[scene.mask(each.index, name)] = 255 * np.array(colour)
    there = scene.instance >= 0
    place = pale.copy()
    x, y = scene.rest[there].T
    place[there] = 255 * np.stack((x, y, 1 - 0.5 * (x + y)), axis=1).clip(0, 1)
    tiles = (parts, place, objects, pale)
    return scene.image, *(np.rint(tile).astype(np.uint8) for tile in tiles)


def _draw_keypoints(draw: ImageDraw, scene: Scene, left: int, top: int) -> None:
    radius = max(scene.size / 50, 1.5)
    for each in scene.instances:
        for n, point in enumerate(scene.keypoints(each.index)):
            if not (0 <= point.x < scene.size and 0 <= point.y < scene.size):
                continue
            x, y = left + point.x, top + point.y
            colour = _bytes(from_hsv(360 * ((n * _GOLDEN) % 1), 0.85, 0.8))
            draw.ellipse(
                (x - radius, y - radius, x + radius, y + radius),
                fill=colour if point.visible else None,
                outline=(255, 255, 255) if point.visible else colour,
            )


def _draw_pair(sheet: Image, draw: ImageDraw, pair: Pair, left: int, top: int) -> None:
    from PIL import Image as Pil

    size = pair.a.size
    draw.text((left, top - 1), pair.category, fill=_INK)
    top += _LINE
    sheet.paste(Pil.fromarray(pair.a.image), (left, top))
    sheet.paste(Pil.fromarray(pair.b.image), (left + size, top))
    points = sample_points(pair.a, pair.instance_a, pair.b, pair.instance_b, 10)
    for n, ((x0, y0), (x1, y1)) in enumerate(zip(points.source, points.target, strict=True)):
        colour = _bytes(from_hsv(360 * ((n * _GOLDEN) % 1), 0.7, 1.0))
        ends = (left + x0, top + y0, left + size + x1, top + y1)
        draw.line(ends, fill=_INK, width=3)
        draw.line(ends, fill=colour, width=1)
        for x, y in (ends[:2], ends[2:]):
            draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=colour, outline=_INK)


def _write(draw: ImageDraw, text: str, left: int, top: int, width: int) -> None:
    """Text in at most three lines, cut short with dots where it does not fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > _CAPTION_LINES:
        lines = [*lines[: _CAPTION_LINES - 1], f"{lines[_CAPTION_LINES - 1]} ..."]
    draw.text((left, top - 2), "\n".join(lines), fill=_INK, spacing=1)


def _bytes(colour: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (int(255 * part + 0.5) for part in colour)
    return red, green, blue
