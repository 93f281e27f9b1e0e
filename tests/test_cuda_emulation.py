"""The emulation that CUDA kernels run on in the tests: is it right, and does it find mistakes?

What a lane holds of a matrix is computed here from the formulas of the PTX ISA (9.7.14, "Matrix
Fragments for mma.m16n8k16 with floating point type", "... mma.m16n8k8" and "ldmatrix"), not from
the emulation's.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import native
import numpy as np
import numpy.typing as npt
import pytest
import torch

SOURCE = Path(__file__).parent / "cuda_primitives.cpp"
LANES = range(32)
Array = npt.NDArray[Any]


class Site(NamedTuple):
    """A line of a kernel with a primitive."""

    primitive: str
    file: str
    line: int
    calls: int
    conflicts: int


class Emulation:
    """tests/cuda_primitives.cpp, built."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("run_kernel", "plant", "take_sites"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def error(
        self,
        kernel: str,
        *inputs: Array,
        out: Array | None = None,
        n: int = 0,
        threads: int = 64,
        grid: tuple[int, int, int] = (1, 1, 1),
        shared: int = 4096,
    ) -> str:
        """Run a kernel; what it was stopped with, or nothing."""
        arrays = [*inputs, *([None] * (3 - len(inputs))), out]
        pointers = [ctypes.c_void_p(None if x is None else x.ctypes.data) for x in arrays]
        counts = (ctypes.c_int * 3)(*grid)
        text = self._library.run_kernel(kernel.encode(), counts, threads, shared, *pointers, n)
        return text.decode()

    def run(self, kernel: str, *inputs: Array, out: Array, **settings: Any) -> Array:
        """Run a kernel that nothing is wrong with."""
        assert self.error(kernel, *inputs, out=out, **settings) == ""
        return out

    def set_memory(self, *arrays: Array) -> None:
        """Put everything but these out of bounds."""
        addresses = (ctypes.c_size_t * len(arrays))(*(x.ctypes.data for x in arrays))
        sizes = (ctypes.c_int64 * len(arrays))(*(x.nbytes for x in arrays))
        self._library.set_memory(len(arrays), addresses, sizes)

    def plant(self, primitive: str = "", file: str = "", line: int = 0) -> None:
        """Spoil a primitive at a line; nothing for none."""
        text = self._library.plant(primitive.encode(), file.encode(), line)
        if text:
            raise ValueError(text.decode())

    def take_sites(self) -> list[Site]:
        """What was called since the last time."""
        rows = [row.split(" ") for row in self._library.take_sites().decode().splitlines()]
        return [Site(name, file, *map(int, numbers)) for name, file, *numbers in rows]

    def first_race(self, events: Array, shared: int) -> int:
        """Which event is the first that races, or -1."""
        flat = np.ascontiguousarray(events, np.int32)
        return int(
            self._library.first_race(len(flat), flat.ctypes.data_as(ctypes.c_void_p), shared)
        )


@pytest.fixture(scope="module")
def library() -> Emulation:
    """The kernels of tests/cuda_primitives.cpp."""
    return Emulation(native.build("cuda_primitives"))


@pytest.fixture
def emulation(library: Emulation) -> Iterator[Emulation]:
    """The same, left as it was found."""
    yield library
    library.set_memory()
    library.plant()


def rng(seed: int = 0) -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(seed)


# What a lane holds -----------------------------------------------------------------------------


def a_elements(lane: int, half: bool) -> list[tuple[int, int]]:
    """Row and column of A's elements in a lane, in the order of its registers."""
    group, thread = lane >> 2, lane % 4
    if half:  # .f16 and .bf16, m16n8k16: a0 to a7
        return [
            (
                group if i in (0, 1, 4, 5) else group + 8,
                thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8,
            )
            for i in range(8)
        ]
    return [  # .tf32, m16n8k8: a0 to a3
        (group if i in (0, 2) else group + 8, thread if i in (0, 1) else thread + 4)
        for i in range(4)
    ]


def b_elements(lane: int, half: bool) -> list[tuple[int, int]]:
    """The same of B."""
    group, thread = lane >> 2, lane % 4
    if half:  # b0 to b3
        return [(thread * 2 + (i & 1) + (0 if i < 2 else 8), group) for i in range(4)]
    return [(thread + 4 * i, group) for i in range(2)]


def c_elements(lane: int) -> list[tuple[int, int]]:
    """The same of C and of the result."""
    group, thread = lane >> 2, lane % 4
    return [(group if i < 2 else group + 8, thread * 2 + (i & 1)) for i in range(4)]


def bits_of(x: torch.Tensor) -> Array:
    """A tensor's numbers as unsigned integers of their size."""
    integers = {2: np.uint16, 4: np.uint32}[x.element_size()]
    return (
        x.contiguous()
        .view(torch.int16 if x.element_size() == 2 else torch.int32)
        .numpy()
        .view(integers)
    )


def of_lanes(matrix: Array, elements: list[list[tuple[int, int]]]) -> Array:
    """The elements that each lane holds, [32, count]."""
    return np.array([[matrix[place] for place in lane] for lane in elements], matrix.dtype)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("mma<Half>", torch.float16),
        ("mma<BFloat>", torch.bfloat16),
        ("mma_tf32", torch.float32),
    ],
)
def test_a_matrix_product_has_the_documented_fragments(
    emulation: Emulation, kernel: str, dtype: torch.dtype
) -> None:
    half = dtype != torch.float32
    inner = 16 if half else 8
    # Small integers: every sum is exact, in whatever order.
    a, b, c = (
        torch.from_numpy(rng(seed).integers(-8, 9, shape).astype(np.float32)).to(dtype)
        for seed, shape in enumerate([(16, inner), (inner, 8), (16, 8)])
    )
    lane_a = of_lanes(bits_of(a), [a_elements(lane, half) for lane in LANES])
    lane_b = of_lanes(bits_of(b), [b_elements(lane, half) for lane in LANES])
    places_c = [c_elements(lane) for lane in LANES]
    # Two halves of 16 bits in each register of 32, the first in its low half.
    registers_a, registers_b = lane_a.view(np.uint32), lane_b.view(np.uint32)
    assert registers_a.shape == (32, 4)
    assert registers_b.shape == (32, 2)

    out = np.full((32, 4), np.nan, np.float32)
    emulation.run(
        kernel, registers_a, registers_b, of_lanes(c.float().numpy(), places_c), out=out, threads=32
    )

    expected = (a.double() @ b.double() + c.double()).float().numpy()
    np.testing.assert_array_equal(out, of_lanes(expected, places_c))


def test_tf32_ignores_the_lowest_bits(emulation: Emulation) -> None:
    ones = np.full((32, 4), 1 + 2**-10 + 2**-11, np.float32)
    out = np.zeros((32, 4), np.float32)
    emulation.run(
        "mma_tf32", ones, np.ones((32, 2), np.float32), np.zeros_like(out), out=out, threads=32
    )
    np.testing.assert_array_equal(out, np.full_like(out, 8 * (1 + 2**-10)))


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_has_the_documented_fragments(emulation: Emulation, transposed: bool) -> None:
    memory = np.arange(1024, dtype=np.uint16)
    rows = (rng().permutation(128)[:32] * 8).astype(np.int32)  # of 8 elements, anywhere
    out = np.zeros((32, 4), np.uint32)
    kernel = f"ldmatrix<{str(transposed).lower()}>"
    emulation.run(kernel, memory, rows, out=out, threads=32)
    for register in range(4):
        # Threads 0 to 7 give the rows of the first matrix, 8 to 15 of the second, ...
        matrix = np.stack([memory[row : row + 8] for row in rows[8 * register : 8 * register + 8]])
        if transposed:
            matrix = matrix.T
        for lane in LANES:  # "each thread holds two elements of row lane / 4"
            two = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert out[lane, register] == int(two[0]) + (int(two[1]) << 16)


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("Half", torch.float16), ("BFloat", torch.bfloat16)])
@pytest.mark.parametrize("inner", [8, 16, 40, 64])
def test_the_recommended_addresses_multiply_matrices(
    emulation: Emulation, name: str, dtype: torch.dtype, row_major: bool, inner: int
) -> None:
    a, b = (
        torch.from_numpy(rng(seed).integers(-8, 9, (16, inner)).astype(np.float32)).to(dtype)
        for seed in (1, 2)
    )
    stored = b.T if row_major else b
    out = np.full((16, 16), np.nan, np.float32)
    emulation.run(
        f"tile<{name}, {str(row_major).lower()}>",
        bits_of(a), bits_of(stored), out=out, n=inner, threads=32, shared=8192,
    )  # fmt: skip
    np.testing.assert_array_equal(out, (a.double() @ b.double().T).numpy())


def test_shuffles_bring_other_lanes_numbers(emulation: Emulation) -> None:
    own = rng().integers(-1000, 1000, 32).astype(np.int32)
    for mask in (1, 2, 16, 31):
        out = emulation.run("shuffles", own, out=np.zeros((32, 4), np.int32), n=mask, threads=32)
        np.testing.assert_array_equal(out[:, 0], own[np.arange(32) ^ mask])
        np.testing.assert_array_equal(out[:, 1], np.full(32, own[mask]))
        np.testing.assert_array_equal(out[:, 2], own[::-1])
        assert not out[:, 3].any()
    own[20] = 5
    out = emulation.run("shuffles", own, out=np.zeros((32, 4), np.int32), n=5, threads=32)
    assert out[:, 3].all()


def test_threads_know_where_they_are(emulation: Emulation) -> None:
    out = np.zeros((4, 3, 2, 96), np.int32)
    emulation.run("indices", out=out, grid=(2, 3, 4), threads=96)
    z, y, x, thread = np.indices(out.shape)
    np.testing.assert_array_equal(out, z * 1000000 + y * 100000 + x * 10000 + thread)


def test_shared_memory_begins_as_nan_in_every_block(emulation: Emulation) -> None:
    out = np.zeros((3, 64), np.float32)
    assert np.isnan(emulation.run("uninitialised", out=out, grid=(3, 1, 1))).all()
    assert np.frombuffer(b"\xff\xff", np.float16).item() != 0  # a NaN in half precision, too
    assert torch.tensor([-1], dtype=torch.int16).view(torch.bfloat16).isnan().all()


def test_copies_fill_in_zeros(emulation: Emulation) -> None:
    source = rng().integers(1, 1 << 30, 512).astype(np.int32)
    out = np.full(1024, -1, np.int32)
    emulation.run("copies", source, out=out)
    threads = np.arange(64)
    np.testing.assert_array_equal(out[:64], source[:64])
    chunks = source[:256].copy().view(np.uint8).reshape(64, 16)
    chunks[np.arange(16) >= (threads % 17)[:, None]] = 0
    np.testing.assert_array_equal(out[64:320], chunks.reshape(-1).view(np.int32))
    words = source[64:128].copy().view(np.uint8).reshape(64, 4)
    words[np.arange(4) >= (threads % 5)[:, None]] = 0
    np.testing.assert_array_equal(out[512:576], words.reshape(-1).view(np.int32))


# Arithmetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("Half", torch.float16), ("BFloat", torch.bfloat16)])
def test_every_number_of_16_bits_is_unpacked_as_torch_does(
    emulation: Emulation, name: str, dtype: torch.dtype
) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    for part, other in (("low", 0), ("high", 16)):
        registers = bits.astype(np.uint32) << other | np.uint32(0x12340000 if not other else 0x5678)
        out = np.zeros(len(bits), np.float32)
        emulation.run(f"unpack_{part}<{name}>", registers, out=out, n=len(bits), threads=32)
        np.testing.assert_array_equal(out, expected)
        finite = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(out[finite]), np.signbit(expected[finite]))


def awkward_floats() -> Array:
    """Random bit patterns, and what lies at and around every number of 16 bits and halfway."""
    random = rng().integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    edges = []
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(0, 1 << 16, 7).to(torch.int32).to(torch.int16).view(dtype).float()
        above = torch.arange(1, (1 << 16) + 1, 7).to(torch.int32).to(torch.int16).view(dtype)
        edges += [numbers, (numbers + above.float()) / 2]
    near = torch.cat(edges).numpy()
    near = near[~np.isnan(near)]
    up, down = np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))
    floats = np.concatenate([random, near, up, down, np.array([65519.996, 65520], np.float32)])
    return floats[~np.isnan(floats)]


@pytest.mark.parametrize(("name", "dtype"), [("Half", torch.float16), ("BFloat", torch.bfloat16)])
def test_packing_rounds_as_torch_does(emulation: Emulation, name: str, dtype: torch.dtype) -> None:
    low = awkward_floats()
    pairs = np.stack([low, low[::-1]], 1)
    out = np.zeros(len(pairs), np.uint32)
    emulation.run(f"pack_both<{name}>", pairs, out=out, n=len(pairs), threads=32)
    expected = bits_of(torch.from_numpy(pairs).to(dtype))
    np.testing.assert_array_equal(out.view(np.uint16).reshape(-1, 2), expected)
    nans = np.full((32, 2), np.nan, np.float32)
    emulation.run(f"pack_both<{name}>", nans, out=out, n=32, threads=32)
    assert torch.from_numpy(out[:32].view(np.int16)).view(dtype).isnan().all()


def test_tf32_rounds_to_ten_bits(emulation: Emulation) -> None:
    x = np.array([1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 3.0, np.inf, np.nan], np.float32)
    out = emulation.run("round_tf32_of", x, out=np.zeros_like(x), n=len(x), threads=32)
    expected = np.array([1 + 2**-10, 1, -1 - 2**-10, 3, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("kernel", ["exp2_fast_of", "exp2_polynomial_of"])
def test_exp2_is_as_exact_as_it_says(emulation: Emulation, kernel: str) -> None:
    x = np.concatenate([np.linspace(-126, 127, 30001), np.linspace(-1, 1, 20001)])
    x = x.astype(np.float32)
    out = emulation.run(kernel, x, out=np.zeros_like(x), n=len(x), threads=32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(out / exact - 1).max() < 2**-22
    tiny = np.array([-126.5, -127, -150, -1e30, -np.inf], np.float32)
    zeros = emulation.run(kernel, tiny, out=np.ones_like(tiny), n=len(tiny), threads=32)
    assert not zeros.any()


def test_log2_takes_numbers_below_the_smallest_normal_one_for_zero(emulation: Emulation) -> None:
    x = np.array([8, 1e-39, 0, -1, 2.0**-126], np.float32)
    out = emulation.run("log2_fast_of", x, out=np.zeros_like(x), n=len(x), threads=32)
    np.testing.assert_array_equal(out, np.array([3, -np.inf, -np.inf, np.nan, -126], np.float32))


def test_rows_that_want_the_same_banks_are_counted(emulation: Emulation) -> None:
    memory, out = np.zeros(1024, np.uint16), np.zeros((32, 4), np.uint32)
    lanes = np.arange(32)
    # Rows of 16 bytes one after the other; of 32; of 128, all in the same banks; one and the same.
    for rows, turns in ((8 * lanes, 0), (16 * lanes, 4), (64 * (lanes % 8), 28), (0 * lanes, 0)):
        emulation.take_sites()
        emulation.run("ldmatrix<false>", memory, rows.astype(np.int32), out=out, threads=32)
        (site,) = (s for s in emulation.take_sites() if s.primitive == "ldmatrix_x4")
        assert site.conflicts == turns


# Races -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel",
    [
        "barrier", "warp_barrier", "own_data", "bytes_of_a_word", "many_readers", "two_buffers",
        "own_copy", "matrix_after_warp_barrier",
    ],
)  # fmt: skip
def test_no_fault_is_found_with(emulation: Emulation, kernel: str) -> None:
    source = np.zeros(64, np.int32)
    assert emulation.error(kernel, source, grid=(2, 1, 1)) == ""


# What errors say, with @n for the n-th line of the kernel.
RACES = {
    "no_barrier_in_the_warp": "thread 1 writes byte 4 .* at @1, which thread 0 read at @2",
    "no_barrier_between_warps": "thread 32 writes byte 128 .* at @1, which thread 0 read at @2",
    "warp_barrier_between_warps": "thread 32 writes byte 128 .* at @1, which thread 0 read at @3",
    "shuffle_for_a_barrier": "thread .* reads byte .* at @3, which thread .* wrote at @1",
    "buffer_used_again": "thread .* writes byte .* at @2, which thread .* read at @4",
    "two_writers": "thread 1 writes byte 0 of shared memory at @1, which thread 0 wrote at @1",
    "part_of_a_word": "thread 2 reads byte 6 .* at @2, which thread 1 wrote at @1",
    "first_of_many_readers": "thread 63 writes byte 0 .* at @2, which thread .* read at @1",
    "reader_of_another_warp": "thread 40 reads byte 0 .* at @1, which thread 31 wrote at @5",
    "matrix_without_barrier": "warp 0 reads byte 0 .* at @4, which thread 0 wrote at @3",
    "store_after_matrix": "thread .* writes byte .* at @4, which warp 0 read at @3",
    "copy_not_waited_for": "thread 0 reads byte 0 .* at @3, into which thread 0 copies .* @1 and",
    "barrier_without_wait": "thread .* reads .* at @4, into which thread .* copies .* since @1 and",
    "copy_not_committed": "thread 63 reads .* at @4, into which thread 63 copies .* since @1 and",
    "wait_without_barrier": "thread 1 writes byte 4 .* at @1, which thread 0 read at @4",
    "waits_for_the_group_before": "reads byte 256 .* at @9, into which thread 0 copies .* @4 and",
    "copy_over_what_is_read": "thread .* writes byte .* at @3, which thread .* read at @7",
    "two_copies_to_one_place": "thread 0 writes byte 0 .* at @3, into which thread 0 copies .* @2",
}
MISTAKES = {
    "some_leave_before_the_barrier": "nobody can go on: threads 0 to 39 wait at sync_threads .@2.; "
    "threads 40 to 63 ended",
    "two_barriers": "threads wait at different barriers: thread 32 at .* .@4., others at .* .@2.",
    "barrier_in_a_branch": "nobody can go on: threads 0 to 15 wait at sync_threads .@1.; threads "
    "16 to 31 wait at shuffle_xor .@2.; threads 32 to 47 wait at sync_threads .@1.; threads 48 .*",
    "lanes_leave_before_a_shuffle": "nobody can go on: threads 0 to 6 wait at shuffle_xor .@2.; "
    "threads 7 to 7 ended; threads 8 to 38 wait",
    "lanes_at_two_instructions": "lanes of a warp diverge: thread 31 is at shuffle .@5., thread 0 "
    "at ldmatrix_x4 .@3.",
    "copies_left_behind": "thread 0 ends without having waited for its copy at @1",
    "beyond_shared_memory": "thread 0 writes 4 bytes at byte 16384 .* at @1; there are 4096",
    "before_shared_memory": "thread 0 reads 4 bytes at byte -12 of shared memory at @1",
    "unaligned_shared_memory": "thread 0 reads 4 bytes at byte 2 .* at @1, which must be aligned",
    "unaligned_row": "reads 16 bytes at byte 8 of shared memory at @2, which must be aligned",
    "unaligned_copy": "thread 1 copies 16 of 16 bytes .* at @1, from an address that must be .* 16",
    "beyond_global_memory": "thread 0 writes 4 bytes of global memory at .*, at byte 256 of memory "
    "1, which has 256",
    "copy_from_beyond_global_memory": "thread 16 reads 12 bytes of global memory at @1, at byte "
    "256 of memory 0, which has 256",
    "two_threads_write_a_number": "thread 63 writes 4 bytes of global memory at .*, which thread 0 "
    "of block 0 has written; this is block 0",
    "two_blocks_write_a_number": "thread 0 writes .*, which thread 63 of block 0 has written; this "
    "is block 1",
    "what_another_thread_wrote": "thread 63 reads .* of global memory at .*, which thread 62 of "
    "block 0 has written",
    "lane_that_is_not_there": "lane 0 asks for the value of lane 32 at @1",
}


@pytest.mark.parametrize("kernel", [*RACES, *MISTAKES])
def test_a_mistake_is_an_error_that_says_where(emulation: Emulation, kernel: str) -> None:
    lines = SOURCE.read_text().splitlines()
    first = 1 + next(i for i, line in enumerate(lines) if f"KERNEL {kernel}(" in line)
    message = (RACES | MISTAKES)[kernel]
    message = re.sub("@([0-9])", lambda m: f"{SOURCE.name}:{first + int(m[1])}", message)
    source, out = np.zeros(64, np.int32), np.zeros(64, np.int32)
    emulation.set_memory(source, out)
    error = emulation.error(kernel, source, out=out, grid=(2, 1, 1))
    assert re.search(rf"block \([01], 0, 0\): .*{message}", error), error
    assert error.startswith(f"emulated kernel {kernel}, ")
    # An error leaves nothing behind.
    assert emulation.error("barrier", grid=(2, 1, 1)) == ""


def test_a_launch_that_a_device_would_refuse_is_refused(emulation: Emulation) -> None:
    assert "whole warps" in emulation.error("barrier", threads=100)
    assert "at most 1024" in emulation.error("barrier", threads=1056)
    assert "200000 bytes of shared memory; the device has" in emulation.error(
        "barrier", shared=200000
    )
    assert "0 x 1 x 1 blocks" in emulation.error("barrier", grid=(0, 1, 1))
    assert "1 x 70000 x 1" in emulation.error("barrier", grid=(1, 70000, 1))


def races_by_definition(events: Array) -> int:
    """The first event that is in conflict with one before it, by looking at every pair."""
    block, warps = 0, [0] * 4
    seen: list[tuple[int, int, int, int, int, int]] = []
    for index, (kind, actor, offset, count) in enumerate(events.tolist()):
        warp = actor // 32 if actor < 1024 else actor - 1024
        if kind == 0:
            block += 1
        elif kind == 1:
            warps[warp] += 1
        else:
            for other_kind, other, begin, end, at_block, at_warp in seen:
                if (
                    other != actor
                    and 3 in (kind, other_kind)
                    and begin < offset + count
                    and offset < end
                    and at_block == block
                    and not (
                        warp == (other // 32 if other < 1024 else other - 1024)
                        and at_warp < warps[warp]
                    )
                ):
                    return index
            seen.append((kind, actor, offset, offset + count, block, warps[warp]))
    return -1


def test_races_are_found_exactly(emulation: Emulation) -> None:
    random = rng()
    actors = np.array([0, 1, 2, 32, 33, 64, 1024, 1025])  # lanes of three warps, and two warps
    firsts = []
    for trial in range(1000):
        length = 12
        kinds = random.choice(4, length, p=[[0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.5, 0.1]][trial % 2])
        counts = random.choice([1, 2, 4, 16], length)
        offsets = random.integers(0, 16, length) // counts * counts
        events = np.stack([kinds, random.choice(actors, length), offsets, counts], 1)
        firsts.append(races_by_definition(events))
        assert emulation.first_race(events, 16) == firsts[-1], events
    # The programs are worth the trouble: races at every length, and some that have none.
    assert set(firsts) >= set(range(1, 12)) | {-1}


# Planted errors --------------------------------------------------------------------------------


def test_what_can_be_spoiled_is_found_when_it_is(emulation: Emulation) -> None:
    source, out = rng().integers(1, 1000, 64).astype(np.int32), np.zeros(64, np.int32)
    emulation.take_sites()
    expected = emulation.run("victim", source, out=out).copy()
    sites = emulation.take_sites()
    assert {(site.primitive, site.calls) for site in sites} == {
        ("copy_async_4", 64), ("wait_copies", 64), ("sync_threads", 64), ("sync_warp", 2),
        ("shuffle_xor", 2),
    }  # fmt: skip
    for primitive, file, line, *_ in sites:
        emulation.plant(primitive, file, line)
        error = emulation.error("victim", source, out=out)
        races = primitive.startswith("sync") or primitive == "wait_copies"
        assert ("race" in error) == races
        assert races or not np.array_equal(out, expected), primitive
        emulation.plant()
        np.testing.assert_array_equal(emulation.run("victim", source, out=out), expected)
    with pytest.raises(ValueError, match="no primitive is called barrier"):
        emulation.plant("barrier", "a.h", 1)


@pytest.mark.slow
def test_fibers_of_posix_do_the_same(tmp_path: Path) -> None:
    # What is used where a processor's registers are not known.
    made = tmp_path / "cuda_primitives.so"
    sources = sorted((native.ROOT / "csrc/cuda/emulation").glob("*.cpp"))
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-o", str(made),
         "-DFLASHMAPS_UCONTEXT", "-I", str(native.ROOT / "csrc"), str(SOURCE), *map(str, sources)],
        check=True,
    )  # fmt: skip
    posix = Emulation(made)
    test_a_matrix_product_has_the_documented_fragments(posix, "mma<Half>", torch.float16)
    test_copies_fill_in_zeros(posix)
    for kernel in (*RACES, *MISTAKES):
        test_a_mistake_is_an_error_that_says_where(posix, kernel)


def test_the_same_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    subprocess.run(
        [nvcc, "-x", "cu", "-std=c++20", "-I", str(native.ROOT / "csrc"), "-arch=sm_80", "-cubin",
         "-Xcompiler", "-Wall,-Wextra", "--Werror", "all-warnings", "-o", str(tmp_path / "all"),
         str(SOURCE)],
        check=True,
    )  # fmt: skip
