"""Launches that are ready to go, and what one call of the backend has allocated for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flashmaps.kernels.settings import Settings, Tiling
from flashmaps.maps.gpu import WORKSPACE, Workspace, best_splits
from flashmaps.maps.problem import Problem, Request, empty_outputs
from flashmaps.maps.tape import Play, Recorder
from torch import Tensor
from triton import knobs

# As `WORKSPACE`, for rows of the map that are sorted: a few hundred at a time keep a GPU busy.
ROWS_TO_SORT = 64 * 2**20

MOST_SPLITS = 64
TOGETHER = 2  # programs of eight warps that hide each other's waiting on a multiprocessor

COMBINED = 256  # outputs that one program of the combining kernels has
COMBINING = Tiling(COMBINED, 1, warps=4, stages=1)


@dataclass(frozen=True)
class Launch:
    """One kernel, ready to go."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tiling: Tiling
    kind: str = ""  # which entry of the settings it took
    scores: int = 0  # how many q k it computes, of all heads

    def run(self) -> None:
        start(self, self.arguments)


def start(launch: Launch, arguments: dict[str, Any]) -> Any:
    """Triton's own way: compile what is not compiled, and go; what it was compiled to."""
    return launch.kernel[(launch.programs,)](**arguments, **launch.tiling.options)


def context_of(device: torch.device) -> Any:
    """The stream that launches go to now; None where a profiler wants to be told of them."""
    hook = knobs.runtime.launch_enter_hook
    if hook is not None and getattr(hook, "calls", True):
        return None
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


class Launched:
    """A launch of a tape: at first triton's own way, then straight to the driver.

    Triton's way finds out for each of 70 arguments what it is compiled for, which takes longer than
    the launch. A tape's launches differ in addresses alone.
    """

    def __init__(self, launch: Launch, recorder: Recorder) -> None:
        self.launch = launch
        self.places = {
            name: recorder.place(value)
            for name, value in launch.arguments.items()
            if isinstance(value, Tensor)
        }
        self.compiled: Any = None
        self.arguments: list[Any] = []
        self.addresses: list[tuple[int, int, int]] = []  # (argument, slot, bytes from its start)

    def __call__(self, call: Play) -> None:
        compiled = self.compiled
        if compiled is None or call.context is None:
            views = {name: call.view(place) for name, place in self.places.items()}
            compiled = start(self.launch, {**self.launch.arguments, **views})
            if compiled is not None:  # interpreted kernels come to nothing
                self._remember(compiled)
            return
        arguments = self.arguments.copy()
        for index, slot, offset in self.addresses:
            arguments[index] = call.addresses[slot] + offset
        compiled.run(
            self.launch.programs, 1, 1, call.context, compiled.function, compiled.packed_metadata,
            None, None, None, *arguments,
        )  # fmt: skip

    def _remember(self, compiled: Any) -> None:
        names = [parameter.name for parameter in self.launch.kernel.params]
        self.arguments = [
            None if name in self.places else self.launch.arguments[name] for name in names
        ]
        self.addresses = [
            (names.index(name), place.slot, place.bytes) for name, place in self.places.items()
        ]
        self.compiled = compiled


@dataclass
class Run(Workspace):
    """One call of the backend: how it launches, in which settings, and what it has allocated."""

    settings: Settings
    launch: Callable[[Launch], None] = Launch.run
    limit: int = WORKSPACE
    roomy: int = ROWS_TO_SORT  # the limit for what takes whole rows
    recorder: Recorder | None = None  # of a tape, on tensors without memory
    scores: int = 0  # q k of the launches that were recorded

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, like: Tensor) -> Tensor:
        """Workspace, counted until `release`."""
        made = self.allocate(shape, dtype, like.device)
        return made if self.recorder is None else self.recorder.make(made)

    def outputs(self, problem: Problem, request: Request) -> dict[str, Tensor]:
        """Tensors for what is asked, nothing in them yet."""
        made = empty_outputs(problem, request)
        if self.recorder is not None:
            for each in made.values():
                self.recorder.make(each)
        return made

    def compute(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """``function(*tensors)`` by torch. Whatever it makes of tensors has to come in this way.

        What it allocates is for the caller to `hold`.
        """
        if self.recorder is None:
            return function(*tensors)
        return self.recorder.compute(function, *tensors)

    def contiguous(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it."""
        if tensor.is_contiguous():
            return tensor
        made: Tensor = self.compute(Tensor.contiguous, tensor)
        return made

    def record(self, launch: Launch) -> None:
        """In the place of `Launch.run`."""
        assert self.recorder is not None
        self.scores += launch.scores
        self.recorder.launch(Launched(launch, self.recorder), launch)


def run_for(request: Request, settings: Settings, recorder: Recorder | None = None) -> Run:
    """A run within the budget of a request. It may take more where it cannot do with less."""
    budget = request.memory_budget
    run = Run(settings, recorder=recorder)
    if recorder is not None:
        run.launch = run.record
    if budget is not None:
        run.limit, run.roomy = min(WORKSPACE, budget), min(ROWS_TO_SORT, budget)
    return run


def run_to_compose(request: Request, settings: Settings, recorder: Recorder | None = None) -> Run:
    """The same for a composition, which makes use of all of a larger budget."""
    run = run_for(request, settings, recorder)
    if request.memory_budget is not None:
        run.roomy = request.memory_budget
    return run


def add_up(parts: Tensor, out: Tensor, run: Run) -> None:
    """Sums over parts, in their order, into ``out``."""
    run.compute(lambda parts, out: torch.sum(parts, 0, out=out), parts, out)


def count_splits(
    run: Run, programs: int, tiles: int, bytes_each: int, together: int = TOGETHER
) -> int:
    """How many programs share the streamed tokens of one block, when there are few blocks.

    From shapes and settings alone, so that the same call adds up in the same order.
    """
    room = max(0, run.limit - run.held)
    most = max(1, min(tiles, MOST_SPLITS, room // max(1, bytes_each)))
    splits = min(most, run.settings.splits) or best_splits(
        programs, tiles, most, run.settings.multiprocessors, together
    )
    # No empty ones: 10 tiles in 4 splits of 3 would do, 10 tiles in 6 of 2 leave one without.
    return -(-tiles // -(-tiles // splits))
