"""Which backend runs: `supports` explains, "auto" is the only thing that chooses."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from flashmaps.kernels import backend as triton
from flashmaps.kernels import backward as triton_backward
from flashmaps.maps.backends import cpu, cpu_backward, cuda, reference, reference_backward
from flashmaps.maps.problem import Cost, Gradient, Problem, Request, default_plan

# In the order that "auto" tries them; each has supports(problem) and reduce(problem, request), and
# most have plan(problem, request). One that has automatic(problem) may decline to be tried: see
# `cuda.AUTOMATIC`.
_BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "reference": reference,
}
NAMES = ("cpu", "reference", "triton", "cuda")


class Availability(NamedTuple):
    """Whether a backend can run here, and why or why not."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def backends() -> dict[str, Availability]:
    """Each backend by name: available or not, and why.

    >>> bool(backends()["reference"])
    True
    """
    found = {"reference": Availability(True, "plain torch, any device")}
    missing = cpu.unavailable_reason()
    found["cpu"] = (
        Availability(True, f"C++ extension, {cpu.instruction_set()} build")
        if missing is None
        else Availability(False, missing)
    )
    for name, gpu in (("triton", triton), ("cuda", cuda)):
        missing = gpu.unavailable_reason()
        found[name] = (
            Availability(True, gpu.what_runs()) if missing is None else Availability(False, missing)
        )
    return found


def check_name(name: str) -> None:
    """As `select` raises, but before there is a problem: a wrong name costs no work.

    What depends on the problem (its device) is left to `select`.
    """
    if name == "auto":
        return
    if name not in NAMES:
        raise ValueError(f"backend {name!r} is unknown; choose 'auto' or one of {', '.join(NAMES)}")
    # Not backends(), which asks the extension for its builds: torch.compile traces this.
    reason = None
    if name == "cpu":
        reason = cpu.unavailable_reason()
    elif name == "triton":
        reason = triton.unavailable_reason()
    elif name == "cuda":
        reason = cuda.unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run this: {reason}")


def select(name: str, problem: Problem) -> str:
    """The backend that will run ``problem``; an explicit request never falls back.

    Raises ValueError for an unknown name, RuntimeError with the reason where it cannot run.
    """
    if name == "auto":
        return next(name for name, module in _BACKENDS.items() if _may_choose(module, problem))
    check_name(name)
    reason = _BACKENDS[name].supports(problem)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run this: {reason}")
    return name


def _may_choose(module: ModuleType, problem: Problem) -> bool:
    if module.supports(problem) is not None:
        return False
    automatic = getattr(module, "automatic", None)
    return automatic is None or bool(automatic(problem))


def get(name: str) -> ModuleType:
    """The module of a backend that `select` has chosen."""
    return _BACKENDS[name]


def plan_pass(name: str, problem: Problem, request: Request) -> Cost:
    """What ``reduce(problem, request)`` of a backend takes, under ``request.memory_budget``.

    A budget below the smallest workspace there is gives that one: to refuse is the caller's part.
    """
    found: Cost = getattr(get(name), "plan", default_plan)(problem, request)
    return found


def backward_name(name: str, problem: Problem) -> str:
    """The backend that goes backwards for this one: CUDA C++ leaves that to Triton.

    And where triton is not installed, to plain torch in chunks on the same device.
    """
    if name != "cuda":
        return name
    return "triton" if triton.supports(problem) is None else "reference"


_BACKWARD: dict[str, ModuleType] = {
    "cpu": cpu_backward,
    "triton": triton_backward,
    "reference": reference_backward,
}


def _backward_module(name: str, problem: Problem) -> ModuleType:
    return _BACKWARD[backward_name(name, problem)]


def run_backward(name: str, problem: Problem, gradient: Gradient) -> dict[str, Tensor]:
    """The gradients that ``gradient`` wants, by the backend of that name."""
    found: dict[str, Tensor] = _backward_module(name, problem).backward(problem, gradient)
    return found


def plan_backward_pass(name: str, problem: Problem, gradient: Gradient) -> Cost:
    """What `run_backward` takes, as `plan_pass`."""
    found: Cost = _backward_module(name, problem).plan_backward(problem, gradient)
    return found
