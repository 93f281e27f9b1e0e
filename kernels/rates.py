"""How many exp2 a GPU does in a second, measured: what passes over a map are bound by."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

_BLOCK, _ROUNDS = 1024, 1024


@triton.jit
def exp2_kernel(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """exp2 of numbers in registers, over and over."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = -tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(ROUNDS):
        x = tl.exp2(x) - 1.5
    tl.store(out + at, x)


def exp2_per_second(
    device: torch.device, seconds: Callable[[Callable[[], object]], float]
) -> float:
    """The rate, from a function that says how many seconds a call takes on the device."""
    programs = 32 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * _BLOCK, device=device)
    with torch.cuda.device(device):
        took = seconds(lambda: exp2_kernel[(programs,)](out, _ROUNDS, _BLOCK, num_warps=8))
    return out.numel() * _ROUNDS / took
