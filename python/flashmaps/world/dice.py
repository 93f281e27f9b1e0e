"""Random numbers and angles that are the same bits on every machine.

What a scene is made of must not depend on the processor, the C library or the version of numpy. So
the world uses only operations that IEEE 754 defines to the last bit (+ - * / and the square root,
one at a time), integer arithmetic, and two documented streams: ``random.Random(n).random()``, which
Python promises to keep, and the raw output of numpy's PCG64, which numpy promises to keep. Sines
come from a polynomial here, since those of C libraries and of numpy differ in the last bit.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Range = tuple[float, float]


def hashed(*key: object) -> int:
    """256 bits that depend on every part of the key, and on nothing else."""
    text = "\x1f".join(map(str, key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


class Dice:
    """A stream of random choices that a key fixes."""

    def __init__(self, *key: object) -> None:
        self.seed = hashed(*key)
        self._random = random.Random(self.seed).random

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        return self._random()

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self._random()

    def near(self, low: float, high: float) -> float:
        """In [low, high), more often near the middle: the mean of two uniform numbers."""
        return low + (high - low) * (self._random() + self._random()) / 2

    def whole(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int((high - low + 1) * self._random())

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[int(len(choices) * self._random())]


def noise_bytes(seed: int, count: int) -> np.ndarray:
    """Uniform bytes, [count] uint8."""
    raw = np.random.PCG64(seed).random_raw(-(-count // 8))
    return raw.astype("<u8").view(np.uint8)[:count]


def turn(degrees: float) -> tuple[float, float]:
    """(cos, sin) of an angle, good to 1e-15 and the same everywhere."""
    quarter = int(degrees / 90 + (0.5 if degrees >= 0 else -0.5))
    x = (degrees - 90 * quarter) * 0.017453292519943295  # at most pi / 4, so Taylor converges fast
    square = x * x
    cosine, sine = 1.0, 1.0
    for n in range(16, 0, -2):
        cosine = 1 - cosine * square / (n * (n - 1))
        sine = 1 - sine * square / (n * (n + 1))
    sine *= x
    quarter %= 4
    if quarter == 1:
        return -sine, cosine
    if quarter == 2:
        return -cosine, -sine
    if quarter == 3:
        return sine, -cosine
    return cosine, sine
