"""Where output may go: checks before the work, and folders on the way to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .system import there


def resolved(path: str | Path) -> Path:
    """The place itself, symbolic links followed, there or not."""
    return Path(os.path.realpath(Path(path).expanduser()))


def checked(folder: str | Path) -> Path:
    """The folder as :func:`resolved`. Raises ValueError where none can be."""
    shown = str(folder)
    if "\0" in shown:
        raise ValueError(f"{shown!r} cannot be a folder's name")
    target = resolved(folder)
    for place in (target, *target.parents):
        if there(place) and not place.is_dir():
            what = "is a file" if place == target else f"lies in {str(place)!r}, which is a file"
            raise ValueError(f"{shown!r} {what}; give a folder to write to")
    above = next(place for place in (target, *target.parents) if place.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"{shown!r} cannot be written: {str(above)!r} is not writable; give another"
        )
    return target


@contextlib.contextmanager
def made(folder: Path) -> Iterator[list[Path]]:
    """With a folder that is made if it is not there, as are those on the way; yields those.

    If the body raises, what was made goes again.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield missing
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):
                os.rmdir(each)
        raise
