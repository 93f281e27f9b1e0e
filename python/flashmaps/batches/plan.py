"""What a batch will take, before it runs: passes, bytes, and time at rates that were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashmaps.matching.pair_order import most_reads

# Bytes on disk of a row of tokens, of points, and of a pair; measured on scenes of the world.
ROW_BYTES = {"tokens": 70, "points": 40, "pairs": 0}
PAIR_BYTES = 80


@dataclass(frozen=True)
class Rates:
    """Seconds of one forward pass of one image, and of one pair, each on one device."""

    seconds_per_pass: float
    seconds_per_pair: float


@dataclass(frozen=True)
class BatchPlan:
    """What a batch will take. Printed, it is a short table.

    Attributes:
        images, pairs: how many; ``left_images``, ``left_pairs``: that are not done yet.
        passes: forward passes that are left.
        feature_bytes, output_bytes: on disk when all is done.
        reads: images that are read for the pairs, at most; ``read_bytes``: of them.
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
        if self.rates is not None:
            one, ten = (self.seconds(n) or 0.0 for n in (1, 10))
            rows += [
                ("a forward pass", f"{self.rates.seconds_per_pass:.3g} s, measured"),
                ("a pair", f"{self.rates.seconds_per_pair:.3g} s, measured"),
                ("time", f"{_time(one)} on one such device, {_time(ten)} on ten"),
            ]
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def plan(
    images: int, pairs: int, *, left: tuple[int, int], tokens: int, points: int | None, rows: str,
    feature_bytes: int, passes: int, side: int, rates: Rates | None,
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
    )  # fmt: skip


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
