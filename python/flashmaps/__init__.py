"""FlashMaps: statistics of diffusion models' attention maps that are never built.

>>> import torch, flashmaps as fm
>>> A = fm.AttentionMap(torch.randn(1, 5, 256, 64), torch.randn(1, 5, 256, 64))
>>> stats = A.reduce("entropy", "argmax")  # one pass, memory that grows with N
>>> stats.entropy.shape
torch.Size([1, 256])
"""

from __future__ import annotations

from flashmaps._validation import checks
from flashmaps.attention_map import AttentionMap, Reductions
from flashmaps.backends import backends
from flashmaps.budget import memory_budget
from flashmaps.capture import capture
from flashmaps.composition import Composition, compose
from flashmaps.cross_self import CrossSelfAttnProcessor
from flashmaps.match import Match, match
from flashmaps.planning import Ceilings, Plan
from flashmaps.processors import MapAttnProcessor
from flashmaps.record import Entry, Record
from flashmaps.statistics import (
    Nims,
    RoundTrip,
    inverse_mapping_entropy,
    inverse_mapping_score,
    mapping_density,
    nims,
    plan_round_trip,
    round_trip,
)
from flashmaps.words import WordMaps, word_maps

__version__ = "0.1.0"

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
    "inverse_mapping_entropy",
    "inverse_mapping_score",
    "mapping_density",
    "match",
    "memory_budget",
    "nims",
    "plan_round_trip",
    "round_trip",
    "word_maps",
]
