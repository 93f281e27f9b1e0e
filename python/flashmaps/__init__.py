"""FlashMaps: statistics of diffusion models' attention maps that are never built.

>>> import torch, flashmaps as fm
>>> A = fm.AttentionMap(torch.randn(1, 5, 256, 64), torch.randn(1, 5, 256, 64))
>>> stats = A.reduce("entropy", "argmax")  # one pass, memory that grows with N
>>> stats.entropy.shape
torch.Size([1, 256])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.backends.choice import backends
from flashmaps.maps.budget import memory_budget
from flashmaps.maps.composition import Composition, compose
from flashmaps.maps.lazy import Reductions
from flashmaps.maps.planning import Ceilings, Plan
from flashmaps.maps.statistics import (
    Nims,
    RoundTrip,
    inverse_mapping_entropy,
    inverse_mapping_score,
    mapping_density,
    nims,
    plan_round_trip,
    round_trip,
)
from flashmaps.maps.validation import checks

if TYPE_CHECKING:
    from flashmaps.diffusion.capture import capture
    from flashmaps.diffusion.cross_self import CrossSelfAttnProcessor
    from flashmaps.diffusion.entry import Entry
    from flashmaps.diffusion.guide import guide
    from flashmaps.diffusion.image_prompts import image_prompt_maps
    from flashmaps.diffusion.known import register_layout
    from flashmaps.diffusion.processors import MapAttnProcessor
    from flashmaps.diffusion.record import Record
    from flashmaps.diffusion.words import WordMaps, word_maps
    from flashmaps.matching.match import match
    from flashmaps.matching.result import Match

__version__ = "0.1.0"

# What is above the maps loads when it is first asked for: maps alone are quick to import.
_LATER = {
    "CrossSelfAttnProcessor": "flashmaps.diffusion.cross_self",
    "Entry": "flashmaps.diffusion.entry",
    "MapAttnProcessor": "flashmaps.diffusion.processors",
    "Match": "flashmaps.matching.result",
    "Record": "flashmaps.diffusion.record",
    "WordMaps": "flashmaps.diffusion.words",
    "capture": "flashmaps.diffusion.capture",
    "guide": "flashmaps.diffusion.guide",
    "image_prompt_maps": "flashmaps.diffusion.image_prompts",
    "match": "flashmaps.matching.match",
    "register_layout": "flashmaps.diffusion.known",
    "word_maps": "flashmaps.diffusion.words",
}

__all__ = [
    "AttentionMap",
    "Ceilings",
    "Composition",
    "CrossSelfAttnProcessor",
    "Entry",
    "MapAttnProcessor",
    "Match",
    "Nims",
    "Plan",
    "Record",
    "Reductions",
    "RoundTrip",
    "WordMaps",
    "backends",
    "capture",
    "checks",
    "compose",
    "guide",
    "image_prompt_maps",
    "inverse_mapping_entropy",
    "inverse_mapping_score",
    "mapping_density",
    "match",
    "memory_budget",
    "nims",
    "plan_round_trip",
    "register_layout",
    "round_trip",
    "word_maps",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'flashmaps' has no attribute {name!r}")
    found = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = found  # from now on without this detour
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
