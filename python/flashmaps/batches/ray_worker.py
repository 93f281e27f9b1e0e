"""What runs on a worker of Ray: the model, kept, and matches of one part of the pairs at a time."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from flashmaps.batches.features import group_features
from flashmaps.batches.rows import Done, PairRows
from flashmaps.diffusion.feature_files import grey
from flashmaps.diffusion.features import Features, load_model
from flashmaps.diffusion.images import Image, load_image
from flashmaps.matching.pair_chunks import compared_only
from flashmaps.matching.pairs import match_pairs
from flashmaps.matching.settings import MatchSettings, fingerprint

_TENSORS = ("query", "key", "output", "head_weights")
_BITS = {torch.bfloat16: torch.int16}  # numpy knows no bfloat16: its bits travel


@dataclass(frozen=True)
class Question:
    """What every task of a run shares."""

    version: str
    model: str
    weights: str  # its fingerprint
    device: str | None
    settings: MatchSettings
    rows: str
    backend: str
    images: int
    threads: int = 1


@dataclass(frozen=True)
class Packed:
    """Features whose tensors are numpy arrays, which Ray places in shared memory as they are."""

    features: Features  # without tensors
    arrays: dict[str, tuple[np.ndarray, str]]  # and the name of torch's dtype


def pack(features: Features, compare: str | None = None) -> Packed:
    """Features on their way; with ``compare``, without what it does not look at."""
    if compare is not None:
        features = compared_only(features, compare)
    arrays = {}
    for name in _TENSORS:
        tensor: Tensor | None = getattr(features, name)
        if tensor is not None:
            plain = tensor.detach().cpu().contiguous()
            bits = plain.view(_BITS.get(plain.dtype, plain.dtype))
            arrays[name] = bits.numpy(), str(tensor.dtype).removeprefix("torch.")
    size = features.image.shape[:2]
    nothing: dict[str, Any] = dict.fromkeys(_TENSORS)
    return Packed(replace(features, image=np.empty((*size, 0)), **nothing), arrays)


def unpack(packed: Packed) -> Features:
    """The features again. Their tensors are those of shared memory: nobody may write to them."""
    tensors: dict[str, Any] = {}
    with warnings.catch_warnings():
        # torch knows no tensors that are read-only; nothing here writes to features.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, (array, dtype) in packed.arrays.items():
            tensors[name] = torch.from_numpy(array).view(getattr(torch, dtype))
    return replace(packed.features, image=grey(packed.features.image.shape[:2]), **tensors)


class Placed(Sequence[Features]):
    """The images of a part, by their numbers in the whole collection."""

    def __init__(self, count: int, found: Mapping[int, Packed]) -> None:
        self._count, self._found = count, found

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Features: ...
    @overload
    def __getitem__(self, index: slice) -> list[Features]: ...
    def __getitem__(self, index: Any) -> Any:
        """The features of one image of the part."""
        return unpack(self._found[index])


class Worker:
    """One process of the cluster; what it answers depends on what it is asked alone."""

    def __init__(self, question: Question) -> None:
        from importlib import metadata

        here = metadata.version("flashmaps")
        if here != question.version:
            raise ValueError(
                f"a worker has flashmaps {here}, the driver {question.version}; install the same "
                "version on every machine"
            )
        torch.set_num_threads(question.threads)
        self.question = question
        self._pipe: Any = None

    def features(self, group: int, images: Sequence[tuple[str, Any]]) -> list[Packed]:
        """Features of a group of images, each its name, and its file's bytes or its pixels."""
        asked = self.question
        if self._pipe is None:
            self._pipe = load_model(asked.model, device=asked.device)
            if fingerprint(self._pipe) != asked.weights:
                raise ValueError(
                    f"a worker's model {asked.model!r} has other weights than the driver's; give "
                    "every machine the same"
                )
        loaded = [_decoded(name, image) for name, image in images]
        return [pack(f) for f in group_features(self._pipe, asked.settings, group, loaded)]

    def pairs(
        self, part: int, numbers: np.ndarray, pairs: np.ndarray,
        points: Mapping[int, np.ndarray] | None, memory_budget: int, images: Sequence[int],
        *placed: Packed,
    ) -> Done:  # fmt: skip
        """The tables of a part. ``placed``: the features of ``images``."""
        asked = self.question
        sets = Placed(asked.images, dict(zip(images, placed, strict=True)))
        rows = PairRows(asked.rows, points, asked.settings, sets, asked.backend)
        chunks = match_pairs(
            sets, pairs, asked.settings.options, memory_budget=memory_budget, order="given",
            backend=asked.backend,
        )  # fmt: skip
        (done,) = rows.in_parts([(part, numbers)], chunks)
        return done


def _decoded(name: str, image: Any) -> Image:
    if not isinstance(image, bytes):
        return load_image(image, name)
    with tempfile.TemporaryDirectory(prefix="flashmaps-") as folder:
        path = Path(folder) / "image"
        path.write_bytes(image)
        return load_image(path, name)
