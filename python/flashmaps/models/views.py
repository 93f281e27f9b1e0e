"""Other views of a picture: warps and shifts that are known, and changes of colour.

A view is made from the pixels alone. So where each of its points comes from is known without anyone
having said what the picture shows, which is all that :mod:`flashmaps.models.agreement` asks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_UPRIGHT = 0.75  # share of the views that are turned by a little; the others by any angle
_REPAINTED, _TURNED = 0.5, 0.2  # shares of the views whose colours change so
_SOFT = 0.06  # deviation of what counts as one colour, all channels in 0 to 1
_PATTERNED = 0.25  # share of a repainted view's colours that get a pattern
_BENDS = 5  # a side: the grid of random shifts that bends a view
_NOWHERE = -8.0  # a point that is outside of every picture


def warped(
    images: Tensor, cells: int, generator: torch.Generator, *, mirror: float = 0.4
) -> tuple[Tensor, Tensor]:
    """Pictures turned, scaled, sheared, shifted and bent, and where it all was.

    Args:
        images: uint8 [n, size, size, 3].
        cells: a side of the grid that the answer is given on; it divides size.
        generator: all chance, on the device of ``images``.
        mirror: share of the views that are mirrored.

    Returns uint8 [n, size, size, 3], and float32 [n, cells, cells, 2]: the point (x, y) of the
    picture that each cell shows on average, in sides of the image from its top left corner; outside
    [0, 1] where the frame has been left and the picture's own reflection fills the view.
    """
    count, size = images.shape[:2]
    options: dict[str, Any] = {"generator": generator, "device": images.device}

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, **options)

    def normal(deviation: float) -> Tensor:
        return deviation * torch.randn(count, **options)

    upright = torch.rand(count, **options) < _UPRIGHT
    angle = torch.where(upright, normal(15), uniform(-180, 180)).deg2rad()
    c, s, aspect = angle.cos(), angle.sin(), normal(0.12).exp()
    turn = torch.stack([c, -s, s, c], -1).view(-1, 2, 2)
    shear = torch.stack([aspect, normal(0.1), torch.zeros_like(c), 1 / aspect], -1).view(-1, 2, 2)
    matrix = turn @ shear / uniform(math.log(0.65), math.log(1.5)).exp()[:, None, None]
    mirrored = torch.rand(count, **options) < mirror
    matrix[:, :, 0] *= 1 - 2 * mirrored[:, None].float()
    shift = torch.stack([normal(0.08), normal(0.08)], -1)
    bends = 0.05 * torch.randn(count, 2, _BENDS, _BENDS, **options)
    bends = bends * torch.rand(count, 1, 1, 1, **options)
    centres = (torch.arange(size, device=images.device) + 0.5) / size - 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    where = torch.einsum("nij,jhw->nihw", matrix, torch.stack([x, y]))
    source = where + shift[:, :, None, None] + 0.5
    source = source + F.interpolate(bends, (size, size), mode="bicubic", align_corners=True)
    seen = F.grid_sample(
        images.permute(0, 3, 1, 2).float(), source.permute(0, 2, 3, 1) * 2 - 1, "bicubic",
        "reflection", align_corners=False,
    )  # fmt: skip
    views = seen.permute(0, 2, 3, 1).round().clamp(0, 255).byte()
    mean = F.avg_pool2d(source, size // cells).permute(0, 2, 3, 1)
    return views, mean.clamp(_NOWHERE, -_NOWHERE)


def moved(
    pictures: Tensor, where: Tensor, largest: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """First pictures and their views, each shifted, before another one's picture.

    A network knows where in its input it is, by its padding. While views lie nearly where the
    first pictures do, it can agree with itself by place and needs to see nothing; so each picture
    is shifted on its own. What comes bare shows the next example: what may be mistaken for it.

    Args:
        pictures: [k n, c, h, h]: n first pictures, views last; latents, since a shift is of cells.
        where: [n, h, h, 2], see :func:`warped`, of the views.
        largest: of a shift along x or y, in sides; an even number of cells, so that tokens of
            half the side move whole.
        generator: all chance.

    Returns both anew: ``where`` points at the shifted first pictures.
    """
    count, side = len(pictures), pictures.shape[-1]
    kinds = count // len(where)
    steps = int(largest * side / 2)
    device = pictures.device
    shift = 2 * torch.randint(-steps, steps + 1, (count, 2), generator=generator, device=device)
    cells = torch.arange(side, device=device)
    x, y = (cells - shift[:, axis, None] for axis in (0, 1))  # [k n, h]: which cell comes here
    inside = ((x >= 0) & (x < side))[:, None, :] & ((y >= 0) & (y < side))[:, :, None]
    place = (y.clamp(0, side - 1)[:, :, None], x.clamp(0, side - 1)[:, None, :])
    each = torch.arange(count, device=device)[:, None, None]
    others = pictures.unflatten(0, (kinds, -1)).roll(1, 1).flatten(0, 1)
    shifted = torch.where(
        inside[:, None], pictures[each, :, place[0], place[1]].permute(0, 3, 1, 2), others
    )
    views = slice(count - len(where), None)
    points = where.float()
    known = ((points >= 0) & (points <= 1)).all(-1)
    rows = torch.arange(len(where), device=device)[:, None, None]
    here = rows, place[0][views], place[1][views]
    points = points[here] + shift[: len(where), None, None] / side
    return shifted, points.masked_fill(~(inside[views] & known[here])[..., None], _NOWHERE)


def recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture in other paint: uint8 [size, size, 3], no point moved.

    Contrast, brightness and gamma change, and grain is added. Before that, in most views the
    picture's own colours are gathered into a few, and each gets a new colour and perhaps a pattern
    (``_REPAINTED``); or all hues are turned (``_TURNED``). Two things of one kind differ so, and
    where the colours meet they stay alike.
    """
    pixels = image.astype(np.float32) / 255
    kind = rng.random()
    if kind < _REPAINTED:
        pixels = _repainted(pixels, rng)
    elif kind < _REPAINTED + _TURNED:
        pixels = _turned(pixels, rng)
    pixels = pixels.clip(0, 1) ** math.exp(rng.normal(0, 0.25))
    pixels = (pixels - 0.5) * rng.uniform(0.6, 1.3) + 0.5 + rng.uniform(-0.12, 0.12)
    pixels += rng.normal(0, 0.03 * rng.random(), pixels.shape)
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def _repainted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = pixels.shape[0]
    flat = pixels.reshape(-1, 3)
    # Grain must not decide which colour a pixel has.
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    shifted = [padded[i : i + size, j : j + size] for i in range(3) for j in range(3)]
    smooth = np.mean(shifted, axis=0).reshape(-1, 3)
    centres = smooth[rng.choice(len(flat), rng.integers(3, 8), replace=False)]
    some = smooth[rng.choice(len(flat), 512)]
    for _ in range(6):  # Lloyd's k-means
        nearest = _distances(some, centres).argmin(1)
        for index in range(len(centres)):
            if (nearest == index).any():
                centres[index] = some[nearest == index].mean(0)
    distances = _distances(smooth, centres)
    shares = np.exp((distances.min(1, keepdims=True) - distances) / (2 * _SOFT**2))
    shares /= shares.sum(1, keepdims=True)  # [size^2, colours]
    # What was lighter or darker than its colour stays so: shading shows shape.
    shade = (flat - shares @ centres).mean(1, keepdims=True) * rng.uniform(0.4, 1.3)
    painted = shade + np.zeros((1, 3))
    for share in shares.T:
        paint, second = rng.random((2, 3))
        pattern = _pattern(size, rng) if rng.random() < _PATTERNED else np.zeros(len(flat))
        painted += share[:, None] * (paint + pattern[:, None] * (second - paint))
    return painted.reshape(pixels.shape)


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared, [points, centres]."""
    return ((points[:, None] - centres) ** 2).sum(-1)


def _pattern(size: int, rng: np.random.Generator) -> np.ndarray:
    """Stripes or spots, [size^2] in 0 to 1."""
    period, angle, offset = rng.uniform(0.05, 0.2), rng.uniform(0, math.pi), rng.random(2)
    centres = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    c, s = math.cos(angle) / period, math.sin(angle) / period
    wave = np.cos(2 * math.pi * (c * x + s * y + offset[0]))
    if rng.random() < 0.5:
        wave = wave * np.cos(2 * math.pi * (c * y - s * x + offset[1]))
    return (0.5 + 4 * (wave - rng.uniform(-0.3, 0.5))).clip(0, 1).ravel()


def _turned(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        pixels = pixels[:, :, rng.permutation(3)]
    grey = np.full((3, 3), 1 / 3)
    turn = rng.uniform(-math.pi, math.pi)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    # A rotation about the grey axis (Rodrigues), with the rest from that axis scaled.
    hue = grey + rng.uniform(0.4, 1.4) * (
        math.cos(turn) * (np.eye(3) - grey) + math.sin(turn) * cross
    )
    pixels = pixels @ hue.T.astype(np.float32)
    return 1 - pixels if rng.random() < 0.2 else pixels
