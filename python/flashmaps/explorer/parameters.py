"""What a page may ask with: plain values of known kinds, or a sentence that says what is wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flashmaps.escapes import printable

MOST_TEXT = 1000  # characters of a prompt
MOST_NAMES = 64  # layers, timesteps


class Parameters:
    """The parameters of one question, each read once, by kind; what is left over is refused.

    Every method raises ValueError that names the parameter, what came and what is wanted.
    """

    def __init__(self, given: Any) -> None:
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ValueError("the parameters must be a JSON object")
        self._given = dict(given)

    def done(self) -> None:
        """Raise ValueError if anything was not read."""
        if self._given:
            raise ValueError(f"not known here: {', '.join(map(_told, sorted(self._given)))}")

    def text(self, name: str, most: int = MOST_TEXT) -> str:
        """A string of at most ``most`` characters; missing: empty."""
        value = self._given.pop(name, "")
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {_told(value)}")
        if len(value) > most:
            raise ValueError(f"{name} has {len(value)} characters; at most {most} are taken")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds half of a surrogate pair, which is no text") from None
        return value

    def choice(self, name: str, among: Sequence[str]) -> str | None:
        """One of some strings, or None where it is missing or null."""
        value = self._given.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, str) or value not in among:
            raise ValueError(f"{name} is {_told(value)}; wanted one of {', '.join(among)}")
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number from ``low`` to ``high``, or None where it is missing or null."""
        value = self._given.pop(name, None)
        return None if value is None else _whole(name, value, low, high)

    def number(self, name: str, low: float, high: float) -> float | None:
        """A finite number from ``low`` to ``high``, or None where it is missing or null."""
        value = self._given.pop(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {_told(value)}")
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{name} is {_told(value)}; it takes {low:g} to {high:g}")
        return float(value)

    def names(self, name: str, among: Sequence[str]) -> tuple[str, ...] | None:
        """Several of some strings, in their order, or None where it is missing, null or empty."""
        value = self._given.pop(name, None)
        if value is None or value == []:
            return None
        if not isinstance(value, list) or len(value) > MOST_NAMES:
            raise ValueError(f"{name} must be a list of at most {MOST_NAMES} names")
        for each in value:
            if not isinstance(each, str) or each not in among:
                raise ValueError(f"{name} holds {_told(each)}, which is none of the known ones")
        return tuple(each for each in among if each in value)

    def wholes(self, name: str, low: int, high: int) -> tuple[int, ...] | None:
        """Several whole numbers, or None where it is missing, null or empty."""
        value = self._given.pop(name, None)
        if value is None or value == []:
            return None
        if not isinstance(value, list) or len(value) > MOST_NAMES:
            raise ValueError(f"{name} must be a list of at most {MOST_NAMES} whole numbers")
        return tuple(dict.fromkeys(_whole(name, each, low, high) for each in value))


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {_told(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {_told(value)}; it takes {low} to {high}")
    return value


def _told(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        shown = "a huge number"
    return printable(shown if len(shown) <= 60 else f"{shown[:60]}...")
