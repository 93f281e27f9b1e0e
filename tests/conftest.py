"""Fixtures of the core's tests: each backend that runs here, and outputs that begin as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import flashmaps as fm
import pytest
import torch

BACKENDS = [name for name, available in fm.backends().items() if available]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here; test_backends.py shows the others as skipped."""
    return request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small problems gain nothing from more, and lose much on a busy machine.

    test_determinism.py has every operation give the same bits on more.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """A test may change how many there are."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh() -> Iterator[None]:
    """torch.compile knows nothing of other tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def poison() -> Iterator[None]:
    """Every torch.empty is NaN, or the largest int64, until something is written to it.

    (What torch.use_deterministic_algorithms adds to that does not act on the CPU.)
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan() and torch.empty(1, dtype=torch.int64) == 2**63 - 1
    yield
    torch.use_deterministic_algorithms(before)
