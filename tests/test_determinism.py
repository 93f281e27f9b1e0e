"""The same call gives the same bits: again, on any number of threads, from several at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import flashmaps as fm
import pytest
import torch
from every_operation import GUARDED_DTYPES, digests, outputs

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def need_cpu() -> None:
    available = fm.backends()["cpu"]
    if not available:
        pytest.skip(f"backend 'cpu': {available.reason}")


def check_same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    different = [name for name, digest in digests(got).items() if digest != digests(want)[name]]
    assert not different, f"bits differ: {different}"


def test_again(backend: str, one_thread: None) -> None:
    check_same_bits(outputs(backend, torch.float32), outputs(backend, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_on_any_number_of_threads(dtype: torch.dtype, threads: None) -> None:
    need_cpu()
    torch.set_num_threads(1)
    alone = outputs("cpu", dtype)
    for count in (2, 3):
        torch.set_num_threads(count)
        check_same_bits(outputs("cpu", dtype), alone)


def test_a_map_is_the_same_beside_others(one_thread: None) -> None:
    """In a batch, among pairs, or alone; whole, or some of its rows."""
    need_cpu()
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 2, n, 24, generator=generator) for n in (45, 71))
    many = fm.AttentionMap(query, key, backend="cpu").to_dense()
    alone = fm.AttentionMap(query[1:2], key[1:2], backend="cpu").to_dense()
    paired = fm.AttentionMap(query, key, pairs=[[2, 0], [1, 1]], backend="cpu")
    assert torch.equal(many[1:2], alone)
    assert torch.equal(paired.to_dense()[1:2], alone)


def test_two_threads_at_once(backend: str, one_thread: None) -> None:
    problems = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        shapes = ((1, 2, 90 + 13 * seed, 24), (1, 2, 130, 24))
        problems.append([torch.randn(shape, generator=generator) for shape in shapes])

    def solve(index: int) -> dict[str, torch.Tensor]:
        A = fm.AttentionMap(*problems[index], backend=backend)
        fields = A.reduce("entropy", "argmax", "column_sum", "column_entropy")._asdict()
        back = fm.AttentionMap(*reversed(problems[index]), backend=backend)
        return {**fields, "product": A @ torch.ones(130, 3), "diagonal": (A @ back).diagonal()}

    want = [solve(index) for index in range(len(problems))]
    wrong: list[object] = []
    start = threading.Barrier(2)

    def work(order: list[int]) -> None:
        try:
            start.wait()
            for index in order * 4:
                check_same_bits(solve(index), want[index])
        except BaseException as error:
            wrong.append(error)

    orders = ([0, 1, 2, 3, 4, 5], [5, 3, 4, 1, 0, 2])
    both = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not wrong


@pytest.mark.skipif(sys.platform == "win32", reason="guards pages with mprotect")
def test_no_byte_outside_inputs_and_outputs_is_touched_or_matters(one_thread: None) -> None:
    """In a process whose tensors end at forbidden pages and whose fresh memory is not zero."""
    need_cpu()
    program = Path(__file__).with_name("every_operation.py")
    # MALLOC_PERTURB_ is glibc's: what malloc returns is filled with the complement of this byte,
    # 0x7f, so that unwritten floats in the kernel's workspace are near 1e38. Ignored elsewhere.
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "MALLOC_PERTURB_": "128"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    for dtype, line in zip(GUARDED_DTYPES, done.stdout.splitlines(), strict=True):
        want = digests(outputs("cpu", dtype))
        different = [name for name, digest in json.loads(line).items() if digest != want[name]]
        assert not different, f"{dtype}: {different}"
