"""What a call takes of a card's memory beyond its results."""

from __future__ import annotations

from collections.abc import Callable

import torch


def most_requested(run: Callable[[], object]) -> int:
    """The most bytes at once that a call asks torch's allocator for, beyond what it returns.

    Not `torch.cuda.memory_allocated`: that counts blocks, and of one that is cached and larger than
    asked the allocator leaves up to 1 MB unsplit, depending on all that was allocated before.
    """
    torch.cuda.synchronize()
    before = _requested("current")
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    held = _requested("current") - before  # the result
    taken = _requested("peak") - before - held
    del result
    return taken


def _requested(what: str) -> int:
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{what}"])
