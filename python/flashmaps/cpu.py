"""Backend "cpu": hands raw pointers, sizes and strides to the C++ extension (csrc/)."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps._problem import Problem, Request, empty_outputs


def _why_missing(error: ImportError) -> str:
    note = Path(__file__).with_name("_native_build_failed.txt")  # left by setup.py
    if note.exists():
        return f"the C++ extension is not built: {note.read_text('utf-8').strip()}"
    return (
        f"the C++ extension is not built for this Python ({error}); install flashmaps again with a "
        "C++20 compiler there, or run `make build` in a checkout"
    )


_C: Any = None
_missing: str | None = None
try:
    _C = importlib.import_module("flashmaps._C")
except ImportError as error:  # installed without a compiler, or for another interpreter
    _missing = _why_missing(error)

_last = threading.local()

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_NORMALIZE = {"block": 0, "rows": 1, "columns": 2}


def unavailable_reason() -> str | None:
    """Why the compiled kernel cannot run at all, or None."""
    return _missing


def supports(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    if _missing is not None:
        return _missing
    if problem.query.device.type != "cpu":
        return f"backend 'cpu' needs tensors on the CPU, these are on {problem.query.device}"
    return None


def instruction_set() -> str | None:
    """The build that runs here: "avx512", "avx2" or "baseline" (NEON on Arm)."""
    return None if _C is None else _C.instruction_sets()[0]


def last_workspace_bytes() -> int:
    """Bytes beyond inputs and outputs that this thread's last call took in C++."""
    return getattr(_last, "workspace", 0)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native(problem: Problem, keep: list[Tensor]) -> object:
    """The C++ view of a problem. ``keep`` holds what it points into until the call is over."""

    def contiguous(tensor: Tensor | None) -> Tensor | None:
        if tensor is not None:
            tensor = tensor.contiguous()
            keep.append(tensor)
        return tensor

    native = _C.Problem()
    keep += (problem.query, problem.key)
    native.query = _pointer(problem.query)
    native.query_strides = problem.query.stride()
    native.key = _pointer(problem.key)
    native.key_strides = problem.key.stride()
    native.dtype = _DTYPES[problem.query.dtype]
    native.bias = _pointer(contiguous(problem.bias))
    native.weights = _pointer(contiguous(problem.head_weights))
    native.pairs = _pointer(contiguous(problem.pairs))
    native.lse = _pointer(contiguous(problem.lse))
    native.query_batch, native.heads, native.queries, native.dim = problem.query.shape
    native.key_batch, native.keys = problem.key.shape[0], problem.key.shape[2]
    native.maps = problem.batch
    native.scale = problem.scale
    native.normalize = _NORMALIZE[problem.normalize]
    native.grid_height, native.grid_width = problem.grid_height, problem.grid_width
    return native


def reduce(problem: Problem, request: Request) -> dict[str, Tensor]:
    """Every requested field in one call; see `flashmaps.reference.reduce` for what each one is."""
    outputs = empty_outputs(problem, request)
    keep: list[Tensor] = []
    native = _native(problem, keep)
    operands = _C.Operands()
    for name in ("right", "left", "cells"):
        operand = getattr(request, name)
        if operand is not None:
            operand = operand.contiguous()
            keep.append(operand)
            setattr(operands, name, _pointer(operand))
    operands.right_columns = 0 if request.right is None else request.right.shape[2]
    operands.left_columns = 0 if request.left is None else request.left.shape[2]
    operands.k = request.k
    operands.num_cells = request.num_cells
    line_mass: Tensor | None = None
    if "return_probability" in outputs:
        partner = request.partner
        assert partner is not None
        if partner.lse is None:
            lse = Request(("lse",))
            partner = partner._replace(lse=reduce(partner, lse)["lse"])
        if partner.normalize != "block":
            line_mass = _line_mass(partner)
            keep.append(line_mass)
        operands.partner = _native(partner, keep)
        operands.partner_line_mass = _pointer(line_mass)
    pointers = {name: _pointer(out) for name, out in outputs.items()}
    _last.workspace = _C.reduce(native, operands, pointers, torch.get_num_threads())
    return outputs


def _line_mass(problem: Problem) -> Tensor:
    """Mass of each line of each row before it is normalised: [P, N, lines]."""
    index = torch.arange(problem.num_keys)
    rows = problem.normalize == "rows"
    line = index // problem.grid_width if rows else index % problem.grid_width
    request = Request(("pooled_keys",), cells=line, num_cells=problem.lines)
    return reduce(problem._replace(normalize="block"), request)["pooled_keys"]
