"""Backend "cuda" on the CPU: its kernels compiled for the host, driven by the backend's own Python.

Kernels may touch the tensors of a call and nothing else; the emulation watches that, and races.
cuda_emulated.py has it as fixtures; benches/gpu/work.py, without pytest, as a backend.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from flashmaps.maps.backends import cuda, cuda_blocks
from flashmaps.maps.backends.cuda_call import Context
from flashmaps.maps.tape import Play
from torch import Tensor


def load(path: Path | None = None) -> ModuleType:
    """The module, compiled if need be."""
    if path is None:
        import native

        path = native.build("_emulated")
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

    def _context(self, stream: int, index: int) -> Context:
        return super()._context(stream, index)._replace(watch=self._watch)

    def _watch(self, name: str, call: Play) -> None:
        self.launches.append(name)
        self.native.set_memory([_reach(tensor) for tensor in call.tensors if tensor is not None])


def _reach(tensor: Tensor) -> tuple[int, int, str]:
    """(address, bytes, name) of everything between a tensor's first and last number."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), (last + 1) * tensor.element_size(), str(tuple(tensor.shape))


def shapes(*of: tuple[int, int, bool]) -> tuple[Any, ...]:
    """Blocks in place of the backend's choice: (warps along rows, along columns, resident)."""
    return tuple(cuda_blocks.Shape(rows, columns, resident, 1) for rows, columns, resident in of)


def random_tokens(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.7 * torch.randn(shape, generator=generator)).to(dtype)
