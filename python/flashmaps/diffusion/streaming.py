"""Entries written to disk while the model runs, and read from there when they are used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.record_files import read_entries, write_entries

PART_BYTES = 256 << 20  # of tensors that wait to be written


class Stream:
    """Writes a record's entries into a folder, in parts of about ``PART_BYTES``.

    What was written is replaced by entries whose tensors are views of the file: the system reads
    them when they are used, and may let go of them. Each part is written whole or not at all, so a
    run that breaks off leaves all parts before it.

    Raises ValueError for a folder that holds parts of another record, or is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"to={str(folder)!r} is a file; give a folder to write to")
        if parts_of(self.folder):
            raise ValueError(
                f"to={str(folder)!r} holds the record of another run; give a new folder, or read "
                "that one with fm.Record.load"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._waiting = 0  # entries at the end of the record that are not written, their bytes
        self._bytes = 0
        self._parts = 0

    def added(self, entries: list[Entry]) -> None:
        """An entry was put at the end of ``entries``; writes a part where it is time to."""
        self._waiting += 1
        self._bytes += bytes_of(entries[-1])
        if self._bytes >= PART_BYTES:
            self.flush(entries)

    def flush(self, entries: list[Entry]) -> None:
        """Write what waits."""
        # Fewer, if the record was cleared meanwhile.
        count = min(self._waiting, len(entries))
        self._waiting = self._bytes = 0
        if not count:
            return
        path = self.folder / f"part-{self._parts:05d}.safetensors"
        self._parts += 1
        write_entries(path, entries[-count:])
        entries[-count:] = read_entries(path)


def parts_of(folder: Path) -> list[Path]:
    """The parts of a record in a folder, in order."""
    return sorted(folder.glob("part-*.safetensors")) if folder.is_dir() else []


def read_parts(folder: str | Path, device: torch.device | str = "cpu") -> list[Entry]:
    """The entries of all parts. Raises FileNotFoundError for a folder without any."""
    parts = parts_of(Path(folder))
    if not parts:
        raise FileNotFoundError(f"the folder {str(folder)!r} holds no parts of a record")
    return [entry for part in parts for entry in read_entries(part, device)]


def bytes_of(entry: Entry) -> int:
    """Of the tensors that an entry holds. Rotary embeddings are not counted: entries share them."""
    tensors: Iterable[Any] = (entry.query, entry.key, entry.lse, entry._mask)
    tensors = [*tensors, *entry.statistics.values()]
    return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor))
