"""Processes that do jobs and may crash or hang: what one does costs the others nothing.

A job is a dict that travels as a line of JSON to a worker, whose answer is another. A worker that
ends, hangs, or says that it cannot be used any more ("spoiled") is replaced, and the job that did
it is recorded. Every answer is on disk before the next job is given out.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

OVER = "the seconds of this part were over"  # of a job that was under way then: nobody's fault

Job = dict[str, Any]
START = 120.0  # seconds that a worker has to say that it is ready


class Hand:
    """One worker process."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command, self.log = command, log
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()

    def ask(self, job: Job, limit: float) -> Job:
        """The answer, or {"lost": why}."""
        start = time.monotonic()
        if self.process is None or self.process.poll() is not None:
            self._start()
            if self._line(START) is None:
                self.stop()
                return {"lost": "the worker did not start; see workers.log"}
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self._line(limit)
        except BrokenPipeError:
            line = None
        if line is None:
            why = self._why(time.monotonic() - start)
            self.stop()
            return {"lost": why}
        found: Job = json.loads(line)
        if found.get("spoiled"):
            self.stop()
        return found

    def _why(self, seconds: float) -> str:
        assert self.process is not None
        try:  # the end of its output comes a little before its status
            return f"the worker ended with status {self.process.wait(1.0)}"
        except subprocess.TimeoutExpired:
            return f"it hung for {seconds:.0f} s"

    def _start(self) -> None:
        self.lines = lines = queue.Queue()
        with self.log.open("ab") as log:
            self.process = process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()

    def _line(self, limit: float) -> str | None:
        try:
            return self.lines.get(timeout=limit)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Kill it, so that nothing of it is left beside what comes next."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def run(
    jobs: Iterable[Job],
    command: list[str],
    file: Path,
    *,
    workers: int,
    seconds: float,
    each: float,
    tell: Callable[[Job], None],
) -> int:
    """Do jobs until they or the seconds are at an end; how many were not begun.

    Args:
        jobs: those that come first matter most.
        command: starts a worker.
        file: takes one line of JSON for each job: the job and its answer.
        workers: how many at once.
        seconds: for all of it. No worker lives on when this returns.
        each: the most seconds that a job may take, unless it has a "limit" of its own.
        tell: is called with each line as it is written.
    """
    waiting: queue.Queue[Job] = queue.Queue()
    for job in jobs:
        waiting.put(job)
    deadline, lock = time.monotonic() + seconds, threading.Lock()
    file.parent.mkdir(parents=True, exist_ok=True)

    def work() -> None:
        hand = Hand(command, file.parent / "workers.log")
        try:
            while (left := deadline - time.monotonic()) > 0:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                line = {**job, **hand.ask(job, min(job.get("limit", each), left))}
                if "lost" in line and deadline - time.monotonic() <= 0:
                    line["lost"] = OVER
                if again := line.pop("again", None):
                    waiting.put(again)
                    continue
                with lock, file.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                    out.flush()
                    tell(line)
        finally:
            hand.stop()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return waiting.qsize()
