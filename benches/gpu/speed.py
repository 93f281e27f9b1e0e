"""How fast, beside whoever else can do it: one contestant of one case at a time.

Times are free of launches: a pass is captured as a CUDA graph and replayed many times between two
events, so that the card never waits for the host. What the host pays for a call is a number of its
own. Where a pass cannot be captured, calls are timed in its place, and the row says so.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import flashmaps as fm
import torch
from memory import most_requested
from operations import COMPOSED, FUSED, OPERATIONS, Inputs, Operation
from shapes import SHAPES, Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SDPA = {
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_CHUNK = 512  # rows of the map that chunked eager torch holds at once
_SECONDS = 0.1  # of replays, for one number
TINY = Shape("tiny", 1, (4, 4), 64)  # for the tests of this file

Run = Callable[[], Any]
Rival = Callable[[Operation, Inputs], Run]


class NoGraph(RuntimeError):
    """A pass could not be captured. The process that tried is not to be used any more."""


class Clock:
    """Times calls: with events on a GPU, or, for a test of this file, without one."""

    def __init__(self, device: str) -> None:
        self.device = device

    def _once(self, run: Run, times: int) -> float:
        """Seconds a call, of so many in a row."""
        if self.device != "cuda":
            start = time.perf_counter()
            for _ in range(times):
                run()
            return (time.perf_counter() - start) / times
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / times

    def replays(self, run: Run) -> float:
        """Seconds: the median of several times n calls in a row, n as large as there is time."""
        each = self._once(run, 1)
        times = max(1, min(200, math.ceil(_SECONDS / 7 / max(each, 1e-7))))
        return statistics.median(self._once(run, times) for _ in range(7))

    def host(self, run: Run) -> float:
        """Seconds that the host is busy with a call, the card working or not; the median."""
        taken = []
        for _ in range(15):
            self.wait()
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        self.wait()
        return statistics.median(taken)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def graph(self, run: Run) -> Run:
        """The same work without Python; NoGraph where it cannot be captured."""
        if self.device != "cuda":
            return run
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:
            raise NoGraph(f"{type(error).__name__}: {error}") from None
        return graph.replay

    def memory(self, run: Run) -> float:
        """MB (10^6 bytes) beyond what was there before and what comes out."""
        if self.device != "cuda":
            run()
            return 0.0
        return most_requested(run) / 1e6


def ceilings(clock: Clock) -> dict[str, float]:
    """Rates a second: exp2, multiplications and additions in float16, bytes of memory and of L2."""
    device, big = clock.device, clock.device == "cuda"
    side, many, few = (8192, 2**28, 2**23) if big else (64, 2**12, 2**12)
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    product = torch.empty_like(a)
    matrix = 2 * side**3 / clock.replays(lambda: torch.mm(a, b, out=product))
    found = {"matrix": matrix}
    for name, size in (("memory", many), ("l2", few)):  # 16 MB there and back stay in L2
        x = torch.zeros(size, dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        copy = clock.graph(lambda x=x, y=y: y.copy_(x))  # type: ignore[misc]
        found[name] = 2 * size / clock.replays(copy)
    found["exp"] = 1e9  # some number, for a test of this file
    if big:
        from flashmaps.kernels.rates import exp2_per_second

        found["exp"] = exp2_per_second(torch.device("cuda"), clock.replays)
    return found


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


def in_bfloat16(run: Run) -> Any:
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


def _chunked(operation: Operation, inputs: Inputs) -> Run:
    """Eager torch some rows at a time, for what needs only its own row."""
    dense = operation.dense
    assert dense is not None
    query, key = inputs.pairs[0]

    def run() -> list[Any]:
        rows = range(0, query.shape[2], _CHUNK)
        return [dense(inputs, eager_map(query[:, :, r : r + _CHUNK], key)) for r in rows]

    return run


def _ours(backend: str, *, known: bool = False, bfloat16: bool = False) -> Rival:
    def make(operation: Operation, inputs: Inputs) -> Run:
        if known:
            maps = known_maps(inputs, backend)
            return lambda: operation.lazy(inputs, *maps)
        if bfloat16:
            return lambda: in_bfloat16(lambda: operation.lazy(inputs, *lazy_maps(inputs, backend)))
        return lambda: operation.lazy(inputs, *lazy_maps(inputs, backend))

    return make


def _dense(make_map: Callable[[Tensor, Tensor], Tensor]) -> Rival:
    def make(operation: Operation, inputs: Inputs) -> Run:
        dense = operation.dense
        assert dense is not None
        return lambda: dense(inputs, *(make_map(*pair) for pair in inputs.pairs))

    return make


def _compiled(operation: Operation, inputs: Inputs) -> Run:
    torch._dynamo.reset()  # or the shapes of another case would make it give up
    return _dense(torch.compile(eager_map, dynamic=False))(operation, inputs)


def _of_sdpa(kind: SDPBackend) -> Rival:
    return lambda operation, inputs: lambda: _sdpa(inputs, kind)


def _with_values(operation: Operation, inputs: Inputs) -> Run:
    query, key = inputs.pairs[0]
    value = torch.zeros_like(key)
    assert inputs.right is not None
    value[..., : operation.columns] = inputs.right[:, None]
    return lambda: scaled_dot_product_attention(query, key, value)[..., : operation.columns].mean(1)


def contestants(operation: Operation, backends: tuple[str, ...]) -> dict[str, Rival]:
    """Everyone by name, ours first."""
    found: dict[str, Rival] = {}
    for backend in backends:
        found[f"flashmaps, {backend}"] = _ours(backend)
        if operation is COMPOSED:
            found[f"flashmaps, {backend}, products in bfloat16"] = _ours(backend, bfloat16=True)
        if operation is FUSED:
            found[f"flashmaps, {backend}, lse given"] = _ours(backend, known=True)
    for name, kind in SDPA.items():
        found[name] = _of_sdpa(kind)
    if operation.gradient:
        return {**found, "eager": _with_graph(_dense(eager_map))}
    if operation.dense is not None:
        found["eager"] = _dense(eager_map)
        if operation.operand == "":
            found["map in bfloat16, then reduce"] = _dense(lambda *pair: half_map(*pair).float())
        whole_columns = operation.name in ("all columns", "pool to 1/4")
        if operation.maps == 1 and operation.operand != "left" and not whole_columns:
            found["chunked eager"] = _chunked
        found["compiled eager"] = _compiled
    if operation.operand == "right":
        found["SDPA with V = x"] = _with_values
    if operation.name in ("lse", "A @ x, C=3") and find_spec("pykeops") is not None:
        found["KeOps"] = _keops
    return found


def _with_graph(rival: Rival) -> Rival:
    return lambda operation, inputs: torch.enable_grad()(rival(operation, inputs))


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


def case_of(job: dict[str, Any]) -> tuple[Operation, Shape, torch.dtype]:
    """The operation, shape and dtype that a job names."""
    operation = next(each for each in OPERATIONS if each.name == job["operation"])
    shape = TINY if job["shape"] == "tiny" else SHAPES[job["shape"]]
    return operation, shape, getattr(torch, job["dtype"])


def measure(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """One contestant of one case: ms, host_ms, mb; what bounds it, as counts.

    Raises NoGraph where the job asks for a graph that cannot be captured.
    """
    operation, shape, dtype = case_of(job)
    batch = job.get("batch", 1)
    inputs = on_device(operation.inputs(shape, dtype), clock.device)
    if batch > 1:
        pairs = tuple(tuple(x.repeat(batch, 1, 1, 1) for x in pair) for pair in inputs.pairs)
        inputs = replace(inputs, pairs=pairs)
    run = contestants(operation, tuple(job["backends"]))[job["by"]](operation, inputs)
    run()  # compiles
    run()
    moved = sum(t.numel() * t.element_size() for pair in inputs.pairs for t in pair)
    if operation.name == "to_dense":
        moved += 4 * batch * shape.queries * shape.keys
    found: dict[str, Any] = {
        "counts": {
            "exp": batch * operation.exps(shape),
            "matrix": batch * operation.flops(shape),
            "memory": moved,
        },
        "host_ms": clock.host(run) * 1e3,
        "mb": clock.memory(run),
    }
    timed = clock.graph(run) if job.get("graph", True) else run
    return {**found, "ms": clock.replays(timed) * 1e3, "graphed": job.get("graph", True)}


# The order of importance: a session that is out of time leaves out the last ones.
_HEADLINE = (
    ("sd2-64", 1), ("sd2-64", 8), ("sdxl-64", 1), ("flux", 1), ("text", 1), ("sd15-64", 1),
    ("sd2-96", 1), ("sd2-32", 1), ("wan", 1),
)  # fmt: skip


def jobs(backends: tuple[str, ...], *, quick: bool, device: str = "cuda") -> list[dict[str, Any]]:
    """What to time: our statistics on the headline shapes and their rivals, then the rest."""
    cases = [(FUSED, name, batch, "float16") for name, batch in _HEADLINE[: 5 if quick else None]]
    rest = [operation for operation in OPERATIONS if operation is not FUSED]
    if not quick:
        cases += [(operation, "sd2-64", 1, "float16") for operation in rest]
        cases += [(FUSED, "sd2-64", 1, dtype) for dtype in ("bfloat16", "float32")]
        cases += [(FUSED, "tokens-65536", 1, "float16"), (rest[0], "flux", 1, "float16")]
    if device == "cpu":
        cases = [(FUSED, "tiny", 1, "float16"), (rest[0], "tiny", 1, "float16")]
    found = []
    for operation, shape, batch, dtype in cases:
        for by in contestants(operation, backends):
            slow = by in ("compiled eager", "chunked eager")
            if slow and (quick or device == "cpu"):
                continue
            found.append(
                {
                    "kind": "time", "operation": operation.name, "shape": shape, "batch": batch,
                    "dtype": dtype, "by": by, "backends": list(backends), "graph": True,
                }
            )  # fmt: skip
    return found
