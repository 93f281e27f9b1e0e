"""The way back on a GPU, of backend "triton" and of backend "cuda"."""

from __future__ import annotations

import torch
from flashmaps.kernels import backend
from flashmaps.maps.problem import Cost, Gradient, Problem, backward_cost
from torch import Tensor


def backward(problem: Problem, gradient: Gradient) -> dict[str, Tensor]:
    """Every gradient that is wanted; `reference_backward.backward` defines them."""
    from flashmaps.kernels import launch_gradient
    from flashmaps.kernels.settings import settings_here

    here = settings_here(problem.query.device)
    run, room = launch_gradient.run_for_gradient(gradient, here)
    if problem.query.is_cuda:
        with torch.cuda.device(problem.query.device):
            into = launch_gradient.backward(problem, gradient, run, room)
    else:
        into = launch_gradient.backward(problem, gradient, run, room)
    backend._last.workspace = run.workspace
    return into


def plan_backward(problem: Problem, gradient: Gradient) -> Cost:
    """What `backward` takes: its launches, made on "meta" and not run."""
    from flashmaps.kernels import launch_gradient
    from flashmaps.kernels.settings import settings_here

    device = problem.query.device
    here = settings_here(torch.device("cuda") if device.type == "meta" else device)
    found, workspace = launch_gradient.dry_run(problem, gradient, here)
    scores = sum(launch.scores for launch in found)
    back = gradient.partner
    if back is not None:
        scores -= back.scores
    passes = max(1, round(scores / problem.scores))
    return backward_cost(problem, gradient, passes=passes, workspace=workspace)
