"""Backend "cuda": CUDA C++ kernels (csrc/cuda/), handed pointers, sizes and torch's stream.

`Backend` takes the compiled module, so that tests drive the same kernels compiled for the host
through the very same Python. Nothing here waits for the GPU or reads a value from it: calls can be
captured in a CUDA graph. docs/cuda.md has the design.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmaps.maps.problem import Cost, Problem, Request, cost_of, empty_outputs

# Head dimensions with kernels. Others would run, padded, but nobody has looked at what they cost.
DIMS = (40, 64, 80, 128, 160)

# (architecture, head dimension) that "auto" takes this backend for: those where recorded
# measurements (benches/results) say that it beats "triton" on every operation. None is recorded.
AUTOMATIC: frozenset[tuple[int, int]] = frozenset()

# Bytes beyond inputs, outputs and copies of inputs, unless the request's budget is less: maps are
# taken in chunks whose log-sum-exps fit, and parts of splits take no more.
WORKSPACE = 4 * 2**20

_LOG2_E = math.log2(math.e)
_ROWS = ("entropy", "max", "argmax", "expectation", "diagonal", "dense")
_COLUMNS = ("column_sum", "column_entropy", "column_max", "column_argmax")
_REFUSED = ("topk_values", "topk_indices")
_OPERAND_WIDTH = 32  # columns of an operand that a block takes at once; kOperandWidth in C++
_CELL_COLUMNS = 32  # cells that are summed at once
_MOST_SPLITS = 64

# Registers that a thread takes at most, by kernel: tests/test_cuda_ahead.py holds nvcc to them.
REGISTERS = {"lse": 168, "statistics": 255, "product": 255, "round_trip": 255}
_SM_REGISTERS = 65536
_BLOCK_OVERHEAD = 1024  # bytes of shared memory that the system keeps of each block


class _Shape(NamedTuple):
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
_SHAPES = (
    _Shape(4, 1, True, 2),
    _Shape(4, 2, True, 1),
    _Shape(2, 2, True, 2),
    _Shape(4, 2, False, 1),
    _Shape(4, 1, False, 1),
    _Shape(2, 1, False, 1),
    _Shape(1, 1, False, 1),
)
_LSE_SHAPES = (_Shape(4, 1, True, 1), _Shape(2, 1, True, 1))  # one head: it always fits
_LSE_WARPS = 4  # kLseThreads in C++


def _note() -> str | None:
    path = Path(__file__).parents[2] / "_cuda_build_failed.txt"  # left by setup.py
    return path.read_text("utf-8").strip() if path.exists() else None


_INSTEAD = 'use backend="triton" on a GPU, or "cpu" and "reference" on the CPU'

_native: Any = None
_missing: str | None = None
try:
    _native = importlib.import_module("flashmaps._cuda")
except ImportError as error:  # installed without nvcc, or for another interpreter
    _missing = f"the CUDA kernels are not built: {_note() or error}; {_INSTEAD}"


@functools.cache
def _limits(native: Any, device: int) -> Any:
    return native.limits(device)


def unavailable_reason() -> str | None:
    """Why the compiled kernels cannot run here at all, or None."""
    if _missing is not None:
        return _missing
    if not torch.cuda.is_available():
        return f"the CUDA kernels are built, but torch sees no GPU here; {_INSTEAD}"
    if torch.compiler.is_compiling():  # which cannot look into the module; `reduce` will
        return None
    try:
        limits = _limits(_native, torch.cuda.current_device())
    except RuntimeError as error:
        return f"the CUDA kernels are built, but the driver refuses: {error}; {_INSTEAD}"
    return _too_old(limits.architecture)


def _too_old(architecture: int) -> str | None:
    if architecture >= 80:
        return None
    return (
        "the CUDA kernels need compute capability 8.0 (Ampere) or later, this GPU has "
        f"{architecture // 10}.{architecture % 10}; {_INSTEAD}"
    )


def what_runs() -> str:
    """The card that kernels run on by default."""
    return f"CUDA C++ kernels on {torch.cuda.get_device_name()}"


def refusal(request: Request) -> str | None:
    """Why these statistics are not for this backend, or None; `Backend.supports` is for maps."""
    if any(name in _REFUSED for name in request.names):
        return 'it has no top-k: use backend="triton" or backend="reference" for that'
    return None


class Backend:
    """The functions of a backend (ARCHITECTURE.md) on one compiled module.

    ``device_type`` is where its pointers are good: "cuda", or "cpu" for kernels compiled for the
    host. ``shapes`` replaces the choice of blocks (tests).
    """

    def __init__(
        self, native: Any, device_type: str = "cuda", shapes: tuple[_Shape, ...] = ()
    ) -> None:
        self.native = native
        self.device_type = device_type
        self.shapes = shapes
        self._last = threading.local()

    def unavailable_reason(self) -> str | None:
        return unavailable_reason() if self.device_type == "cuda" else None

    def what_runs(self) -> str:
        return what_runs() if self.device_type == "cuda" else "CUDA C++ kernels, emulated"

    def supports(self, problem: Problem) -> str | None:
        """Why this problem cannot run here, or None."""
        reason = self.unavailable_reason()
        if reason is not None:
            return reason
        device = problem.query.device
        if device.type != self.device_type:
            return f"backend 'cuda' needs tensors on a GPU, these are on {device}"
        if problem.query.dtype not in (torch.float16, torch.bfloat16):
            return (
                "backend 'cuda' takes float16 and bfloat16, these are "
                f"{str(problem.query.dtype).removeprefix('torch.')}: convert Q and K, or use "
                'backend="triton"'
            )
        dim = problem.query.shape[3]
        if dim not in DIMS:
            return (
                f"backend 'cuda' has kernels for head dimensions {', '.join(map(str, DIMS))}, this "
                f'one is {dim}: use backend="triton"'
            )
        if problem.normalize != "block":
            return (
                f"backend 'cuda' does not normalise {problem.normalize} of the key grid: use "
                'backend="triton"'
            )
        return None

    def automatic(self, problem: Problem) -> bool:
        """Whether "auto" may choose this backend for a problem that it supports."""
        if not AUTOMATIC:
            return False
        architecture = self.limits(problem.query.device).architecture
        return (architecture, problem.query.shape[3]) in AUTOMATIC

    def limits(self, device: torch.device) -> Any:
        if self.device_type != "cuda":
            return self.native.limits(0)
        return _limits(self.native, _index(device))

    def plan(self, problem: Problem, request: Request) -> Cost:
        """What `reduce` takes: its launches, arranged and not made."""
        run = self._run(problem, request, planning=True)
        run.reduce(problem, request, None)
        scores = run.scores
        back = request.partner
        if back is not None and "return_probability" in request.names:
            scores -= _scores(back)
        passes = round(scores / _scores(problem))
        return cost_of(problem, request, passes=passes, workspace=run.workspace)

    def reduce(self, problem: Problem, request: Request) -> dict[str, Tensor]:
        """Every requested field; see `reference.reduce` for what each one is."""
        run = self._run(problem, request, planning=False)
        outputs = empty_outputs(problem, request)
        if self.device_type == "cuda":
            with torch.cuda.device(problem.query.device):
                run.reduce(problem, request, outputs)
        else:
            run.reduce(problem, request, outputs)
        self._last.workspace = run.workspace
        return outputs

    def last_workspace_bytes(self) -> int:
        """Bytes beyond inputs and outputs that this thread's last call allocated itself."""
        return getattr(self._last, "workspace", 0)

    def _run(self, problem: Problem, request: Request, *, planning: bool) -> _Run:
        reason = refusal(request) or _too_old(self.limits(problem.query.device).architecture)
        if reason is not None:
            raise RuntimeError(f"backend 'cuda' cannot run this: {reason}")
        return _Run(self, problem.query.device, request.memory_budget, planning)


def _index(device: torch.device) -> int:
    if device.type == "cuda" and device.index is not None:
        return device.index
    return torch.cuda.current_device()


def _scores(problem: Problem) -> int:
    """How many q k there are."""
    return problem.batch * problem.heads * problem.num_queries * problem.num_keys


def _pitch(count: int) -> int:
    """Floats from one row to the next, where 16 bytes are copied at once."""
    return -(-count // 4) * 4


def _some_maps(problem: Problem, some: slice) -> Problem:
    """A few of the maps of a batch (views)."""
    lse = None if problem.lse is None else problem.lse[some]
    if problem.pairs is not None:
        return problem._replace(pairs=problem.pairs[some], lse=lse)
    bias = None if problem.bias is None else problem.bias[some]
    return problem._replace(query=problem.query[some], key=problem.key[some], bias=bias, lse=lse)


class _Operand(NamedTuple):
    """What a map is multiplied with: [P, tokens, columns] and how far apart its rows are."""

    tensor: Tensor
    stride: int  # from map to map; 0 where all have the same
    pitch: int

    @property
    def columns(self) -> int:
        return self.tensor.shape[2]


class _Run:
    """One call: what it launches, and what it has allocated.

    Only planned, it makes the same decisions on the same shapes, and neither allocates nor
    launches.
    """

    def __init__(
        self, backend: Backend, device: torch.device, budget: int | None, planning: bool
    ) -> None:
        self.native = backend.native
        self.shapes = backend.shapes
        self.limits = backend.limits(device)
        self.budget = budget
        self.planning = planning
        self.device = device
        self.workspace = 0  # bytes beyond inputs and outputs, at most at once
        self.scores = 0  # q k that were computed
        self._held = 0
        self._copied = 0
        self.stream: Any = None
        if not planning:
            handle, index = 0, 0
            if backend.device_type == "cuda":
                index = _index(device)
                handle = torch.cuda.current_stream(device).cuda_stream
            self.stream = self.native.Stream(handle, index)

    # Memory.

    def hold(self, size: int) -> None:
        """Count what torch allocates for us; negative when it is free again."""
        self._held += size
        self.workspace = max(self.workspace, self._held)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Workspace, counted until `release`."""
        device = torch.device("meta") if self.planning else self.device
        made = torch.empty(shape, dtype=dtype, device=device)
        self.hold(made.numel() * made.element_size())
        return made

    def release(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                self.hold(-tensor.numel() * tensor.element_size())

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy that is contiguous and aligned, kept to the end of the call."""
        self.hold(tensor.numel() * tensor.element_size())
        self._copied += tensor.numel() * tensor.element_size()
        if self.planning:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return tensor.clone(memory_format=torch.contiguous_format)

    def fits(self, each: int) -> int:
        """How many of something may still be allocated."""
        limit = self._copied + WORKSPACE if self.budget is None else self.budget
        return max(0, limit - self._held) // max(1, each)

    # Inputs.

    def aligned(self, tokens: Tensor) -> Tensor:
        """Q or K as the kernels read them: 16 bytes at once, a head's numbers side by side."""
        strides = [s for s, n in zip(tokens.stride()[:3], tokens.shape, strict=False) if n > 1]
        good = tokens.stride(3) == 1 and all(s % 8 == 0 and s >= 0 for s in strides)
        return tokens if good and _is_aligned(tokens) else self.copy(tokens)

    def operand(self, tensor: Tensor) -> _Operand:
        maps, tokens, columns = tensor.shape
        if (columns > 1 and tensor.stride(2) != 1) or (tokens > 1 and tensor.stride(1) < columns):
            tensor = self.copy(tensor)
        pitch = tensor.stride(1) if tokens > 1 else columns
        return _Operand(tensor, tensor.stride(0) if maps > 1 else 0, pitch)

    def prepare(self, tensor: Tensor, factor: float) -> Tensor:
        """[..., pitch]: times the factor, in rows of whole 16 bytes."""
        count = tensor.shape[-1]
        made = self.empty(*tensor.shape[:-1], _pitch(count))
        source = tensor if tensor.is_contiguous() else self.copy(tensor)
        arguments = self.native.Prepare()
        setattr(arguments, "in", source.data_ptr())
        arguments.out = made.data_ptr()
        arguments.rows = tensor.numel() // count
        arguments.count, arguments.pitch = count, _pitch(count)
        arguments.factor = factor
        self.launch(self.native.prepare, arguments)
        return made

    def map(self, problem: Problem, shift: Tensor | None, *, keys_kept: bool = False) -> Any:
        """A map as the kernels take it; its bias already in their units and pitch."""
        found = self.native.Map()
        for name, tokens in (("query", problem.query), ("key", problem.key)):
            native = self.native.Tokens()
            native.data = tokens.data_ptr()
            native.batches, native.count = tokens.shape[0], tokens.shape[2]
            native.batch_stride, native.head_stride, native.token_stride = tokens.stride()[:3]
            setattr(found, name, native)
        found.maps, found.heads, found.dim = problem.batch, problem.heads, problem.query.shape[3]
        found.scale = problem.scale * _LOG2_E
        found.weight = 1.0 / problem.heads
        if problem.head_weights is not None:
            found.weights = problem.head_weights.data_ptr()
        if problem.pairs is not None:
            found.pairs = problem.pairs.data_ptr()
        if problem.bias is not None:
            found.bias, found.bias_pitch = problem.bias.data_ptr(), problem.bias.shape[-1]
        if shift is not None:
            found.shift, found.shift_pitch = shift.data_ptr(), shift.shape[-1]
        found.keys_kept = keys_kept
        return found

    # Launches.

    def launch(self, function: Any, arguments: Any, *more: Any) -> None:
        if not self.planning:
            function(arguments, *more, self.stream)

    def launch_pass(self, name: str, arguments: Any, problem: Problem, times: int = 1) -> None:
        self.scores += times * _scores(problem)
        types = self.native.TokenType
        half = problem.query.dtype == torch.float16
        self.launch(getattr(self.native, name), arguments, types.half if half else types.bfloat)

    def arrange(self, name: str, arguments: Any, each: int, programs: int = 1) -> int:
        """Choose the arguments' blocks and splits, and return how many splits there are.

        ``each``: bytes of a split's part; ``programs``: blocks beside each other for the same kept
        tokens of a map.
        """
        of = arguments.map
        kept, streamed = (of.key, of.query) if of.keys_kept else (of.query, of.key)
        shapes = self.shapes or _SHAPES
        if name == "lse":
            shapes = tuple(s for s in self.shapes if s.warps <= _LSE_WARPS) or _LSE_SHAPES
        for shape in shapes:
            rows = _at_most(shape.warp_rows, -(-kept.count // 32))
            columns = _at_most(shape.warp_columns, -(-streamed.count // 64))
            resident = shape.resident and (name == "lse" or streamed.count > 64 * columns)
            arguments.tiling = self.native.Tiling(rows, columns, resident)
            shared = self.native.shared_bytes(arguments)
            fitting = self.blocks_on_sm(name, 32 * rows * columns, shared)
            if fitting >= shape.blocks:
                break
        else:
            raise RuntimeError(
                f"backend 'cuda' cannot run this: a block of its kernel {name!r} takes {shared} "
                f"bytes of shared memory, this GPU has {self.limits.shared_bytes}"
            )
        blocks = of.maps * programs * -(-kept.count // (32 * rows))
        tiles = -(-streamed.count // (64 * columns))
        most = min(tiles, _MOST_SPLITS, max(1, self.fits(each)))
        arguments.splits = _best_splits(blocks, tiles, most, fitting * self.limits.multiprocessors)
        return int(arguments.splits)

    def blocks_on_sm(self, name: str, threads: int, shared: int) -> int:
        """How many blocks an SM has room for at once."""
        if shared > self.limits.shared_bytes:
            return 0
        registers = -(-REGISTERS[name] // 8) * 8
        whole = self.limits.shared_bytes + _BLOCK_OVERHEAD
        return min(whole // (shared + _BLOCK_OVERHEAD), _SM_REGISTERS // (registers * threads))

    # Passes.

    def reduce(self, problem: Problem, request: Request, outputs: dict[str, Tensor] | None) -> None:
        """Fill the outputs; planning, there are none."""
        made = empty_outputs(_on_meta(problem), request) if outputs is None else outputs
        problem = self.ready(problem)
        partner = request.partner if "return_probability" in made else None
        if partner is not None:
            partner = self.ready(partner)
        right = None if request.right is None else self.operand(request.right)
        left = None if request.left is None else self.operand(request.left)
        each = problem.heads * _pitch(problem.num_queries) * 4
        if partner is not None:
            each += partner.heads * _pitch(partner.num_queries) * 4
        step = max(1, min(problem.batch, self.fits(each)))
        for start in range(0, problem.batch, step):
            some = slice(start, min(start + step, problem.batch))
            self.reduce_maps(
                _some_maps(problem, some),
                replace(
                    request,
                    partner=None if partner is None else _some_maps(partner, some),
                    right=None,
                    left=None,
                ),
                None if right is None else right._replace(tensor=right.tensor[some]),
                None if left is None else left._replace(tensor=left.tensor[some]),
                {name: out[some] for name, out in made.items()},
            )

    def ready(self, problem: Problem) -> Problem:
        """Tokens aligned, weights and pairs contiguous, the bias in log2 units and pitched."""
        bias, weights, pairs = problem.bias, problem.head_weights, problem.pairs
        if weights is not None and not weights.is_contiguous():
            weights = self.copy(weights)
        if pairs is not None and not pairs.is_contiguous():
            pairs = self.copy(pairs)
        if bias is not None:
            before = self._held
            bias = self.prepare(bias, _LOG2_E)
            self._copied += self._held - before
        return problem._replace(
            query=self.aligned(problem.query),
            key=self.aligned(problem.key),
            bias=bias,
            head_weights=weights,
            pairs=pairs,
        )

    def reduce_maps(
        self,
        problem: Problem,
        request: Request,
        right: _Operand | None,
        left: _Operand | None,
        outputs: dict[str, Tensor],
    ) -> None:
        if set(outputs) == {"lse"}:
            self.log_sum_exp(problem, outputs["lse"], None)
            return
        shift = self.shift(problem, outputs.get("lse"))
        rows = {name: outputs[name] for name in _ROWS if name in outputs}
        if rows:
            self.statistics(problem, shift, rows)
        columns = {name: outputs[name] for name in _COLUMNS if name in outputs}
        if columns:
            self.statistics(problem, shift, columns, keys_kept=True)
        if "product" in outputs:
            assert right is not None
            self.product(problem, shift, right, outputs["product"])
        if "transposed_product" in outputs:
            assert left is not None
            self.product(problem, shift, left, outputs["transposed_product"], keys_kept=True)
        if "pooled_keys" in outputs:
            self.pooled(problem, shift, request, outputs["pooled_keys"])
        if "return_probability" in outputs:
            assert request.partner is not None
            self.return_probability(problem, shift, request.partner, outputs["return_probability"])
        self.release(shift)

    def shift(self, problem: Problem, lse_out: Tensor | None) -> Tensor:
        """Minus the log-sum-exp in log2 units, [P, H, pitch]; and the log-sum-exp if asked for."""
        if problem.lse is None:
            shift = self.empty(problem.batch, problem.heads, _pitch(problem.num_queries))
            self.log_sum_exp(problem, lse_out, shift)
            return shift
        if lse_out is not None:
            self.log_sum_exp(problem, lse_out, None)
        return self.prepare(problem.lse, -_LOG2_E)

    def log_sum_exp(self, problem: Problem, lse: Tensor | None, shift: Tensor | None) -> None:
        arguments = self.native.LogSumExp()
        arguments.map = self.map(problem, shift)
        count = problem.batch * problem.heads * problem.num_queries
        splits = self.arrange("lse", arguments, 4 * count, programs=problem.heads)
        parts = None
        if splits > 1:
            parts = self.empty(splits, count)
            arguments.parts = parts.data_ptr()
        else:
            arguments.lse = 0 if lse is None else lse.data_ptr()
            arguments.shift = 0 if shift is None else shift.data_ptr()
        of = arguments.map
        of.shift = 0  # a term of scores elsewhere, an output here
        self.launch_pass("lse", arguments, problem)
        if parts is not None:
            together = self.native.CombineLse()
            together.parts, together.splits = parts.data_ptr(), splits
            together.rows = problem.batch * problem.heads
            together.count, together.pitch = problem.num_queries, _pitch(problem.num_queries)
            together.lse = 0 if lse is None else lse.data_ptr()
            together.shift = 0 if shift is None else shift.data_ptr()
            self.launch(self.native.combine_lse, together)
            self.release(parts)

    def statistics(
        self,
        problem: Problem,
        shift: Tensor,
        fields: dict[str, Tensor],
        *,
        keys_kept: bool = False,
    ) -> None:
        """The statistics of one side in one launch (and one that combines splits)."""
        arguments = self.native.Statistics()
        arguments.map = self.map(problem, shift, keys_kept=keys_kept)
        arguments.grid_width = max(1, problem.grid_width)
        arguments.grid_height = max(1, problem.grid_height)
        finished = {_FINISHED[name]: out for name, out in fields.items()}
        wanted = {part for name in fields for part in _PARTS[name]}
        count = problem.batch * (problem.num_keys if keys_kept else problem.num_queries)
        each = count * sum(_PART_BYTES[part] for part in wanted)
        splits = self.arrange("statistics", arguments, each)
        parts: dict[str, Tensor] = {}
        if splits > 1:
            for part in sorted(wanted):
                shape = (splits, count, 2) if part == "expectation" else (splits, count)
                dtype = torch.int64 if part == "argtop" else torch.float32
                parts[part] = self.empty(*shape, dtype=dtype)
            # These have one place each in the map, and so come from one split.
            whole = {name: out for name, out in finished.items() if name in ("diagonal", "dense")}
            arguments.out = self.outputs({**parts, **whole})
        else:
            arguments.out = self.outputs(finished)
        self.launch_pass("statistics", arguments, problem)
        if parts:
            together = self.native.Combine()
            together.parts, together.out = self.outputs(parts), self.outputs(finished)
            together.count, together.splits = count, splits
            together.of_columns = keys_kept
            self.launch(self.native.combine, together)
            self.release(*parts.values())

    def outputs(self, tensors: dict[str, Tensor]) -> Any:
        out = self.native.StatisticsOutputs()
        for name, tensor in tensors.items():
            setattr(out, name, tensor.data_ptr())
        return out

    def product(
        self,
        problem: Problem,
        shift: Tensor,
        operand: _Operand,
        out: Tensor,
        *,
        keys_kept: bool = False,
        split: bool = True,
    ) -> None:
        """``out[..., :columns]`` of rows ``out.stride(1)`` apart."""
        arguments = self.native.Product()
        arguments.map = self.map(problem, shift, keys_kept=keys_kept)
        columns = operand.columns
        width = min(_OPERAND_WIDTH, -(-columns // 8) * 8)
        programs = -(-columns // width)
        arguments.operand = operand.tensor.data_ptr()
        arguments.operand_stride, arguments.operand_pitch = operand.stride, operand.pitch
        arguments.columns, arguments.width = columns, width
        arguments.aligned = (
            operand.pitch % 4 == 0 and operand.stride % 4 == 0 and _is_aligned(operand.tensor)
        )
        kept = problem.num_keys if keys_kept else problem.num_queries
        each = 4 * problem.batch * kept * columns
        splits = self.arrange("product", arguments, each, programs)
        if not split:
            arguments.splits = splits = 1
        parts = None
        if splits > 1:
            parts = self.empty(splits, problem.batch, kept, columns)
        target = out if parts is None else parts
        arguments.out, arguments.out_pitch = target.data_ptr(), target.stride(-2)
        self.launch_pass("product", arguments, problem, programs)
        self.add_up(parts, out)

    def add_up(self, parts: Tensor | None, out: Tensor) -> None:
        """Parts of splits, in their order."""
        if parts is None:
            return
        if not self.planning:
            torch.sum(parts, 0, out=out)
        self.release(parts)

    def pooled(self, problem: Problem, shift: Tensor, request: Request, out: Tensor) -> None:
        """Sums over the keys of each cell: a product with ones where a key is in a cell."""
        assert request.cells is not None
        for start in range(0, request.num_cells, _CELL_COLUMNS):
            columns = min(_CELL_COLUMNS, request.num_cells - start)
            ones = self.empty(1, problem.num_keys, columns)
            self.hold(problem.num_keys * columns + 8 * columns)  # comparing makes bools
            if not self.planning:
                cell = torch.arange(start, start + columns, device=self.device)
                ones.copy_(request.cells[:, None] == cell)
            self.hold(-problem.num_keys * columns - 8 * columns)
            operand = _Operand(ones, 0, columns)
            self.product(problem, shift, operand, out[..., start:], split=False)
            self.release(ones)

    def return_probability(
        self, problem: Problem, shift: Tensor, partner: Problem, out: Tensor
    ) -> None:
        back_shift = self.shift(partner, None)
        arguments = self.native.Return()
        arguments.map = self.map(problem, shift)
        arguments.back = self.map(partner, back_shift, keys_kept=True)
        splits = self.arrange("round_trip", arguments, 4 * out.numel())
        parts = self.empty(splits, *out.shape) if splits > 1 else None
        arguments.out = (out if parts is None else parts).data_ptr()
        self.scores += _scores(partner)
        self.launch_pass("round_trip", arguments, problem)
        self.add_up(parts, out)
        self.release(back_shift)


# Which outputs of the kernel a field is: where it finishes it alone, and where splits leave parts.
_FINISHED = {
    "entropy": "entropy",
    "max": "top",
    "argmax": "argtop",
    "expectation": "expectation",
    "diagonal": "diagonal",
    "dense": "dense",
    "column_sum": "total",
    "column_entropy": "entropy",
    "column_max": "top",
    "column_argmax": "argtop",
}
_PARTS: dict[str, tuple[str, ...]] = {
    "entropy": ("plogp",),
    "max": ("top",),
    "argmax": ("top", "argtop"),
    "expectation": ("expectation",),
    "diagonal": (),
    "dense": (),
    "column_sum": ("total",),
    "column_entropy": ("total", "plogp"),
    "column_max": ("top",),
    "column_argmax": ("top", "argtop"),
}
_PART_BYTES = {"total": 4, "plogp": 4, "top": 4, "argtop": 8, "expectation": 8}


def _is_aligned(tensor: Tensor) -> bool:
    """Whether its first number is at a multiple of 16 bytes; "meta" tensors are theirs' offset."""
    if tensor.device.type == "meta":
        return tensor.storage_offset() * tensor.element_size() % 16 == 0
    return tensor.data_ptr() % 16 == 0


def _at_most(warps: int, wanted: int) -> int:
    """The smallest power of two that is enough, or all warps that there are."""
    return min(warps, 1 << max(0, wanted - 1).bit_length())


def _best_splits(blocks: int, tiles: int, most: int, slots: int) -> int:
    """How many blocks share the streamed tokens of one, so that the card has least to do.

    Blocks run in waves of ``slots``; a wave lasts as long as one of them: its tiles, and about one
    more to begin and to end with. From shapes and the card alone, so that the same call adds up in
    the same order.
    """

    def time(splits: int) -> int:
        return -(-blocks * splits // slots) * (-(-tiles // splits) + 1)

    return min(range(1, most + 1), key=time)


def _on_meta(problem: Problem) -> Problem:
    return problem._replace(query=problem.query.to("meta"), key=problem.key.to("meta"))


here = Backend(_native)
supports, reduce, plan, automatic = here.supports, here.reduce, here.plan, here.automatic
last_workspace_bytes = here.last_workspace_bytes
