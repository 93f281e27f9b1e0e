"""Folders to work in, with a name that nobody can guess, which die with their process.

They are called ``.flashmaps-`` and some random letters, only their owner may enter them, and they
hold a file ``owner`` that is locked as long as the process lives. The next process that works in
the same place removes those whose lock is free.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .system import NEW, OLD, alone_in, lock

PREFIX = ".flashmaps-"
_OWNER = "owner"
_FORMAT = "flashmaps work 1"

# What to do with a dead process's folder before it is removed: (folder, what its owner noted).
Rescue = Callable[[Path, dict[str, Any]], None]


@dataclass
class Work:
    """A folder of this process."""

    path: Path
    _descriptor: int
    _about: dict[str, Any]
    keep: bool = False  # what is in it is still needed: the next process finishes

    def note(self, **about: Any) -> None:
        """Write down what the next process has to know, should this one die."""
        self._about |= about
        text = json.dumps(self._about).encode()
        os.pwrite(self._descriptor, text, 0)  # over a shorter one: notes only grow
        os.fsync(self._descriptor)


@contextlib.contextmanager
def work_folder(
    parent: Path, target: str, *, alone: bool = False, rescue: Rescue | None = None
) -> Iterator[Work]:
    """A folder in ``parent`` for what becomes ``target`` there; removed at the end.

    Args:
        alone: raise ValueError when a living process has one for the same target.
        rescue: called with the folders of dead processes before they are removed.
    """
    with alone_in(parent):
        busy = _sweep(parent, rescue)
        if alone and target in busy:
            raise ValueError(
                f"{str(parent / target)!r} is being written by another process; wait for it, or "
                "give another folder"
            )
        work = _make(parent, target)
    process = os.getpid()
    try:
        yield work
    finally:
        if os.getpid() == process:  # a forked child that leaves must not take it along
            with contextlib.suppress(OSError):  # the next process will
                if not work.keep:
                    remove(work.path)
            os.close(work._descriptor)


def is_work(path: Path) -> bool:
    """Whether a folder is one of these, by its name and its owner's note; or not one yet."""
    if not path.name.startswith(PREFIX) or path.is_symlink():
        return False
    try:
        return _about(path) is not None or not os.listdir(path)
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Remove a work folder, its owner last: a kill on the way leaves one that is still known."""
    with os.scandir(path) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != _OWNER:
            os.unlink(entry.path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path / _OWNER)
    os.rmdir(path)


def _make(parent: Path, target: str) -> Work:
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        descriptor = None
        try:
            descriptor = os.open(path / _OWNER, NEW, 0o600)
            if lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
                about = {"format": _FORMAT, "target": target}
                os.pwrite(descriptor, json.dumps(about).encode(), 0)
                return Work(path, descriptor, about)
        except FileNotFoundError:
            pass  # another process took it for a dead one's, before it had an owner: once more
        except BaseException:
            with contextlib.suppress(OSError):
                remove(path)
            if descriptor is not None:
                os.close(descriptor)
            raise
        if descriptor is not None:
            os.close(descriptor)


def _sweep(parent: Path, rescue: Rescue | None) -> set[str]:
    """Remove what dead processes have left in a folder; targets of those that live."""
    busy: set[str] = set()
    try:
        with os.scandir(parent) as found:
            entries = [
                Path(entry.path)
                for entry in found
                if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False)
            ]
    except PermissionError:  # may be written to, but not listed
        return busy
    for path in entries:
        with contextlib.suppress(OSError):  # not ours to enter, or just gone
            target = _clear(path, rescue)
            if target is not None:
                busy.add(target)
    return busy


def _clear(path: Path, rescue: Rescue | None) -> str | None:
    """Remove one if its process is dead, else say what it is for."""
    if os.lstat(path).st_uid != os.geteuid():
        return None
    with contextlib.suppress(OSError):
        os.rmdir(path)  # died before it had an owner
        return None
    descriptor = os.open(path / _OWNER, OLD)
    try:
        about = _read(descriptor)
        if lock(descriptor) is not True:
            return about.get("target") if about else None
        if about is None or (not about and os.listdir(path) != [_OWNER]):
            return None
        if rescue is not None:
            rescue(path, about)
        remove(path)
        return None
    finally:
        os.close(descriptor)


def _about(path: Path) -> dict[str, Any] | None:
    try:
        descriptor = os.open(path / _OWNER, OLD)
    except OSError:
        return None
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> dict[str, Any] | None:
    """The owner's note; None if it is nobody's. An empty one is of who died before writing it."""
    text = os.pread(descriptor, 1 << 20, 0)
    if not text:
        return {}
    try:
        about = json.loads(text)
    except ValueError:
        return None
    known = isinstance(about, dict) and about.get("format") == _FORMAT
    return about if known else None
