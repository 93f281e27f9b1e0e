"""Borders of segments at pixels: what tokens say, voted over patches of like colour.

A token is many pixels. What share of it belongs to each segment is interpolated bilinearly, summed
over the patches that Felzenszwalb and Huttenlocher's graph method finds in the image
(scikit-image), and each patch goes to the segment with the largest sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.images import Image, resize
from flashmaps.maps.grids import Grid

# Chosen on the world's validation split among scales 20, 50 and 100, and SLIC's patches
# (`flashmaps eval segments --split validation`). In a larger picture a patch of equal contrast
# is as large a share of the picture: the scale goes with the pixels of a side.
_SCALE, _SIGMA, _SMALLEST, _SIDE = 50, 0.5, 10, 128
_ENTRIES = 2**18  # pixels that are added up together: a few MB
_LONGEST = 384  # pixels a side that patches are looked for at: 40 MB; finer borders are theirs


def patches(image: Image) -> np.ndarray:
    """Patches of like colour: [h, w] int64, 0 to n - 1, at most ``_LONGEST`` pixels a side."""
    from skimage.segmentation import felzenszwalb

    height, width = image.shape[:2]
    share = min(1.0, _LONGEST / max(height, width))
    seen = resize(image, (max(1, round(height * share)), max(1, round(width * share))))
    ratio = max(1.0, max(seen.shape[:2]) / _SIDE)
    found = felzenszwalb(
        seen, scale=_SCALE * ratio, sigma=_SIGMA, min_size=round(_SMALLEST * ratio**2)
    )
    rows = (np.arange(height) * found.shape[0]) // height
    columns = (np.arange(width) * found.shape[1]) // width
    return found[rows[:, None], columns[None, :]].astype(np.int64)


def to_pixels(share: Tensor, grid: Grid, size: Grid) -> np.ndarray:
    """[N, k] of tokens as [k, h, w] of pixels, bilinear between token centres."""
    planes = share.T.reshape(1, share.shape[1], *grid)
    drawn = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    return drawn[0].numpy()


def pixel_labels(share: Tensor, grid: Grid, size: Grid, voters: np.ndarray | None) -> np.ndarray:
    """The segment of each pixel: [h, w] int64.

    ``share``: [N, k], of each token for each segment. ``voters``: [h, w] patches that decide
    together; None: each pixel for itself.
    """
    if voters is not None:
        votes = patch_weights(voters, grid) @ share.numpy()
        return np.asarray(votes.argmax(1)[voters], dtype=np.int64)
    labels = np.zeros(size, dtype=np.int64)
    best = to_pixels(share[:, :1], grid, size)[0]
    for k in range(1, share.shape[1]):  # one plane at a time: k planes of a photograph are large
        plane = to_pixels(share[:, k : k + 1], grid, size)[0]
        better = plane > best
        labels[better] = k
        best[better] = plane[better]
    return labels


def patch_weights(voters: np.ndarray, grid: Grid) -> Any:
    """How much of each patch each token makes up, bilinear: [patches, N] sparse."""
    from scipy.sparse import csr_array

    (rows, down), (columns, across) = (
        _between(pixels, tokens) for pixels, tokens in zip(voters.shape, grid, strict=True)
    )
    count, tokens = int(voters.max()) + 1, grid[0] * grid[1]
    total = csr_array((count, tokens), dtype=np.float32)
    step = max(1, _ENTRIES // voters.shape[1])
    for start in range(0, voters.shape[0], step):  # each corner has an entry for every pixel
        strip = slice(start, start + step)
        for r in (0, 1):
            for c in (0, 1):
                index = rows[r][strip, None] * grid[1] + columns[c]
                weight = down[r][strip, None] * across[c]
                ends = (voters[strip].ravel(), index.ravel())
                total = total + csr_array((weight.ravel(), ends), shape=(count, tokens))
    return total


def _between(
    pixels: int, tokens: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Of pixels along a side, the tokens before and after each, and what each of them counts."""
    at = ((np.arange(pixels) + 0.5) * tokens / pixels - 0.5).clip(0, tokens - 1)
    before = np.floor(at).astype(np.int32)
    after = np.minimum(before + 1, tokens - 1)
    share = (at - before).astype(np.float32)
    return (before, after), (1 - share, share)


def borders(labels: np.ndarray) -> np.ndarray:
    """Pixels with another label beside, above or below them: [h, w] bool."""
    found = np.zeros(labels.shape, dtype=bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    found[:, 1:] |= across
    found[:, :-1] |= across
    found[1:] |= down
    found[:-1] |= down
    return found
