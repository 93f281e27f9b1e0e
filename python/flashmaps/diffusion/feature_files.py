"""Features as files: safetensors, no pickle. Tensors that nobody looks at are not read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.arguments import number, whole
from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.record_files import read_entries

if TYPE_CHECKING:
    from flashmaps.diffusion.features import Features

_FORMAT = "flashmaps features 1"
_PLAIN = ("scale", "grid", "input_size", "layers", "timestep", "seeds", "prompt", "inversion_steps")
_TUPLES = ("grid", "input_size", "layers", "seeds")
_GREY = np.float32(0.5)


def write_features(
    path: Path,
    features: Features,
    *,
    image: bool = True,
    dtype: torch.dtype | None = None,
    only: Iterable[str] | None = None,
) -> None:
    """What :meth:`Features.save` does, but for making the file whole."""
    from safetensors.torch import save_file

    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}; wanted a floating point dtype, such as torch.float16")
    kept = ("query", "key", "output") if only is None else tuple(only)
    tensors = {"head_weights": features.head_weights.detach()}
    for name in ("query", "key", "output"):
        tensor = getattr(features, name)
        if tensor is None:
            continue
        if name not in kept:
            tensor = tensor[:, :, :0]  # heads and width stay known
        tensors[name] = tensor.detach().to(dtype or tensor.dtype)
    if image:
        tensors["image"] = _packed(features.image)
    about: dict[str, Any] = {name: getattr(features, name) for name in _PLAIN}
    about["image_size"] = list(features.image.shape[:2])
    plain = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    # One key: several are written in any order, and the same features shall be the same bytes.
    save_file(plain, path, {"features": json.dumps({"format": _FORMAT, **about})})


def read_fields(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    only: Iterable[str] | None = None,
) -> dict[str, Any] | list[Entry]:
    """The fields of ``Features``; the entries where the file is a record."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} to load features from")
    kept = ("query", "key", "output") if only is None else tuple(only)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = file.metadata() or {}
            if str(about.get("format", "")).startswith("flashmaps record"):
                return read_entries(path, device)
            if "features" not in about:
                raise ValueError(f"{str(path)!r} holds no features that flashmaps has written")
            names = set(file.keys())
            found: dict[str, Any] = {"output": None}
            for name in ("query", "key", "output"):
                if name in names:
                    part = file.get_slice(name)
                    tensor = file.get_tensor(name) if name in kept else part[:, :, :0]
                    found[name] = tensor.to(dtype or tensor.dtype)
            found["head_weights"] = file.get_tensor("head_weights")
            image = file.get_tensor("image").cpu().numpy() if "image" in names else None
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from None
    try:
        plain = json.loads(about["features"])
        if (written := plain.pop("format", None)) != _FORMAT:
            raise ValueError(f"its format is {written!r}; this version reads {_FORMAT!r}")
        height, width = plain.pop("image_size")
        for name in _TUPLES:
            plain[name] = tuple(plain[name])
        if isinstance(plain["timestep"], list):
            plain["timestep"] = tuple(plain["timestep"])
        if set(plain) != set(_PLAIN):
            raise ValueError(f"it says {sorted(plain)}; wanted {sorted(_PLAIN)}")
        fields = {**found, **plain, "image": _unpacked(image, (height, width))}
        _check_shapes(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{str(path)!r} is a damaged file of features: {why}") from None
    return fields


def _check_shapes(fields: dict[str, Any]) -> None:
    """Raise ValueError or KeyError for tensors that do not go together."""
    query, key = fields["query"], fields["key"]
    whole("grid's height", fields["grid"][0], 1)
    whole("grid's width", fields["grid"][1], 1)
    number("scale", fields["scale"])
    if query.ndim != 4 or key.ndim != 4 or query.shape[1] != key.shape[1]:
        raise ValueError(f"query is {list(query.shape)} and key {list(key.shape)}")
    if list(fields["head_weights"].shape) != [query.shape[1]]:
        raise ValueError(f"head_weights has shape {list(fields['head_weights'].shape)}")


def check_entries(entries: Sequence[Entry], row: int) -> None:
    """ValueError unless each entry has Q and K of one image alone, and such a row of its batch."""
    if not entries:
        raise ValueError("the record holds no entries; select() chose none")
    for entry in entries:
        if entry.query is None or entry.key is None:
            raise ValueError(
                f"layer {entry.layer!r} holds statistics only; features need Q and K: capture "
                "with keep='qk'"
            )
        tokens, grid = entry.query.shape[2], entry.grid
        if grid is None:
            raise ValueError(f"layer {entry.layer!r} has no image grid; features have one")
        if tokens != grid[0] * grid[1] or entry.key.shape[2] != tokens:
            raise ValueError(
                f"layer {entry.layer!r} has {tokens} queries and {entry.key.shape[2]} keys on a "
                f"grid of {grid[0]} x {grid[1]}; features are of one image alone"
            )
        batch = entry.query.shape[0]
        if not 0 <= row < batch:
            raise ValueError(f"row={row}; the record's batch holds {batch}, counted from 0")


def grey(size: Sequence[int]) -> np.ndarray:
    """In place of an image of this (height, width): one number seen so often, without memory."""
    return np.broadcast_to(_GREY, (*size, 3))


def _packed(image: np.ndarray) -> Tensor:
    """Bytes where they say the same, to the bit; else as it is."""
    image = np.ascontiguousarray(image)
    with np.errstate(invalid="ignore"):
        small = np.rint(image * 255).clip(0, 255).astype(np.uint8)
    if image.dtype == np.float32 and np.array_equal(small.astype(np.float32) / 255, image):
        return torch.from_numpy(small)
    return torch.from_numpy(image)


def _unpacked(image: np.ndarray | None, size: Sequence[int]) -> np.ndarray:
    if image is None:
        return grey(size)
    return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
