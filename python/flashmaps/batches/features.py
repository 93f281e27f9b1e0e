"""The first stage: features of every image, each once, as files of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flashmaps.batches.ahead import ahead, behind
from flashmaps.batches.collection import Collection
from flashmaps.diffusion.feature_files import write_features
from flashmaps.diffusion.feature_folder import FeatureFolder
from flashmaps.diffusion.features import OTHER_NOISE, Features, features
from flashmaps.diffusion.images import Image
from flashmaps.diffusion.threads import fit_threads
from flashmaps.files import Run
from flashmaps.matching.options import COMPARE
from flashmaps.matching.settings import MatchSettings

GROUP = 8  # images that are decoded together, ahead of the model, and written together

Group = tuple[int, list[Features]]  # its number, and the features of its images


def only_of(settings: MatchSettings) -> tuple[str, ...]:
    """Of query, key and output, what is compared, and so kept."""
    return tuple(dict.fromkeys(COMPARE[settings.compare]))


def group_features(
    pipe: Any, settings: MatchSettings, group: int, images: Sequence[Any],
    only: Sequence[str] | None = None,
) -> list[Features]:  # fmt: skip
    """Features of the images of a group: a question of their numbers alone.

    ``only``: of query, key and output, what is wanted; default: what is compared.
    """
    wanted = only_of(settings) if only is None else only
    options = {**settings.for_features, "outputs": "output" in wanted}
    if settings.same_noise:
        return features(pipe, list(images), **options)
    return with_own_noise(pipe, images, range(group * GROUP, (group + 1) * GROUP), options)


def with_own_noise(
    pipe: Any, images: Sequence[Any], numbers: Sequence[int], options: Mapping[str, Any],
    prompts: Sequence[str] | None = None,
) -> list[Features]:  # fmt: skip
    """Features of images whose noise depends on a number of each alone, not on its company.

    Args:
        options: of :func:`flashmaps.diffusion.features.features`.
    """
    options = {name: value for name, value in options.items() if name != "same_noise"}
    base = options.pop("seeds", (0,))
    found = []
    for place, (image, number) in enumerate(zip(images, numbers, strict=False)):
        seeds = [seed + number * OTHER_NOISE for seed in base]
        prompt = "" if prompts is None else prompts[place]
        found += features(pipe, [image], seeds=seeds, prompt=prompt, **options)
    return found


class FeatureStage:
    """Features of a collection in a run's folder, a file for each image.

    Images are shown to the model two at a time at most, in groups that depend on their numbers
    alone: what rounding there is does not depend on what was there before.

    Args:
        dtype: that tensors are kept in; None: as the model makes them.
        only: of query, key and output, those that are kept; default: what is compared.
        folder: of the files, inside the run's.
    """

    def __init__(
        self, run: Run, collection: Collection, settings: MatchSettings,
        dtype: torch.dtype | None = None, *, only: Sequence[str] | None = None,
        folder: str = "features",
    ) -> None:  # fmt: skip
        self.run, self.collection = run, collection
        self.settings, self.dtype = settings, dtype
        self.only = only_of(settings) if only is None else tuple(only)
        self.folder = folder
        self.names = [f"{folder}/{number:06d}.safetensors" for number in range(len(collection))]

    def missing(self) -> list[int]:
        """Images whose features are not there as they were written. Reads all that are."""
        return [i for i, name in enumerate(self.names) if not self.run.whole(name)]

    def groups(self, missing: Iterable[int]) -> list[int]:
        """The groups of these images."""
        return sorted({number // GROUP for number in missing})

    def numbers(self, group: int) -> range:
        """The images of a group."""
        return range(group * GROUP, min((group + 1) * GROUP, len(self.collection)))

    def decoded(self, groups: Sequence[int]) -> Iterator[list[Image]]:
        """The images of groups, each group while the one before is looked at."""
        return ahead([self.collection.load(i) for i in self.numbers(group)] for group in groups)

    def computed(self, pipe: Any, groups: Sequence[int]) -> Iterator[Group]:
        """Groups, here and now. A small model gets one thread."""
        with fit_threads(pipe):
            for group, images in zip(groups, self.decoded(groups), strict=True):
                yield group, group_features(pipe, self.settings, group, images, self.only)

    def write(self, done: Iterable[Group], left: int, progress: bool) -> None:
        """Groups in any order. One is written while the next is computed.

        Args:
            done: groups of missing images; ``left``: how many images are missing.
        """
        from tqdm.auto import tqdm

        count = len(self.collection)
        with tqdm(
            total=count, initial=count - left, desc="features", unit="image", disable=not progress
        ) as bar:
            for _, found in behind(done, self.commit):
                bar.update(len(found))

    def commit(self, done: Group) -> None:
        """Write the features of a group."""
        group, found = done
        with self.run.files() as new:
            (new / self.folder).mkdir(parents=True)
            for number, each in zip(self.numbers(group), found, strict=True):
                write_features(
                    new / self.names[number], each, image=False, dtype=self.dtype, only=self.only
                )

    def sets(self) -> FeatureFolder:
        """All of them, in the order of the images."""
        return FeatureFolder(self.run.folder, names=self.names)

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
