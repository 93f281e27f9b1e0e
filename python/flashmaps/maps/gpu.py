"""What both GPU backends arrange alike: workspace that is counted, and the parts of splits.

Tokens that are streamed are split among programs where there would be too few of them. Each then
leaves parts of its statistics, which one more kernel puts together, in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashmaps.maps.problem import Problem, Request

# Bytes beyond inputs, outputs and copies of inputs, unless the request's budget is less: maps are
# taken in chunks whose log-sum-exps fit, and parts of splits take no more.
WORKSPACE = 4 * 2**20

LOG2_E = math.log2(math.e)  # kernels count in powers of two

ROW_STATISTICS = ("entropy", "max", "argmax", "expectation", "diagonal")
COLUMN_STATISTICS = ("column_sum", "column_entropy", "column_max", "column_argmax")

# Which output of a kernel a statistic is, where the kernel finishes it alone; and the outputs that
# it is made from where splits leave parts.
FINISHED = {
    "entropy": "entropy",
    "max": "top",
    "argmax": "argtop",
    "expectation": "expectation",
    "diagonal": "diagonal",
    "column_sum": "total",
    "column_entropy": "entropy",
    "column_max": "top",
    "column_argmax": "argtop",
}
PARTS: dict[str, tuple[str, ...]] = {
    "entropy": ("plogp",),
    "max": ("top",),
    "argmax": ("top", "argtop"),
    "expectation": ("expectation",),
    "diagonal": ("diagonal",),
    "column_sum": ("total",),
    "column_entropy": ("total", "plogp"),
    "column_max": ("top",),
    "column_argmax": ("top", "argtop"),
}


def part_shape(part: str) -> tuple[int, ...]:
    """Of a part, for each token: (x, y) of an expectation, one number of all else."""
    return (2,) if part == "expectation" else ()


def part_dtype(part: str) -> torch.dtype:
    """Indices are int64."""
    return torch.int64 if part == "argtop" else torch.float32


def part_bytes(parts: Iterable[str]) -> int:
    """What these parts take for each token."""
    return sum(part_dtype(part).itemsize * math.prod(part_shape(part)) for part in parts)


def on_meta(problem: Problem) -> Problem:
    """The problem without memory."""
    return Problem._make(x.to("meta") if isinstance(x, Tensor) else x for x in problem)


def passes_of(problem: Problem, request: Request, scores: int) -> int:
    """How often the map's scores were computed, of ``scores`` in all.

    The map back counts by itself: `flashmaps.maps.problem.cost_of`.
    """
    back = request.partner
    if back is not None and "return_probability" in request.names:
        scores -= back.scores
    return round(scores / problem.scores)


def best_splits(blocks: int, tiles: int, most: int, multiprocessors: int, together: int = 1) -> int:
    """How many blocks share the streamed tokens of one, so that the card has least to do.

    A multiprocessor works at full rate with ``together`` blocks or more, and those that it has
    share it; a block takes as long as its tiles, and about one more to begin and to end with. From
    shapes and the card alone, so that the same call adds up in the same order.
    """

    def time(splits: int) -> int:
        each = -(-tiles // splits) + 1
        return max(together, -(-blocks * splits // multiprocessors)) * each

    return min(range(1, most + 1), key=time)


@dataclass
class Workspace:
    """Bytes beyond inputs and outputs that one call has allocated."""

    workspace: int = field(default=0, init=False)  # the most at once
    held: int = field(default=0, init=False)

    def hold(self, size: int) -> None:
        """Count what torch allocates for us; negative when it is free again."""
        self.held += size
        self.workspace = max(self.workspace, self.held)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Counted until `release`."""
        made = torch.empty(shape, dtype=dtype, device=device)
        self.hold(made.numel() * made.element_size())
        return made

    def release(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                self.hold(-tensor.numel() * tensor.element_size())
