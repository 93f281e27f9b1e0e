"""What a plain argument may be, decided in one place: whole numbers, numbers, switches, choices.

Python takes True for 1, "yes" for true, and `int` cuts 2.9 to 2; here each of them is an error that
names the argument, what it got and what it wants. Numbers of numpy and of 0-dimensional tensors
count as numbers. Values of the wrong kind raise TypeError, values out of range ValueError, unless
a caller says that both are ValueError.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BOOLEANS = (bool, np.bool_)
LARGEST_WHOLE = 2**63 - 1  # beyond it len() and tensors fail, in words of their own


def is_boolean(value: object) -> bool:
    """True or False, also numpy's and torch's."""
    return isinstance(value, _BOOLEANS) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def as_whole(value: object) -> int | None:
    """``value`` as an int if it is a whole number of an integer type; None for all else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if is_boolean(value) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _between(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if least is not None:
        return f" >= {least}"
    return f" <= {most}" if most is not None else ""


def whole(
    name: str,
    value: object,
    least: int | None = None,
    most: int | None = None,
    *,
    kind: type[Exception] = ValueError,
) -> int:
    """A whole number from ``least`` to ``most``, of at most 64 bits.

    ``kind`` is the error of what is no whole number; one out of range is a ValueError.
    """
    found = as_whole(value)
    if found is not None and abs(found) > LARGEST_WHOLE:
        limits = _between(least, LARGEST_WHOLE if most is None else most)
        raise ValueError(
            f"{name} must be a whole number{limits}, got one of {found.bit_length()} bits"
        )
    if found is not None and _inside(found, least, most):
        return found
    error = kind if found is None else ValueError
    raise error(f"{name} must be a whole number{_between(least, most)}, got {value!r}")


def _inside(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> float:
    """A finite number, at least ``least``, at most ``most`` and more than ``above``."""
    found = _as_float(value)
    if math.isfinite(found) and _inside(found, least, most) and (above is None or found > above):
        return found
    limits = _between(least, most)
    if above is not None:
        limits = f" above {above}" + (f" and <= {most}" if most is not None else "")
    raise ValueError(f"{name} must be a finite number{limits}, got {value!r}")


def _as_float(value: object) -> float:
    """NaN for what is no number, or one beyond all floats."""
    single = isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex()
    if is_boolean(value) or not (isinstance(value, numbers.Real) or single):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.nan


def switch(name: str, value: object) -> bool:
    """True or False, and nothing that Python would take for one of them."""
    if isinstance(value, _BOOLEANS):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def unicode_text(name: str, value: object) -> str:
    """A string that UTF-8 can write: tokenizers and files take no other."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={value!a} is no Unicode text: {value[error.start]!a} is half a character"
        ) from None
    return value


def sides(value: Any) -> tuple[int, int] | None:
    """(height, width) in whole numbers, or None for what is no pair of them."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        found = [as_whole(each) for each in value]
    except TypeError:
        return None
    if len(found) != 2 or None in found:
        return None
    return found[0], found[1]  # type: ignore[return-value]
