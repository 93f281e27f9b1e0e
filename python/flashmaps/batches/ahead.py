"""Two things at once: what comes next is made while what came before is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def behind(items: Iterable[Item], commit: Callable[[Item], None]) -> Iterator[Item]:
    """Items once they are committed, by a thread, while the next one is being made.

    At most two are held: the one that is committed and the one that waits for it. Errors of
    either side come out here; an item whose successor fails is committed all the same.
    """
    waiting: tuple[Item, Future[None]] | None = None
    with ThreadPoolExecutor(1) as writer:
        for item in items:
            if waiting is not None:
                waiting[1].result()
                yield waiting[0]
            waiting = item, writer.submit(commit, item)
        if waiting is not None:
            waiting[1].result()
            yield waiting[0]


def ahead(items: Iterable[Item], most: int = 1) -> Iterator[Item]:
    """Items, of which ``most`` are made by a thread before they are asked for."""
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as maker:
        waiting: list[Future[Item | object]] = [
            maker.submit(next, source, end) for _ in range(most)
        ]
        while (item := waiting.pop(0).result()) is not end:
            waiting.append(maker.submit(next, source, end))
            yield item  # type: ignore[misc]
