"""Features of many pairs, a few at a time: what is loaded, and what a chunk of pairs takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from flashmaps.diffusion.feature_files import grey
from flashmaps.diffusion.features import Features
from flashmaps.maps.grids import Grid
from flashmaps.matching.options import COMPARE

# Bytes of results and temporaries that a round trip takes for one token of a pair: its fields
# (about 70), the operands and products of both passes (4 floats each), and what is gathered from
# them. And for one token and head: the log-sum-exp, and its double.
TOKEN_BYTES = 160
HEAD_BYTES = 8
# Of what fits, the part that loaded images and their copies may take; the rest is for pairs.
_IMAGES_SHARE = 0.75


def give_back() -> None:
    """Return what was freed to the system, where the C library keeps it (glibc).

    It raises, as it sees large blocks come and go, the size from which on it would do so by itself;
    holes between blocks then stayed with a batch, 25 MB of them under a budget of 64.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return None


def compared_bytes(features: Features, compare: str) -> int:
    """Bytes of the tensors that are compared."""
    names = set(COMPARE[compare])
    tensors = [each for name in names if (each := getattr(features, name)) is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def stacked_bytes(features: Features, compare: str) -> int:
    """Bytes that one image takes in a chunk: stacked; and for cosines in single precision and
    scaled to length 1, at once for a moment."""
    names = set(COMPARE[compare])
    tensors = [each for name in names if (each := getattr(features, name)) is not None]
    total = sum(t.numel() * t.element_size() for t in tensors)
    if compare == "qk":
        return total
    wide = [torch.promote_types(t.dtype, torch.float32).itemsize * t.numel() for t in tensors]
    widened = sum(w for w, t in zip(wide, tensors, strict=True) if t.element_size() < 4)
    return total + widened + 2 * sum(wide)


def pair_bytes(source: Features, target: Features, compare: str) -> int:
    """Bytes of results and temporaries of one pair."""
    heads = 1 if compare == "features" else source.key.shape[1]
    tokens = sum(f.grid[0] * f.grid[1] for f in (source, target))
    return tokens * (TOKEN_BYTES + HEAD_BYTES * heads)


class Images:
    """The features that are at hand: those of a list, or those that were read and still fit.

    What was read is kept without what is not compared. Where something has to go, it is the image
    that is needed last, which no order of reading can do better than.

    Args:
        pairs: all that will be asked for, in this order.
    """

    def __init__(
        self, sets: Sequence[Features], compare: str,
        pairs: Sequence[tuple[int, int]] | np.ndarray,
    ) -> None:  # fmt: skip
        self.sets, self.compare = sets, compare
        self.resident = isinstance(sets, (list, tuple))  # the caller's own memory
        self._held: dict[int, Features] = {}
        self.bytes = 0
        self.largest = 0  # of one image as it is read, with all that is not compared
        if not self.resident:
            flat = np.asarray(pairs, dtype=np.int32).reshape(-1)
            self._order = np.argsort(flat, kind="stable")
            self._starts = np.searchsorted(flat[self._order], np.arange(len(sets) + 1))

    def __getitem__(self, index: int) -> Features:
        if self.resident:
            return self.sets[index]
        if index in self._held:
            return self._held[index]
        read = self.sets[index]
        self.largest = max(self.largest, read.nbytes)
        kept = self._held[index] = compared_only(read, self.compare)
        self.bytes += compared_bytes(kept, self.compare)
        return kept

    def let_go(self, limit: float, needed: Container[int], position: int) -> None:
        """Until no more than ``limit`` bytes are held, but for those that are needed.

        ``position``: of the pair that is next.
        """
        while self.bytes > limit:
            others = [index for index in self._held if index not in needed]
            if not others:
                return
            last = max(others, key=lambda index: self._next(index, position))
            self.bytes -= compared_bytes(self._held.pop(last), self.compare)

    def _next(self, index: int, position: int) -> float:
        """The position of the next pair that an image is in."""
        uses = self._order[self._starts[index] : self._starts[index + 1]]
        at = np.searchsorted(uses, 2 * position)
        return float("inf") if at == len(uses) else float(uses[at])


def compared_only(features: Features, compare: str) -> Features:
    """Without the tensors and the pixels that matching by ``compare`` does not look at."""
    kept = set(COMPARE[compare])
    nothing = features.key[:, :, :0].clone()  # no view, which would hold the whole
    return replace(
        features,
        query=features.query if "query" in kept else nothing,
        key=features.key if "key" in kept else nothing,
        output=features.output if "output" in kept else None,
        image=grey(features.image.shape[:2]),
    )


@dataclass(frozen=True)
class Room:
    """How a budget is shared: bytes for images that are kept, and images on a tile's side."""

    kept: float
    side: int

    @classmethod
    def of(cls, first: Features, compare: str, budget: int) -> Room:
        """For images like the first one: 2 ``side`` of them are kept, and stacked in a chunk."""
        one = compared_bytes(first, compare)
        each = one + stacked_bytes(first, compare)
        whole = max(0, first.nbytes - one)
        fit = int(_IMAGES_SHARE * (budget - whole) // max(each, 1))
        return cls(kept=max(2, fit) * one, side=max(1, fit // 2))


def chunks(
    images: Images, pairs: np.ndarray, budget: int, kept: float
) -> Iterator[tuple[list[int], dict[int, Features]]]:
    """Runs of consecutive pairs with the same grids that fit the budget: positions, features.

    At every moment: the images that are held, their copies in the chunk, and its results.
    """
    compare = images.compare
    chunk: list[int] = []
    loaded: dict[int, Features] = {}
    taken, first = 0, (0, 0)
    for position, (source, target) in enumerate(pairs):
        pair = int(source), int(target)
        images.let_go(kept, {*loaded, *pair}, position)
        each = {i: images[i] for i in pair}
        cost = _cost(each, pair, loaded, compare)
        full = taken + cost + images.bytes > budget
        if chunk and (full or _grids(each, pair) != _grids(loaded, first)):
            yield chunk, loaded
            chunk, loaded, taken = [], {}, 0
            images.let_go(kept, pair, position)
            cost = _cost(each, pair, {}, compare)
        if not chunk:
            first = pair
            images.let_go(max(0, budget - cost), pair, position)
            least = max(cost + images.bytes, images.largest)
            if least > budget:
                raise ValueError(
                    f"memory_budget = {budget} bytes is too small: pair {pair} alone takes {least}"
                )
        chunk.append(position)
        loaded.update(each)
        taken += cost
    if chunk:
        yield chunk, loaded


def _cost(
    each: dict[int, Features], pair: tuple[int, int], loaded: dict[int, Features], compare: str
) -> int:
    fresh = sum(stacked_bytes(f, compare) for i, f in each.items() if i not in loaded)
    return fresh + pair_bytes(each[pair[0]], each[pair[1]], compare)


def _grids(loaded: dict[int, Features], pair: tuple[int, int]) -> tuple[Grid, Grid]:
    return loaded[pair[0]].grid, loaded[pair[1]].grid
