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
from flashmaps.maps.chain import Chain, Hops, chain
from flashmaps.maps.composition import Composition, compose
from flashmaps.maps.cycles import Cycles, cycles
from flashmaps.maps.groups import (
    collection_product,
    group_flows,
    group_mass,
    nearest_others,
    symmetric_product,
)
from flashmaps.maps.lazy import Reductions
from flashmaps.maps.planning import Ceilings, Plan
from flashmaps.maps.refined import refined
from flashmaps.maps.spectra import eigenpairs, normalized_product
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
    from flashmaps.batches.run import batch
    from flashmaps.diffusion.capture import capture
    from flashmaps.diffusion.cross_self import CrossSelfAttnProcessor
    from flashmaps.diffusion.entry import Entry
    from flashmaps.diffusion.guide import guide
    from flashmaps.diffusion.image_prompts import image_prompt_maps
    from flashmaps.diffusion.known import register_layout
    from flashmaps.diffusion.processors import MapAttnProcessor
    from flashmaps.diffusion.record import Record
    from flashmaps.diffusion.tokens import LearnedToken, optimize_tokens
    from flashmaps.diffusion.words import WordMaps, word_maps
    from flashmaps.explorer.widget import explore
    from flashmaps.matching.match import match
    from flashmaps.matching.result import Match
    from flashmaps.parts.completion import complete
    from flashmaps.parts.find import FoundParts, find_parts
    from flashmaps.parts.imagined import Completion
    from flashmaps.parts.learn import learn_parts
    from flashmaps.parts.memory import PartsPlan, plan_parts
    from flashmaps.parts.result import Parts
    from flashmaps.segmentation.collection import CoSegments, Part
    from flashmaps.segmentation.cosegment import cosegment
    from flashmaps.segmentation.result import Level, Segments
    from flashmaps.segmentation.segment import segment

__version__ = "0.1.0"

# What is above the maps loads when it is first asked for: maps alone are quick to import.
_LATER = {
    "CoSegments": "flashmaps.segmentation.collection",
    "Completion": "flashmaps.parts.imagined",
    "CrossSelfAttnProcessor": "flashmaps.diffusion.cross_self",
    "Entry": "flashmaps.diffusion.entry",
    "FoundParts": "flashmaps.parts.find",
    "LearnedToken": "flashmaps.diffusion.tokens",
    "Level": "flashmaps.segmentation.result",
    "MapAttnProcessor": "flashmaps.diffusion.processors",
    "Match": "flashmaps.matching.result",
    "Part": "flashmaps.segmentation.collection",
    "Parts": "flashmaps.parts.result",
    "PartsPlan": "flashmaps.parts.memory",
    "Record": "flashmaps.diffusion.record",
    "Segments": "flashmaps.segmentation.result",
    "WordMaps": "flashmaps.diffusion.words",
    "batch": "flashmaps.batches.run",
    "capture": "flashmaps.diffusion.capture",
    "complete": "flashmaps.parts.completion",
    "cosegment": "flashmaps.segmentation.cosegment",
    "explore": "flashmaps.explorer.widget",
    "find_parts": "flashmaps.parts.find",
    "guide": "flashmaps.diffusion.guide",
    "image_prompt_maps": "flashmaps.diffusion.image_prompts",
    "learn_parts": "flashmaps.parts.learn",
    "match": "flashmaps.matching.match",
    "optimize_tokens": "flashmaps.diffusion.tokens",
    "plan_parts": "flashmaps.parts.memory",
    "register_layout": "flashmaps.diffusion.known",
    "segment": "flashmaps.segmentation.segment",
    "word_maps": "flashmaps.diffusion.words",
}

__all__ = [
    "AttentionMap",
    "Ceilings",
    "Chain",
    "CoSegments",
    "Completion",
    "Composition",
    "CrossSelfAttnProcessor",
    "Cycles",
    "Entry",
    "FoundParts",
    "Hops",
    "LearnedToken",
    "Level",
    "MapAttnProcessor",
    "Match",
    "Nims",
    "Part",
    "Parts",
    "PartsPlan",
    "Plan",
    "Record",
    "Reductions",
    "RoundTrip",
    "Segments",
    "WordMaps",
    "backends",
    "batch",
    "capture",
    "chain",
    "checks",
    "collection_product",
    "complete",
    "compose",
    "cosegment",
    "cycles",
    "eigenpairs",
    "explore",
    "find_parts",
    "group_flows",
    "group_mass",
    "guide",
    "image_prompt_maps",
    "inverse_mapping_entropy",
    "inverse_mapping_score",
    "learn_parts",
    "mapping_density",
    "match",
    "memory_budget",
    "nearest_others",
    "nims",
    "normalized_product",
    "optimize_tokens",
    "plan_parts",
    "plan_round_trip",
    "refined",
    "register_layout",
    "round_trip",
    "segment",
    "symmetric_product",
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
