"""Features of the images of a table, computed once and kept on disk.

A table of segments takes most of its time to run the model; what is changed between tables is how
segments are found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        self._pipe, self._size = pipe, size
        self._folder: Path | None = None
        if folder is not None:
            asked = {
                "images": what, "weights": fingerprint(pipe), "size": size,
                "settings": settings_of(pipe).for_features,
            }  # fmt: skip
            key = json.dumps(asked, sort_keys=True, default=str)
            self._asked = asked
            self._folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]

    def see(self, group: int, images: Sequence[Any]) -> list[Features]:
        """Of the images of group ``group``."""
        if self._folder is None:
            return self._run(images)
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        names = [f"{group:06d}/{i:04d}.safetensors" for i in range(len(images))]
        with open_run(self._folder, KIND, self._asked) as run:
            if not all(run.whole(name) for name in names):
                made = self._run(images)
                with run.files() as new:
                    (new / names[0]).parent.mkdir(parents=True)
                    for name, each in zip(names, made, strict=True):
                        each.save(new / name)
            return [Features.load(run.folder / name) for name in names]

    def _run(self, images: Sequence[Any]) -> list[Features]:
        return see(self._pipe, list(images), size=self._size)
