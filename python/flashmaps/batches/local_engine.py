"""One machine, one process: decoding, the model, matching and writing go on side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flashmaps.batches.features import FeatureStage, Group
from flashmaps.batches.rows import Done, PairRows
from flashmaps.diffusion.features import Features
from flashmaps.matching.pairs import match_pairs
from flashmaps.matching.settings import MatchSettings

# Pairs whose order is known at once: which image is needed last takes some 50 bytes a pair. From
# one block to the next, images are read again.
BLOCK = 2**18


class Local:
    """What :class:`flashmaps.batches.ray_engine.Cluster` is on many machines."""

    def __init__(self, pipe: Any, settings: MatchSettings, rows: str, backend: str) -> None:
        self.pipe, self.settings, self.rows, self.backend = pipe, settings, rows, backend

    def features(self, stage: FeatureStage, groups: Sequence[int]) -> Iterator[Group]:
        """Features of groups of images."""
        return stage.computed(self.pipe, groups)

    def pairs(
        self, parts: Sequence[tuple[int, np.ndarray]], pairs: np.ndarray,
        points: Sequence[np.ndarray] | None, sets: Sequence[Features], memory_budget: int,
    ) -> Iterator[Done]:  # fmt: skip
        """Tables of parts, in ``memory_budget`` bytes. Chunks of pairs go
        through the kernels together, beyond parts' ends."""
        rows = PairRows(self.rows, points, self.settings, sets, self.backend)
        each = max(1, BLOCK // max(1, len(parts[0][1])))
        for start in range(0, len(parts), each):
            block = parts[start : start + each]
            chunks = match_pairs(
                sets, pairs[np.concatenate([numbers for _, numbers in block])],
                self.settings.options, memory_budget=memory_budget, order="given",
                backend=self.backend,
            )  # fmt: skip
            yield from rows.in_parts(block, chunks)
