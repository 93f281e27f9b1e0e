"""What is asked of the operating system: locks, exchanges, what lasts, errors as sentences."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there nobody is told of a second writer
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_NO_EXCHANGE = {
    errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EBUSY,
    errno.EPERM, errno.EACCES,
}  # fmt: skip
_AT_FDCWD, _EXCHANGE = -100, 2  # Linux: fcntl.h, renameat2(2)
_SWAP = 2  # macOS: renamex_np(2)

# Whoever finds a name of ours taken by a link does not follow it.
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC
OLD = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC


def lock(descriptor: int) -> bool | None:
    """Whether the file is ours alone now; None where the file system has no locks.

    The kernel lets go of a lock when its last holder dies, however it dies.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time, for moments: waits for the others, where there are locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # may be entered but not listed
        yield
        return
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step that no crash can divide; False where that is not offered."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        done = library.renamex_np(os.fsencode(one), os.fsencode(other), _SWAP)
    elif hasattr(library, "renameat2"):
        done = library.renameat2(
            _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE
        )
    else:
        return False
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def there(path: Path) -> bool:
    """Whether something of that name is there, a link to nowhere too.

    Unlike os.path.lexists it does not take a disk that fails for an answer.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are safe on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        if path.is_dir():  # one that may be written to, but not listed
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Everything in a folder, from the leaves to the folder itself."""
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            sync_all(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            sync(Path(entry.path))
    sync(folder)


def readable_by_all_that_may(file: Path, folder_mode: int) -> None:
    """Some writers make files that only their owner may read; as the folder's mode says, then."""
    file.chmod(stat.S_IMODE(folder_mode) & 0o666)


# -- errors ----------------------------------------------------------------------------------------

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota on that disk is used up",
    errno.EFBIG: "a file became larger than is allowed there",
}
_REASONS = {
    **_FULL,
    errno.EROFS: "it lies on a read-only disk",
    errno.EACCES: "permission is denied",
    errno.EPERM: "it is not permitted",
    errno.ENOENT: "its place is gone, or takes no files",
    errno.EIO: "the disk reports an error",
    errno.ENAMETOOLONG: "a name in it is too long",
    errno.ELOOP: "it is a symbolic link in a circle",
    errno.ENOTDIR: "a part of it is a file",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.ENOTEMPTY: "another process has put something there meanwhile",
}


class NotWritten(OSError):
    """Something could not be written; the message says what and why."""


@contextlib.contextmanager
def told(place: str | Path, *, only_full: bool = False) -> Iterator[None]:
    """Turn system errors into a sentence about ``place``.

    With ``only_full``, around the work of others, only those that mean that a disk is full: their
    other errors may be about anything.
    """
    reasons = _FULL if only_full else _REASONS
    try:
        yield
    except NotWritten:
        raise
    except Exception as error:
        code = getattr(error, "errno", None) if isinstance(error, OSError) else None
        if code is None and os.strerror(errno.ENOSPC) in str(error):  # as safetensors says it
            code = errno.ENOSPC
        if code not in reasons:
            raise
        written = NotWritten(f"{str(place)!r} cannot be written: {reasons[code]}")
        written.errno = code
        raise written from error
