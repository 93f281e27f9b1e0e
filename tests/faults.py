"""A process that dies, or whose system calls fail, at a chosen moment."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator

from flashmaps.files import folders, system

# What flashmaps.files asks of the system, by way of `os`, shutil, tempfile and pathlib.
CALLS = (
    "chmod", "close", "fsync", "ftruncate", "lstat", "mkdir", "open", "pread", "pwrite", "rename",
    "replace", "rmdir", "scandir", "stat", "unlink",
)  # fmt: skip

# Before the n-th call, after it; or it fails.
BEFORE, AFTER, FULL, BROKEN = "killed before", "killed after", "disk full", "disk broken"
_ERRORS = {FULL: errno.ENOSPC, BROKEN: errno.EIO}


_aside: list[bool] = []


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Within, calls are not counted: for what the test itself does."""
    _aside.append(True)
    try:
        yield
    finally:
        _aside.pop()


@contextlib.contextmanager
def counted(at: int, how: str) -> Iterator[list[str]]:
    """Within, the ``at``-th call (from 1) meets its fate; yields the names of the calls made."""
    seen: list[str] = []

    def wrapped(name: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            if _aside:
                return original(*args, **kwargs)
            seen.append(name)
            here = len(seen) == at
            if here and how == BEFORE:
                os.kill(os.getpid(), signal.SIGKILL)
            if here and how in _ERRORS and name != "close":
                raise OSError(_ERRORS[how], os.strerror(_ERRORS[how]))
            done = original(*args, **kwargs)
            if here and how == AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return call

    originals = [(os, name) for name in CALLS] + [
        (folders, "exchange"), (system.fcntl, "flock"),
    ]  # fmt: skip
    kept = [(owner, name, getattr(owner, name)) for owner, name in originals]
    for owner, name, original in kept:
        setattr(owner, name, wrapped(name, original))
    try:
        yield seen
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


def attempt(work: Callable[[], None], at: int, how: str) -> str:
    """What became of ``work`` in a process of its own: "killed", "done", "through", or its error.

    "through": the work was over before the ``at``-th call.
    """
    if how in _ERRORS:  # nobody dies of these
        return _try(work, at, how)
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writable, _try(work, at, how).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else said


def _try(work: Callable[[], None], at: int, how: str) -> str:
    said = "done"
    with counted(at, how) as seen:
        try:
            work()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    return "through" if said == "done" and len(seen) < at else said
