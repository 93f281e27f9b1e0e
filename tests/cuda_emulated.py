"""Backend "cuda" on the CPU, emulated, as fixtures: see cuda_watched.py."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
from cuda_watched import Watched, load, random_tokens, shapes
from flashmaps.maps.backends import cuda

__all__ = ["Watched", "emulated", "load", "module", "random_tokens", "shapes"]

backends = importlib.import_module("flashmaps.maps.backends.choice")  # fm.backends is the function


@pytest.fixture(scope="session")
def module() -> ModuleType:
    return load()


@pytest.fixture
def emulated(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Backend "cuda", available on the CPU while the test runs."""
    backend = Watched(module)
    monkeypatch.setitem(backends._BACKENDS, "cuda", backend)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    yield backend
    module.set_memory([])
    module.set_limits(module.Limits(multiprocessors=4, shared_bytes=163 * 1024, architecture=80))
