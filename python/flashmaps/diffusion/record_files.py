"""Entries of a record on disk: one safetensors file, tensors as they are and the rest as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.arguments import number, sides, switch, whole
from flashmaps.diffusion.entry import Entry
from flashmaps.files import whole_file

_FORMAT = "flashmaps record 1"
_PLAIN = ("layer", "step", "kind", "scale", "grid", "frames", "guidance", "causal", "count")
_NEWER = (
    "batch",
    "call",
    "adapter",
    "adapter_image",
    "per_head",
    "rows",
    "why",
)  # absent from older files
_TENSORS = ("query", "key", "lse", "_mask", "_mask_alike")


def write_entries(path: str | Path, entries: Iterable[Entry]) -> Path:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    shared: dict[Any, str] = {}
    rows = [_as_json(each, index, tensors, shared) for index, each in enumerate(entries)]
    with whole_file(path) as new:
        save_file(tensors, new, {"format": _FORMAT, "entries": json.dumps(rows)})
    return Path(path)


def read_entries(path: str | Path, device: torch.device | str = "cpu") -> list[Entry]:
    """Read what :func:`write_entries` wrote. Raises ValueError for any other file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} to load a record from")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(
                    f"{str(path)!r} is not a record that this version of flashmaps reads: its "
                    f"format is {about.get('format')!r}, wanted {_FORMAT!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from None
    try:
        entries = [_from_json(row, tensors) for row in _strict(about["entries"])]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
        raise ValueError(f"{str(path)!r} is a damaged record: {why}") from None
    if str(device) == "cpu":
        return entries
    return [_moved(entry, device) for entry in entries]


def _strict(text: str) -> list[dict[str, Any]]:
    """A list of objects from JSON without NaN."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    rows = json.loads(text, parse_constant=refuse)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("its entries are no list of objects")
    return rows


def _moved(entry: Entry, device: torch.device | str) -> Entry:
    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return replace(
        entry,
        **{name: there(getattr(entry, name)) for name in _TENSORS},
        statistics={name: there(x) for name, x in entry.statistics.items()},
        rotary=None if entry.rotary is None else tuple(there(x) for x in entry.rotary),
    )


def _as_json(
    entry: Entry, index: int, tensors: dict[str, Tensor], shared: dict[Any, str]
) -> dict[str, Any]:
    """One entry as JSON; its tensors go into ``tensors``, rotary embeddings only once: `shared`."""

    def put(name: str, tensor: Tensor) -> str:
        tensor = tensor.detach().contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor if whole else tensor.clone()  # safetensors refuses shared storage
        return name

    row: dict[str, Any] = {name: getattr(entry, name) for name in (*_PLAIN, *_NEWER)}
    row |= {"timestep": entry.timestep, "rotated": entry.rotated}
    for name in ("queries", "keys"):
        row[name] = {part: [at.start, at.stop] for part, at in getattr(entry, name).items()}
    for name in _TENSORS:
        tensor = getattr(entry, name)
        if tensor is not None and name == "_mask" and tensor.ndim == 3:  # one for many entries
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if place not in shared:
                shared[place] = put(f"{index}.{name}", tensor)
            row[name] = shared[place]
            continue
        row[name] = None if tensor is None else put(f"{index}.{name}", tensor)
    row["statistics"] = {
        name: put(f"{index}.statistics.{name}", x) for name, x in entry.statistics.items()
    }
    if entry.rotary is not None:
        row["rotary"] = []
        for n, x in enumerate(entry.rotary):
            place = (x.data_ptr(), x.shape, x.stride())
            if place not in shared:
                shared[place] = put(f"rotary.{index}.{n}", x)
            row["rotary"].append(shared[place])
    return row


def _from_json(row: dict[str, Any], tensors: Mapping[str, Tensor]) -> Entry:
    """One entry. Raises ValueError, KeyError or TypeError for what is none."""
    _check_row(row)
    values: dict[str, Any] = {name: row[name] for name in (*_PLAIN, "rotated")}
    values |= {name: row[name] for name in _NEWER if name in row}
    values["batch"] = tuple(values.get("batch", ()))
    values["grid"] = None if row["grid"] is None else tuple(row["grid"])
    values["_timestep"] = row["timestep"]
    for name in ("queries", "keys"):
        values[name] = {part: slice(*at) for part, at in row[name].items()}
    for name in _TENSORS:
        values[name] = None if row[name] is None else tensors[row[name]]
    values["statistics"] = {name: tensors[key] for name, key in row["statistics"].items()}
    if "rotary" in row:
        values["rotary"] = tuple(tensors[name] for name in row["rotary"])
    return Entry(**values)


def _check_row(row: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError for plain values of the wrong kind."""
    for name in ("layer", "kind"):
        if not isinstance(row[name], str):
            raise ValueError(f"{name} is {row[name]!r}")
    number("scale", row["scale"])
    whole("frames", row["frames"], 1)
    whole("count", row["count"], 1)
    if row["step"] is not None:
        whole("step", row["step"], 0)
    if row["timestep"] is not None:
        number("timestep", row["timestep"])
    switch("causal", row["causal"])
    switch("rotated", row["rotated"])
    if row["grid"] is not None and (sides(row["grid"]) is None or min(row["grid"]) < 1):
        raise ValueError(f"grid is {row['grid']!r}")
    for name in ("queries", "keys"):
        for part, (start, stop) in row[name].items():
            whole(f"{name} of {part!r}", start, 0)
            whole(f"{name} of {part!r}", stop, start)
