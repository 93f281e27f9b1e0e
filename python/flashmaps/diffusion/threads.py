"""How many threads small work is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SMALL = 20_000_000  # parameters of a UNet whose calls are too small to share


@contextmanager
def fit_threads(pipe: Any) -> Iterator[None]:
    """One torch thread while a small model runs on the CPU; afterwards as many as before.

    An operation of the built-in model takes some tens of microseconds. Shared among threads, each
    ends with OpenMP's threads waiting for each other, and they wait by spinning: on a machine that
    does other things, the thread waited for is often not running. Eight pairs of ``eval world``
    took 28 s of processor time with two threads on a busy machine with two cores, 7 s with one, and
    7 s with two that sleep while they wait (OMP_WAIT_POLICY=passive, which must be set before torch
    is loaded). Large models gain from threads and keep them.
    """
    before = torch.get_num_threads()
    unet = pipe.unet
    small = sum(each.numel() for each in unet.parameters()) < SMALL and unet.device.type == "cpu"
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if small:
            torch.set_num_threads(before)
