"""What keeps a match honest: ways to find a token's match that need no trained model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.features import Features
from flashmaps.diffusion.images import Image, resize
from flashmaps.maps.grids import Grid

UNTRAINED_SEED = 0

# Dense SIFT: one upright descriptor, of one scale, at the centre of each token. The image is
# resized so that a token is this many pixels; with the blur below, which is SIFT's smallest, the
# window of a descriptor is 15 sigma = 24 pixels = 6 tokens wide.
_SIFT_PIXELS = 4
_SIFT_SIGMA = 1.6
_SIFT_LEAST = 12  # pixels a side that scikit-image's scale space needs
_STRIP = 2**24  # distances at a time


def untrained(pipe: Any, seed: int = UNTRAINED_SEED) -> Any:
    """The pipeline with a UNet of the same architecture and fresh random weights (VAE kept)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = type(pipe.unet).from_config(pipe.unet.config).eval().requires_grad_(False)
    fresh = copy.copy(pipe)
    if pipe.unet.dtype != unet.dtype:  # diffusers warns of any cast, even one that does nothing
        unet = unet.to(pipe.unet.dtype)
    fresh.unet = unet.to(pipe.unet.device)
    return fresh


def nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """For each row of [n, c] the nearest row of [M, c], the first among ties: [n] int64."""
    rows = max(1, _STRIP // len(keys))
    return torch.cat([torch.cdist(part, keys).argmin(1) for part in queries.split(rows)])


def unit_rows(heads: Tensor) -> Tensor:
    """[1, H, N, d] to [N, H d] of length 1, where nearest means largest cosine."""
    flat = heads[0].permute(1, 0, 2).flatten(1).float().cpu()
    return torch.nn.functional.normalize(flat, dim=1)


def colours(of: Features, side: int) -> Tensor:
    """[N, 3 side^2]: mean colour of every token and of its neighbours, edges repeated."""
    small = torch.from_numpy(resize(of.image, of.grid)).permute(2, 0, 1)[None]
    padded = torch.nn.functional.pad(small, (side // 2,) * 4, mode="replicate")
    return torch.nn.functional.unfold(padded, side)[0].T.contiguous()


def dense_sift(image: Image, grid: Grid) -> Tensor:
    """SIFT at every token's centre, [N, 128] of length 1 (zeros where the image is flat).

    scikit-image's descriptors, with keypoints on the token grid instead of detected ones: upright,
    since a detector's orientation needs a corner to hold on to, and of one scale.
    """
    from skimage.feature import SIFT

    pixels = max(_SIFT_PIXELS, -(-_SIFT_LEAST // min(grid)))
    grey = resize(image, (grid[0] * pixels, grid[1] * pixels)) @ np.array(
        [0.2125, 0.7154, 0.0721], np.float32
    )
    rows = (np.arange(grid[0]) + 0.5) * pixels - 0.5
    columns = (np.arange(grid[1]) + 0.5) * pixels - 0.5
    count = grid[0] * grid[1]
    sift = SIFT(upsampling=1, n_octaves=1)
    sift.positions = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    sift.sigmas = np.full(count, _SIFT_SIGMA)
    sift.scales = np.zeros(count, dtype=int)
    sift.octaves = np.zeros(count, dtype=int)
    sift.orientations = np.zeros(count)
    with np.errstate(invalid="ignore", divide="ignore"):  # where no gradient is, 0 / 0
        sift.extract(grey)
    found = torch.from_numpy(sift.descriptors.astype(np.float32))
    return torch.nn.functional.normalize(found, dim=1)
