"""In which blocks a kernel of backend "cuda" runs, and among how many its streamed tokens go."""

from __future__ import annotations

from typing import Any, NamedTuple

MOST_SPLITS = 64

# Registers that a thread takes at most, by kernel: tests/test_cuda_ahead.py holds nvcc to them.
REGISTERS = {"lse": 168, "statistics": 255, "product": 255, "round_trip": 255}
_SM_REGISTERS = 65536
_BLOCK_OVERHEAD = 1024  # bytes of shared memory that the system keeps of each block


class Shape(NamedTuple):
    """A block: warps along the rows and columns of its tile, each of them 32 x 64 of it."""

    warp_rows: int
    warp_columns: int
    resident: bool  # kept tokens of all heads stay in shared memory
    blocks: int  # of them that have to fit an SM for this one to be chosen

    @property
    def warps(self) -> int:
        return self.warp_rows * self.warp_columns


# In order of what they ask of the second-level cache for each exponential: streamed tokens alone
# for 128 rows; for 64; both sides' tokens. Two blocks of four warps hide each other's products
# behind exponentials better than one of eight, which waits at the same barriers.
SHAPES = (
    Shape(4, 1, True, 2),
    Shape(4, 2, True, 1),
    Shape(2, 2, True, 2),
    Shape(4, 2, False, 1),
    Shape(4, 1, False, 1),
    Shape(2, 1, False, 1),
    Shape(1, 1, False, 1),
)
LSE_SHAPES = (Shape(4, 1, True, 1), Shape(2, 1, True, 1))  # one head: it always fits
LSE_WARPS = 4  # kLseThreads in C++


def blocks_on_sm(limits: Any, name: str, threads: int, shared: int) -> int:
    """How many blocks an SM has room for at once."""
    if shared > limits.shared_bytes:
        return 0
    registers = -(-REGISTERS[name] // 8) * 8
    whole = limits.shared_bytes + _BLOCK_OVERHEAD
    return min(whole // (shared + _BLOCK_OVERHEAD), _SM_REGISTERS // (registers * threads))


def at_most(warps: int, wanted: int) -> int:
    """The smallest power of two that is enough, or all warps that there are."""
    return min(warps, 1 << max(0, wanted - 1).bit_length())
