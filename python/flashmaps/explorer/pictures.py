"""Images that a page may look at: checked bytes in; a picture and an array out."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashmaps.diffusion.images import Image, load_image

BUNDLED = Path(__file__).parent / "pictures"
BUNDLED_NAMES = ("one.jpg", "two.jpg")  # a cat twice, drawn by flashmaps.world

MOST_BYTES = 16 * 2**20  # of an upload
MOST_PIXELS = 24_000_000  # of an image that comes as bytes
MOST_SIDE = 16_384
FORMATS = ("PNG", "JPEG", "WEBP")
SHOWN_SIDE = 1024  # pixels; what the page gets, and what the model looks at, is no larger


@dataclass(eq=False)
class Picture:
    """An image and the PNG that shows it. Two of the same content are two pictures."""

    name: str
    image: Image  # [h, w, 3] float32
    shown: bytes  # PNG
    bundled: bool = False
    place: int | None = None  # in the match that it comes from


def picture(name: str, image: Any) -> Picture:
    """A picture of anything that :func:`flashmaps.diffusion.images.load_image` takes."""
    from PIL import Image as Pil

    rgb = load_image(image, name)
    shown = Pil.fromarray((rgb * 255 + 0.5).astype(np.uint8))
    if max(shown.size) > SHOWN_SIDE:
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Pil.Resampling.LANCZOS)
        rgb = load_image(shown, name)
    file = io.BytesIO()
    shown.save(file, "PNG", compress_level=3)
    return Picture(name, rgb, file.getvalue())


def uploaded(name: str, data: bytes) -> Picture:
    """A picture from bytes that anybody may have sent.

    Raises ValueError for what is no PNG, JPEG or WebP, is cut off, or is larger than the limits,
    which are checked before anything is decoded.
    """
    from PIL import Image as Pil

    if not data:
        raise ValueError("the upload is empty; wanted the bytes of an image")
    if len(data) > MOST_BYTES:
        raise ValueError(f"the upload has {len(data)} bytes; at most {MOST_BYTES} are taken")
    try:
        opened = Pil.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # Pillow's readers raise what they like on bytes that were made up
        raise ValueError("the upload is no PNG, JPEG or WebP image that can be read") from None
    width, height = opened.size
    if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
        raise ValueError(
            f"the upload is {width} x {height} pixels; at most {MOST_SIDE} a side and "
            f"{MOST_PIXELS} in all are taken"
        )
    try:
        opened.draft("RGB", (SHOWN_SIDE, SHOWN_SIDE))  # JPEG: decoded near the size it is used at
        opened.load()
    except Exception:
        raise ValueError("the upload is an image that is cut off or damaged") from None
    return picture(name or "upload", opened)


def draw(folder: Path) -> None:
    """Draw the two pictures that come with the package: two scenes of the world with a cat."""
    from PIL import Image as Pil

    from flashmaps import world

    pair = world.pairs("validation", 3, category="cat", seed=3, size=512)[0]
    for name, scene in zip(BUNDLED_NAMES, (pair.a, pair.b), strict=True):
        Pil.fromarray(scene.image).save(folder / name, quality=88, optimize=True)


def bundled() -> list[Picture]:
    """The two pictures that come with the package."""
    return [replace(picture(name, BUNDLED / name), bundled=True) for name in BUNDLED_NAMES]
