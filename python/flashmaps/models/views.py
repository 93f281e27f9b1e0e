"""Other views of a picture: warps that are known, and changes of colour.

A view is made from the pixels alone. So where each of its points comes from is known without anyone
having said what the picture shows, which is all that :mod:`flashmaps.models.agreement` asks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

_UPRIGHT = 0.75  # share of the views that are turned by a little; the others by any angle
_REPAINTED = 0.5  # share of the views whose hues change
_BENDS = 5  # a side: the grid of random shifts that bends a view


def warped(
    image: np.ndarray, rng: np.random.Generator, cells: int, *, mirror: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """The picture turned, scaled, sheared, shifted and bent, and where it all was.

    Args:
        image: uint8 [size, size, 3].
        rng: all chance.
        cells: a side of the grid that the answer is given on; it divides size.
        mirror: share of the views that are mirrored.

    Returns uint8 [size, size, 3], and float16 [cells, cells, 2]: the point (x, y) of ``image`` that
    each cell shows on average, in sides of the image from its top left corner; outside [0, 1] where
    the frame has been left and the picture's own reflection fills the view.
    """
    size = image.shape[0]
    angle = rng.normal(0, 15) if rng.random() < _UPRIGHT else rng.uniform(-180, 180)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    zoom = math.exp(rng.uniform(math.log(0.75), math.log(1.4)))
    aspect = math.exp(rng.normal(0, 0.12))
    matrix = np.array([[c, -s], [s, c]]) @ np.array([[aspect, rng.normal(0, 0.1)], [0, 1 / aspect]])
    matrix /= zoom
    if rng.random() < mirror:
        matrix[:, 0] *= -1
    shift = rng.normal(0, 0.08, 2)
    bends = rng.normal(0, 0.04, (1, 2, _BENDS, _BENDS)) * rng.random()
    centres = (np.arange(size) + 0.5) / size - 0.5
    x, y = np.meshgrid(centres, centres)
    where = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y])) + shift[:, None, None] + 0.5
    bent = F.interpolate(torch.from_numpy(bends), (size, size), mode="bicubic", align_corners=True)
    source = torch.from_numpy(where)[None] + bent
    pixels = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None]
    seen = F.grid_sample(
        pixels, source.permute(0, 2, 3, 1) * 2 - 1, "bicubic", "reflection", align_corners=False
    )
    view = seen[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
    mean = F.avg_pool2d(source, size // cells)[0].permute(1, 2, 0)
    return view, mean.clamp(-8, 8).numpy().astype(np.float16)


def recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other colours, the same everywhere in the picture: uint8 [size, size, 3].

    Contrast, brightness and gamma change, and grain is added. In half of the views channels are
    exchanged, hues turned, saturation changed, and now and then light and dark exchanged: what can
    be told by its colour is learnt from the others first.
    """
    pixels = image.astype(np.float32) / 255
    if rng.random() < _REPAINTED:
        pixels = _repainted(pixels, rng)
    pixels = pixels ** math.exp(rng.normal(0, 0.25))
    pixels = (pixels - 0.5) * rng.uniform(0.6, 1.3) + 0.5 + rng.uniform(-0.12, 0.12)
    pixels += rng.normal(0, 0.03 * rng.random(), pixels.shape)
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def _repainted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        pixels = pixels[:, :, rng.permutation(3)]
    grey = np.full((3, 3), 1 / 3)
    turn = rng.uniform(-math.pi, math.pi) * (rng.random() < 0.8)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    # A rotation about the grey axis (Rodrigues), with the rest from that axis scaled.
    hue = grey + rng.uniform(0.4, 1.4) * (
        math.cos(turn) * (np.eye(3) - grey) + math.sin(turn) * cross
    )
    pixels = (pixels @ hue.T.astype(np.float32)).clip(0, 1)
    return 1 - pixels if rng.random() < 0.2 else pixels
