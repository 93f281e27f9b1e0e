"""Exemplars laid over an image of one of their kind, so that their shapes fit what is seen.

The map T from places of the image to places of an exemplar is affine plus a smooth bend, a grid of
offsets between which it is bilinear. It starts as the affine map that most matches agree on
(:func:`fit_affine`), and then minimises, all exemplars at once,

    1 - IoU(sigmoid(depth(T x)), seen)  +  MATCHES mean_i w_i log(1 + |T x_i - y_i|^2 / slack^2)
    + SHEAR |what is no similarity in T|^2 / |T|^2  +  BEND (|offsets|^2 + |their differences|^2)

The IoU is a soft one, over places where nothing is in front; ``depth`` is how far inside the
exemplar's outline a place is. Matches alone are off by a token or two; outlines alone find any
place that is alike. Places are (x, y) from the middle of the picture, in halves of its longer side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Chosen on scenes of the world's validation split, as said in docs/parts.md.
SLACK = 0.09  # places: how far off a match may be before it counts little
_EDGE = 1 / 64  # places: how soft an outline is
_REACH = 12 / 64  # places: depths are cut off there
_MATCHES, _SHEAR, _BEND = 0.1, 0.2, 0.02
_OFFSETS = 6  # of the bend, a side
_STEPS, _RATE = 60, 0.02  # of Adam
_ROUNDS = 10  # of reweighting in the affine fit
_PLANE = 128  # cells a side of the planes of depths
_LOOK = 64  # places a side at which the IoU is taken


@dataclass(frozen=True, eq=False)
class Laid:
    """Exemplars laid over an image.

    Attributes:
        depth: [n, h, w] float32, for each pixel of the image how far inside each exemplar's outline
            it falls, in 128ths of the exemplar's longer side; negative outside.
        inside: [n, h, w] bool, whether it falls inside the exemplar's picture at all.
        places: [n, h, w, 2] float32, (x, y) in pixels of each exemplar.
    """

    depth: np.ndarray
    inside: np.ndarray
    places: np.ndarray


def to_places(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Places of pixels (x, y) of an image of size (h, w)."""
    height, width = size
    return (points + 0.5 - np.array((width, height)) / 2) / (max(size) / 2)


def to_pixels(places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (x, y) of places of an image of size (h, w)."""
    height, width = size
    return places * (max(size) / 2) + np.array((width, height)) / 2 - 0.5


def fit_affine(
    source: np.ndarray, target: np.ndarray, weight: np.ndarray, slack: float = SLACK
) -> np.ndarray:  # [3, 2]
    """The affine map of points [n, 2] to points [n, 2] that most of them agree on.

    Weighed least squares, a point's weight being w / (1 + (r / s)^2) for its residual r in the
    round before (Cauchy's); s comes down from 1.5 median residuals to ``slack``.
    """
    full = np.column_stack((source, np.ones(len(source))))
    own, found = weight, np.zeros((3, 2))
    for step in range(_ROUNDS):
        root = np.sqrt(own)[:, None]
        found = np.linalg.lstsq(root * full, root * target, rcond=None)[0]
        residual = np.linalg.norm(full @ found - target, axis=1)
        early = step < _ROUNDS // 2
        scale = max(slack, 1.5 * float(np.median(residual))) if early else slack
        own = weight / (1 + (residual / scale) ** 2)
    return found


def lay(
    visible: np.ndarray,  # [h, w] bool
    free: np.ndarray,  # [h, w] bool, where nothing is in front
    shapes: Sequence[np.ndarray],  # n of [h, w] bool, of the exemplars
    source: np.ndarray,  # [t, 2], places of matched tokens in the image
    targets: np.ndarray,  # [n, t, 2], where they lie in each exemplar
    weights: np.ndarray,  # [n, t], how far to trust that
    *,
    outline: bool = True,
) -> Laid:
    """Lay exemplars of which ``shapes`` are the whole objects over an image.

    ``outline=False`` leaves the IoU out.
    """
    size = visible.shape[0], visible.shape[1]
    starts = [fit_affine(source, y, w) for y, w in zip(targets, weights, strict=True)]
    affine = torch.tensor(np.array(starts), dtype=torch.float32).requires_grad_()
    offsets = torch.zeros(len(shapes), 2, _OFFSETS, _OFFSETS, requires_grad=True)
    planes = torch.stack([_plane(shape) for shape in shapes])
    x, y = (torch.from_numpy(each).float() for each in (source, targets))
    trust = torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()
    look = _grid(_LOOK)
    seen, unhidden = (_looked(mask & free) for mask in (visible, np.ones_like(visible)))

    def carried(points: Tensor) -> Tensor:  # [t, 2] to [n, t, 2]
        at = points.expand(len(shapes), 1, -1, -1)
        bend = F.grid_sample(offsets, at, "bilinear", "border", align_corners=True)[:, :, 0]
        return points @ affine[:, :2] + affine[:, 2:] + bend.transpose(1, 2)

    with torch.enable_grad():
        optimizer = torch.optim.Adam([affine, offsets], lr=_RATE)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            p = torch.sigmoid(_sampled(planes, carried(look)) / _EDGE)
            both = (p * seen).sum(1)
            either = (p * unhidden).sum(1) + seen.sum() - both
            off = (carried(x) - y).square().sum(2) / SLACK**2
            loss = _MATCHES * (trust * off.log1p()).sum(1)
            if outline:
                loss = loss + 1 - both / either.clamp_min(1)
            (loss + _SHEAR * _shear(affine) + _BEND * _bend(offsets)).sum().backward()
            optimizer.step()
    with torch.no_grad():
        rows, columns = np.indices(size)
        pixels = np.stack((columns.ravel(), rows.ravel()), 1)
        there = carried(torch.from_numpy(to_places(pixels, size)).float())
        depth = _sampled(planes, there) * (_PLANE / 2)
        sides = [np.array(shape.shape[::-1]) / max(shape.shape) for shape in shapes]
        inside = there.abs().numpy() <= np.array(sides)[:, None]
        places = np.stack(
            [
                to_pixels(place.numpy(), (shape.shape[0], shape.shape[1]))
                for place, shape in zip(there, shapes, strict=True)
            ]
        )
    return Laid(
        depth.numpy().reshape(-1, *size),
        inside.all(2).reshape(-1, *size),
        places.astype(np.float32).reshape(-1, *size, 2),
    )


def _plane(mask: np.ndarray) -> Tensor:
    """[1, 128, 128]: depth inside the outline in places, on the square around the picture."""
    from scipy.ndimage import distance_transform_edt

    inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
    depth = np.where(mask, inside - 0.5, 0.5 - outside) * (2 / max(mask.shape))
    long = max(mask.shape)
    top, left = (long - mask.shape[0]) // 2, (long - mask.shape[1]) // 2
    square = np.full((long, long), -_REACH)
    square[top : top + mask.shape[0], left : left + mask.shape[1]] = depth.clip(-_REACH, _REACH)
    plane = torch.from_numpy(square).float()[None, None]
    return F.interpolate(
        plane, (_PLANE, _PLANE), mode="bilinear", antialias=True, align_corners=False
    )[0]


def _sampled(planes: Tensor, places: Tensor) -> Tensor:  # [n, 1, s, s], [n, t, 2] to [n, t]
    """Depths at places; far outside beyond the picture."""
    found = F.grid_sample(
        planes + _REACH, places[:, None], "bilinear", "zeros", align_corners=False
    )
    return found[:, 0, 0] - _REACH


def _grid(side: int) -> Tensor:  # [side^2, 2], places
    middle = (torch.arange(side) + 0.5) / side * 2 - 1
    return torch.stack((middle.repeat(side), middle.repeat_interleave(side)), 1)


def _looked(mask: np.ndarray) -> Tensor:  # [1, 64^2]
    """What share of the square around each place at which one looks a mask covers."""
    long = max(mask.shape)
    top, left = (long - mask.shape[0]) // 2, (long - mask.shape[1]) // 2
    square = np.zeros((long, long), dtype=np.float32)
    square[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    plane = torch.from_numpy(square)[None, None]
    return F.adaptive_avg_pool2d(plane, (_LOOK, _LOOK)).flatten(1)


def _shear(affine: Tensor) -> Tensor:  # [n]
    """How far linear maps are from turning and scaling, mirrored or not; 0 to 2."""
    a, b, c, d = affine[:, :2].flatten(1).T
    sign = torch.sign((a * d - b * c).detach())
    other = torch.stack((a - sign * d, b + sign * c, c + sign * b, d - sign * a), 1)
    return other.square().sum(1) / affine[:, :2].square().sum((1, 2)).clamp_min(1e-4)


def _bend(offsets: Tensor) -> Tensor:  # [n]
    across, down = offsets.diff(dim=3), offsets.diff(dim=2)
    rough = across.square().sum((1, 2, 3)) + down.square().sum((1, 2, 3))
    return 4 * offsets.square().sum((1, 2, 3)) + 16 * rough
