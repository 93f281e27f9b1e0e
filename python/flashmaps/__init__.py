"""FlashMaps: statistics of diffusion models' attention maps that are never built.

>>> import torch, flashmaps as fm
>>> A = fm.AttentionMap(torch.randn(1, 5, 256, 64), torch.randn(1, 5, 256, 64))
>>> stats = A.reduce("entropy", "argmax")  # one pass, memory that grows with N
>>> stats.entropy.shape
torch.Size([1, 256])
"""

from __future__ import annotations

import importlib

from flashmaps._validation import checks
from flashmaps.attention_map import AttentionMap, Reductions
from flashmaps.backends import backends
from flashmaps.composition import Composition, compose
from flashmaps.statistics import (
    Nims,
    RoundTrip,
    inverse_mapping_entropy,
    inverse_mapping_score,
    mapping_density,
    nims,
    round_trip,
)

__version__ = "0.1.0"

# What needs diffusers or pictures is imported when it is first used, to keep this import quick.
_LAZY = {"capture": "capture", "match": "match", "Match": "match"}

__all__ = [
    "AttentionMap",
    "Composition",
    "Match",
    "Nims",
    "Reductions",
    "RoundTrip",
    "backends",
    "capture",
    "checks",
    "compose",
    "inverse_mapping_entropy",
    "inverse_mapping_score",
    "mapping_density",
    "match",
    "nims",
    "round_trip",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"flashmaps.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'flashmaps' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
