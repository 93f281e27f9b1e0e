"""Files and folders written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_folder(folder: str | Path, marker: str) -> Iterator[Path]:
    """Write a folder whole or not at all: yields an empty one, which becomes ``folder`` at the end.

    The new folder replaces an old one that holds the file ``marker`` (so: one that was written by
    the same command) or nothing. If the body raises, nothing changes.

    Raises ValueError when ``folder`` is a file, or holds things that are not ours to delete.
    """
    target = Path(folder).expanduser().absolute()
    check_replaceable(target, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is atomic only within one file system.
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        if not (new / marker).is_file():
            raise RuntimeError(f"the folder is not complete: {marker} was not written")
        for file in new.rglob("*"):  # some writers make files that only their owner may read
            if file.is_file():
                file.chmod(new.stat().st_mode & 0o666)
        old = target.exists()
        if old:
            target.rename(work / "old")
        try:
            new.rename(target)
        except OSError:
            if old:
                (work / "old").rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_replaceable(folder: str | Path, marker: str) -> None:
    """Raise ValueError unless ``folder`` can be made, is empty, or is ours by its ``marker``."""
    target = Path(folder).expanduser().absolute()
    for place in (target, *target.parents):
        if place.exists() and not place.is_dir():
            what = "is a file" if place == target else f"lies in {str(place)!r}, which is a file"
            raise ValueError(f"{str(folder)!r} {what}; give a folder to write to")
    there = next(place for place in (target.parent, *target.parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{str(folder)!r} cannot be written: {str(there)!r} is not writable; give another"
        )
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise ValueError(
            f"{str(folder)!r} holds other files (there is no {marker} in it), and would be "
            "replaced; give another folder, or an empty one"
        )


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: yields a path beside it, which takes its place at the end.

    Raises ValueError when ``path`` is a folder, or the folder it should lie in is not there.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give a file to write to")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{str(path)!r} cannot be written: there is no such folder to put it in")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON; a NaN or infinity is an error, since no other program would read it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
