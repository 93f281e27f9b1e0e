"""What a capture leaves: entries of attention layers, to choose from and to average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.record_files import read_entries, write_entries
from flashmaps.diffusion.selection import (
    matches,
    of_guidance,
    patterns,
    resolutions,
    whole_numbers,
)
from flashmaps.diffusion.streaming import read_parts
from flashmaps.diffusion.tables import plot, to_pandas, to_parquet
from flashmaps.maps.attention_map import AttentionMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class Record(Sequence[Entry]):
    """What a capture has seen, in order of execution: a read-only sequence of :class:`Entry`."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = list(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __getitem__(self, index: Any) -> Any:
        """One entry, or a Record of several: ``rec[0]``, ``rec[:10]``."""
        if isinstance(index, slice):
            return Record(self._entries[index])
        return self._entries[index]

    def __add__(self, other: Record) -> Record:
        """The entries of both, this one's first."""
        if not isinstance(other, Record):
            return NotImplemented
        return Record([*self._entries, *other._entries])

    def __repr__(self) -> str:
        return f"Record({len(self)} entries of {len(self.layers)} layers)"

    @property
    def layers(self) -> list[str]:
        """Names of the layers seen, in order of first execution."""
        return list(dict.fromkeys(entry.layer for entry in self._entries))

    def select(
        self,
        layers: str | Iterable[str] | None = None,
        *,
        step: int | Iterable[int] | None = None,
        kind: str | None = None,
        resolution: Any = None,
        guidance: str | None = None,
        adapter: int | None = None,
    ) -> Record:
        """The entries that match all that is given; see :class:`flashmaps.capture` for the values.

        ``guidance="conditional"`` takes that part of entries that hold several; ``adapter`` is the
        index of an IP-Adapter.

        Raises ValueError for ``step`` where a matching entry is a mean over steps.
        """
        steps = None if step is None else whole_numbers("step", step)
        sizes = None if resolution is None else resolutions(resolution)
        chosen = [
            entry
            for entry in self._entries
            if (layers is None or matches(entry.layer, patterns(layers)))
            and (kind is None or entry.kind == kind)
            and (sizes is None or entry.grid in sizes)
            and (adapter is None or entry.adapter == adapter)
        ]
        if guidance is not None:
            chosen = [half for entry in chosen if (half := of_guidance(entry, guidance))]
        if steps is not None:
            for entry in chosen:
                if entry.step is None:
                    raise ValueError(
                        f"layer {entry.layer!r} holds the mean over {entry.count} passes, which "
                        "has no step; capture with keep='statistics' to have the statistics of "
                        "each step, or with keep='qk' for its Q and K"
                    )
            chosen = [entry for entry in chosen if entry.step in steps]
        return Record(chosen)

    def map(
        self,
        block: str | None = None,
        *,
        to: Record | None = None,
        weights: Sequence[float] | None = None,
        **options: Any,
    ) -> AttentionMap:
        """The mean of all entries' maps, as one lazy map with all their heads; O(N d) memory.

            rec.select("up_blocks.2.*", kind="self").map().entropy()

        ``to`` gives the keys, entry by entry: the same selection of another record. ``weights`` sum
        to 1, one for each entry. Entries must agree in tokens and batch; see
        ``AttentionMap.average`` and :meth:`Entry.map`.
        """
        if not self._entries:
            raise ValueError("there are no entries to take the map of; select() chose none")
        others: Sequence[Entry | None] = [None] * len(self) if to is None else list(to)
        if len(others) != len(self):
            raise ValueError(
                f"to has {len(others)} entries for {len(self)}; make the same selection of both"
            )
        maps = [
            entry.map(block, to=other, **options)
            for entry, other in zip(self._entries, others, strict=True)
        ]
        for entry, attention_map in zip(self._entries, maps, strict=True):
            if attention_map.shape != maps[0].shape:
                raise ValueError(
                    f"maps of different sizes do not average: {self[0].layer!r} is "
                    f"{maps[0].shape}, {entry.layer!r} is {attention_map.shape}; choose one level "
                    "with select(resolution=...)"
                )
        return AttentionMap.average(maps, weights)

    def clear(self) -> None:
        """Forget everything seen so far, to bound memory in a long run."""
        self._entries.clear()

    # -- tables ------------------------------------------------------------------------------------

    def to_pandas(self, *, tokens: bool = False) -> DataFrame:
        """The statistics as a pandas data frame; entries without any have no rows.

        A row is one statistic of one image in one entry: ``mean``, ``std`` (over all tokens, not a
        sample's), ``min`` and ``max`` of its values. With ``tokens=True`` it is one ``value``, with
        the number of its ``token`` and, of statistics with several numbers for each, its
        ``channel``. Columns before these: ``entry`` (its index), ``layer``, ``step`` and
        ``timestep`` (missing in means), ``kind``, ``guidance`` (the part that the image is of),
        ``adapter``, ``height``, ``width``, ``frames``, ``count``, ``image`` (its index within the
        part), ``head`` (where heads are apart), ``statistic``.

        Raises ValueError where no entry has statistics, ImportError without pandas.
        """
        return to_pandas(self._entries, tokens=tokens)

    def to_parquet(self, path: str | Path, *, tokens: bool = False) -> Path:
        """What :meth:`to_pandas` has, as a Parquet file: whole or not at all, entry by entry."""
        return to_parquet(self._entries, path, tokens=tokens)

    def plot(self, statistic: str | None = None, *, cmap: str = "viridis") -> Figure:
        """A statistic, averaged over tokens and images, layer by step: a matplotlib Figure.

        Default: the first that there is. Layers are in order of execution. Means over steps have a
        column "mean". Several entries of one layer and step (parts of guidance, adapters) are
        averaged too: choose with :meth:`select` before.
        """
        return plot(self._entries, statistic, cmap=cmap)

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all: tensors as they are, the rest as JSON."""
        return write_entries(path, self._entries)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Record:
        """Read what :meth:`save` wrote, or the folder that ``fm.capture(..., to=folder)`` wrote.

        On the CPU tensors are read when they are used. Raises ValueError for any other file.
        """
        if Path(path).is_dir():
            return cls(read_parts(path, device))
        return cls(read_entries(path, device))
