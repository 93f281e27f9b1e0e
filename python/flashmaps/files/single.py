"""Single files, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .places import resolved
from .system import readable_by_all_that_may, sync, told
from .work import work_folder


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: yields a path that takes its place at the end.

    A symbolic link to a file stays one, and a file's permissions stay as they are. If the body
    raises, nothing has changed.

    Raises ValueError when ``path`` is a folder, a device or a pipe, or the folder it should lie in
    is not there; OSError in one sentence where it cannot be written.
    """
    shown = str(path)
    if "\0" in shown:
        raise ValueError(f"{shown!r} cannot be a file's name")
    with told(shown):
        target = resolved(path)
        if target.is_dir():
            raise ValueError(f"{shown!r} is a folder; give a file to write to")
        if not target.parent.is_dir():
            raise ValueError(f"{shown!r} cannot be written: there is no such folder to put it in")
        before = target.stat().st_mode if target.exists() else None
        if before is not None and not stat.S_ISREG(before):
            raise ValueError(f"{shown!r} is no ordinary file; give a file to write to")
    with contextlib.ExitStack() as stack:
        with told(shown):
            work = stack.enter_context(work_folder(target.parent, target.name))
            new = work.path / "new"
            new.mkdir()
            new /= target.name
        with told(shown, only_full=True):
            yield new
        with told(shown):
            if before is None:
                readable_by_all_that_may(new, new.parent.stat().st_mode)
            else:
                new.chmod(stat.S_IMODE(before))
            sync(new)
            os.replace(new, target)
            sync(target.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON; a NaN or infinity is an error, since no other program would read it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
