"""Segments, shown: the left photograph of the demo, and a collection of drawn scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flashmaps.diffusion.features import Features
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.segment_scenes import WorldCollections
from flashmaps.evaluation.segment_scores import score
from flashmaps.segmentation.collection import CoSegments
from flashmaps.segmentation.cosegment import cosegment
from flashmaps.segmentation.result import Segments
from flashmaps.segmentation.seen import Seen
from flashmaps.segmentation.segment import see_objects, segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CATEGORY = "car"
IMAGES = 6  # the first of that category in the test split


class ShownSegments:
    """A segmented photograph and a co-segmented collection, with pictures and numbers."""

    def __init__(self, pipe: Any, photograph: Features | Seen, backend: str) -> None:
        with fit_threads(pipe):
            self.photograph: Segments = segment(photograph, backend=backend)
            drawn = WorldCollections("test", IMAGES, seeds=1, categories=(CATEGORY,))[0]
            self.collection: CoSegments = cosegment(
                see_objects(pipe, drawn.images), backend=backend
            )
        labels = np.concatenate([each.ravel() for each in self.collection.labels])
        truth = np.concatenate([each.ravel() for each in drawn.truth])
        scores = score(labels, truth)
        self.results = {
            "photograph": [
                {"level": level.name, "segments": level.count} for level in self.photograph.tree
            ],
            "collection": {
                "category": CATEGORY,
                "images": IMAGES,
                "labels": self.collection.count,
                "true_parts": drawn.targets,
                "part_iou": scores["iou"],
                "ari": scores["ari"],
            },
        }

    def figures(self) -> dict[str, Figure]:
        """The pictures, by the names of their files."""
        return {"segments": self.photograph.plot(), "cosegments": self.collection.plot()}
