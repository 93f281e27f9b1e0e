"""Backend "cpu": hands raw pointers, sizes and strides to the C++ extension (csrc/)."""

from __future__ import annotations

import importlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.maps.problem import Cost, Problem, Request, cost_of, empty_outputs, query_mask_reason


def _why_missing(error: ImportError) -> str:
    note = Path(__file__).parents[2] / "_native_build_failed.txt"  # left by setup.py
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
    if problem.masks_queries:
        return query_mask_reason("cpu")
    return None


def instruction_set() -> str | None:
    """The build that runs here: "avx512", "avx2" or "baseline" (NEON on Arm)."""
    return None if _C is None else _C.instruction_sets()[0]


def last_workspace_bytes() -> int:
    """Bytes beyond inputs and outputs that this thread's last call took in C++."""
    return getattr(_last, "workspace", 0)


class _Pointers:
    """Addresses for C++: kept alive, contiguous, and the bytes of copies that this took.

    When planning, 1 stands for whatever is there, and nothing is copied or read.
    """

    def __init__(self, planning: bool) -> None:
        self.planning = planning
        self.kept: list[Tensor] = []
        self.copied = 0

    def __call__(self, tensor: Tensor | None, *, any_strides: bool = False) -> int:
        if tensor is None:
            return 0
        if not any_strides and not tensor.is_contiguous():
            self.copied += tensor.numel() * tensor.element_size()
            if not self.planning:
                tensor = tensor.contiguous()
        self.kept.append(tensor)
        return 1 if self.planning else tensor.data_ptr()


def _native(problem: Problem, pointer: _Pointers) -> Any:
    """The C++ view of a problem."""
    native = _C.Problem()
    native.query = pointer(problem.query, any_strides=True)
    native.query_strides = problem.query.stride()
    native.key = pointer(problem.key, any_strides=True)
    native.key_strides = problem.key.stride()
    native.dtype = _DTYPES[problem.query.dtype]
    native.bias = pointer(problem.bias)
    native.weights = pointer(problem.head_weights)
    native.pairs = pointer(problem.pairs)
    if problem.lse is not None:
        native.lse = pointer(problem.lse, any_strides=True)
        native.lse_strides = problem.lse.stride()
    native.query_batch, native.heads, native.queries, native.dim = problem.query.shape
    native.key_batch, native.keys = problem.key.shape[0], problem.key.shape[2]
    if problem.key_group > 1:
        native.key_group = problem.key_group
    native.maps = problem.batch
    native.scale = problem.scale
    native.normalize = _NORMALIZE[problem.normalize]
    native.grid_height, native.grid_width = problem.grid_height, problem.grid_width
    return native


def _call(problem: Problem, request: Request, outputs: dict[str, Tensor] | None) -> tuple[Any, int]:
    """What the C++ call took, and what Python holds for it; without outputs only planned."""
    pointer = _Pointers(planning=outputs is None)
    operands = _C.Operands()
    held = 0
    if "return_probability" in request.names:
        partner = request.partner
        assert partner is not None and partner.lse is not None
        operands.partner = _native(partner, pointer)
        if partner.normalize != "block":
            held = _line_mass_bytes(partner)
            operands.partner_line_mass = (
                1 if outputs is None else pointer(_line_mass(partner, request.memory_budget))
            )
    native = _native(problem, pointer)
    operands.right = pointer(request.right)
    operands.left = pointer(request.left)
    operands.cells = pointer(request.cells)
    operands.right_columns = 0 if request.right is None else request.right.shape[2]
    operands.left_columns = 0 if request.left is None else request.left.shape[2]
    operands.k = request.k
    operands.num_cells = request.num_cells
    pointers = {name: 1 if outputs is None else outputs[name].data_ptr() for name in request.names}
    held += pointer.copied
    budget = 0  # none
    if request.memory_budget is not None:
        budget = max(1, request.memory_budget - held)
    threads = torch.get_num_threads()
    return _C.reduce(native, operands, pointers, threads, budget, outputs is None), held


def plan(problem: Problem, request: Request) -> Cost:
    """What `reduce` takes: C++ by its own account, and the copies made for it."""
    native, held = _call(problem, request, None)
    cost = cost_of(problem, request, passes=native.passes, workspace=held + native.workspace)
    cost = replace(cost, share=native.threads / torch.get_num_threads())
    partner = request.partner
    if partner is not None and partner.normalize != "block":
        mass = plan(*_line_mass_request(partner, request.memory_budget))
        mass = replace(mass, workspace=mass.workspace + _line_mass_bytes(partner, index=True))
        return mass.then(cost)
    return cost


def reduce(problem: Problem, request: Request) -> dict[str, Tensor]:
    """Every requested field in one call; see `reference.reduce` for what each one is."""
    outputs = empty_outputs(problem, request)
    native, _ = _call(problem, request, outputs)
    _last.workspace = native.workspace
    return outputs


# Mass of each line of each row before it is normalised: [P, N, lines].


def _line_mass(problem: Problem, memory_budget: int | None) -> Tensor:
    return reduce(*_line_mass_request(problem, memory_budget))["pooled_keys"]


def _line_mass_request(problem: Problem, memory_budget: int | None) -> tuple[Problem, Request]:
    index = torch.arange(problem.num_keys)
    rows = problem.normalize == "rows"
    line = index // problem.grid_width if rows else index % problem.grid_width
    if memory_budget is not None:
        memory_budget -= _line_mass_bytes(problem, index=True)
    request = Request(
        ("pooled_keys",), cells=line, num_cells=problem.lines, memory_budget=memory_budget
    )
    return problem._replace(normalize="block"), request


def _line_mass_bytes(problem: Problem, *, index: bool = False) -> int:
    """Of the result; and of the line of each key, and what it is made from."""
    mass = problem.batch * problem.num_queries * problem.lines * problem.itemsize
    return mass + (3 * 8 * problem.num_keys if index else 0)
