"""One call of backend "cuda": its memory, inputs as its kernels read them, and single launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flashmaps.maps.backends.cuda_blocks import (
    LSE_SHAPES,
    LSE_WARPS,
    MOST_SPLITS,
    SHAPES,
    Shape,
    at_most,
    blocks_on_sm,
)
from flashmaps.maps.gpu import LOG2_E, WORKSPACE, Workspace, best_splits
from flashmaps.maps.problem import Problem
from flashmaps.maps.tape import Play, Recorder

# Tensors without memory have addresses all the same while a call is arranged: number n of the
# recorder begins at (n + 1) times this, which is more than anything else that is told to a kernel.
_APART = 2**40


def device_index(device: torch.device) -> int:
    """Which GPU this is."""
    if device.type == "cuda" and device.index is not None:
        return device.index
    return torch.cuda.current_device()


def pitch(count: int) -> int:
    """Floats from one row to the next, where 16 bytes are copied at once."""
    return -(-count // 4) * 4


def is_aligned(tensor: Tensor) -> bool:
    """Whether its first number is at a multiple of 16 bytes; "meta" tensors are theirs' offset."""
    if tensor.device.type == "meta":
        return tensor.storage_offset() * tensor.element_size() % 16 == 0
    return tensor.data_ptr() % 16 == 0


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _fields(of: Any) -> tuple[str, ...]:
    """The members of a struct of the module."""
    return tuple(name for name in dir(of) if isinstance(getattr(of, name), property))


class Operand(NamedTuple):
    """What a map is multiplied with: [P, tokens, columns] and how far apart its rows are."""

    tensor: Tensor
    stride: int  # from map to map; 0 where all have the same
    pitch: int

    @property
    def columns(self) -> int:
        return self.tensor.shape[2]


class Driver(Protocol):
    """What a call asks of its `flashmaps.maps.backends.cuda.Backend`."""

    native: Any
    device_type: str
    shapes: tuple[Shape, ...]

    def limits(self, device: torch.device) -> Any: ...


class Launched:
    """A launch of a tape: addresses are filled in, and it goes."""

    def __init__(
        self, function: Callable[..., None], arguments: Any, more: tuple[Any, ...],
        addresses: list[tuple[Any, str, int, int]],
    ) -> None:  # fmt: skip
        self.function, self.arguments, self.more = function, arguments, more
        self.addresses = addresses  # (struct, field, slot, bytes from its start)

    def __call__(self, call: Play) -> None:
        addresses = call.addresses
        for struct, name, slot, offset in self.addresses:
            setattr(struct, name, addresses[slot] + offset)
        context: Context = call.context
        if context.watch is not None:
            context.watch(self.function.__name__, call)
        self.function(self.arguments, *self.more, context.stream)


class Context(NamedTuple):
    """Of one play of a tape: where its launches go, and who is told before each of them."""

    stream: Any
    watch: Callable[[str, Play], None] | None = None


class Call(Workspace):
    """Arranges what a call launches and allocates, on tensors without memory."""

    def __init__(
        self, backend: Driver, device: torch.device, budget: int | None, recorder: Recorder
    ) -> None:
        super().__init__()
        self.native = backend.native
        self.shapes = backend.shapes
        self.limits = backend.limits(device)
        self.budget = budget
        self.recorder = recorder
        self.scores = 0  # q k that are computed
        self._copied = 0

    # Memory.

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Workspace, counted until `release`."""
        return self.recorder.make(self.allocate(shape, dtype, torch.device("meta")))

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy that is contiguous and aligned, kept to the end of the call."""
        self.hold(tensor.numel() * tensor.element_size())
        self._copied += tensor.numel() * tensor.element_size()
        made: Tensor = self.recorder.compute(_contiguous_copy, tensor)
        return made

    def address(self, tensor: Tensor) -> int:
        """What stands for a tensor's address until the tape is played."""
        place = self.recorder.place(tensor)
        return (place.slot + 1) * _APART + place.bytes

    def fits(self, each: int) -> int:
        """How many of something may still be allocated."""
        limit = self._copied + WORKSPACE if self.budget is None else self.budget
        return max(0, limit - self.held) // max(1, each)

    # Inputs.

    def aligned(self, tokens: Tensor) -> Tensor:
        """Q or K as the kernels read them: 16 bytes at once, a head's numbers side by side."""
        strides = [s for s, n in zip(tokens.stride()[:3], tokens.shape, strict=False) if n > 1]
        good = tokens.stride(3) == 1 and all(s % 8 == 0 and s >= 0 for s in strides)
        return tokens if good and is_aligned(tokens) else self.copy(tokens)

    def operand(self, tensor: Tensor) -> Operand:
        maps, tokens, columns = tensor.shape
        if (columns > 1 and tensor.stride(2) != 1) or (tokens > 1 and tensor.stride(1) < columns):
            tensor = self.copy(tensor)
        pitch = tensor.stride(1) if tokens > 1 else columns
        return Operand(tensor, tensor.stride(0) if maps > 1 else 0, pitch)

    def prepare(self, tensor: Tensor, factor: float) -> Tensor:
        """[..., pitch]: times the factor, in rows of whole 16 bytes."""
        count = tensor.shape[-1]
        made = self.empty(*tensor.shape[:-1], pitch(count))
        source = tensor if tensor.is_contiguous() else self.copy(tensor)
        arguments = self.native.Prepare()
        setattr(arguments, "in", self.address(source))
        arguments.out = self.address(made)
        arguments.rows = tensor.numel() // count
        arguments.count, arguments.pitch = count, pitch(count)
        arguments.factor = factor
        self.launch(self.native.prepare, arguments)
        return made

    def map(self, problem: Problem, shift: Tensor | None, *, keys_kept: bool = False) -> Any:
        """A map as the kernels take it; its bias already in their units and pitch."""
        found = self.native.Map()
        for name, tokens in (("query", problem.query), ("key", problem.key)):
            native = self.native.Tokens()
            native.data = self.address(tokens)
            native.batches, native.count = tokens.shape[0], tokens.shape[2]
            native.batch_stride, native.head_stride, native.token_stride = tokens.stride()[:3]
            setattr(found, name, native)
        found.maps, found.heads, found.dim = problem.batch, problem.heads, problem.query.shape[3]
        found.scale = problem.scale * LOG2_E
        found.weight = 1.0 / problem.heads
        if problem.head_weights is not None:
            found.weights = self.address(problem.head_weights)
        if problem.pairs is not None:
            found.pairs = self.address(problem.pairs)
        if problem.bias is not None:
            found.bias, found.bias_pitch = self.address(problem.bias), problem.bias.shape[-1]
        if shift is not None:
            found.shift, found.shift_pitch = self.address(shift), shift.shape[-1]
        found.keys_kept = keys_kept
        return found

    # Launches.

    def launch(self, function: Any, arguments: Any, *more: Any) -> None:
        found = [*self._addresses(arguments)]
        for *_, slot, _ in found:
            self.recorder.use(slot)
        self.recorder.launch(Launched(function, arguments, more, found), function.__name__)

    def _addresses(self, struct: Any) -> Iterator[tuple[Any, str, int, int]]:
        """Every address in a struct and those within it."""
        for name in _fields(type(struct)):
            value = getattr(struct, name)
            if isinstance(value, int):
                if value >= _APART:
                    yield struct, name, value // _APART - 1, value % _APART
            elif type(value).__module__ == type(struct).__module__ and _fields(type(value)):
                yield from self._addresses(value)

    def launch_pass(self, name: str, arguments: Any, problem: Problem, times: int = 1) -> None:
        self.scores += times * problem.scores
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
        shapes = self.shapes or SHAPES
        if name == "lse":
            shapes = tuple(s for s in self.shapes if s.warps <= LSE_WARPS) or LSE_SHAPES
        for shape in shapes:
            rows = at_most(shape.warp_rows, -(-kept.count // 32))
            columns = at_most(shape.warp_columns, -(-streamed.count // 64))
            resident = shape.resident and (name == "lse" or streamed.count > 64 * columns)
            arguments.tiling = self.native.Tiling(rows, columns, resident)
            shared = self.native.shared_bytes(arguments)
            fitting = blocks_on_sm(self.limits, name, 32 * rows * columns, shared)
            if fitting >= shape.blocks:
                break
        else:
            raise RuntimeError(
                f"backend 'cuda' cannot run this: a block of its kernel {name!r} takes {shared} "
                f"bytes of shared memory, this GPU has {self.limits.shared_bytes}"
            )
        blocks = of.maps * programs * -(-kept.count // (32 * rows))
        tiles = -(-streamed.count // (64 * columns))
        most = min(tiles, MOST_SPLITS, max(1, self.fits(each)))
        arguments.splits = best_splits(blocks, tiles, most, self.limits.multiprocessors, fitting)
        return int(arguments.splits)
