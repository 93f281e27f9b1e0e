"""Matches against known correspondences: benchmarks, baselines, scores and their intervals.

`flashmaps eval` runs :func:`flashmaps.evaluation.run.evaluate`; docs/evaluation.md says what it
measures and how. What is imported here needs numpy only.
"""

from __future__ import annotations

from flashmaps.evaluation.metrics import (
    PCK_THRESHOLDS,
    auroc,
    endpoint_errors,
    pck,
    score_field,
)

__all__ = ["PCK_THRESHOLDS", "auroc", "endpoint_errors", "pck", "score_field"]
