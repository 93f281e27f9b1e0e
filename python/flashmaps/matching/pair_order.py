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


def check_pairs(pairs: Any, count: int) -> list[tuple[int, int]]:
    """``pairs`` as tuples; None: all. ValueError for what is no pair of ``count`` images."""
    if pairs is None:
        if count < 2:
            raise ValueError(f"sets has {count} images; wanted at least 2, or pairs")
        return all_pairs(count)
    if isinstance(pairs, (Tensor, np.ndarray)):
        pairs = pairs.tolist()
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
    return chosen


def tile_order(pairs: Sequence[Sequence[int]], side: int) -> list[int]:
    """The positions of P pairs in the order of tiles of ``side`` x ``side`` images.

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
    given = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    row, column = given.T // side
    column = np.where(row % 2, -column, column)
    return np.lexsort((np.arange(len(given)), column, row)).tolist()


def most_reads(images: int, pairs: int, side: int) -> int:
    """The bound of :func:`tile_order`."""
    blocks = -(-images // side)
    return min(2 * pairs, side * (blocks**2 + 1))
