"""Answers as few bytes: plain values and arrays of bytes, one after the other.

``[4 bytes, little endian: length of the JSON] [JSON] [bytes]``. A row of probabilities goes as one
byte a token, on a square-root scale, so that what is a thousandth of the largest is still seen.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from torch import Tensor


def pack(values: dict[str, Any], data: bytes = b"") -> bytes:
    """One answer. NaN and infinity, which JSON does not have, are null."""
    told = json.dumps(_finite(values), separators=(",", ":"), allow_nan=False).encode()
    return len(told).to_bytes(4, "little") + told + data


def unpack(answer: bytes) -> tuple[dict[str, Any], bytes]:
    """The values and the bytes of an answer."""
    length = int.from_bytes(answer[:4], "little")
    return json.loads(answer[4 : 4 + length]), answer[4 + length :]


def roots(row: Tensor) -> bytes:
    """Probabilities [M] as round(255 sqrt(p / max p)), a byte each."""
    largest = float(row.max())
    if largest <= 0:
        return bytes(len(row))
    return (row.clamp_min(0) / largest).sqrt().mul(255).round().byte().numpy().tobytes()


def levels(values: Tensor) -> tuple[bytes, float, float]:
    """Numbers [M] from 1 (the least) to 255 (the greatest), a byte each; 0 where there is none.

    Returns the bytes, the least and the greatest.
    """
    numbers = values.detach().float().cpu().numpy()
    there = np.isfinite(numbers)
    if not there.any():
        return bytes(numbers.size), math.nan, math.nan
    low, high = float(numbers[there].min()), float(numbers[there].max())
    scaled = np.zeros(numbers.size, dtype=np.uint8)
    share = (numbers[there] - low) / max(high - low, 1e-30)
    scaled[there.ravel()] = (1 + 254 * share).round().astype(np.uint8).ravel()
    return scaled.tobytes(), low, high


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
