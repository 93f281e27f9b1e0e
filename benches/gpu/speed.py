"""How fast, beside whoever else can do it, in the same run on the same numbers."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flashmaps as fm
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashmaps.kernels.rates import exp2_per_second
from operations import COMPOSED, FUSED, OPERATIONS, Inputs, Operation
from shapes import SHAPES, Shape

SDPA = {
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_CHUNK = 512  # rows of the map that chunked eager torch holds at once


@dataclass
class Row:
    """One contestant of one case."""

    by: str
    ms: float | None = None  # median; replayed as a CUDA graph where that works
    call_ms: float | None = None  # as Python calls it
    mb: float | None = None  # most memory at once, beyond inputs and outputs
    of_limit: float | None = None
    refusal: str = ""


@dataclass
class Case:
    """An operation on a shape: what bounds it, and who did it in which time."""

    operation: str
    shape: str
    dtype: str
    limits_ms: dict[str, float]  # by the measured rate of exp2, of the matrix units, of the memory
    rows: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.operation}, {self.shape}, {self.dtype}"


class Clock:
    """Times calls: with events on a GPU, or, for a test of this file, without one."""

    def __init__(self, device: str) -> None:
        self.device = device

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds."""
        if self.device != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def median(self, run: Callable[[], Any], budget: float = 0.15) -> float:
        """Of as many calls as fit the budget, at least three."""
        each = self.once(run)
        rounds = max(3, min(50, int(budget / max(each, 1e-6))))
        return statistics.median(self.once(run) for _ in range(rounds))

    def graph(self, run: Callable[[], Any]) -> Callable[[], Any] | None:
        """The same work without Python, where it can be captured."""
        if self.device != "cuda":
            return None
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except Exception:
            torch.cuda.synchronize()
            return None
        return graph.replay

    def memory(self, run: Callable[[], Any]) -> float:
        """MB (10^6 bytes) beyond what was there before and what comes out."""
        if self.device != "cuda":
            run()
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return (peak - held) / 1e6


# Ceilings of the card, measured.


def ceilings(clock: Clock, quick: bool) -> dict[str, float]:
    """Rates per second: exp2 of one number; float16 multiplications and additions; bytes moved."""
    device = clock.device
    side, many = (8192, 2**28) if device == "cuda" else (64, 2**12)
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    product = torch.empty_like(a)
    matrix = 2 * side**3 / min(clock.median(lambda: torch.mm(a, b, out=product)) for _ in range(3))
    x = torch.zeros(many, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    moved = 2 * many / clock.median(lambda: y.copy_(x))
    exps = 1e9  # some number, for a test of this file
    if device == "cuda":
        exps = exp2_per_second(torch.device("cuda"), clock.median)
    return {"exp": exps, "matrix": matrix, "memory": moved}


# The contestants.


def on_device(inputs: Inputs, device: str) -> Inputs:
    """The same numbers on a GPU."""
    return replace(
        inputs,
        pairs=tuple((query.to(device), key.to(device)) for query, key in inputs.pairs),
        right=None if inputs.right is None else inputs.right.to(device),
        left=None if inputs.left is None else inputs.left.to(device),
    )


def lazy_maps(inputs: Inputs, backend: str) -> list[fm.AttentionMap]:
    """Ours, on one backend."""
    grids: dict[str, Any] = {"query_grid": inputs.shape.grid, "key_grid": inputs.shape.key_grid}
    return [fm.AttentionMap(query, key, **grids, backend=backend) for query, key in inputs.pairs]


def known_maps(inputs: Inputs, backend: str) -> list[fm.AttentionMap]:
    """Ours, with the log-sum-exp that attention has returned."""
    return [
        fm.AttentionMap(
            *pair, lse=a.lse, query_grid=a.query_grid, key_grid=a.key_grid, backend=backend
        )
        for pair, a in zip(inputs.pairs, lazy_maps(inputs, backend), strict=True)
    ]


def in_bfloat16(run: Callable[[], Any]) -> Any:
    """With torch's switch for products of float32 at "medium", which compositions follow."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision(before)


def eager_map(query: Tensor, key: Tensor) -> Tensor:
    """The mean map as it is usually written: scores of all heads, in the dtype of the model."""
    return (query @ key.mT * query.shape[3] ** -0.5).softmax(-1).mean(1).float()


def half_map(query: Tensor, key: Tensor) -> Tensor:
    """The mean map once, head by head, in bfloat16: the honest rival where it fits."""
    total: Tensor | None = None
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head].mT * query.shape[3] ** -0.5
        one = scores.softmax(-1, dtype=torch.float32) / query.shape[1]
        total = one.bfloat16() if total is None else total.add_(one)
    assert total is not None
    return total


def chunked(operation: Operation, inputs: Inputs) -> Callable[[], Any] | None:
    """Eager torch some rows at a time, for what needs only its own row."""
    if operation.maps > 1 or operation.dense is None or operation.operand == "left":
        return None
    if operation.name in ("all columns", "pool to 1/4"):
        return None
    dense = operation.dense
    query, key = inputs.pairs[0]

    def run() -> list[Any]:
        rows = range(0, query.shape[2], _CHUNK)
        return [dense(inputs, eager_map(query[:, :, r : r + _CHUNK], key)) for r in rows]

    return run


def contestants(
    operation: Operation, inputs: Inputs, backends: tuple[str, ...], *, every: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everyone by name, ours first."""
    for backend in backends:
        yield (
            f"flashmaps, {backend}",
            lambda backend=backend: operation.lazy(inputs, *lazy_maps(inputs, backend)),
        )
        if operation is COMPOSED:
            yield (
                f"flashmaps, {backend}, products in bfloat16",
                lambda backend=backend: in_bfloat16(
                    lambda: operation.lazy(inputs, *lazy_maps(inputs, backend))
                ),
            )
        if operation is FUSED:
            known = known_maps(inputs, backend)
            yield f"flashmaps, {backend}, lse given", lambda known=known: FUSED.lazy(inputs, *known)
    dense = operation.dense
    if dense is not None:
        yield "eager", lambda: dense(inputs, *(eager_map(*pair) for pair in inputs.pairs))
        if every:
            compiled = torch.compile(eager_map, dynamic=False)
            yield "compiled eager", lambda: dense(inputs, *(compiled(*p) for p in inputs.pairs))
        in_chunks = chunked(operation, inputs)
        if in_chunks is not None:
            yield "chunked eager", in_chunks
        if operation.operand == "":
            yield (
                "map in bfloat16, then reduce",
                lambda: dense(inputs, *(half_map(*pair).float() for pair in inputs.pairs)),
            )
    query, key = inputs.pairs[0]
    for name, kind in SDPA.items():
        yield name, lambda kind=kind: _sdpa(inputs, kind)
    if operation.operand == "right" and inputs.right is not None:
        value = torch.zeros_like(key)
        value[..., : operation.columns] = inputs.right[:, None]
        yield (
            "SDPA with V = x",
            lambda: scaled_dot_product_attention(query, key, value)[..., : operation.columns].mean(
                1
            ),
        )
    if operation.name in ("lse", "A @ x, C=3") and find_spec("pykeops") is not None:
        yield "KeOps", _keops(operation, inputs)


def _sdpa(inputs: Inputs, kind: SDPBackend) -> list[Tensor]:
    with sdpa_kernel(kind):
        return [scaled_dot_product_attention(q, k, k) for q, k in inputs.pairs]


def _keops(operation: Operation, inputs: Inputs) -> Callable[[], Any]:
    from pykeops.torch import LazyTensor

    query, key = inputs.pairs[0]
    left = (query.float() * query.shape[3] ** -0.5)[0, :, :, None, :].contiguous()
    right = key.float()[0, :, None, :, :].contiguous()

    def scores() -> Any:
        return (LazyTensor(left) * LazyTensor(right)).sum(-1)

    if operation.name == "lse":
        return lambda: scores().logsumexp(dim=2)
    assert inputs.right is not None
    x = inputs.right[0].expand(query.shape[1], 1, -1, -1).contiguous()
    return lambda: scores().sumsoftmaxweight(LazyTensor(x), dim=2).mean(0)


def measure(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    backends: tuple[str, ...],
    rates: dict[str, float],
    clock: Clock,
    *,
    every: bool,
) -> Case:
    """One case: every contestant that can run."""
    inputs = on_device(operation.inputs(shape, dtype), clock.device)
    moved = sum(t.numel() * t.element_size() for pair in inputs.pairs for t in pair)
    if operation.name == "to_dense":
        moved += 4 * shape.queries * shape.keys
    limits = {
        "exp": operation.exps(shape) / rates["exp"] * 1e3,
        "matrix": operation.flops(shape) / rates["matrix"] * 1e3,
        "memory": moved / rates["memory"] * 1e3,
    }
    case = Case(operation.name, str(shape), str(dtype).removeprefix("torch."), limits)
    found = contestants(operation, inputs, backends, every=every)
    while True:
        name = "the next contestant"
        try:
            name, run = next(found)
            run()  # compiles
            run()
            replay = clock.graph(run)
            call = clock.median(run)
            seconds = call if replay is None else clock.median(replay)
            row = Row(name, seconds * 1e3, call * 1e3, clock.memory(run))
            row.of_limit = max(limits.values()) / row.ms if row.ms else None
        except StopIteration:
            break
        except Exception as error:
            row = Row(name, refusal=f"{type(error).__name__}: {str(error).splitlines()[:1]}"[:160])
        case.rows.append(row)
        replay = None
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
    return case


# The order of importance: a run that is out of time leaves out the last ones.
_HEADLINE = ("sd2-64", "sdxl-64", "flux", "text", "sd15-64", "sd2-96", "sd2-32", "wan")


def plan(quick: bool, only: str | None) -> list[tuple[Operation, Shape, torch.dtype]]:
    """What to measure."""
    half = torch.float16
    found = [(FUSED, SHAPES["sd2-64"], half)]
    rest = [operation for operation in OPERATIONS if operation is not FUSED]
    found += [(operation, SHAPES["sd2-64"], half) for operation in rest]
    if not quick:
        found += [(FUSED, SHAPES[name], half) for name in _HEADLINE[1:]]
        found += [(FUSED, SHAPES["sd2-64"], dtype) for dtype in (torch.bfloat16, torch.float32)]
        found += [(FUSED, SHAPES["tokens-65536"], half)]
        found += [(rest[0], SHAPES["flux"], half), (rest[1], SHAPES["flux"], half)]
    return [each for each in found if only is None or only in each[0].name]
