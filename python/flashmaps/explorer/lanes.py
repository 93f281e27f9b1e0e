"""Work in turn: questions wait in two lanes, so that many visitors make it slow but not fall over.

One thread runs the model and whole maps, another the single rows that a moving pointer asks for. A
question that a newer one of the same visitor and kind has overtaken is dropped when its turn comes.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MOST_WAITING = 64  # in a lane
MOST_OF_ONE = 8  # of one visitor, in a lane


class Busy(Exception):
    """Too much is waiting already."""


class Overtaken(Exception):
    """A newer question of the same kind has come, or the visitor has hung up."""


class Lane:
    """One thread, and the questions that wait for it."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"flashmaps-{name}")
        self._waiting: Counter[str] = Counter()
        self._newest: dict[tuple[str, str], int] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    async def run(self, visitor: str, work: Callable[[], T], *, latest: str | None = None) -> T:
        """The result of ``work``, once it is its turn.

        Args:
            visitor: who asks; each may have a few questions waiting.
            latest: of questions with this name only the visitor's newest is answered.

        Raises Busy, Overtaken, and whatever ``work`` raises.
        """
        with self._lock:
            if latest is not None:
                number = next(self._numbers)
                self._newest[visitor, latest] = number
            if self._waiting.total() >= MOST_WAITING or self._waiting[visitor] >= MOST_OF_ONE:
                raise Busy("too much is asked at once; try again in a moment")
            self._waiting[visitor] += 1
        dropped = threading.Event()

        def turn() -> T:
            with self._lock:
                old = latest is not None and self._newest.get((visitor, latest)) != number
            if old or dropped.is_set():
                raise Overtaken
            return work()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, turn)
        except asyncio.CancelledError:
            dropped.set()
            raise
        finally:
            with self._lock:
                self._waiting[visitor] -= 1
                if not self._waiting[visitor]:
                    del self._waiting[visitor]
                    for key in [k for k in self._newest if k[0] == visitor]:
                        del self._newest[key]

    def close(self) -> None:
        """Let go of the thread; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
