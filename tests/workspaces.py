"""What an operation really held: torch's own record of allocations, and C++'s account of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flashmaps as fm
import torch
from flashmaps.maps.backends import cpu
from torch.profiler import ProfilerActivity, profile


class Accounted:
    """The extension; what a call took in C++ shows up in torch's record, at that moment."""

    def __init__(self) -> None:
        self.of = cpu._C

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.of, attribute)

    def reduce(self, *arguments: Any) -> Any:
        cost = self.of.reduce(*arguments)
        if not arguments[-1]:  # not only planned
            torch.empty(cost.workspace, dtype=torch.uint8)
        return cost

    def backward(self, *arguments: Any) -> Any:
        cost = self.of.backward(*arguments)
        if not arguments[-1]:
            torch.empty(cost.workspace, dtype=torch.uint8)
        return cost


@contextmanager
def _accounted() -> Iterator[None]:
    before, cpu._C = cpu._C, Accounted() if fm.backends()["cpu"] else None
    try:
        yield
    finally:
        cpu._C = before


def peak(run: Callable[[], Any]) -> tuple[int, Any]:
    """(bytes, result): the most that one call held at once beyond its inputs and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, _accounted():
        result = run()
    found = [
        (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in _with_children(record.profiler.kineto_results.experimental_event_tree())
        if event.tag.name == "Allocation"
    ]
    sizes: dict[int, int] = {}
    held = most = 0
    for _, address, size in sorted(found, key=lambda each: each[0]):
        if size > 0:
            sizes[address] = size
            held += size
            most = max(most, held)
        else:
            held -= sizes.pop(address, 0)  # 0: of what was there before
    return most - output_bytes(result), result


def _with_children(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _with_children(event.children)


def output_bytes(result: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in flat(result)}
    return sum(storages.values())


def flat(result: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a result, whatever holds it."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, fm.Reductions):
        yield from result._asdict().values()
    elif isinstance(result, fm.RoundTrip):
        yield from vars(result).values()
    else:
        for each in result:
            yield from flat(each)
