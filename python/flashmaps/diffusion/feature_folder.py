"""A folder of features as a sequence that reads when asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from flashmaps.diffusion.features import Features

SUFFIX = ".safetensors"


class FeatureFolder(Sequence[Features]):
    """The features in a folder, in the order of their names; each is read when it is asked for.

        sets = FeatureFolder("features")
        write_pairs("matches.parquet", sets)

    Args:
        folder: with ``*.safetensors`` of :meth:`Features.save`, or of :meth:`Record.save`.
        only: of query, key and output, those that are read; default: all.
        device, dtype: what tensors become. Left out, they are as they were written and
            memory-mapped.
        names: of the files, in another order than theirs, or some of them.

    Raises ValueError where there is no such folder, or nothing in it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        only: Iterable[str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        names: Iterable[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{str(folder)!r} is no folder of features")
        if names is None:
            self.paths = sorted(self.folder.glob(f"*{SUFFIX}"))
        else:
            self.paths = [self.folder / name for name in names]
        if not self.paths:
            raise ValueError(f"{str(folder)!r} holds no *{SUFFIX}")
        self._only = None if only is None else tuple(only)
        self._device, self._dtype = device, dtype

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Features: ...
    @overload
    def __getitem__(self, index: slice) -> list[Features]: ...
    def __getitem__(self, index: Any) -> Any:
        """The features of one image, read now; of a slice, a list."""
        if isinstance(index, slice):
            return [self._read(path) for path in self.paths[index]]
        return self._read(self.paths[index])

    def _read(self, path: Path) -> Features:
        return Features.load(path, device=self._device, dtype=self._dtype, only=self._only)

    def __repr__(self) -> str:
        return f"FeatureFolder({str(self.folder)!r}, {len(self)} images)"
