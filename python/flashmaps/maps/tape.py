"""What a GPU backend does for a call, arranged once and done again for every call like it.

Shapes, strides, dtypes, what is asked and the budget decide what a call allocates and launches;
addresses only fill it in. Arranging takes ten times as long as all the rest of the host's part, so
a backend arranges on tensors without memory, keeps that, and plays it on the tensors of a call.

A backend records through a `Recorder`: which tensors there are (inputs, outputs, workspace), what
torch computes of them on the way, and its launches. A `Tape` then allocates each tensor where it is
first used and lets it go where it was last, so that playing holds no more than what was planned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmaps.maps.problem import Gradient, Problem, Request

_MOST = 256  # tapes that a thread keeps


class Place(NamedTuple):
    """A tensor as part of another that has memory of its own, number ``slot`` of the tape."""

    slot: int
    offset: int  # in its own numbers
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """From the first byte of the slot's tensor to the first of this."""
        return self.offset * self.dtype.itemsize


class Play:
    """One call: its tensors and their addresses by slot, None and 0 where there is none now."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.tensors: list[Tensor | None] = [None] * count
        self.addresses = [0] * count
        self.device = device
        self.context: Any = None  # of the backend: a stream, what watches it

    def put(self, slot: int, tensor: Tensor) -> None:
        """A tensor that is there from now on."""
        self.tensors[slot] = tensor
        self.addresses[slot] = tensor.data_ptr()

    def view(self, place: Place) -> Tensor:
        """The tensor at a place."""
        base = self.tensors[place.slot]
        assert base is not None
        if base.shape == place.shape and base.stride() == place.stride and not place.offset:
            return base
        return base.as_strided(place.shape, place.stride, base.storage_offset() + place.offset)


Step = Callable[[Play], None]


@dataclass
class Tape:
    """What a call does, in order."""

    inputs: list[int | None]  # the slot of each of `tensors_of`, None where it was not given
    outputs: dict[str, int]
    count: int  # slots
    steps: list[Step]
    workspace: int  # bytes at once beyond inputs and outputs
    scores: int = 0  # q k that are computed
    launches: list[Any] = field(default_factory=list)

    def play(
        self, tensors: tuple[Tensor | None, ...], device: torch.device, context: Any = None
    ) -> dict[str, Tensor]:
        """Do it with the tensors of a call; its outputs."""
        call = Play(self.count, device)
        call.context = context
        there, addresses = call.tensors, call.addresses
        for slot, tensor in zip(self.inputs, tensors, strict=True):
            if slot is not None:
                there[slot] = tensor
                addresses[slot] = tensor.data_ptr()  # type: ignore[union-attr]
        for step in self.steps:
            step(call)
        return {name: there[slot] for name, slot in self.outputs.items()}  # type: ignore[misc]


class Recorder:
    """Keeps what a backend arranges on tensors without memory."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}  # by the storage's identity
        self._bases: list[Tensor] = []  # keeps the storages, and so their identities
        self._made: dict[int, int] = {}  # slot -> the step that makes it
        self._used: dict[int, int] = {}  # slot -> the step that uses it last
        self._steps: list[Step] = []
        self.launches: list[Any] = []

    def add(self, tensor: Tensor) -> int:
        """A tensor with memory of its own; its slot."""
        slot = len(self._bases)
        self._slots[tensor.untyped_storage()._cdata] = slot
        self._bases.append(tensor)
        return slot

    def given(self, tensor: Tensor) -> Tensor:
        """The stand-in of an input: no memory, but its shape, strides, dtype and alignment."""
        odd = _odd(tensor) // tensor.element_size()
        reach = 1 + sum(
            (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n
        )
        base = torch.empty(reach + odd, dtype=tensor.dtype, device="meta")
        made = base.as_strided(tensor.shape, tensor.stride(), odd)
        self.add(made)
        return made

    def make(self, tensor: Tensor) -> Tensor:
        """A tensor that playing allocates here."""
        slot = self.add(tensor)
        self._made[slot] = len(self._steps)
        self._steps.append(_Make([(slot, (*tensor.shape,), tensor.dtype)]))
        return tensor

    def place(self, tensor: Tensor) -> Place:
        """Where a tensor is, which must be part of one that was added."""
        slot = self._slots[tensor.untyped_storage()._cdata]
        self.use(slot)
        offset = int(tensor.storage_offset()) - int(self._bases[slot].storage_offset())
        return Place(slot, offset, (*tensor.shape,), tensor.stride(), tensor.dtype)

    def compute(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """``function(*tensors)`` by torch: here without memory, playing with it.

        It may write into its arguments and return new tensors, one or a tuple of them.
        """
        places = [self.place(tensor) for tensor in tensors]
        found = function(*tensors)
        every = found if isinstance(found, tuple) else (found,)
        slots = [
            self.add(each)
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in self._slots
            else None
            for each in every
        ]

        def step(call: Play) -> None:
            result = function(*map(call.view, places))
            for slot, each in zip(
                slots, result if isinstance(result, tuple) else (result,), strict=True
            ):
                if slot is not None:
                    call.put(slot, each)

        for slot in slots:
            if slot is not None:
                self._made[slot] = len(self._steps)
        self._steps.append(step)
        return found

    def use(self, slot: int) -> None:
        """The next step uses it."""
        self._used[slot] = len(self._steps)

    def launch(self, step: Step, launch: Any) -> None:
        """A launch, whose places have been asked for since the last step."""
        self._steps.append(step)
        self.launches.append(launch)

    def tape(
        self, inputs: list[int | None], outputs: dict[str, Tensor], workspace: int, scores: int = 0
    ) -> Tape:
        """All of it, each tensor let go where it was last used."""
        kept = {name: self.place(tensor).slot for name, tensor in outputs.items()}
        last: dict[int, list[int]] = {}
        for slot, made in self._made.items():
            if slot not in kept.values():
                last.setdefault(max(made, self._used.get(slot, made)), []).append(slot)
        steps: list[Step] = []
        for number, step in enumerate(self._steps):
            if isinstance(step, _Make) and steps and isinstance(steps[-1], _Make):
                steps[-1] = _Make(steps[-1].wanted + step.wanted)
            else:
                steps.append(step)
            if number in last:
                steps.append(_drop(tuple(last[number])))
        return Tape(inputs, kept, len(self._bases), steps, workspace, scores, self.launches)


class _Make:
    """Allocates some tensors."""

    def __init__(self, wanted: list[tuple[int, tuple[int, ...], torch.dtype]]) -> None:
        self.wanted = wanted

    def __call__(self, call: Play) -> None:
        empty, device = torch.empty, call.device
        tensors, addresses = call.tensors, call.addresses
        for slot, shape, dtype in self.wanted:
            tensors[slot] = made = empty(shape, dtype=dtype, device=device)
            addresses[slot] = made.data_ptr()


def _drop(slots: tuple[int, ...]) -> Step:
    def step(call: Play) -> None:
        for slot in slots:
            call.tensors[slot] = None

    return step


def _odd(tensor: Tensor) -> int:
    """Bytes that a tensor begins beyond a multiple of 16."""
    if tensor.is_meta:
        return int(tensor.storage_offset()) * tensor.element_size() % 16
    return tensor.data_ptr() % 16


# Calls and what they have in common.


def tensors_of(problem: Problem, request: Request) -> tuple[Tensor | None, ...]:
    """The tensors that a call is given, always in this order."""
    back = request.partner
    return (
        *problem[:6], request.right, request.left, request.cells,
        *((None,) * 6 if back is None else back[:6]),
    )  # fmt: skip


def call_key(problem: Problem, request: Request, *more: Hashable) -> Hashable:
    """What decides how a call is arranged: equal keys are arranged alike."""
    back = request.partner
    return (
        *_told(tensors_of(problem, request)), *problem[6:], None if back is None else back[6:],
        request.names, request.k, request.num_cells, request.memory_budget,
        problem.query.device, *more,
    )  # fmt: skip


def _told(tensors: tuple[Tensor | None, ...]) -> Iterator[Hashable]:
    for each in tensors:
        yield None if each is None else (each.shape, each.stride(), each.dtype, _odd(each))


def _stand_ins(
    tensors: tuple[Tensor | None, ...], recorder: Recorder
) -> tuple[list[Tensor | None], list[int | None]]:
    """Tensors without memory, and their slots."""
    slots: list[int | None] = []
    made: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is None:
            slots.append(None)
            made.append(None)
        else:
            made.append(recorder.given(tensor))
            slots.append(len(recorder._bases) - 1)
    return made, slots


def without_memory(
    problem: Problem, request: Request, recorder: Recorder
) -> tuple[Problem, Request, list[int | None]]:
    """The call on stand-ins, and the slots of its tensors in the order of `tensors_of`."""
    made, slots = _stand_ins(tensors_of(problem, request), recorder)
    back = request.partner
    there = Problem._make((*made[:6], *problem[6:]))
    partner = None if back is None else Problem._make((*made[9:15], *back[6:]))
    right, left, cells = made[6:9]
    return (
        there,
        Request(
            request.names, right, left, request.k, cells, request.num_cells, partner,
            request.memory_budget,
        ),
        slots,
    )  # fmt: skip


# The same for the way back.

_TERMS = tuple(
    each.name
    for each in fields(Gradient)
    if each.name not in ("wanted", "partner", "memory_budget")
)


def tensors_of_gradient(problem: Problem, gradient: Gradient) -> tuple[Tensor | None, ...]:
    """The tensors that a way back is given, always in this order."""
    back = gradient.partner
    return (
        *problem[:6], *((None,) * 6 if back is None else back[:6]),
        *(getattr(gradient, name) for name in _TERMS),
    )  # fmt: skip


def gradient_key(problem: Problem, gradient: Gradient, *more: Hashable) -> Hashable:
    """What decides how a way back is arranged."""
    back = gradient.partner
    return (
        *_told(tensors_of_gradient(problem, gradient)), *problem[6:],
        None if back is None else back[6:], gradient.wanted, gradient.memory_budget,
        problem.query.device, "back", *more,
    )  # fmt: skip


def gradient_without_memory(
    problem: Problem, gradient: Gradient, recorder: Recorder
) -> tuple[Problem, Gradient, list[int | None]]:
    """The way back on stand-ins, and the slots of its tensors."""
    made, slots = _stand_ins(tensors_of_gradient(problem, gradient), recorder)
    back = gradient.partner
    there = Problem._make((*made[:6], *problem[6:]))
    partner = None if back is None else Problem._make((*made[6:12], *back[6:]))
    terms = dict(zip(_TERMS, made[12:], strict=True))
    return there, replace(gradient, partner=partner, **terms), slots  # type: ignore[arg-type]


class Tapes:
    """The tapes that a thread has recorded, the oldest let go where there are many."""

    def __init__(self) -> None:
        self._local = threading.local()

    def _kept(self) -> dict[Hashable, Tape]:
        found: dict[Hashable, Tape] | None = getattr(self._local, "kept", None)
        if found is None:
            found = self._local.kept = {}
        return found

    def get(self, key: Hashable, record: Callable[[], Tape]) -> Tape:
        """The tape of a call, recorded where there is none yet."""
        kept = self._kept()
        tape = kept.get(key)
        if tape is None:
            tape = record()
            while len(kept) >= _MOST:
                del kept[next(iter(kept))]
            kept[key] = tape
        return tape

    def clear(self) -> None:
        """Of this thread."""
        self._kept().clear()

    def __iter__(self) -> Iterator[Tape]:
        return iter(self._kept().values())
