"""Backend "triton": GPU kernels. NVIDIA, and nothing in them that only NVIDIA could run."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from flashmaps.kernels import INTERPRETING, unavailable_reason
from flashmaps.maps.gpu import passes_of
from flashmaps.maps.problem import Cost, Problem, Request, cost_of, query_mask_reason
from flashmaps.maps.tape import Tape, Tapes, call_key, tensors_of
from torch import Tensor

if TYPE_CHECKING:
    from flashmaps.kernels.settings import Settings

_last = threading.local()
_tapes = Tapes()

MOST_DIMS = 256


def supports(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    reason = unavailable_reason()
    if reason is not None:
        return reason
    device = problem.query.device
    if device.type != ("cpu" if INTERPRETING else "cuda"):
        where = "the CPU (TRITON_INTERPRET=1)" if INTERPRETING else "a GPU"
        return f"backend 'triton' needs tensors on {where}, these are on {device}"
    if problem.masks_queries:
        return query_mask_reason("triton")
    if problem.query.dtype == torch.float64:
        return (
            "backend 'triton' computes in float32 and takes no float64: convert Q and K with "
            '.float(), or use backend="reference"'
        )
    dims = problem.query.shape[3]
    if dims > MOST_DIMS:
        return f"backend 'triton' takes head dimensions up to {MOST_DIMS}, this one is {dims}"
    if INTERPRETING and problem.query.dtype == torch.bfloat16:
        return "triton's interpreter (TRITON_INTERPRET=1) has no bfloat16 arithmetic"
    return None


def what_runs() -> str:
    """The card that kernels run on by default, or that they are interpreted."""
    if INTERPRETING:
        return "Triton kernels, interpreted on the CPU (TRITON_INTERPRET=1)"
    return f"Triton kernels on {torch.cuda.get_device_name()}"


def last_workspace_bytes() -> int:
    """Bytes beyond inputs and outputs that this thread's last call allocated itself."""
    return getattr(_last, "workspace", 0)


def plan(problem: Problem, request: Request) -> Cost:
    """What `reduce` takes: its launches, made on "meta" and not run."""
    tape = _tape(problem, request)
    passes = passes_of(problem, request, tape.scores)
    return cost_of(problem, request, passes=passes, workspace=tape.workspace)


def reduce(problem: Problem, request: Request) -> dict[str, Tensor]:
    """Every requested field; see `reference.reduce` for what each one is."""
    return play(_tape(problem, request), tensors_of(problem, request), problem.query.device)


def _tape(problem: Problem, request: Request) -> Tape:
    """What this call does, arranged when the first one like it comes."""
    device = problem.query.device
    here = _settings_here(torch.device("cuda") if device.type == "meta" else device)

    def record() -> Tape:
        from flashmaps.kernels import launches

        return launches.record(problem, request, here)

    return _tapes.get(call_key(problem, request, here), record)


def _settings_here(device: torch.device) -> Settings:
    from flashmaps.kernels.settings import settings_here

    return settings_here(device)


def play(tape: Tape, tensors: tuple[Tensor | None, ...], device: torch.device) -> dict[str, Tensor]:
    """What a tape does, on the tensors of a call."""
    from flashmaps.kernels.run import context_of

    if device.type != "cuda" or device.index == torch.cuda.current_device():
        outputs = tape.play(tensors, device, context_of(device))
    else:
        with torch.cuda.device(device):
            outputs = tape.play(tensors, device, context_of(device))
    _last.workspace = tape.workspace
    return outputs


def composes(first: Problem, second: Problem, request: Request) -> bool:
    """Whether `compose` does this; if not, `strips.py` does with dense pieces of maps."""
    from flashmaps.kernels import composing

    return composing.composes(first, second, request.names)


def plan_compose(first: Problem, second: Problem, request: Request) -> Cost:
    """What `compose` takes."""
    from flashmaps.kernels import composing
    from flashmaps.kernels.settings import settings_here

    device = first.query.device
    here = settings_here(torch.device("cuda") if device.type == "meta" else device)
    strips, workspace = composing.strips_for(first, second, request, here)
    dense = Request(("dense",))
    again = 1 if strips.blocks == 1 else -(-first.num_queries // strips.rows)
    passes = [1 + (first.lse is None), again + (second.lse is None)]
    costs = [
        cost_of(each, dense, passes=count, workspace=workspace)
        for each, count in zip((first, second), passes, strict=True)
    ]
    product = 2.0 * first.batch * first.num_queries * first.num_keys * second.num_keys
    return costs[0].then(costs[1]).then(Cost(flops=product))


def compose(first: Problem, second: Problem, request: Request) -> dict[str, Tensor]:
    """Statistics of the rows of A A', whose entries go from the product to the reducers."""
    here = _settings_here(first.query.device)
    both = replace(request, partner=second)

    def record() -> Tape:
        from flashmaps.kernels import composing

        return composing.record(first, second, request, here)

    tape = _tapes.get(call_key(first, both, here, "compose"), record)
    return play(tape, tensors_of(first, both), first.query.device)
