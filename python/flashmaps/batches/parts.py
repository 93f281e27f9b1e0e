"""The second stage: pairs in parts, each a table that is there whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flashmaps.batches.ahead import behind
from flashmaps.batches.rows import Done, Table
from flashmaps.files import Run
from flashmaps.matching.pair_batch import need_pyarrow

_PART_ROWS = 2**16  # of tokens: some MB, a second or so of work
_PARTS = 2048  # more pairs than these parts hold at that size make larger parts, up to
_LARGEST = 2**18  # rows
_TILE_BYTES = 2**27  # of both sides of a tile
_ROW_BYTES = 100  # of a row while it is made: 76 in a table, and the parts of it


def part_pairs(pairs: int, tokens: int) -> int:
    """Pairs of a part: a question of these two numbers alone, so that runs agree."""
    most = max(1, _LARGEST // tokens)
    return min(most, max(1, _PART_ROWS // tokens, -(-pairs // _PARTS)))


def tile_side(images: int, pairs: int, image_bytes: int) -> int:
    """Images on a side of the tiles that pairs are ordered by.

    n sqrt(n / P), with which images are read n sqrt(P / n) times or so; fewer where they would take
    more than ``_TILE_BYTES``. A question of the run alone, as the parts are.
    """
    blocks = max(1, round(math.sqrt(pairs / images)))
    best = math.ceil(images / blocks)
    return max(1, min(images, best, _TILE_BYTES // max(1, 2 * image_bytes)))


def rows_bytes(pairs: int, tokens: int) -> int:
    """What the rows of a part take while they are made."""
    return pairs * tokens * _ROW_BYTES


class Parts:
    """The tables of all pairs.

    Args:
        count: of pairs; ``order``: their positions, in the order of the parts.
        each: pairs of a part.
        rows: as of :class:`flashmaps.batches.rows.PairRows`.
    """

    def __init__(self, run: Run, order: np.ndarray, each: int, rows: str) -> None:
        self.run, self.rows, self.count = run, rows, len(order)
        self.numbers = [order[i : i + each] for i in range(0, len(order), each)]

    def __len__(self) -> int:
        """How many parts."""
        return len(self.numbers)

    def names(self, part: int) -> list[str]:
        """The files of a part."""
        kinds = ("summaries",) if self.rows == "pairs" else ("matches", "summaries")
        return [f"{kind}/{part:06d}.parquet" for kind in kinds]

    def missing(self) -> list[tuple[int, np.ndarray]]:
        """The parts that are not there as they were written: number, and numbers of its pairs."""
        return [
            (part, self.numbers[part])
            for part in range(len(self))
            if not all(self.run.whole(name) for name in self.names(part))
        ]

    def write(self, done: Iterable[Done], left: int, progress: bool) -> None:
        """Parts in any order. One is written while the next is computed.

        Args:
            done: parts that are missing, as they become complete; ``left``: of all pairs.
        """
        from tqdm.auto import tqdm

        with tqdm(
            total=self.count, initial=self.count - left, desc="pairs", unit="pair",
            disable=not progress,
        ) as bar:  # fmt: skip
            for part, _, _ in behind(done, self._commit):
                bar.update(len(self.numbers[part]))

    def _commit(self, done: Done) -> None:
        part, summary, rows = done
        with self.run.files() as new:
            for name, table in zip(reversed(self.names(part)), (summary, rows), strict=False):
                (new / name).parent.mkdir(exist_ok=True)
                assert table is not None  # there are as many names as tables
                self.write_table(new / name, table)

    def summary(self) -> Table:
        """The rows of all pairs, in their order."""
        _, parquet = need_pyarrow()
        found: Table = {}
        for part in range(len(self)):
            table = parquet.read_table(self.run.folder / self.names(part)[-1])
            place = table["pair"].to_numpy()
            for name in table.column_names:
                values = table[name].to_numpy()
                found.setdefault(name, np.empty(self.count, values.dtype))[place] = values
        return found

    @staticmethod
    def write_table(path: Path, table: Table) -> None:
        """A table as Parquet, the same bytes for the same table."""
        pyarrow, parquet = need_pyarrow()
        columns = {k: v.tolist() if v.dtype.kind == "U" else v for k, v in table.items()}
        parquet.write_table(pyarrow.table(columns), path)
