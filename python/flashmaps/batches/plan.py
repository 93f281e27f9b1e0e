"""What a batch will take, before it runs: passes, bytes, and time at rates that were measured."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmaps.matching.pair_order import most_reads, tile_order

# Bytes on disk of a row of tokens, of points, and of a pair; measured on scenes of the world.
ROW_BYTES = {"tokens": 70, "points": 40, "pairs": 0}
PAIR_BYTES = 80


@dataclass(frozen=True)
class Rates:
    """Seconds of one forward pass of one image, and of one pair, each on one device.

    ``measured``: here and now; else they were given, of a device that is not here.
    """

    seconds_per_pass: float
    seconds_per_pair: float
    measured: bool = True


@dataclass(frozen=True)
class BatchPlan:
    """What a batch will take. Printed, it is a short table.

    Attributes:
        images, pairs: how many; ``left_images``, ``left_pairs``: that are not done yet.
        passes: forward passes that are left.
        feature_bytes, output_bytes: on disk when all is done.
        reads: images that are read for the pairs, at most; ``read_bytes``: of them.
        simulated: images that were read in a simulation of as many pairs, drawn at random.
        rates: that were measured; None: no time is told.
    """

    images: int
    pairs: int
    left_images: int
    left_pairs: int
    passes: int
    feature_bytes: int
    output_bytes: int
    reads: int
    rates: Rates | None = None
    simulated: int | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes of features that are read for the pairs, at most."""
        return self.reads * self.feature_bytes // max(1, self.images)

    def seconds(self, devices: int = 1) -> float | None:
        """On so many devices like the one that was measured, each with its share."""
        if self.rates is None:
            return None
        features = self.passes * self.rates.seconds_per_pass
        return (features + self.left_pairs * self.rates.seconds_per_pair) / devices

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        names = (
            "images", "pairs", "left_images", "left_pairs", "passes", "feature_bytes",
            "output_bytes", "reads", "read_bytes",
        )  # fmt: skip
        rates = self.rates
        return {
            **{name: getattr(self, name) for name in names},
            "simulated_reads": self.simulated,
            "rates_measured": None if rates is None else rates.measured,
            "seconds_per_pass": None if rates is None else rates.seconds_per_pass,
            "seconds_per_pair": None if rates is None else rates.seconds_per_pair,
            "hours": {n: None if rates is None else self.seconds(n) / 3600 for n in (1, 10)},  # type: ignore[operator]
        }

    def __str__(self) -> str:
        rows = [
            ("images", f"{self.images}, {self.left_images} to do"),
            ("pairs", f"{self.pairs}, {self.left_pairs} to do"),
            ("forward passes", f"{self.passes}"),
            ("features on disk", f"{self.feature_bytes / 1e6:.1f} MB"),
            ("matches on disk", f"{self.output_bytes / 1e6:.1f} MB, about"),
            ("images read for pairs", f"{self.reads} at most, {self.read_bytes / 1e6:.1f} MB"),
        ]
        if self.simulated is not None:
            size = self.simulated * self.feature_bytes / max(1, self.images) / 1e6
            rows.append(
                ("in a simulation", f"{self.simulated}, {size:.1f} MB, pairs drawn at random")
            )
        if self.rates is not None:
            told = "measured" if self.rates.measured else "given, not measured on hardware"
            one, ten = (self.seconds(n) or 0.0 for n in (1, 10))
            rows += [
                ("a forward pass", f"{self.rates.seconds_per_pass:.3g} s, {told}"),
                ("a pair", f"{self.rates.seconds_per_pair:.3g} s, {told}"),
                ("time", f"{_time(one)} on one such device, {_time(ten)} on ten"),
            ]
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def plan(
    images: int, pairs: int, *, left: tuple[int, int], tokens: int, points: int | None, rows: str,
    feature_bytes: int, passes: int, side: int, rates: Rates | None, simulated: int | None = None,
) -> BatchPlan:  # fmt: skip
    """The plan of n images and P pairs.

    Args:
        left: images and pairs that are to do.
        tokens: of an image; points: of all pairs together, where rows are points.
        feature_bytes, passes: of one image.
        side: images on a tile's side.
    """
    lines = points if rows == "points" and points is not None else pairs * tokens
    return BatchPlan(
        images, pairs, *left, passes=left[0] * passes, feature_bytes=images * feature_bytes,
        output_bytes=pairs * PAIR_BYTES + lines * ROW_BYTES[rows],
        reads=most_reads(images, left[1], side), rates=rates,
        simulated=simulated,
    )  # fmt: skip


def simulated_reads(images: int, pairs: int, side: int, seed: int = 0) -> int:
    """How many images are read for so many pairs of so many images, drawn at random, in the order
    of tiles, by who holds 2 ``side`` images and lets go of the one that is needed last."""
    drawn = np.random.default_rng(seed).integers(images, size=(pairs, 2))
    asked = drawn[tile_order(drawn, side)].ravel().tolist()
    following, last = [0] * len(asked), dict.fromkeys(range(images), len(asked))
    for place in range(len(asked) - 1, -1, -1):
        following[place], last[asked[place]] = last[asked[place]], place
    held: dict[int, int] = {}  # and when it is needed next
    latest: list[tuple[int, int]] = []  # a heap of (minus that, image), with some that are past
    reads = 0
    for place, image in enumerate(asked):
        reads += image not in held
        held[image] = following[place]
        while len(held) > 2 * side:
            when, other = heapq.heappop(latest)
            if other != image and held.get(other) == -when:
                del held[other]
        heapq.heappush(latest, (-following[place], image))
    return reads


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
