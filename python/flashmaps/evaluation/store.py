"""Q, K and block outputs of every self-attention layer, computed once and kept on disk.

A pass is of one size, timestep and noise seed; it fills a feature folder for each layer, as batches
have them. What a variant of matching needs is read from a few of them, so that hundreds of variants
cost one pass of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.batches.ahead import behind
from flashmaps.batches.collection import Collection
from flashmaps.batches.features import FeatureStage
from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.feature_folder import FeatureFolder
from flashmaps.diffusion.features import (
    OTHER_NOISE,
    Features,
    block_of,
    block_outputs,
    features,
)
from flashmaps.diffusion.images import Image
from flashmaps.diffusion.observe import find_layers
from flashmaps.files import open_run
from flashmaps.maps.grids import Grid
from flashmaps.matching.options import COMPARE
from flashmaps.matching.settings import MatchSettings

_KEPT = 24  # tensors that stay in memory: those of the layers that are being compared
WHAT = ("query", "key", "output")


class Store:
    """The passes of ``images``, all of one size, through a pipeline.

    Args:
        folder: where the files go; those of an earlier run are used again.
        pipe: a loaded pipeline.
        images: those of pair i are 2 i (source) and 2 i + 1 (target).
        progress: show a bar over the images of each pass that is not there yet.

    Attributes:
        layers: name of every self-attention layer, in the order of the pipeline.
    """

    def __init__(
        self, folder: Path, pipe: Any, images: Sequence[Image], *, progress: bool = False
    ) -> None:
        self.folder, self.pipe, self.images, self.progress = folder, pipe, images, progress
        self.layers = tuple(find_layers(pipe.unet, "*.attn1"))
        self._sides = [Collection.of(list(images[side::2])) for side in (0, 1)]
        self._passes: dict[str, dict[str, FeatureFolder]] = {}  # those that are there, and whole
        self._read = lru_cache(maxsize=_KEPT)(self._read_tensor)

    def features(self, settings: MatchSettings) -> tuple[Features, Features]:
        """The sources and the targets of all pairs as two ``Features`` with a batch each.

        Only what ``settings.compare`` needs is there; the rest has no tokens.
        """
        wanted = set(COMPARE[settings.compare])
        found: list[dict[str, Tensor]] = []
        for side in (0, 1):
            apart = OTHER_NOISE if side and not settings.same_noise else 0
            parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
            for seed in settings.seeds:
                for timestep in settings.timesteps:
                    for layer in settings.layers or ():
                        for name in wanted:
                            key = (side, settings.size, timestep, seed + apart, layer, name)
                            parts[name].append(self._read(*key).float())
            found.append({name: torch.cat(each, dim=1) for name, each in parts.items()})
        first = [
            self._pass(0, settings.size, settings.timesteps[0], settings.seeds[0])[layer][0]
            for layer in settings.layers or ()
        ]
        passes = len(settings.seeds) * len(settings.timesteps)
        weights = torch.cat([each.head_weights for each in first] * passes)  # as the parts above
        made = []
        for side, tensors in enumerate(found):
            empty = next(iter(tensors.values()))[:, :, :0]
            made.append(
                replace(
                    first[0],
                    query=tensors.get("query", empty),
                    key=tensors.get("key", empty),
                    output=tensors.get("output"),
                    head_weights=weights / weights.sum(),
                    image=self.images[side],
                    layers=settings.layers or (),
                    timestep=settings.timestep,
                    seeds=settings.seeds,
                )
            )
        return made[0], made[1]

    def grid(self, layer: str, size: int | None, timestep: int) -> Grid:
        """(height, width) of a layer's tokens, from a pass that is there or is made now."""
        return self._pass(0, size, timestep, 0)[layer][0].grid

    def _read_tensor(
        self, side: int, size: int | None, timestep: int, seed: int, layer: str, name: str
    ) -> Tensor:
        sets = self._pass(side, size, timestep, seed)[layer]
        return torch.cat([getattr(each, name) for each in sets])

    def _pass(
        self, side: int, size: int | None, timestep: int, seed: int
    ) -> dict[str, FeatureFolder]:
        """The features of each layer; what is not there is made."""
        from tqdm.auto import tqdm

        path = f"size-{size or 'own'}/t{timestep}-seed{seed}-{('source', 'target')[side]}"
        if path in self._passes:
            return self._passes[path]
        with open_run(self.folder, "passes") as run:
            stages = {
                layer: FeatureStage(
                    run, self._sides[side],
                    MatchSettings(layers=(layer,), timestep=timestep, seeds=(seed,), size=size),
                    # Halves: a cosine is then rounded by 0.0003, far below any temperature.
                    torch.float16, only=WHAT, folder=f"{path}/{layer}",
                )
                for layer in self.layers
            }  # fmt: skip
            missing = {i for stage in stages.values() for i in stage.missing()}

            def commit(done: tuple[int, dict[str, list[Features]]]) -> None:
                for layer, found in done[1].items():
                    stages[layer].commit((done[0], found))

            first = stages[self.layers[0]]
            made = behind(self._computed(first, first.groups(missing)), commit)
            for _ in tqdm(
                made, desc=path, leave=False, total=len(first.groups(missing)),
                disable=not (self.progress and missing),
            ):  # fmt: skip
                pass
            self._passes[path] = {layer: stage.sets() for layer, stage in stages.items()}
        return self._passes[path]

    def _computed(
        self, stage: FeatureStage, groups: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, list[Features]]]]:
        """Features of every layer, by one forward pass for each group of images."""
        options = stage.settings.for_features
        for group, images in zip(groups, stage.decoded(groups), strict=True):
            with (
                capture(self.pipe, self.layers) as record,
                block_outputs(self.pipe, self.layers) as seen,
            ):
                features(self.pipe, images, batch_size=len(images), **options)
            yield (
                group,
                {
                    entry.layer: [
                        replace(
                            Features.from_record([entry], image, row),
                            output=seen[block_of(entry.layer)][row : row + 1, None],
                        )
                        for row, image in enumerate(images)
                    ]
                    for entry in record
                },
            )
