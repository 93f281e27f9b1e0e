"""Backend "cuda" on the CPU: its kernels compiled for the host, driven by the backend's own Python.

Kernels may touch the tensors of a call and nothing else; the emulation watches that, and races.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import native
import pytest
import torch
from flashmaps.maps.backends import cuda, cuda_blocks, cuda_launches
from flashmaps.maps.problem import Problem, Request
from torch import Tensor

backends = importlib.import_module("flashmaps.maps.backends.choice")  # fm.backends is the function


def load(path: Path | None = None) -> ModuleType:
    """The module, compiled if need be."""
    path = native.build("_emulated") if path is None else path
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watched(cuda.Backend):
    """Kernels may touch inputs, outputs and workspace, each exactly as long as it is."""

    def __init__(self, module: ModuleType, shapes: tuple[Any, ...] = ()) -> None:
        super().__init__(module, "cpu", shapes)
        self.launches: list[str] = []

    def _run(self, problem: Problem, request: Request, *, planning: bool) -> cuda_launches.Run:
        run = super()._run(problem, request, planning=planning)
        known = [t for t in (*_tensors(problem), *_tensors(request)) if t.device.type == "cpu"]
        empty, copy, launch, reduce = run.empty, run.copy, run.launch, run.reduce

        def watched_empty(*shape: int, **options: Any) -> Tensor:
            known.append(empty(*shape, **options))
            return known[-1]

        def watched_copy(tensor: Tensor) -> Tensor:
            known.append(copy(tensor))
            return known[-1]

        def watched_reduce(of: Problem, what: Request, outputs: dict[str, Tensor] | None) -> None:
            known.extend((outputs or {}).values())
            reduce(of, what, outputs)

        def watched_launch(function: Any, arguments: Any, *more: Any) -> None:
            if not planning:
                self.launches.append(function.__name__)
                self.native.set_memory([_reach(tensor) for tensor in known])
            launch(function, arguments, *more)

        run.empty, run.copy = watched_empty, watched_copy  # type: ignore[method-assign]
        run.launch, run.reduce = watched_launch, watched_reduce  # type: ignore[method-assign]
        return run


def _tensors(of: Any) -> Iterator[Tensor]:
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, tuple):
        for each in of:
            yield from _tensors(each)
    elif is_dataclass(of):
        for field in fields(of):
            yield from _tensors(getattr(of, field.name))


def _reach(tensor: Tensor) -> tuple[int, int, str]:
    """(address, bytes, name) of everything between a tensor's first and last number."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), (last + 1) * tensor.element_size(), str(tuple(tensor.shape))


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


def shapes(*of: tuple[int, int, bool]) -> tuple[Any, ...]:
    """Blocks in place of the backend's choice: (warps along rows, along columns, resident)."""
    return tuple(cuda_blocks.Shape(rows, columns, resident, 1) for rows, columns, resident in of)


def random_tokens(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.7 * torch.randn(shape, generator=generator)).to(dtype)
