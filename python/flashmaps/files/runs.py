"""Folders that grow: files added some at a time, and a run that goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from . import marker
from .marker import MARKER, NotOurs, State, check_name
from .places import checked, made
from .system import NEW, OLD, lock, sync, there, told
from .work import Work, is_work, work_folder


class Run:
    """A folder of ours, open for writing; see :func:`open_run`.

    Attributes:
        folder: where it is.
        fresh: whether it holds nothing of an earlier run.
    """

    def __init__(self, folder: Path, shown: str, state: State, descriptor: int, work: Work) -> None:
        self.folder, self.fresh = folder, not state.files and not state.children
        self._shown, self._state, self._work = shown, state, work
        self._descriptor = descriptor
        self._count = 0

    @property
    def names(self) -> list[str]:
        """Every file that was written, as names with slashes, sorted."""
        return sorted(self._state.files)

    def whole(self, name: str) -> bool:
        """Whether a file is there as it was written, byte by byte. Reads it."""
        try:
            return marker.seal(self.folder / name) == self._state.files.get(name)
        except OSError:
            return False

    @contextlib.contextmanager
    def files(self, *, instead_of: Iterable[str] = ()) -> Iterator[Path]:
        """Write files that belong together: yields an empty folder whose files join the run's.

        They replace those of the same name, and those of ``instead_of`` go, in one step: a crash
        leaves all old ones, or all new ones once the folder is opened again. If the body raises,
        nothing changes. Folders inside are kept as they are.

        Raises ValueError when a file that this run has not written is in the way.
        """
        staged = self._work.path / str(self._count)
        self._count += 1
        with told(self._shown):
            staged.mkdir()
        try:
            with told(self._shown, only_full=True):
                yield staged
            with told(self._shown):
                self._commit(staged, instead_of)
        finally:
            if not self._work.keep:
                shutil.rmtree(staged, ignore_errors=True)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Write one file of the run: yields a path, which takes its place at the end."""
        check_name(name)
        with self.files() as new:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            yield new / name

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run."""
        with self.file(name) as new:
            new.write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Any) -> None:
        """Write strict JSON; a NaN or infinity is an error."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def remove(self, names: Iterable[str]) -> None:
        """Remove files of the run; names that are not its files are passed over."""
        gone = [name for name in names if name in self._state.files]
        if gone:
            with told(self._shown):
                self._append(marker.commit("", {}, gone))
                self._forget(gone)

    def child(self, name: str) -> Path:
        """A folder inside for a run, or a whole folder, of its own; this one's list names it."""
        if check_name(name) not in self._state.children:
            if there(self.folder / name):
                raise NotOurs(self._in_the_way([name + "/"]))
            with told(self._shown):
                self._append(marker.commit("", {}, children=[name]))
            self._state.children.add(name)
        return self.folder / name

    def discard_children(self) -> None:
        """Remove what lies in the folders inside; whatever else somebody put there stays."""
        with told(self._shown):
            for name in self._state.children:
                if (self.folder / name).is_dir():
                    marker.discard(self.folder / name)

    # -- inside ------------------------------------------------------------------------------------

    def _commit(self, staged: Path, instead_of: Iterable[str]) -> None:
        files = marker.finish(staged)
        blocked = [
            name for name in files
            if name not in self._state.files and self._taken(name)
        ]  # fmt: skip
        if blocked:
            raise NotOurs(self._in_the_way(blocked))
        gone = [n for n in dict.fromkeys(instead_of) if n in self._state.files and n not in files]
        place = staged.relative_to(self.folder).as_posix()
        self._work.keep = True  # from the commit on what waits counts
        try:
            self._append(marker.commit(place, files, gone))
        except BaseException:
            self._work.keep = False
            raise
        self._state.files |= files
        _move(self.folder, staged, list(files))
        self._forget(gone)
        shutil.rmtree(staged, ignore_errors=True)
        self._work.keep = False

    def _taken(self, name: str) -> bool:
        """Whether a file, or a folder on the way to it, is somebody else's."""
        ways = (PurePosixPath(name), *PurePosixPath(name).parents)
        return any(
            there(self.folder / way)
            and (way == ways[0] or not (self.folder / way).is_dir() or _linked(self.folder, way))
            for way in ways
        )

    def _in_the_way(self, names: list[str]) -> str:
        return (
            f"{self._shown!r} holds other files ({marker.listed(names)}) where results have to go; "
            "move them away, or give another folder"
        )

    def _forget(self, gone: list[str]) -> None:
        for name in gone:
            self._state.files.pop(name, None)
        marker.clear(self.folder, gone)

    def _append(self, line: bytes) -> None:
        end = self._state.length
        try:
            written = os.pwrite(self._descriptor, line, end)
            while written < len(line):
                written += os.pwrite(self._descriptor, line[written:], end + written)
            os.fsync(self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, end)
            raise
        self._state.length += len(line)

    def _start_again(self, settings: Any) -> None:
        """Throw away everything, and begin with other settings."""
        self.discard_children()
        self.remove(self.names)
        os.ftruncate(self._descriptor, 0)
        self._state.children.clear()
        self._state.settings, self._state.length = json.loads(json.dumps(settings)), 0
        self._append(marker.header(self._state.kind, settings))
        self.fresh = True


@contextlib.contextmanager
def open_run(
    folder: str | Path, kind: str, settings: Any = None, *, overwrite: bool = False
) -> Iterator[Run]:
    """Open a folder that grows: a new one, or one of the same kind and settings, to go on with.

        with open_run(out, "evaluation", asked) as run:
            for part in parts:
                if not run.whole(part.name):
                    with run.file(part.name) as new: ...

    Args:
        folder: where; it is made if it is not there. Files in it that the run has not written are
            left alone.
        kind: what is in it, one word; a folder of another kind is refused.
        settings: what the run depends on, as JSON has it; other settings are another run.
        overwrite: throw away a run of other settings. The files go before new ones are there, so
            check everything else first.

    Raises ValueError for a folder that is not ours, of another kind or of other settings, or that
    another process writes to; OSError in one sentence where it cannot be written.
    """
    shown = str(folder)
    with contextlib.ExitStack() as stack:
        with told(shown):
            target = checked(folder)
            stack.enter_context(made(target))
            descriptor, state = stack.enter_context(_locked(target, shown, kind, settings))
            work = stack.enter_context(work_folder(target, "."))
            run = Run(target, shown, state, descriptor, work)
            differing = _differing(state.settings, settings)
            if differing:
                if not overwrite:
                    raise ValueError(
                        f"{shown!r} holds a run of other settings ({differing}); give another "
                        "folder, or overwrite it (--overwrite)"
                    )
                others = marker.strangers(target, state)
                if others:
                    raise NotOurs(
                        f"{shown!r} holds other files ({marker.listed(others)}), which flashmaps "
                        "has not written; move them away before you overwrite it"
                    )
                run._start_again(settings)
        with told(shown, only_full=True):
            yield run


@contextlib.contextmanager
def _locked(target: Path, shown: str, kind: str, settings: Any) -> Iterator[tuple[int, State]]:
    """The marker, made if there is none, as ours alone: its descriptor, and what it says.

    If the body raises before anything was written, the marker goes again.
    """
    path = target / MARKER
    marker.check(target, shown, kind, grows=True)
    descriptor = _open(path, shown)
    state = State(kind, length=-1)  # nothing is known of it
    try:
        found = marker.check(target, shown, kind, grows=True)
        if found is None:
            state.length = 0
            os.ftruncate(descriptor, 0)
            line = marker.header(kind, settings)
            os.pwrite(descriptor, line, 0)
            os.fsync(descriptor)
            sync(target)
            state = State(kind, json.loads(json.dumps(settings)), length=len(line))
        else:
            state = found
            os.ftruncate(descriptor, state.length)  # a line that was never finished
            recover(target, state)
        yield descriptor, state
    except BaseException:
        if state.length >= 0 and not (state.files or state.children):
            with contextlib.suppress(OSError):
                if not marker.strangers(target, None):
                    os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def _open(path: Path, shown: str) -> int:
    """The marker's descriptor, with its lock."""
    while True:
        try:
            descriptor = os.open(path, OLD)
        except FileNotFoundError:
            try:
                descriptor = os.open(path, NEW, 0o666)
            except FileExistsError:  # by another process, in this moment
                continue
        try:
            if lock(descriptor) is False:
                raise ValueError(
                    f"{shown!r} is being written by another process; wait for it, or give another "
                    "folder"
                )
            if _same(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was replaced in this moment


def recover(target: Path, state: State) -> None:
    """Move what was committed and still waits."""
    for place in state.waiting:
        if is_work(target / PurePosixPath(place).parts[0]) and (target / place).is_dir():
            _move(target, target / place, state.commits[place])
            marker.clear(target, [n for n in state.gone[place] if n not in state.files])


def _move(folder: Path, staged: Path, names: list[str]) -> None:
    """Files from where they wait to their places; those that do not wait have been moved."""
    touched = {folder}
    for name in names:
        if there(_inside(staged, name)):
            path = _inside(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, path)
            touched.add(path.parent)
    for each in touched:
        sync(each)


def _inside(folder: Path, name: str) -> Path:
    """A file's place. Raises NotOurs where a symbolic link on the way leads elsewhere."""
    for way in PurePosixPath(name).parents:
        if _linked(folder, way):
            raise NotOurs(f"{str(folder / way)!r} is a symbolic link; wanted a folder")
    return folder / name


def _same(descriptor: int, path: Path) -> bool:
    here = os.fstat(descriptor)
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _linked(folder: Path, way: PurePosixPath) -> bool:
    return way != PurePosixPath(".") and (folder / way).is_symlink()


def _differing(before: Any, now: Any) -> str:
    """What settings differ in, in words; empty: in nothing."""
    now = json.loads(json.dumps(now))
    if before == now:
        return ""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before!r} there, {now!r} now"
    return "; ".join(
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    )
