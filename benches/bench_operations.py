"""Every other operation beside its rivals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from operations import FUSED, OPERATIONS, Operation
from shapes import SHAPES

REST = [operation for operation in OPERATIONS if operation is not FUSED]


@pytest.mark.parametrize("operation", REST, ids=lambda operation: operation.name)
def test_sd2_64(case: Callable[..., None], operation: Operation) -> None:
    case(operation, SHAPES["sd2-64"])


@pytest.mark.parametrize("operation", REST, ids=lambda operation: operation.name)
@pytest.mark.parametrize("name", ["sd2-32", "sdxl-64"])
def test_more_shapes(
    case: Callable[..., None], full: bool, name: str, operation: Operation
) -> None:
    if not full:
        pytest.skip("--full runs it")
    case(operation, SHAPES[name])


def test_keops() -> None:
    """Shows among the skipped when KeOps, a rival above, is not there."""
    pytest.importorskip("pykeops", reason="KeOps is not installed: pip install pykeops")
