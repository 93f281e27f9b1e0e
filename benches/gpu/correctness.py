"""Is every number right, on this card: each operation, backend and dtype against float64.

The problems and checks are those of tests/, with fresh random numbers and outputs that begin as
NaN. session.py shares them among processes, because most of the time goes into compiling kernels.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flashmaps as fm
import torch
from flashmaps.maps.backends.choice import get
from flashmaps.maps.problem import Request
from memory import most_requested

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import oracle  # noqa: E402
import problems  # noqa: E402
from checks import EVERYWHERE, OPERATIONS, Checked  # noqa: E402
from contract import Subject  # noqa: E402

# One of each kind; the others are variations of these.
QUICK = (
    "1x1x1x1x8-float32", "2x5x33x47x64-float16", "2x5x33x47x64-bfloat16", "1x2x36x49x128-bfloat16",
    "1x1x9x16x256-float16", "1x2x37x517x40-float32", "1x2x37x517x40-float16",
    "2x2x301x77x16-float16", "2x3x21x45x24-bias-float16", "1x2x11x45x24-columns-float32",
    "2to3x4x21x45x24-everything-float32", "2x3x26x130x40-lse-float16",
    "2x3x26x45x24-width-first-float32",
)  # fmt: skip
SMALLEST = {"triton": "1x2x16x25x72-float16", "cuda": "2x5x33x47x64-float16"}  # without a card


@dataclass(frozen=True)
class Result:
    """One check. ``error`` is None where it passed, or where the backend refuses the problem."""

    backend: str
    check: str
    error: str | None
    seconds: float
    refused: bool = False


def named_cases() -> dict[str, tuple[problems.Problem, torch.dtype]]:
    """The contract's problems in the dtypes of a GPU."""
    found = dict(zip(problems.CASE_NAMES, problems.CASES, strict=True))
    return {name: case for name, case in found.items() if case[1] != torch.float64}


def prepare(seed: int) -> None:
    """Of each process: fresh numbers, outputs that begin as NaN, one thread."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    from_name = problems._seed
    problems._seed = lambda problem: from_name(problem) + seed


@functools.cache
def _checked(name: str, backend: str, device: str) -> Checked:
    return Checked(*named_cases()[name], backend, device)


def check(name: str, operation: str, backend: str, device: str) -> Result:
    """One operation on one problem."""
    start = time.perf_counter()
    error, refused = None, False
    try:
        OPERATIONS[operation](_checked(name, backend, device))
    except AssertionError as wrong:
        error = str(wrong)
    except Exception as wrong:
        # What a backend does not do it says in these words (flashmaps.maps.backends.choice).
        refused = str(wrong).startswith(f"backend {backend!r} cannot run this: ")
        error = None if refused else traceback.format_exc()
    return Result(backend, f"{name}/{operation}", error, time.perf_counter() - start, refused)


def check_problem(
    name: str, operations: tuple[str, ...], backend: str, device: str
) -> list[Result]:
    """Some operations on one problem, whose truth is computed once."""
    found = [check(name, operation, backend, device) for operation in operations]
    _checked.cache_clear()
    for cached in (problems.inputs, problems.truth, problems.plain):
        cached.cache_clear()
    return found


def has_topk(backend: str) -> bool:
    """Backend "cuda" leaves it to the others."""
    refusal = getattr(get(backend), "refusal", None)
    return refusal is None or refusal(Request(("topk_values",), k=1)) is None


# Beyond the contract's sizes: some rows and columns of large maps.


def check_large(tokens: int, heads: int, dtype: torch.dtype, backend: str, device: str) -> Result:
    """Rows and columns here and there of a map that is never built, against float64."""
    start = time.perf_counter()
    try:
        _check_large(tokens, heads, dtype, backend, device)
        error = None
    except Exception as wrong:
        error = str(wrong) if isinstance(wrong, AssertionError) else traceback.format_exc()
    what = f"{heads}x{tokens}x64-{str(dtype).removeprefix('torch.')}/large"
    return Result(backend, what, error, time.perf_counter() - start)


def _check_large(tokens: int, heads: int, dtype: torch.dtype, backend: str, device: str) -> None:
    query, key = (torch.randn(1, heads, tokens, 64, device=device).to(dtype) for _ in range(2))
    lazy = fm.AttentionMap(query, key, backend=backend)
    fields = lazy.reduce("entropy", "argmax", "max", "column_sum", "column_argmax")
    largest = lazy.topk(5) if has_topk(backend) else None
    x = torch.randn(1, tokens, 3, device=device)
    product = lazy @ x
    picked = torch.linspace(0, tokens - 1, 16, device=device).long()

    def scores(dtype: torch.dtype, rows: slice | torch.Tensor, columns: slice | torch.Tensor):
        return (query[:, :, rows].to(dtype) @ key[:, :, columns].to(dtype).mT) / 8

    def truth(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Some rows [1, 16, M], some columns [1, N, 16], the largest score."""
        of_rows = scores(dtype, picked, slice(None))
        columns, most = [], float(of_rows.abs().max())
        for low in range(0, tokens, 1024):
            part = slice(low, low + 1024)
            lse = scores(dtype, part, slice(None)).logsumexp(-1, keepdim=True)
            columns.append((scores(dtype, part, picked) - lse).exp().mean(1))
        return of_rows.softmax(-1).mean(1).cpu(), torch.cat(columns, 1).cpu(), most

    exact, rival = truth(torch.float64), truth(torch.float32)
    roundings = exact[2] + tokens**0.5 + heads**0.5 + 4
    maps = [
        (oracle.Map(r, 1, roundings), oracle.Map(c, 1, roundings)) for r, c, _ in (exact, rival)
    ]
    rows = Subject(None, maps[0][0], maps[1][0], dtype)  # type: ignore[arg-type]
    columns = Subject(None, maps[0][1], maps[1][1], dtype)  # type: ignore[arg-type]
    for name in ("entropy", "argmax", "max"):
        rows.check_reduction(name, getattr(fields, name)[:, picked].cpu())
    for name in ("column_sum", "column_argmax"):
        columns.check_reduction(name, getattr(fields, name)[:, picked].cpu())
    rows.check("product", product[:, picked].cpu(), x.cpu())
    if largest is not None:
        values, indices = (each[:, picked].cpu() for each in largest)
        rows.check_entries("topk", values, lambda dense: dense.gather(2, indices))


# What surrounds the kernels.


def check_compiled(backend: str, device: str) -> None:
    """torch.compile with its own backend, in one graph."""
    query, key = (torch.randn(1, 2, 300, 40, device=device).half() for _ in range(2))

    def statistics(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        lazy = fm.AttentionMap(2 * query, key, backend=backend)
        return lazy.entropy() + 1, lazy @ torch.ones(300, 3, device=device)

    compiled = torch.compile(statistics, fullgraph=True)
    for got, want in zip(compiled(query, key), statistics(query, key), strict=True):
        torch.testing.assert_close(got, want)


def check_graph(backend: str, device: str) -> None:
    """A CUDA graph of a whole pass, replayed on other numbers, has the bits of a call."""
    query, key = (torch.randn(1, 5, 1024, 64, device=device).half() for _ in range(2))

    def statistics() -> list[torch.Tensor]:
        lazy = fm.AttentionMap(query, key, backend=backend)
        found = lazy.reduce("entropy", "argmax", "expectation", "column_entropy")
        largest = lazy.topk(5) if has_topk(backend) else ()
        return [*found._asdict().values(), *largest, lazy.pool(key_to=(8, 8))]

    statistics()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = statistics()
    query.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, statistics(), strict=True):
        assert torch.equal(got, want)


def check_memory(backend: str, device: str) -> None:
    """What torch is asked for at most is what was planned, but for a few scalars."""
    query, key = (torch.randn(1, 5, 4096, 64, device=device).half() for _ in range(2))
    lazy = fm.AttentionMap(query, key, backend=backend)
    known = fm.AttentionMap(query, key, lse=lazy.lse, backend=backend)
    x = torch.randn(1, 4096, 3, device=device)
    there_and_back = fm.compose(known, known)
    calls: list[tuple[fm.Plan, Callable[[], object]]] = [
        (a.plan(*names), functools.partial(a.reduce, *names))
        for a in (fm.AttentionMap(query, key, backend=backend), known)
        for names in (("entropy", "argmax"), ("column_entropy", "column_argmax"))
    ]
    calls += [
        (known.plan("product", columns=3), lambda: known @ x),
        *(
            (known.plan("topk", k=k), functools.partial(known.topk, k))
            for k in (8, 100)
            if has_topk(backend)
        ),
        (
            there_and_back.plan("entropy", "argmax"),
            lambda: there_and_back.reduce("entropy", "argmax"),
        ),
    ]
    for plan, run in calls:
        run()  # compiles
        taken = most_requested(run)
        assert taken <= plan.workspace + 32 * 512, f"{plan}\ntook {taken} bytes of workspace"


def check_sanitized(backend: str, device: str) -> None:
    """compute-sanitizer sees no access out of bounds in any kernel."""
    tool = shutil.which("compute-sanitizer")
    assert tool is not None
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        __file__,
        backend,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def check_around(name: str, run: Callable[[str, str], None], backend: str, device: str) -> Result:
    """One of those above."""
    start = time.perf_counter()
    try:
        run(backend, device)
        error = None
    except Exception:
        error = traceback.format_exc()
    return Result(backend, name, error, time.perf_counter() - start)


def around() -> dict[str, Callable[[str, str], None]]:
    """The checks of what surrounds the kernels that can run here."""
    found = {
        "torch.compile": check_compiled,
        "CUDA graph": check_graph,
        "planned memory": check_memory,
    }
    if shutil.which("compute-sanitizer") is not None:
        found["compute-sanitizer"] = check_sanitized
    return found


def _sanitized(backend: str) -> None:
    """What compute-sanitizer watches: each kernel once, on sizes that fit no tile."""
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or it would not see past an allocation
    for name in ("2x5x33x47x64-float16", "1x2x37x517x40-float16"):
        for result in check_problem(name, EVERYWHERE, backend, "cuda"):
            assert result.error is None, result


if __name__ == "__main__":
    _sanitized(sys.argv[1])
