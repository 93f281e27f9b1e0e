"""What makes a folder ours: ``flashmaps.jsonl`` in it, which says its kind and lists its files.

The first line says what the folder is, each further one what was written since:

    {"format": "flashmaps folder 1", "kind": "match", "settings": null}
    {"commit": "", "files": {"match.json": [1043, "<sha256>"], ...}, "gone": []}

A line counts once its end is on the disk, and then all of it: that is the moment at which files
that belong together are written. ``commit`` names the folder in which they wait; whoever opens the
folder next moves those that still do. ``children`` lists folders inside with a marker of their own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .system import NEW, readable_by_all_that_may, sync, sync_all
from .work import PREFIX, is_work

MARKER = "flashmaps.jsonl"
FORMAT = "flashmaps folder 1"
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # of file managers; nobody misses them
_NAMED = 5  # files that a refusal names

Seal = tuple[int, str]  # bytes, sha256


@dataclass
class State:
    """What a marker says: of a folder's kind, settings, files and children."""

    kind: str
    settings: Any = None
    files: dict[str, Seal] = field(default_factory=dict)
    children: set[str] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)  # where files waited that were committed
    commits: dict[str, list[str]] = field(default_factory=dict)  # their names
    gone: dict[str, list[str]] = field(default_factory=dict)
    length: int = 0  # bytes of whole lines


class NotOurs(ValueError):
    """A folder holds what nobody here has written, or of another kind."""


def read(folder: Path) -> State | None:
    """What the marker of a folder says; None where there is none, or none was finished.

    Raises NotOurs for a file of that name that is something else.
    """
    path = folder / MARKER
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link
            raise NotOurs(_not_written(folder)) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotOurs(_not_written(folder))
        with open(descriptor, "rb", closefd=False) as file:
            text = file.read()
    finally:
        os.close(descriptor)
    try:
        return parse(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotOurs(_not_written(folder)) from None


def _not_written(folder: Path) -> str:
    return f"{str(folder)!r} holds a {MARKER} that flashmaps has not written; give another folder"


def parse(text: bytes) -> State | None:
    """The marker's text as a state. Raises ValueError, KeyError, TypeError for another's text."""
    length = text.rfind(b"\n") + 1  # what comes after it was never finished
    lines = text[:length].splitlines()
    if not lines:
        if text and not (json.dumps({"format": FORMAT})[:-1].encode()).startswith(text[:30]):
            raise ValueError("not the beginning of a marker")
        return None
    first, *others = map(json.loads, lines)
    if first["format"] != FORMAT or not isinstance(first["kind"], str):
        raise ValueError("not a marker")
    state = State(first["kind"], first.get("settings"), length=length)
    for line in others:
        for name in line.get("children", ()):
            state.children.add(check_name(name))
        place, names = line.get("commit", ""), []
        for name, (size, digest) in line.get("files", {}).items():
            state.files[check_name(name)] = (int(size), str(digest))
            names.append(name)
        for name in line.get("gone", ()):
            state.files.pop(check_name(name), None)
        if place:
            check_name(place)
            if not place.startswith(PREFIX):
                raise ValueError("not a work folder")
            state.waiting.append(place)
            state.commits[place] = names
            state.gone[place] = list(line.get("gone", ()))
    return state


def check_name(name: str) -> str:
    """A name that stays inside the folder, as a path with slashes. Raises ValueError for others."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != name:
        raise ValueError(f"{name!r} is no name of a file inside the folder")
    if name == MARKER or "\0" in name:
        raise ValueError(f"{name!r} cannot be the name of an output file")
    return name


def header(kind: str, settings: Any = None) -> bytes:
    """The marker's first line."""
    return _line({"format": FORMAT, "kind": kind, "settings": settings})


def commit(
    place: str, files: Mapping[str, Seal], gone: Iterable[str] = (), children: Iterable[str] = ()
) -> bytes:
    """The line that makes files count."""
    values: dict[str, Any] = {"commit": place, "files": files, "gone": list(gone)}
    return _line({**values, "children": list(children)} if children else values)


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def names_in(folder: Path) -> list[str]:
    """Every file below a folder, as names with slashes, sorted. Raises ValueError for others."""
    found = []
    for entry in _walk(folder):
        if entry.is_file(follow_symlinks=False):
            found.append(os.path.relpath(entry.path, folder).replace(os.sep, "/"))
        elif not entry.is_dir(follow_symlinks=False):
            raise ValueError(f"{entry.path!r} is no ordinary file; only such are written")
    return sorted(found)


def seal(path: Path) -> Seal:
    """Size and SHA-256 of a file, by which it is known again."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def finish(folder: Path) -> dict[str, Seal]:
    """Make every file of a new folder readable and safe on the disk: their names and seals."""
    mode = folder.stat().st_mode
    files = {}
    for name in names_in(folder):
        readable_by_all_that_may(folder / name, mode)
        files[check_name(name)] = seal(folder / name)
    sync_all(folder)
    return files


def mark(folder: Path, kind: str, files: Mapping[str, Seal]) -> None:
    """Write the marker of a folder that is complete."""
    descriptor = os.open(folder / MARKER, NEW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(header(kind) + commit("", files))
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def adopt(folder: Path, kind: str) -> None:
    """Take every file in a folder without a marker for ours, of this kind.

    For folders whose content is known to be ours from elsewhere: that it could be read as what it
    has to be. Nothing happens where there is a marker.
    """
    if read(folder) is None:
        with contextlib.suppress(FileNotFoundError):  # one that was never finished
            os.unlink(folder / MARKER)
        mark(folder, kind, {name: seal(folder / name) for name in names_in(folder)})


def strangers(folder: Path, state: State | None, inside: str = "") -> list[str]:
    """What is in a folder and not on its list, by name; folders end in a slash."""
    listed = set(state.files) if state else set()
    parents = {str(each) for name in listed for each in PurePosixPath(name).parents}
    children = state.children if state else set()
    parents |= {str(each) for name in children for each in PurePosixPath(name).parents}
    found: list[str] = []
    stack = [""]
    while stack:
        here = stack.pop()
        with os.scandir(folder / here) as entries:
            for entry in entries:
                name = f"{here}{entry.name}"
                if not entry.is_dir(follow_symlinks=False):
                    ours = name in listed or name == MARKER or entry.name in _LITTER
                    if not ours:
                        found.append(f"{inside}{name}")
                elif name in children:
                    path = folder / name
                    found += strangers(path, read(path), f"{inside}{name}/")
                elif name in parents:
                    stack.append(f"{name}/")
                elif here or not is_work(Path(entry.path)):
                    found.append(f"{inside}{name}/")
    return sorted(found)


def check(folder: Path, shown: str, kind: str, *, grows: bool = False) -> State | None:
    """What the marker says. Raises NotOurs for a folder that is not ours, or not of this kind.

    With ``grows`` a folder of the kind may hold other things too: they are left alone.
    """
    state = read(folder)
    if state is not None and state.kind != kind:
        raise NotOurs(
            f"{shown!r} holds what flashmaps has written as {state.kind!r}, and would be replaced "
            f"as {kind!r}; give another folder"
        )
    if not (grows and state is not None):
        others = strangers(folder, state)
        if others:
            raise NotOurs(
                f"{shown!r} holds other files ({listed(others)}), which flashmaps has not written; "
                "give another folder, or move them away"
            )
    return state


def listed(names: list[str]) -> str:
    """The first few names, quoted, and how many more there are."""
    told = ", ".join(repr(name) for name in names[:_NAMED])
    return told if len(names) <= _NAMED else f"{told} and {len(names) - _NAMED} more"


def discard(folder: Path) -> None:
    """Remove a folder of ours: its listed files, its marker; and itself, if nothing else is in it.

    A folder that is not there, or has no marker, is left as it is (an empty one goes).
    """
    state = read(folder)
    if state is None:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
        return
    for name in state.children:
        discard(folder / name)
    clear(folder, state.files)
    os.unlink(folder / MARKER)
    with contextlib.suppress(OSError):  # something else is in it
        os.rmdir(folder)


def clear(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and folders inside that are empty then. Never through a symbolic link."""
    parents: set[PurePosixPath] = set()
    for name in names:
        path = PurePosixPath(name)
        if not any((folder / each).is_symlink() for each in path.parents):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder / name)
        parents.update(path.parents)
    for each in sorted(parents - {PurePosixPath(".")}, key=lambda p: -len(p.parts)):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(folder / each)


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
