"""Parts within objects: what lies around things stays whole, and a part is one connected piece."""

from __future__ import annotations

import numpy as np
import torch

from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import Grid
from flashmaps.segmentation.map_equation import compact

_ROWS = 256  # of the map that are there at a time


def surroundings(tokens: np.ndarray, grid: Grid) -> np.ndarray:
    """Of each segment, whether it lies around things rather than being one: [count] bool.

    It does if it holds more of the picture's frame, its outermost tokens, than of the picture.
    """
    count = int(tokens.max()) + 1
    frame = np.ones(grid, dtype=bool)
    frame[1:-1, 1:-1] = False
    on = np.bincount(tokens[frame.ravel()], minlength=count) / frame.sum()
    return np.asarray(on > np.bincount(tokens, minlength=count) / len(tokens))


def nested(objects: np.ndarray, fine: np.ndarray, grid: Grid) -> np.ndarray:
    """Segments of ``fine`` cut at the borders of objects; what lies around things whole: [N].

    Gradients of sky and ground have no parts that anybody would name, and would make up most of
    the segments.
    """
    whole = surroundings(objects, grid)[objects]
    inside = objects * (int(fine.max()) + 2) + np.where(whole, 0, fine + 1)
    return compact(inside)


def connected(parts: np.ndarray, objects: np.ndarray, grid: Grid) -> np.ndarray:
    """Connected pieces of each part, but of what lies around things: [N], single tokens too."""
    from skimage.measure import label

    pieces = label(parts.reshape(grid) + 1, connectivity=1).ravel()
    whole = surroundings(objects, grid)[objects]
    return compact(np.where(whole, parts, int(parts.max()) + pieces))


def without_single(pieces: np.ndarray, objects: np.ndarray, A: AttentionMap) -> np.ndarray:
    """Pieces of one token go to the piece of their object that they flow to most, if there is one.

    ``A``: [1, N, N], of which the rows of these tokens are looked at.
    """
    size = np.bincount(pieces)
    owner = np.zeros(len(size), dtype=np.int64)
    owner[pieces] = objects
    out = pieces.copy()
    single = np.flatnonzero(size[pieces] == 1)
    for some in np.array_split(single, -(-len(single) // _ROWS)) if len(single) else ():
        rows = A.rows(torch.from_numpy(some))[0].float().cpu()
        flow = torch.zeros(len(some), len(size)).index_add_(1, torch.from_numpy(pieces), rows)
        to = flow.numpy()
        to[(owner[None, :] != objects[some, None]) | (size[None, :] == 1)] = -1.0
        best = to.argmax(1)
        there = to[np.arange(len(some)), best] >= 0
        out[some[there]] = best[there]
    return compact(out)
