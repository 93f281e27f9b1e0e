"""Features of the images of a table, computed once and kept on disk.

A table of segments takes most of its time to run the model; what is changed between tables is how
segments are found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashmaps.batches.collection import Collection
from flashmaps.batches.features import FeatureStage
from flashmaps.diffusion.features import Features
from flashmaps.files import open_run
from flashmaps.matching.settings import fingerprint, settings_of
from flashmaps.segmentation.segment import see

KIND = "segment-features"


class KeptFeatures:
    """Features of groups of images, from a folder if they are there, else made and put there.

    Args:
        pipe: a loaded pipeline.
        what: which images, in words; groups of other images, or of another model or other settings
            of it, have other places in the folder.
        folder: None keeps nothing.
        size: longer side that the model is shown; None: its own.
    """

    def __init__(
        self, pipe: Any, what: str, folder: str | Path | None = None, size: int | None = None
    ) -> None:
        self._pipe, self._settings = pipe, settings_of(pipe).with_given(size=size)
        self._folder: Path | None = None
        if folder is not None:
            self._asked = {
                "images": what, "weights": fingerprint(pipe),
                "settings": self._settings.for_features,
            }  # fmt: skip
            key = json.dumps(self._asked, sort_keys=True, default=str)
            self._folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]

    def see(self, group: int, images: Sequence[Any]) -> list[Features]:
        """Of the images of group ``group``."""
        if self._folder is None:
            return see(self._pipe, list(images), size=self._settings.size)
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        collection = Collection.of(list(images))
        with open_run(self._folder, KIND, self._asked) as run:
            stage = FeatureStage(
                run, collection, self._settings, only=("query", "key", "output"),
                folder=f"{group:06d}",
            )  # fmt: skip
            if missing := stage.missing():
                done = stage.computed(self._pipe, stage.groups(missing))
                stage.write(done, len(missing), progress=False)
            return [replace(each, image=collection.load(i)) for i, each in enumerate(stage.sets())]
