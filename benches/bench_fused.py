"""Entropy, maximum, argmax and expectation in one pass: every shape, every dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operations import FUSED
from shapes import SHAPES

LONG = ("wan", "tokens-16384", "tokens-65536")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(case: Callable[..., None], full: bool, name: str) -> None:
    if name in LONG and not full:
        pytest.skip("takes long: --full runs it")
    headline = name == "sd2-64"
    case(FUSED, SHAPES[name], compiled=headline or (full and name not in LONG), headline=headline)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(case: Callable[..., None], full: bool, dtype: torch.dtype) -> None:
    case(FUSED, SHAPES["sd2-64"], dtype, compiled=full)
