"""Which pairs of images, and in which order they read each image least often."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from flashmaps.arguments import sides, switch, whole


def all_pairs(count: int, *, both_ways: bool = False) -> list[tuple[int, int]]:
    """Every (i, j) of ``count`` images with i < j; ``both_ways``: and (j, i) right after it."""
    pairs: Iterable[tuple[int, int]] = combinations(range(whole("count", count, 0)), 2)
    if not switch("both_ways", both_ways):
        return list(pairs)
    return [each for i, j in pairs for each in ((i, j), (j, i))]


def upper_pairs(count: int, *, both_ways: bool = False) -> np.ndarray:
    """What :func:`all_pairs` gives, as [P, 2] int32: 8 bytes a pair."""
    found = np.stack(np.triu_indices(count, 1), axis=1).astype(np.int32)
    if both_ways:
        found = np.stack((found, found[:, ::-1]), axis=1).reshape(-1, 2)
    return found


def check_pairs(pairs: Any, count: int) -> np.ndarray:
    """``pairs`` as [P, 2] int32; None: all. ValueError for what is no pair of ``count`` images."""
    if pairs is None:
        if count < 2:
            raise ValueError(f"sets has {count} images; wanted at least 2, or pairs")
        return upper_pairs(count)
    if isinstance(pairs, (Tensor, np.ndarray)):
        array = np.asarray(pairs.cpu() if isinstance(pairs, Tensor) else pairs)
        whole_numbers = array.dtype.kind in "iu" and array.ndim == 2 and array.shape[1] == 2
        if whole_numbers and array.size and array.min() >= 0 and array.max() < count:
            return array.astype(np.int32, copy=False)
        pairs = array.tolist()  # to say which one is wrong
    chosen = []
    for position, pair in enumerate(pairs):
        found = sides(pair)
        if found is None:
            raise ValueError(f"pairs[{position}] = {pair!r}; wanted two integers (source, target)")
        source, target = found
        for index in (source, target):
            if not 0 <= index < count:
                raise ValueError(
                    f"pairs[{position}] picks image {index}, but there are {count}: indices go "
                    f"from 0 to {count - 1}"
                )
        chosen.append((source, target))
    if not chosen:
        raise ValueError("pairs is empty: give at least one (source, target)")
    return np.array(chosen, dtype=np.int32)


def tile_order(pairs: Sequence[Sequence[int]] | np.ndarray, side: int) -> np.ndarray:
    """The positions [P] of P pairs in the order of tiles of ``side`` x ``side`` images.

    Tiles are taken row by row, to and fro, so that from one to the next only ``side`` images are
    new. Whoever holds the 2 ``side`` images of a tile reads, of n images in r = ceil(n / side)
    blocks,

        at most min(2 P, side (r^2 + 1)) images,

    which is about n sqrt(P / n) where r = sqrt(P / n), that is, where n sqrt(n / P) images fit on
    each side; where more fit, it is less. With less room than that no order of pairs that are drawn
    at random can do as well.
    """
    if side < 1:
        raise ValueError(f"side={side}; wanted at least 1")
    row, column = np.asarray(pairs, dtype=np.int32).reshape(-1, 2).T // side
    column[row % 2 == 1] *= -1
    return np.lexsort((column, row))  # which is stable


def most_reads(images: int, pairs: int, side: int) -> int:
    """The bound of :func:`tile_order`."""
    blocks = -(-images // side)
    return min(2 * pairs, side * (blocks**2 + 1))
