"""Images in: from whatever people hold to float RGB, and to a size that a model takes.

An image here is a float32 array [height, width, 3] with values in [0, 1]. Points are (x, y) in
pixels with (0, 0) at the centre of the top left pixel, so a point u of the unit square (cell
centres, as in the core) lies at pixel ``u * (width, height) - 0.5``.
"""

from __future__ import annotations

import numbers
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Image = np.ndarray  # [height, width, 3] float32 in [0, 1]

SMALLEST_SIDE = 16  # pixels; below that a latent has fewer than 2 x 2 cells at the coarsest level
# What a model is shown at most: far beyond what any was trained on, within what memory can hold.
LARGEST_SIDE = 16_384
LARGEST_AREA = 4096**2


def load_image(image: Any, name: str = "image") -> Image:
    """RGB image [height, width, 3], float32 in [0, 1].

    Args:
        image: a path, a PIL image, or a numpy array or torch tensor: grey [h, w] or colour
            [h, w, 3 or 4] or [3 or 4, h, w], uint8 in 0..255, uint16 in 0..65535, bool or floating
            point in 0..1. EXIF orientation is applied; transparency is laid on white. Files and PIL
            images of floats are taken as such arrays; those of 32-bit integers, whose white nobody
            knows, are refused.
        name: what to call the image in errors.

    Raises FileNotFoundError or ValueError, saying what was wrong and what is wanted.
    """
    if isinstance(image, (str, Path)):
        array = _read(Path(image), name)
    elif isinstance(image, Tensor):
        array = (
            image.detach().to("cpu").float().numpy()
            if image.is_floating_point()
            else (image.detach().cpu().numpy())
        )
    elif isinstance(image, np.ndarray):
        array = image
    elif hasattr(image, "getexif") and hasattr(image, "convert"):  # PIL, without importing it
        array = _from_pil(image, name)
    else:
        raise ValueError(
            f"{name} is a {type(image).__name__}; wanted a path, a PIL image, or a numpy "
            "or torch array"
        )
    rgb = _to_rgb(_to_unit_range(_channels_last(array, name), name))
    height, width = rgb.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"{name} is {width} x {height} pixels; both sides must be at least {SMALLEST_SIDE}"
        )
    return rgb


def fit_size(
    height: int, width: int, size: int | tuple[int, int], multiple: int
) -> tuple[int, int]:
    """(height, width) near the wanted size, both a multiple of ``multiple``, aspect kept.

    ``size`` is the longer side in pixels, or (height, width) outright. Rounding to the multiple
    changes the aspect by at most half a multiple per side.

    Raises ValueError if the size is neither, below one multiple, or beyond LARGEST_SIDE and
    LARGEST_AREA.
    """
    sides = list(size) if isinstance(size, (tuple, list)) else [size, size]
    if len(sides) != 2 or not all(
        isinstance(side, numbers.Integral) and not isinstance(side, bool) for side in sides
    ):
        raise ValueError(f"size={size!r} must be a whole number of pixels, or (height, width)")
    if min(sides) < 1:
        raise ValueError(f"size={size}; both sides must be at least one pixel")
    if max(sides) <= LARGEST_SIDE:
        wanted = (float(sides[0]), float(sides[1]))
        if not isinstance(size, (tuple, list)):
            longer = max(height, width)
            wanted = (height * wanted[0] / longer, width * wanted[1] / longer)
    if max(sides) > LARGEST_SIDE or wanted[0] * wanted[1] > LARGEST_AREA:
        raise ValueError(
            f"size={size} is more than a model is shown: at most {LARGEST_SIDE} pixels a side, and "
            f"{LARGEST_AREA} in all"
        )
    if max(wanted) < multiple:
        raise ValueError(f"size={size} is too small; this model needs at least {multiple} pixels")
    rounded = [max(multiple, int(side / multiple + 0.5) * multiple) for side in wanted]
    return rounded[0], rounded[1]


def resize(image: Image, size: tuple[int, int]) -> Image:
    """Resample to (height, width) with an antialiased bicubic filter, clipped to [0, 1]."""
    if image.shape[:2] == tuple(size):
        return image
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    planes = torch.nn.functional.interpolate(
        planes, size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return planes[0].permute(1, 2, 0).clamp(0, 1).contiguous().numpy()


def to_model_input(image: Image) -> Tensor:
    """[1, 3, height, width] in [-1, 1], what a diffusers VAE encodes."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] * 2 - 1


def _read(path: Path, name: str) -> np.ndarray:
    try:
        from PIL import Image as Pil
        from PIL import UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            f"reading image files needs Pillow ({error}); install it with: pip install pillow"
        ) from error

    path = path.expanduser()
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL in it
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}: {str(path)!r} cannot be read: {why}") from None
    if not there:
        raise FileNotFoundError(f"{name}: there is no file {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"{name}: {str(path)!r} is a folder; wanted an image file")
    if not path.is_file():  # a pipe would keep us waiting, a device never end
        raise ValueError(f"{name}: {str(path)!r} is no ordinary file; wanted an image file")
    try:
        with Pil.open(path) as image:
            return _from_pil(image, name)
    except UnidentifiedImageError:
        raise ValueError(
            f"{name}: {str(path)!r} is not an image that Pillow can read (PNG, JPEG, WebP, "
            "TIFF, ...)"
        ) from None
    except (OSError, SyntaxError, Pil.DecompressionBombError) as error:
        raise ValueError(f"{name}: {str(path)!r} cannot be read: {error}") from None


def _from_pil(image: Any, name: str) -> np.ndarray:
    from PIL import ImageOps

    kind = image.format  # of the file; a copy forgets it
    image = ImageOps.exif_transpose(image)
    # Pillow's own conversions would clip all of these to 8 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):
        return (np.asarray(image, dtype=np.float32) / 65535).clip(0, 1)
    if image.mode == "F":
        return np.asarray(image)
    if image.mode == "I":
        low, high = image.getextrema()
        raise ValueError(
            f"{name} holds 32-bit integers from {low} to {high}, and which of them is white is not "
            "said; convert it to 8 or 16 bits, or to floats from 0 to 1"
        )
    has_alpha = "A" in image.mode or "transparency" in image.info
    try:
        return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    except ValueError as error:
        raise ValueError(
            f"{name} has the colours {image.mode!r} of Pillow: {error}; convert it to RGB"
        ) from None


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """[h, w, channels] with 1, 3 or 4 channels."""
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim == 3 and array.shape[2] in (1, 3, 4):
        return array
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return np.moveaxis(array, 0, 2)
    raise ValueError(
        f"{name} has shape {shape}; wanted [height, width], [height, width, 3] or "
        "[3, height, width]"
    )


def _to_unit_range(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if array.dtype == np.uint16:
        return array.astype(np.float32) / 65535
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} has dtype {array.dtype}; wanted uint8 (0..255), uint16 (0..65535) or float "
            "(0..1)"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"{name} is floating point with values from {low:g} to {high:g}; wanted 0..1 "
            "(or uint8 for 0..255)"
        )
    return array.clip(0, 1)


def _to_rgb(array: np.ndarray) -> Image:
    channels = array.shape[2]
    if channels == 1:
        array = np.repeat(array, 3, axis=2)
    elif channels == 4:
        colour, alpha = array[:, :, :3], array[:, :, 3:]
        array = colour * alpha + (1 - alpha)
    return np.ascontiguousarray(array, dtype=np.float32)
