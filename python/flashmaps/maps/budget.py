"""How much memory an operation may take: the context, the argument, and the error.

The budget bounds an operation's *workspace*: what it holds at once beyond its inputs (queries,
keys, masks, weights, a given log-sum-exp, operands) and the tensors that it returns. Copies that it
makes of its inputs count. What libraries allocate past torch (MKL's packing buffers, threads'
stacks, the rounding of allocators) does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from flashmaps.arguments import as_whole

_MOST = 2**62  # what operators can be given; no memory is larger

_of_context: ContextVar[int | None] = ContextVar("flashmaps_memory_budget", default=None)


@contextmanager
def memory_budget(bytes: int | None) -> Iterator[None]:
    """Bound the workspace of every operation inside: ``with fm.memory_budget(64 * 2**20): ...``

    Args:
        bytes: what an operation may hold at once beyond its inputs and the tensors it returns;
            None for no bound. An inner context replaces an outer one, and the argument
            ``memory_budget=`` of an operation replaces both.

    Each thread and each asyncio task has its own. It is read when an operation runs, so it holds
    for functions of torch.compile that are called inside; inside such a function use the argument.

    Raises:
        TypeError: not a whole number. ValueError, by the operation: too small; the message says the
            smallest that works.
    """
    token = _of_context.set(check_budget(bytes))
    try:
        yield
    finally:
        _of_context.reset(token)


def check_budget(budget: object) -> int | None:
    """``budget`` as an int or None, or a TypeError."""
    if budget is None:
        return None
    found = as_whole(budget)
    if found is None:
        raise TypeError(
            f"memory_budget must be a whole number of bytes, such as 64 * 2**20, got {budget!r}"
        )
    return max(-_MOST, min(found, _MOST))


def budget_of_context() -> int | None:
    """The innermost ``memory_budget`` around this call, in this thread or task."""
    return _of_context.get()


def budget_in_force(argument: object) -> int | None:
    """The argument, or else the context's.

    While torch.compile traces, the argument alone: operators see the context when they run.
    """
    budget = check_budget(argument)
    if budget is not None or torch.compiler.is_compiling():
        return budget
    return budget_of_context()


def too_small(budget: int, smallest: int, what: str) -> ValueError:
    """The error of a budget that nothing can be done with."""
    return ValueError(
        f"memory_budget = {budget} bytes is too small for {what}: the smallest that works is "
        f"{smallest}"
    )
