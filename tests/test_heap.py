"""Budgets held to the heap itself: every allocation of the process counted, whoever makes it.

test_memory_budget.py holds plans to torch's record and to C++'s account of itself; this holds both
of these to the truth. Each operation runs once before it is measured: MKL keeps the buffers that it
packs matrices into, which no plan knows of.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import flashmaps as fm
import pytest
import torch

# Small things that are no tensors: Python's objects, the threads' notes, rounding of the allocator.
SLACK = 48 * 2**10
HERE = Path(__file__).parent


def operations() -> dict[str, tuple[Callable[[], object], Callable[..., fm.Plan]]]:
    """Some of each kind, of maps whose workspaces are far above the slack."""
    found: dict[str, tuple[Callable[[], object], Callable[..., fm.Plan]]] = {}
    names = ("entropy", "argmax", "column_entropy", "column_argmax")
    for backend in ("cpu", "reference"):
        if not fm.backends()[backend]:
            continue
        query = torch.randn(2, 300, 3, 40).transpose(1, 2).requires_grad_()  # strided
        key = torch.randn(2, 3, 400, 40).requires_grad_()
        options = {"backend": backend, "key_grid": (20, 20)}
        plain = fm.AttentionMap(query, key, **options)
        pairs = fm.AttentionMap(query, key, pairs=[[0, 1], [1, 1], [0, 0]], **options)
        ends = [torch.randn(2, 3, n, 40).requires_grad_() for n in (400, 300)]
        composed = plain @ fm.AttentionMap(*ends, backend=backend)
        found[f"{backend} composed backward"] = _way_back(
            composed, ("entropy", "column_max"), query, key, *ends
        )
        for name, A in {"plain": plain, "pairs": pairs}.items():
            title = f"{backend} {name}"
            x, y = torch.randn(A.shape[0], 400, 4), torch.randn(A.shape[0], 300, 4)
            found |= {
                f"{title} reduce": (
                    lambda A=A: A.reduce(*names),
                    lambda A=A, **o: A.plan(*names, **o),
                ),
                f"{title} product": (
                    lambda A=A, x=x: A @ x,
                    lambda A=A, **o: A.plan("product", columns=4, **o),
                ),
                f"{title} transposed": (
                    lambda A=A, y=y: A.mT @ y,
                    lambda A=A, **o: A.plan("transposed_product", columns=4, **o),
                ),
                f"{title} backward": _way_back(A, ("entropy", "column_entropy"), query, key),
                f"{title} rows in portions backward": _way_back_of(
                    lambda A=A: A.rows(range(0, 300, 2)), A, ("rows",), query, key, count=150
                ),
                f"{title} pool in portions backward": _way_back_of(
                    lambda A=A: A.pool(key_to=(5, 5)), A, ("pool",), query, key, key_to=(5, 5)
                ),
                f"{title} topk": (lambda A=A: A.topk(9), lambda A=A, **o: A.plan("topk", k=9, **o)),
            }
    return found


def _way_back(
    A: fm.AttentionMap | fm.Composition, names: tuple[str, ...], *leaves: torch.Tensor
) -> tuple[Callable[[], object], Callable[..., fm.Plan]]:
    """Of results that are there: the gradients are what comes out."""
    loss = sum(x.sum() for x in A.reduce(*names)._asdict().values())
    return (
        lambda: torch.autograd.grad(loss, leaves, retain_graph=True),
        lambda **o: A.plan(*names, backward=True, **o),
    )


def _way_back_of(
    run: Callable[[], torch.Tensor],
    A: fm.AttentionMap,
    names: tuple[str, ...],
    *leaves: torch.Tensor,
    **asked: object,
) -> tuple[Callable[[], object], Callable[..., fm.Plan]]:
    """The way back of an operation in portions, whose number the way forth decides."""
    g = torch.randn_like(run())

    def prepare() -> Callable[[], object]:
        result = run()
        return lambda: torch.autograd.grad(result, leaves, g, retain_graph=True)

    return prepare, lambda **o: A.plan(*names, **asked, backward=True, **o)


def main() -> None:
    """In a process with the counter: what each operation held beyond its result, by budget."""
    heap = ctypes.CDLL(os.environ["LD_PRELOAD"])
    heap.heap_peak.restype = heap.heap_held.restype = ctypes.c_longlong
    from workspaces import output_bytes

    torch.set_num_threads(2)
    for what, (run, planner) in operations().items():
        least = planner(memory_budget=2**40).workspace
        for budget in (None, least // 2, least // 5):
            try:
                plan = planner(memory_budget=budget)
            except ValueError as error:
                plan = planner(memory_budget=int(str(error).rsplit(" ", 1)[1]))
                budget = plan.memory_budget
            with fm.memory_budget(budget):
                with torch.set_grad_enabled("backward" in what):
                    prepared = run() if "portions" in what else run
                    prepared()
                    heap.heap_peak()
                    before = heap.heap_held()
                    result = prepared()
                held = heap.heap_peak() - before - output_bytes(result)
            del result, prepared
            print(json.dumps([what, budget, plan.workspace, held]), flush=True)


@pytest.mark.skipif(sys.platform != "linux", reason="a library that is loaded before all others")
def test_no_operation_holds_more_of_the_heap_than_its_plan_and_its_budget(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler was found, which builds the counter")
    counter = tmp_path / "heap.so"
    # Or the compiler would make a call of calloc of what calloc does.
    flags = ["-O2", "-fno-builtin", "-shared", "-fPIC"]
    build = [compiler, *flags, str(HERE / "heap.c"), "-o", str(counter), "-ldl"]
    subprocess.run(build, check=True)
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "LD_PRELOAD": str(counter)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3 * len(operations())
    for what, budget, planned, held in rows:
        assert held <= planned + SLACK, f"{what}, budget {budget}: {planned} planned, {held} held"
        assert budget is None or planned <= budget, what
        assert held > 0.3 * planned - SLACK, f"{what}: the counter saw {held} of {planned}"


if __name__ == "__main__":
    main()
