"""What the host pays for one call, in microseconds: all of Python and drivers, kernels left out.

Launches do nothing (tests/mocked_launches.py), so that this is measured without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import flashmaps as fm
import pytest
import torch
from flashmaps.maps.backends import cpu

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mocked_launches

NAMES = ("entropy", "max", "argmax", "expectation")


class _NoKernel:
    """The extension, which computes nothing."""

    def __init__(self, native: Any) -> None:
        self._native = native
        problem, operands = native.Problem(), native.Operands()
        problem.query_batch = problem.key_batch = problem.maps = problem.heads = 1
        problem.queries = problem.keys = problem.dim = 1
        self._cost = native.reduce(problem, operands, {"max": 1}, 1, 0, True)

    def reduce(self, *given: Any) -> Any:
        return self._cost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


def silent(backend: str) -> contextlib.AbstractContextManager[Any]:
    """The backend on the CPU with launches that do nothing; skips where it is not built."""
    if backend == "triton":
        pytest.importorskip("triton")
        return mocked_launches.triton(note=False)
    if backend == "cuda":
        try:
            native = importlib.import_module("flashmaps._cuda")
        except ImportError as error:
            pytest.skip(f"the CUDA kernels are not built: {error}")
        return mocked_launches.cuda_cpp(native)
    if cpu._C is None:
        pytest.skip("the C++ extension is not built")
    return mock.patch.object(cpu, "_C", _NoKernel(cpu._C))


@pytest.mark.parametrize("call", ["reduce", "reduce, lse given", "map and reduce"])
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_host(host: Callable[..., None], backend: str, call: str) -> None:
    """Host time of a call; "map and reduce" makes the AttentionMap too."""
    query, key = (torch.randn(1, 5, 4096, 64).half() for _ in range(2))
    with silent(backend):
        lazy = fm.AttentionMap(query, key, backend=backend)
        known = fm.AttentionMap(query, key, lse=torch.zeros(1, 5, 4096), backend=backend)
        run: Callable[[], Any] = {
            "reduce": lambda: lazy.reduce(*NAMES),
            "reduce, lse given": lambda: known.reduce(*NAMES),
            "map and reduce": lambda: fm.AttentionMap(query, key, backend=backend).reduce(*NAMES),
        }[call]
        for _ in range(3):  # arranges and compiles
            run()
        host(backend, call, run)


def test_host_of_the_way_back(host: Callable[..., None]) -> None:
    """From the gradients of entropy and expectation to those of Q and K.

    Few tokens: what torch adds up on the way is done by this machine, and should cost little.
    """
    query, key = (torch.randn(1, 5, 256, 64).half().requires_grad_() for _ in range(2))
    with silent("triton"), torch.enable_grad():
        from flashmaps.kernels import backward as way_back

        given: list[Any] = []
        real = way_back.backward
        with mock.patch.object(way_back, "backward", lambda *a: given.extend(a) or real(*a)):
            lazy = fm.AttentionMap(query, key, key_grid=(16, 16), backend="triton")
            found = lazy.reduce("entropy", "expectation")
            loss = found.entropy.sum() + found.expectation.sum()
            torch.autograd.grad(loss, (query, key))
        for _ in range(3):
            real(*given)
        host("triton", "back", lambda: real(*given))
