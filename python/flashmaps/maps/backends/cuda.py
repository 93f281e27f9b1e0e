"""Backend "cuda": CUDA C++ kernels (csrc/cuda/), handed pointers, sizes and torch's stream.

`Backend` takes the compiled module, so that tests drive the same kernels compiled for the host
through the very same Python. Nothing here waits for the GPU or reads a value from it: calls can be
captured in a CUDA graph. docs/cuda.md has the design.
"""

from __future__ import annotations

import functools
import importlib
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.maps.backends.cuda_blocks import Shape
from flashmaps.maps.backends.cuda_call import Context, device_index
from flashmaps.maps.backends.cuda_launches import Run
from flashmaps.maps.gpu import passes_of
from flashmaps.maps.problem import Cost, Problem, Request, cost_of, query_mask_reason
from flashmaps.maps.tape import Recorder, Tape, Tapes, call_key, tensors_of, without_memory

# Head dimensions with kernels. Others would run, padded, but nobody has looked at what they cost.
DIMS = (40, 64, 80, 128, 160)

# (architecture, head dimension) that "auto" takes this backend for: those where recorded
# measurements (benches/results) say that it beats "triton" on every operation. None is recorded.
AUTOMATIC: frozenset[tuple[int, int]] = frozenset()

_REFUSED = ("topk_values", "topk_indices")


def _note() -> str | None:
    path = Path(__file__).parents[2] / "_cuda_build_failed.txt"  # left by setup.py
    return path.read_text("utf-8").strip() if path.exists() else None


_INSTEAD = 'use backend="triton" on a GPU, or "cpu" and "reference" on the CPU'

_native: Any = None
_missing: str | None = None
try:
    _native = importlib.import_module("flashmaps._cuda")
except ImportError as error:  # installed without nvcc, or for another interpreter
    _missing = f"the CUDA kernels are not built: {_note() or error}; {_INSTEAD}"


@functools.cache
def _limits(native: Any, device: int) -> Any:
    return native.limits(device)


def unavailable_reason() -> str | None:
    """Why the compiled kernels cannot run here at all, or None."""
    if _missing is not None:
        return _missing
    if not torch.cuda.is_available():
        return f"the CUDA kernels are built, but torch sees no GPU here; {_INSTEAD}"
    if torch.compiler.is_compiling():  # which cannot look into the module; `reduce` will
        return None
    try:
        limits = _limits(_native, torch.cuda.current_device())
    except RuntimeError as error:
        return f"the CUDA kernels are built, but the driver refuses: {error}; {_INSTEAD}"
    return _too_old(limits.architecture)


def _too_old(architecture: int) -> str | None:
    if architecture >= 80:
        return None
    return (
        "the CUDA kernels need compute capability 8.0 (Ampere) or later, this GPU has "
        f"{architecture // 10}.{architecture % 10}; {_INSTEAD}"
    )


def what_runs() -> str:
    """The card that kernels run on by default."""
    return f"CUDA C++ kernels on {torch.cuda.get_device_name()}"


def refusal(request: Request) -> str | None:
    """Why these statistics are not for this backend, or None; `Backend.supports` is for maps."""
    if any(name in _REFUSED for name in request.names):
        return 'it has no top-k: use backend="triton" or backend="reference" for that'
    return None


class Backend:
    """The functions of a backend (ARCHITECTURE.md) on one compiled module.

    ``device_type`` is where its pointers are good: "cuda", or "cpu" for kernels compiled for the
    host. ``shapes`` replaces the choice of blocks (tests).
    """

    def __init__(
        self, native: Any, device_type: str = "cuda", shapes: tuple[Shape, ...] = ()
    ) -> None:
        self.native = native
        self.device_type = device_type
        self.shapes = shapes
        self._last = threading.local()
        self._tapes = Tapes()  # of each thread: playing writes addresses into them

    def unavailable_reason(self) -> str | None:
        return unavailable_reason() if self.device_type == "cuda" else None

    def what_runs(self) -> str:
        runs = what_runs() if self.device_type == "cuda" else "CUDA C++ kernels, emulated"
        return f"{runs}; gradients by backend 'triton'"

    def supports(self, problem: Problem) -> str | None:
        """Why this problem cannot run here, or None."""
        reason = self.unavailable_reason()
        if reason is not None:
            return reason
        device = problem.query.device
        if device.type != self.device_type:
            return f"backend 'cuda' needs tensors on a GPU, these are on {device}"
        if problem.masks_queries:
            return query_mask_reason("cuda")
        if problem.query.dtype not in (torch.float16, torch.bfloat16):
            return (
                "backend 'cuda' takes float16 and bfloat16, these are "
                f"{str(problem.query.dtype).removeprefix('torch.')}: convert Q and K, or use "
                'backend="triton"'
            )
        dim = problem.query.shape[3]
        if dim not in DIMS:
            return (
                f"backend 'cuda' has kernels for head dimensions {', '.join(map(str, DIMS))}, this "
                f'one is {dim}: use backend="triton"'
            )
        if problem.normalize != "block":
            return (
                f"backend 'cuda' does not normalise {problem.normalize} of the key grid: use "
                'backend="triton"'
            )
        return None

    def automatic(self, problem: Problem) -> bool:
        """Whether "auto" may choose this backend for a problem that it supports."""
        if not AUTOMATIC:
            return False
        architecture = self.limits(problem.query.device).architecture
        return (architecture, problem.query.shape[3]) in AUTOMATIC

    def limits(self, device: torch.device) -> Any:
        if self.device_type != "cuda":
            return self.native.limits(0)
        return _limits(self.native, device_index(device))

    def plan(self, problem: Problem, request: Request) -> Cost:
        """What `reduce` takes: its launches, arranged and not made."""
        tape = self._tape(problem, request)
        passes = passes_of(problem, request, tape.scores)
        return cost_of(problem, request, passes=passes, workspace=tape.workspace)

    def reduce(self, problem: Problem, request: Request) -> dict[str, Tensor]:
        """Every requested field; see `reference.reduce` for what each one is."""
        tape = self._tape(problem, request)
        device = problem.query.device
        tensors = tensors_of(problem, request)
        if self.device_type != "cuda":
            outputs = tape.play(tensors, device, self._context(0, 0))
        else:
            index = device_index(device)
            if index == torch.cuda.current_device():
                outputs = tape.play(tensors, device, self._context_of(index))
            else:
                with torch.cuda.device(device):
                    outputs = tape.play(tensors, device, self._context_of(index))
        self._last.workspace = tape.workspace
        return outputs

    def _context_of(self, index: int) -> Context:
        return self._context(torch._C._cuda_getCurrentRawStream(index), index)

    def _context(self, stream: int, index: int) -> Context:
        return Context(self.native.Stream(stream, index))

    def last_workspace_bytes(self) -> int:
        """Bytes beyond inputs and outputs that this thread's last call allocated itself."""
        return getattr(self._last, "workspace", 0)

    def _tape(self, problem: Problem, request: Request) -> Tape:
        """What this call does, arranged when the first one like it comes."""
        limits = self.limits(problem.query.device)
        card = (limits.multiprocessors, limits.shared_bytes, limits.architecture)

        def record() -> Tape:
            reason = refusal(request) or _too_old(limits.architecture)
            if reason is not None:
                raise RuntimeError(f"backend 'cuda' cannot run this: {reason}")
            recorder = Recorder()
            run = Run(self, problem.query.device, request.memory_budget, recorder)
            there, asked, inputs = without_memory(problem, request, recorder)
            outputs = run.reduce(there, asked)
            return recorder.tape(inputs, outputs, run.workspace, run.scores)

        return self._tapes.get(call_key(problem, request, card), record)


here = Backend(_native)
supports, reduce, plan, automatic = here.supports, here.reduce, here.plan, here.automatic
last_workspace_bytes = here.last_workspace_bytes
