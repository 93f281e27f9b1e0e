"""Launches that are ready to go, and what one call of the backend has allocated for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flashmaps.kernels.settings import Settings, Tiling
from flashmaps.maps.gpu import WORKSPACE, Workspace
from flashmaps.maps.problem import Request
from torch import Tensor

# As `WORKSPACE`, for rows of the map that are sorted: a few hundred at a time keep a GPU busy.
ROWS_TO_SORT = 64 * 2**20

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
        self.kernel[(self.programs,)](**self.arguments, **self.tiling.options)


@dataclass
class Run(Workspace):
    """One call of the backend: how it launches, in which settings, and what it has allocated."""

    settings: Settings
    launch: Callable[[Launch], None] = Launch.run
    limit: int = WORKSPACE
    roomy: int = ROWS_TO_SORT  # the limit for what takes whole rows

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, like: Tensor) -> Tensor:
        """Workspace, counted until `release`."""
        return self.allocate(shape, dtype, like.device)


def run_for(request: Request, settings: Settings) -> Run:
    """A run within the budget of a request. It may take more where it cannot do with less."""
    budget = request.memory_budget
    if budget is None:
        return Run(settings)
    return Run(settings, limit=min(WORKSPACE, budget), roomy=min(ROWS_TO_SORT, budget))


def run_to_compose(request: Request, settings: Settings) -> Run:
    """The same for a composition, which makes use of all of a larger budget."""
    run = run_for(request, settings)
    if request.memory_budget is not None:
        run.roomy = request.memory_budget
    return run


def count_splits(run: Run, programs: int, tiles: int, bytes_each: int) -> int:
    """How many programs share the streamed tokens of one block, when there are few blocks.

    From shapes and settings alone, so that the same call adds up in the same order.
    """
    wanted = run.settings.programs // max(1, programs)
    fitting = run.limit // max(1, bytes_each)
    splits = max(1, min(wanted, tiles, fitting))
    # No empty ones: 10 tiles in 4 splits of 3 would do, 10 tiles in 6 of 2 leave one without.
    return -(-tiles // -(-tiles // splits))
