"""What of matches goes into the tables of a part: rows of tokens or points, and summaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.features import Features
from flashmaps.matching.cross_map import place_points
from flashmaps.matching.pair_batch import PairBatch, pair_columns, token_columns
from flashmaps.matching.points import token_at
from flashmaps.matching.settings import MatchSettings

Table = dict[str, np.ndarray]
Done = tuple[int, Table, Table | None]  # a part: its number, summaries, and rows where asked for


class PairRows:
    """Tables of matched pairs.

    Args:
        rows: "tokens", "points", or "pairs", of which there are summaries alone.
        points: by the number of a pair, where rows are points.
        sets: features by the number of an image, where rows are points.
    """

    def __init__(
        self, rows: str, points: Sequence[np.ndarray] | Mapping[int, np.ndarray] | None,
        settings: MatchSettings, sets: Sequence[Features], backend: str,
    ) -> None:  # fmt: skip
        self.rows, self.points, self.settings = rows, points, settings
        self.sets, self.backend = sets, backend

    def in_parts(
        self, parts: Sequence[tuple[int, np.ndarray]], chunks: Iterable[PairBatch]
    ) -> Iterator[Done]:
        """The tables of some parts as they become complete.

        Args:
            parts: (number of the part, numbers of its pairs); ``chunks``: of all of these pairs,
                one after the other.
        """
        todo = np.concatenate([numbers for _, numbers in parts])
        waiting = iter(parts)
        part, left = _next(waiting)
        rows: list[Table] = []
        summaries: list[Table] = []
        for chunk in chunks:
            numbers = torch.from_numpy(todo[chunk.numbers.numpy()])
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
                    yield part, _joined(summaries), _joined(rows) if rows else None
                    rows, summaries = [], []
                    part, left = _next(waiting)

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
        if self.rows == "points":
            return self._points(chunk)
        trusted = self._confidence(chunk)
        table = {name: values.numpy() for name, values in token_columns(chunk).items()}
        if trusted is not None:
            table["confidence"] = trusted.cpu().flatten().numpy()
        return table

    def _confidence(self, chunk: PairBatch) -> Tensor | None:  # [P, N_s]
        calibration = self.settings.calibration
        if calibration is None:
            return None
        return calibration.probability({name: chunk.score(name) for name in calibration.scores})

    def _points(self, chunk: PairBatch) -> Table:
        assert self.points is not None
        calibration = self.settings.calibration
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
            if calibration is not None and len(points):
                other = [token_at(point, to.grid, to.image.shape[:2]) for point in placed]
                said = chunk.confidence(calibration, torch.tensor(tokens), torch.tensor(other), row)
                table["confidence"] = said.cpu().numpy()
            elif calibration is not None:
                table["confidence"] = np.empty(0, np.float32)
            found.append(table)
        return {name: np.concatenate([t[name] for t in found]) for name in found[0]}


def _next(parts: Iterator[tuple[int, np.ndarray]]) -> tuple[int, int]:
    """The number and the pairs of the next part; none after the last."""
    part, numbers = next(parts, (-1, ()))
    return part, len(numbers)


def _joined(tables: Sequence[Table]) -> Table:
    return {k: np.concatenate([t[k] for t in tables]) for k in tables[0]}
