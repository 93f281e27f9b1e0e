"""The way back on a GPU, of backend "triton" and of backend "cuda"."""

from __future__ import annotations

import torch
from flashmaps.kernels import backend
from flashmaps.maps.problem import Cost, Gradient, Problem, backward_cost
from flashmaps.maps.tape import Tape, gradient_key, tensors_of_gradient
from torch import Tensor


def backward(problem: Problem, gradient: Gradient) -> dict[str, Tensor]:
    """Every gradient that is wanted; `reference_backward.backward` defines them."""
    tape = _tape(problem, gradient)
    return backend.play(tape, tensors_of_gradient(problem, gradient), problem.query.device)


def plan_backward(problem: Problem, gradient: Gradient) -> Cost:
    """What `backward` takes: its launches, made on "meta" and not run."""
    tape = _tape(problem, gradient)
    scores, back = tape.scores, gradient.partner
    if back is not None:
        scores -= back.scores
    passes = max(1, round(scores / problem.scores))
    return backward_cost(problem, gradient, passes=passes, workspace=tape.workspace)


def _tape(problem: Problem, gradient: Gradient) -> Tape:
    """What this way back does, arranged when the first one like it comes."""
    device = problem.query.device
    here = backend._settings_here(torch.device("cuda") if device.type == "meta" else device)

    def record() -> Tape:
        from flashmaps.kernels import launch_gradient

        return launch_gradient.record(problem, gradient, here)

    return backend._tapes.get(gradient_key(problem, gradient, here), record)
