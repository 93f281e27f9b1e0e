"""What parts are learned from: where each part is in each image of a collection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashmaps.segmentation.collection import CoSegments

MOST = 12  # parts; the largest are taken
_LEAST = 0.001  # share of an image's area below which it does not show a part


def part_masks(
    segments: CoSegments | Sequence[Any], images: int, size: tuple[int, int]
) -> Tensor:  # [n, P, h, w]
    """Where each part is, [n, P, h, w] float32 in 0..1, of ``images`` images in ``size``.

    Args:
        segments: a co-segmentation, whose parts in common that are no background are taken, soft by
            their confidence; or for each image labels [h, w] of whole numbers, below 0 for none, or
            weights [P, h, w] in 0..1, at any size.

    Raises ValueError where there is no part, one is empty in every image, or numbers do not fit.
    """
    if isinstance(segments, CoSegments):
        planes = _of_cosegments(segments)
    else:
        planes = _given(segments)
    if len(planes) != images:
        raise ValueError(f"segments are of {len(planes)} images, and there are {images} images")
    found = torch.cat([F.adaptive_avg_pool2d(each[None], size) for each in planes])
    areas = found.mean((0, 2, 3))
    empty = [p for p in range(found.shape[1]) if float(areas[p]) <= 0]
    if empty:
        raise ValueError(f"segments: part {empty[0]} is empty in every image; leave it out")
    if found.shape[1] > MOST:
        found = found[:, areas.argsort(descending=True)[:MOST].sort().values]
    return found


def shown(masks: Tensor) -> Tensor:  # [n, P] bool
    """Which image shows which part."""
    return masks.mean((2, 3)) >= _LEAST


def hard_labels(masks: Tensor) -> np.ndarray:  # [n, h, w] int16
    """The part of each pixel, -1 where all of them together are less than nothing at all."""
    best, where = masks.max(1)
    labels = torch.where(masks.sum(1) >= 0.5, where, torch.full_like(where, -1))
    return labels.masked_fill(best <= 0, -1).to(torch.int16).numpy()


def common_parts(found: CoSegments) -> list[int]:
    """Labels that the images have in common and that do not lie around things."""
    # One smaller than a patch of the image may have no pixel.
    pixels = {int(each) for labels in found.labels for each in np.unique(labels)}
    return [p.id for p in found.parts if p.common and not p.background and p.id in pixels]


def _of_cosegments(found: CoSegments) -> list[Tensor]:
    chosen = common_parts(found)
    if not chosen:
        raise ValueError(
            "no object: the images have no part in common but what lies around things; give images "
            "of one category, or segments= of your own"
        )
    planes = []
    for labels, confidence, each in zip(found.labels, found.confidence, found.sets, strict=True):
        hard = np.stack([labels == part for part in chosen])
        trust = torch.from_numpy(confidence).view(1, 1, *each.grid)
        trust = F.interpolate(trust, labels.shape, mode="bilinear", align_corners=False)[0]
        planes.append(torch.from_numpy(hard).float() * trust)
    return planes


def _given(segments: Any) -> list[Tensor]:
    if isinstance(segments, (str, bytes)) or not isinstance(segments, Sequence) or not segments:
        raise ValueError("segments must be a CoSegments, or labels or masks of each image")
    arrays = [np.asarray(each) for each in segments]
    dims = {each.ndim for each in arrays}
    if len(dims) != 1 or not dims <= {2, 3}:
        raise ValueError(
            "segments must be labels [h, w], or weights [P, h, w], of every image; got shapes "
            + ", ".join(str(list(each.shape)) for each in arrays[:3])
        )
    if dims == {3}:
        counts = {each.shape[0] for each in arrays}
        if len(counts) != 1:
            raise ValueError(f"segments have {sorted(counts)} parts; every image has to have all")
        planes = [torch.from_numpy(np.array(each, dtype=np.float32)) for each in arrays]
        for index, each in enumerate(planes):
            if not bool((each >= 0).all() & (each <= 1).all()):
                raise ValueError(f"segments[{index}] has weights that are not in 0..1")
    else:
        if not all(np.issubdtype(each.dtype, np.integer) for each in arrays):
            raise ValueError(f"segments hold {arrays[0].dtype}; labels are whole numbers")
        count = max(int(each.max(initial=-1)) for each in arrays) + 1
        if count > 10 * MOST:
            raise ValueError(f"segments have labels up to {count - 1}; at most {MOST} are learned")
        planes = [
            torch.from_numpy(np.stack([each == p for p in range(count)])).float()
            for each in arrays
            if count
        ]
    if not planes or not planes[0].shape[0] or not any(float(each.sum()) > 0 for each in planes):
        raise ValueError("segments are empty: no pixel of any image is of a part")
    return planes
