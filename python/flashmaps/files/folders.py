"""Folders that are made anew each time, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import marker
from .marker import MARKER, Seal
from .places import checked, made
from .runs import open_run
from .system import exchange, sync, there, told
from .work import Work, is_work, work_folder


def check_folder(folder: str | Path, kind: str, *, grows: bool = False) -> None:
    """Raise ValueError unless a folder can be written: by ``whole_folder``, or a run (``grows``).

    It must be new, empty, or of this kind; for ``whole_folder`` it must hold nothing that was not
    written as such. Changes nothing.
    """
    with told(folder):
        target = checked(folder)
        if target.is_dir():
            marker.check(target, str(folder), kind, grows=grows)


@contextlib.contextmanager
def whole_folder(folder: str | Path, kind: str) -> Iterator[Path]:
    """Write a folder whole or not at all: yields an empty one, which becomes ``folder`` at the end.

        with whole_folder(out, "match") as new:
            (new / "numbers.json").write_text(...)

    Args:
        folder: where. One of the same kind is replaced, if nothing else is in it.
        kind: what is in it, one word.

    If the body raises, nothing has changed. A crash at any moment leaves the old folder or the new
    one. (Where folders cannot be exchanged, as on some network disks, at the top of a mounted disk,
    or in a folder that one may not write to, the files are moved one by one, after they are listed
    as written: a crash among these moves is mended by whatever opens the folder next.)

    Raises ValueError for a folder that is not ours, of another kind, holds other files, or that
    another process writes to; OSError in one sentence where it cannot be written.
    """
    shown = str(folder)
    with told(shown):
        target = checked(folder)
        if target.is_dir():
            marker.check(target, shown, kind)
        inside = _only_inside(target)
    if inside:
        with open_run(folder, kind) as run, run.files(instead_of=run.names) as new:
            yield new
        return
    with contextlib.ExitStack() as stack:
        with told(shown):
            stack.enter_context(made(target.parent))
            work = stack.enter_context(
                work_folder(target.parent, target.name, alone=True, rescue=_rescue)
            )
            new = work.path / "new"
            new.mkdir()
        with told(shown, only_full=True):
            yield new
        with told(shown):
            _switch(work, new, target, shown, kind, marker.finish(new))


def _only_inside(target: Path) -> bool:
    """Whether nothing can be written beside a folder, or what is beside it is another disk."""
    if not target.is_dir():
        return False
    parent = target.parent
    return (
        not os.access(parent, os.W_OK | os.X_OK)
        or target.stat().st_dev != parent.stat().st_dev
        or os.path.ismount(target)
    )


def _switch(
    work: Work, new: Path, target: Path, shown: str, kind: str, files: dict[str, Seal]
) -> None:
    """The new folder in place of the old, with its marker."""
    marker.mark(new, kind, files)
    if not target.is_dir():
        os.rename(new, target)
        sync(target.parent)
        return
    marker.check(target, shown, kind)  # once more: work takes its time
    new.chmod(stat.S_IMODE(target.stat().st_mode))
    work.note(replaces=target.stat().st_ino)
    work.keep = True  # once exchanged the old one is in it
    if exchange(new, target):
        with contextlib.suppress(OSError):  # then whoever comes next does it
            sync(target.parent)
            _retire(new, target)
            work.keep = False
        return
    work.keep = False
    os.unlink(new / MARKER)
    with open_run(target, kind) as run, run.files(instead_of=run.names) as staged:
        staged.rmdir()
        os.rename(new, staged)


def _rescue(path: Path, about: dict[str, Any]) -> None:
    """Finish what a process began that died after it had exchanged the folders."""
    name = str(about.get("target"))
    old, target = path / "new", path.parent / name
    if Path(name).name != name or target.is_symlink() or old.is_symlink():
        return
    if old.is_dir() and target.is_dir() and old.stat().st_ino == about.get("replaces"):
        _retire(old, target)


def _retire(old: Path, target: Path) -> None:
    """Empty the folder that was replaced; what somebody put there meanwhile goes to the new one."""
    state = marker.read(old)
    if state is not None:
        marker.clear(old, state.files)
    for name in marker.names_in(old):
        if name != MARKER and not is_work(old / Path(name).parts[0]):
            path = target / name
            while there(path):
                path = path.with_name(f"{path.name}.kept")
            path.parent.mkdir(parents=True, exist_ok=True)
            os.rename(old / name, path)
