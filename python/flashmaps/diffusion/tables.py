"""Statistics of a record as tables: data frames, Parquet files, a picture of layers by steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.entry import Entry
from flashmaps.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Columns that every row has, in order, and their types in numpy; then those of `tokens`.
_WHOLE = {
    "entry": "int32",
    "layer": "str",
    "step": "int32",
    "timestep": "float64",
    "kind": "str",
    "guidance": "str",
    "adapter": "int32",
    "height": "int32",
    "width": "int32",
    "frames": "int32",
    "count": "int32",
    "image": "int32",
    "head": "int32",
    "statistic": "str",
}
_SUMMARY = {"mean": "float64", "std": "float64", "min": "float64", "max": "float64"}
_TOKENS = {"token": "int64", "channel": "int32", "value": "float64"}


def rows(entries: Iterable[Entry], *, tokens: bool = False) -> Iterator[dict[str, list[Any]]]:
    """The rows of each entry that has statistics, as columns; None where there is no value.

    Without ``tokens`` a row is one statistic of one image (of one head, where heads are apart):
    its mean, standard deviation (over all values, not a sample's), least and largest value.
    With it a row is one value: of a query or key token, and where a statistic has several numbers
    for each (expectation: x, y), of one channel.
    """
    for number, entry in enumerate(entries):
        if not entry.statistics:
            continue
        parts = entry.parts or (entry.guidance,)
        height, width = entry.grid if entry.grid is not None else (None, None)
        columns: dict[str, list[Any]] = {
            name: [] for name in (*_WHOLE, *(_TOKENS if tokens else _SUMMARY))
        }
        for name, values in entry.statistics.items():
            images = len(values) // len(parts)
            for index, (head, value) in _by_image(values, entry.per_head):
                shared = (
                    number, entry.layer, entry.step, entry.timestep, entry.kind,
                    parts[index // images], entry.adapter, height, width, entry.frames,
                    entry.count, index % images, head, name,
                )  # fmt: skip
                fresh = _values(value) if tokens else _summary(value)
                length = len(next(iter(fresh.values())))
                for column, one in zip(_WHOLE, shared, strict=True):
                    columns[column] += [one] * length
                for column, many in fresh.items():
                    columns[column] += many
        yield columns


def _by_image(values: Tensor, per_head: bool) -> Iterator[tuple[int, tuple[int | None, Tensor]]]:
    for index, of_image in enumerate(values.detach().cpu()):
        if per_head:
            for head, of_head in enumerate(of_image):
                yield index, (head, of_head)
        else:
            yield index, (None, of_image)


def _summary(values: Tensor) -> dict[str, list[float]]:
    numbers = values.double()
    return {
        "mean": [float(numbers.mean())],
        "std": [float(numbers.std(correction=0))],
        "min": [float(numbers.min())],
        "max": [float(numbers.max())],
    }


def _values(values: Tensor) -> dict[str, list[Any]]:
    flat = values.reshape(1, 1) if values.ndim == 0 else values.flatten(1) if values.ndim > 1 else (
        values[:, None]
    )  # fmt: skip
    count, channels = flat.shape
    single = values.ndim < 2
    return {
        "token": torch.arange(count).repeat_interleave(channels).tolist(),
        "channel": [None] * count if single else torch.arange(channels).repeat(count).tolist(),
        "value": flat.double().flatten().tolist(),
    }


def to_pandas(entries: Iterable[Entry], *, tokens: bool = False) -> DataFrame:
    """All rows as one data frame; see :meth:`flashmaps.Record.to_pandas`."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            f"data frames need the package pandas ({error}); install it with: pip install pandas"
        ) from error
    kinds = {**_WHOLE, **(_TOKENS if tokens else _SUMMARY)}
    whole: dict[str, list[Any]] = {name: [] for name in kinds}
    for columns in rows(_with_statistics(entries), tokens=tokens):
        for name, values in columns.items():
            whole[name] += values
    # Whole numbers of which some are missing stay whole.
    nullable = {"int32": "Int32", "int64": "Int64"}
    return pandas.DataFrame(
        {
            name: pandas.Series(values, dtype=nullable.get(kinds[name], kinds[name]))
            for name, values in whole.items()
        }
    )


def to_parquet(entries: Iterable[Entry], path: str | Path, *, tokens: bool = False) -> Path:
    """A Parquet file, written whole or not at all, an entry at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f"Parquet files need the package pyarrow ({error}); "
            "install it with: pip install pyarrow"
        ) from error
    kinds = {**_WHOLE, **(_TOKENS if tokens else _SUMMARY)}
    of = {"str": pyarrow.string(), "float64": pyarrow.float64(), "int32": pyarrow.int32()}
    of["int64"] = pyarrow.int64()
    schema = pyarrow.schema([(name, of[kind]) for name, kind in kinds.items()])
    chosen = _with_statistics(entries)
    with whole_file(path) as new, parquet.ParquetWriter(new, schema) as writer:
        for columns in rows(chosen, tokens=tokens):
            writer.write_table(pyarrow.table(columns, schema=schema))
    return Path(path)


def _with_statistics(entries: Iterable[Entry]) -> list[Entry]:
    found = list(entries)
    if not any(each.statistics for each in found):
        raise ValueError(
            f"none of the {len(found)} entries has statistics; name some when you capture: "
            "reduce=('entropy', 'max'), with keep='statistics' for those of each step"
        )
    return found


def plot(
    entries: Iterable[Entry], statistic: str | None = None, *, cmap: str = "viridis"
) -> Figure:
    """A picture of layers by steps; see :meth:`flashmaps.Record.plot`."""
    from matplotlib.figure import Figure

    found = _with_statistics(entries)
    names = list(dict.fromkeys(name for each in found for name in each.statistics))
    if statistic is None:
        statistic = names[0]
    if statistic not in names:
        raise ValueError(f"statistic={statistic!r}; the record has {', '.join(names)}")
    found = [each for each in found if statistic in each.statistics]
    layers = list(dict.fromkeys(each.layer for each in found))
    steps = sorted({each.step for each in found if each.step is not None})
    means = any(each.step is None for each in found)
    sums, counts = np.zeros((2, len(layers), len(steps) + means))
    for each in found:
        at = layers.index(each.layer), len(steps) if each.step is None else steps.index(each.step)
        sums[at] += float(each.statistics[statistic].double().mean())
        counts[at] += 1
    with np.errstate(invalid="ignore"):
        values = sums / counts  # NaN, and blank, where a layer did not run
    wide = 1.5 + 0.09 * max(map(len, layers)) + max(2.0, 0.3 * values.shape[1])
    figure = Figure(figsize=(wide, 1.2 + 0.22 * len(layers)), layout="constrained")
    ax = figure.subplots()
    drawn = ax.imshow(values, aspect="auto", cmap=cmap, interpolation="nearest")
    ax.set_yticks(range(len(layers)), layers, fontsize=7)
    labels = [str(step) for step in steps] + ["mean"] * means
    every = max(1, math.ceil(len(labels) / 25))
    ax.set_xticks(range(0, len(labels), every), labels[::every], fontsize=7)
    ax.set_xlabel("step")
    unit = " (nats)" if statistic.endswith("entropy") else ""
    figure.colorbar(drawn, ax=ax, label=f"mean {statistic}{unit}")
    return figure
