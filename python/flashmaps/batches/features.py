"""The first stage: features of every image, each once, as files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.batches.choose import descriptor
from flashmaps.batches.collection import Collection
from flashmaps.diffusion.feature_files import write_features
from flashmaps.diffusion.feature_folder import FeatureFolder
from flashmaps.diffusion.features import Features, features
from flashmaps.files import Run
from flashmaps.matching.options import COMPARE
from flashmaps.matching.settings import MatchSettings

GROUP = 8  # images that are decoded together, ahead of the model, and written together
_NOISE_APART = 1_000_003  # added to the seeds of the next image when noise is to differ


def only_of(settings: MatchSettings) -> tuple[str, ...]:
    """Of query, key and output, what is compared, and so kept."""
    return tuple(dict.fromkeys(COMPARE[settings.compare]))


class FeatureStage:
    """Features of a collection in a run's folder.

    Images are shown to the model two at a time at most, in groups that depend on their numbers
    alone: what rounding there is does not depend on what was there before.
    """

    def __init__(
        self, run: Run, collection: Collection, pipe: Any, settings: MatchSettings,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.run, self.collection, self.pipe = run, collection, pipe
        self.settings, self.dtype = settings, dtype
        self.names = [f"features/{number:06d}.safetensors" for number in range(len(collection))]

    def missing(self) -> list[int]:
        """Images whose features are not there as they were written. Reads all that are."""
        return [i for i, name in enumerate(self.names) if not self.run.whole(name)]

    def make(self, missing: Sequence[int], progress: bool) -> None:
        """The features that are missing, by groups; images are decoded a group ahead."""
        from tqdm.auto import tqdm

        if not missing:
            return
        groups = sorted({number // GROUP for number in missing})
        count = len(self.collection)

        def decoded(group: int) -> list[Any]:
            numbers = range(group * GROUP, min((group + 1) * GROUP, count))
            return [self.collection.load(number) for number in numbers]

        with (
            ThreadPoolExecutor(1) as ahead,
            tqdm(
                total=count, initial=count - len(missing), desc="features", unit="image",
                disable=not progress,
            ) as bar,
        ):  # fmt: skip
            waiting = ahead.submit(decoded, groups[0])
            for place, group in enumerate(groups):
                images = waiting.result()
                if place + 1 < len(groups):
                    waiting = ahead.submit(decoded, groups[place + 1])
                with self.run.files() as new:
                    (new / "features").mkdir()
                    for number, found in enumerate(self._features(group, images), group * GROUP):
                        write_features(
                            new / self.names[number], found, image=False, dtype=self.dtype,
                            only=only_of(self.settings),
                        )  # fmt: skip
                bar.update(len(images))

    def _features(self, group: int, images: list[Any]) -> list[Features]:
        options = {
            **self.settings.for_features, "outputs": self.settings.compare == "features",
        }  # fmt: skip
        if self.settings.same_noise:
            return features(self.pipe, images, **options)
        found = []
        for number, image in enumerate(images, group * GROUP):
            seeds = [seed + number * _NOISE_APART for seed in self.settings.seeds]
            found += features(self.pipe, [image], **{**options, "seeds": seeds})
        return found

    def sets(self) -> FeatureFolder:
        """All of them, in the order of the images."""
        return FeatureFolder(self.run.folder, names=self.names)

    def descriptors(self) -> Tensor:  # [n, c]
        """Of all images, for those that are nearest."""
        return torch.stack([descriptor(each, self.settings.compare) for each in self.sets()])

    def table(self) -> dict[str, np.ndarray]:
        """A row for each image: its number, name, size in pixels, and grid of tokens."""
        sets = list(map(_about, self.sets()))
        return {
            "image": np.arange(len(sets), dtype=np.int32),
            "name": np.array(self.collection.names),
            **{
                name: np.array([each[i] for each in sets], np.int32)
                for i, name in enumerate(("height", "width", "grid_height", "grid_width"))
            },
        }


def _about(one: Features) -> tuple[int, int, int, int]:
    return (*one.image.shape[:2], *one.grid)
