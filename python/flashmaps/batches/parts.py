"""The second stage: pairs in parts, each a table that is there whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.features import Features
from flashmaps.files import Run
from flashmaps.matching.cross_map import place_points
from flashmaps.matching.pair_batch import PairBatch, need_pyarrow, pair_columns, token_columns
from flashmaps.matching.points import token_at
from flashmaps.matching.settings import MatchSettings

Table = dict[str, np.ndarray]

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
        pairs: all of them; ``order``: their positions, in the order of the parts.
        each: pairs of a part.
        points: for each pair, where rows are points.
    """

    def __init__(
        self, run: Run, pairs: Sequence[tuple[int, int]], order: Sequence[int], each: int,
        rows: str, points: Sequence[np.ndarray] | None, settings: MatchSettings,
        sets: Sequence[Features], backend: str,
    ) -> None:  # fmt: skip
        self.run, self.pairs, self.rows, self.points = run, pairs, rows, points
        self.settings, self.sets, self.backend = settings, sets, backend
        self.numbers = [list(order[i : i + each]) for i in range(0, len(order), each)]

    def __len__(self) -> int:
        """How many parts."""
        return len(self.numbers)

    def names(self, part: int) -> list[str]:
        """The files of a part."""
        kinds = ("summaries",) if self.rows == "pairs" else ("matches", "summaries")
        return [f"{kind}/{part:06d}.parquet" for kind in kinds]

    def missing(self) -> list[int]:
        """The positions of pairs whose part is not there as it was written, in order."""
        self._todo = [
            part
            for part in range(len(self))
            if not all(self.run.whole(name) for name in self.names(part))
        ]
        return [position for part in self._todo for position in self.numbers[part]]

    def write(self, todo: Sequence[int], chunks: Iterable[PairBatch], progress: bool) -> None:
        """The parts that were missing. A part is written while the next one is computed.

        Args:
            todo: what ``missing`` gave; ``chunks``: of these pairs, in this order.
        """
        from tqdm.auto import tqdm

        parts = iter(self._todo)
        part = next(parts)
        left = len(self.numbers[part])
        rows: list[Table] = []
        summaries: list[Table] = []
        waiting: Future[None] | None = None
        total = len(self.pairs)
        with (
            ThreadPoolExecutor(1) as writer,
            tqdm(
                total=total, initial=total - len(todo), desc="pairs", unit="pair",
                disable=not progress,
            ) as bar,
        ):  # fmt: skip
            for chunk in chunks:
                numbers = torch.tensor([todo[i] for i in chunk.numbers.tolist()])
                chunk = replace(chunk, numbers=numbers)
                summary, table = self._summary(chunk), self._rows(chunk)
                count, start = len(numbers), 0
                ends = np.cumsum([0, *self._lines(chunk)])
                while start < count:
                    stop = min(count, start + left)
                    summaries.append({k: v[start:stop] for k, v in summary.items()})
                    if table is not None:
                        some = slice(ends[start], ends[stop])
                        rows.append({k: v[some] for k, v in table.items()})
                    left -= stop - start
                    start = stop
                    if left == 0:
                        if waiting is not None:
                            waiting.result()
                        waiting = writer.submit(self._commit, part, rows, summaries)
                        rows, summaries = [], []
                        bar.update(len(self.numbers[part]))
                        if (following := next(parts, None)) is not None:
                            part, left = following, len(self.numbers[following])
            if waiting is not None:
                waiting.result()

    def _commit(self, part: int, rows: list[Table], summaries: list[Table]) -> None:
        with self.run.files() as new:
            for name, tables in zip(reversed(self.names(part)), (summaries, rows), strict=False):
                (new / name).parent.mkdir(exist_ok=True)
                joined = {k: np.concatenate([t[k] for t in tables]) for k in tables[0]}
                self.write_table(new / name, joined)

    def summary(self) -> Table:
        """The rows of all pairs, in their order."""
        _, parquet = need_pyarrow()
        tables = [parquet.read_table(self.run.folder / self.names(p)[-1]) for p in range(len(self))]
        joined = {
            name: np.concatenate([t[name].to_numpy() for t in tables])
            for name in tables[0].column_names
        }
        order = np.argsort(joined["pair"], kind="stable")
        return {name: values[order] for name, values in joined.items()}

    @staticmethod
    def write_table(path: Path, table: Table) -> None:
        """A table as Parquet, the same bytes for the same table."""
        pyarrow, parquet = need_pyarrow()
        columns = {k: v.tolist() if v.dtype.kind == "U" else v for k, v in table.items()}
        parquet.write_table(pyarrow.table(columns), path)

    # -- rows --------------------------------------------------------------------------------------

    def _lines(self, chunk: PairBatch) -> list[int]:
        """Rows of each pair."""
        if self.rows == "points":
            assert self.points is not None
            return [len(self.points[number]) for number in chunk.numbers.tolist()]
        return [chunk.trip.forward.shape[1]] * len(chunk.numbers)

    def _summary(self, chunk: PairBatch) -> Table:
        table = {name: values.numpy() for name, values in pair_columns(chunk).items()}
        trusted = self._confidence(chunk)
        if trusted is not None:
            table["mean_confidence"] = trusted.mean(1).cpu().numpy()
        return table

    def _rows(self, chunk: PairBatch) -> Table | None:
        if self.rows == "pairs":
            return None
        trusted = self._confidence(chunk)
        if self.rows == "points":
            return self._points(chunk, trusted)
        table = {name: values.numpy() for name, values in token_columns(chunk).items()}
        if trusted is not None:
            table["confidence"] = trusted.cpu().flatten().numpy()
        return table

    def _confidence(self, chunk: PairBatch) -> Tensor | None:  # [P, N_s]
        calibration = self.settings.calibration
        if calibration is None:
            return None
        return calibration.probability({name: chunk.score(name) for name in calibration.scores})

    def _points(self, chunk: PairBatch, trusted: Tensor | None) -> Table:
        assert self.points is not None
        found: list[Table] = []
        for row, (number, (s, t)) in enumerate(
            zip(chunk.numbers.tolist(), chunk.pairs.tolist(), strict=True)
        ):
            of, to, points = self.sets[s], self.sets[t], self.points[number]
            height, width = of.image.shape[:2]
            inside = (points >= -0.5) & (points < (width - 0.5, height - 0.5))
            if not inside.all():
                x, y = points[~inside.all(1)][0]
                raise ValueError(
                    f"pair {number}: point ({x:g}, {y:g}) lies outside image {s} of "
                    f"{width} x {height} pixels"
                )
            unit = torch.from_numpy((points + 0.5) / (width, height))
            options = self.settings.options
            there = place_points(of, to, unit[None], options, backend=self.backend)[0]
            size = np.array((to.image.shape[1], to.image.shape[0]))
            placed = (there.double().clamp(0, 1).numpy() * size - 0.5).clip(0, size - 1)
            tokens = [token_at(point, of.grid, (height, width)) for point in points]
            table = {
                "pair": np.full(len(points), number, np.int32),
                "source": np.full(len(points), s, np.int32),
                "target": np.full(len(points), t, np.int32),
                "point": np.arange(len(points), dtype=np.int32),
                "x": points[:, 0], "y": points[:, 1],
                "target_x": placed[:, 0], "target_y": placed[:, 1],
                "return_probability": chunk.trip.return_probability[row].cpu().numpy()[tokens],
            }  # fmt: skip
            if trusted is not None:
                table["confidence"] = trusted[row].cpu().numpy()[tokens]
            found.append(table)
        return {name: np.concatenate([t[name] for t in found]) for name in found[0]}
