"""Which pairs of a collection: from a table, or of a kind (all, nearest, chain, star)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.batches.collection import Collection
from flashmaps.batches.token_index import nearest_by_tokens
from flashmaps.diffusion.features import Features
from flashmaps.matching.options import COMPARE
from flashmaps.matching.pair_order import check_pairs, upper_pairs

KINDS = ("all", "nearest", "chain", "star")
SEARCHES = ("mean", "tokens")
_BLOCK = 2048  # images whose similarities are computed at once


@dataclass(frozen=True)
class Pairs:
    """Pairs that were asked for, perhaps not known yet.

    Attributes:
        kind: one of KINDS, or "given".
        given: [P, 2] of "given".
        points: for each given pair [n, 2] of (x, y) in pixels of the source; None: all tokens.
        number: of "nearest", how many for each image; of "star", the image in the middle.
        both_ways: of KINDS, (j, i) right after (i, j) too. Nearest pairs are one way each.
        search: of "nearest": by "mean" features, or by "tokens".
    """

    kind: str
    given: tuple[tuple[int, int], ...] = ()
    points: tuple[np.ndarray, ...] | None = None
    number: int = 0
    both_ways: bool = False
    search: str = "mean"

    def count(self, images: int) -> int:
        """How many."""
        ways = 2 if self.both_ways else 1
        match self.kind:
            case "all":
                return ways * images * (images - 1) // 2
            case "nearest":
                return images * min(self.number, images - 1)
            case "given":
                return len(self.given)
            case _:
                return ways * (images - 1)

    def resolved(self, images: int, sets: Sequence[Features], compare: str) -> np.ndarray:
        """All of them, [P, 2] int32.

        ``sets``: the features of the images, of which "nearest" is a question.
        """
        match self.kind:
            case "given":
                found: Sequence[tuple[int, int]] = self.given
            case "all":
                return upper_pairs(images, both_ways=self.both_ways)
            case "nearest":
                if self.search == "tokens":
                    found = nearest_by_tokens(sets, compare, self.number)
                else:
                    means = torch.stack([descriptor(each, compare) for each in sets])
                    found = nearest(means, self.number)
            case "chain":
                found = self._ways([(i, i + 1) for i in range(images - 1)])
            case _:
                found = self._ways([(self.number, j) for j in range(images) if j != self.number])
        return np.array(found, dtype=np.int32)

    def _ways(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [p for pair in pairs for p in ((pair, pair[::-1]) if self.both_ways else (pair,))]

    def to_json(self) -> dict[str, Any]:
        """What a run depends on."""
        digest = hashlib.sha256(np.asarray(self.given, np.int64).tobytes())
        for each in self.points or ():
            digest.update(np.ascontiguousarray(each, np.float64).tobytes() + b"|")
        given = digest.hexdigest()[:32] if self.kind == "given" else None
        return {
            "kind": self.kind, "given": given, "number": self.number, "both_ways": self.both_ways,
            "search": self.search,
        }  # fmt: skip


def choose(
    pairs: Any, collection: Collection, *, number: int | None = None, both_ways: bool = False,
    search: str = "mean",
) -> Pairs:  # fmt: skip
    """What ``fm.batch(pairs=...)`` means.

    Args:
        pairs: one of KINDS; a CSV or Parquet file, or a mapping of columns ``source``, ``target``
            (numbers or names of images) and, for points, ``x`` and ``y`` in pixels of the source,
            a row for each point; or a sequence of (source, target).
        number: of "nearest": how many for each image, default 5; of "star": the image in the
            middle, default 0.
        search: of "nearest": "mean", by the cosine of mean features, exact; or "tokens", by an
            index over tokens, see :func:`flashmaps.batches.token_index.nearest_by_tokens`.

    Raises ValueError that names the row that is wrong.
    """
    count = len(collection)
    if search not in SEARCHES:
        raise ValueError(f"search={search!r}; wanted {' or '.join(map(repr, SEARCHES))}")
    if search != "mean" and pairs != "nearest":
        raise ValueError("search belongs to pairs='nearest'")
    if isinstance(pairs, str) and pairs in KINDS:
        if count < 2:
            raise ValueError(f"pairs={pairs!r} needs at least 2 images, there are {count}")
        number = {"nearest": 5, "star": 0}.get(pairs, 0) if number is None else number
        if pairs == "nearest" and number < 1:
            raise ValueError(f"number={number}; pairs='nearest' needs at least 1 for each image")
        if pairs == "star" and not 0 <= number < count:
            raise ValueError(f"number={number}; the star's middle is an image of 0 to {count - 1}")
        return Pairs(pairs, number=number, both_ways=both_ways, search=search)
    if number is not None or both_ways:
        raise ValueError(f"number and both_ways belong to pairs = {', '.join(KINDS)}")
    if isinstance(pairs, (str, Path)):
        pairs = _read(Path(pairs))
    if not isinstance(pairs, Mapping):
        return Pairs("given", _tuples(check_pairs(pairs, count)))
    return _from_columns(pairs, collection)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() not in (".csv", ".parquet") or not path.is_file():
        raise ValueError(
            f"pairs={str(path)!r}; wanted {', '.join(KINDS)}, or a .csv or .parquet file that is "
            "there"
        )
    from flashmaps.matching.pairs import need_pyarrow

    _, parquet = need_pyarrow()
    try:
        if path.suffix.lower() == ".csv":
            from pyarrow import csv

            table = csv.read_csv(path)
        else:
            table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not readable as a table: {error}") from None
    return {name: table[name].to_pylist() for name in table.column_names}


def _from_columns(columns: Mapping[str, Sequence[Any]], collection: Collection) -> Pairs:
    if not {"source", "target"} <= set(columns):
        raise ValueError(
            f"the table of pairs has columns {list(columns)}; wanted source and target"
        )
    if ("x" in columns) != ("y" in columns):
        raise ValueError("the table of pairs has one of the columns x and y; wanted both")
    names = collection.index()

    def numbered(value: Any, row: int, column: str) -> int:
        if isinstance(value, str):
            if value in names:
                return names[value]
            if not value.isdigit():
                raise ValueError(f"row {row}: {column} {value!r} is the name of no image")
        return int(value)

    rows = zip(columns["source"], columns["target"], strict=True)
    asked = [(numbered(s, r, "source"), numbered(t, r, "target")) for r, (s, t) in enumerate(rows)]
    every = _tuples(check_pairs(asked, len(collection)))
    if "x" not in columns:
        return Pairs("given", every)
    grouped: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for pair, x, y in zip(every, columns["x"], columns["y"], strict=True):
        grouped.setdefault(pair, []).append((float(x), float(y)))
    points = tuple(np.asarray(each) for each in grouped.values())
    return Pairs("given", tuple(grouped), points=points)


def _tuples(pairs: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple((s, t) for s, t in pairs.tolist())


def descriptor(features: Features, compare: str) -> Tensor:
    """One unit vector of an image: the mean over tokens of its unit vectors, heads side by side."""
    x: Tensor | None = getattr(features, COMPARE[compare][1])
    assert x is not None  # as matching itself says it
    pooled = torch.nn.functional.normalize(x.float(), dim=-1).mean(2).flatten()
    return torch.nn.functional.normalize(pooled, dim=0).cpu()


def nearest(descriptors: Tensor, number: int) -> list[tuple[int, int]]:
    """For each image, (it, one of the ``number`` images of the largest cosine), nearest first.

    Exact, in blocks; of equals the lowest number first.
    """
    count = len(descriptors)
    number = min(number, count - 1)
    found = []
    for start in range(0, count, _BLOCK):
        rows = descriptors[start : start + _BLOCK] @ descriptors.T
        here = torch.arange(len(rows))
        rows[here, start + here] = -torch.inf
        order = rows.sort(dim=1, descending=True, stable=True).indices[:, :number]
        found += [(start + i, j) for i, row in enumerate(order.tolist()) for j in row]
    return found
