"""Backend "triton": GPU kernels. NVIDIA, and nothing in them that only NVIDIA could run."""

from __future__ import annotations

import threading

import torch
from flashmaps.kernels import INTERPRETING, unavailable_reason
from flashmaps.maps.gpu import passes_of
from flashmaps.maps.problem import Cost, Problem, Request, cost_of, query_mask_reason
from torch import Tensor

_last = threading.local()

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
    from flashmaps.kernels import launches
    from flashmaps.kernels.settings import settings_here

    device = problem.query.device
    here = settings_here(torch.device("cuda") if device.type == "meta" else device)
    found, workspace = launches.dry_run(problem, request, here)
    passes = passes_of(problem, request, sum(launch.scores for launch in found))
    return cost_of(problem, request, passes=passes, workspace=workspace)


def reduce(problem: Problem, request: Request) -> dict[str, Tensor]:
    """Every requested field; see `reference.reduce` for what each one is."""
    from flashmaps.kernels import launches
    from flashmaps.kernels.run import run_for
    from flashmaps.kernels.settings import settings_here

    run = run_for(request, settings_here(problem.query.device))
    if problem.query.is_cuda:
        with torch.cuda.device(problem.query.device):
            outputs = launches.reduce(problem, request, run)
    else:
        outputs = launches.reduce(problem, request, run)
    _last.workspace = run.workspace
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
    from flashmaps.kernels import composing
    from flashmaps.kernels.run import run_to_compose
    from flashmaps.kernels.settings import settings_here

    run = run_to_compose(request, settings_here(first.query.device))
    if first.query.is_cuda:
        with torch.cuda.device(first.query.device):
            outputs = composing.compose(first, second, request, run)
    else:
        outputs = composing.compose(first, second, request, run)
    _last.workspace = run.workspace
    return outputs
