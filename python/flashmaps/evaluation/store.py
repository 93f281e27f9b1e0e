"""Q, K and block outputs of every self-attention layer, computed once and kept on disk.

A file holds one forward pass of all images: one size, timestep and noise seed. What a variant of
matching needs is read from a few of them, so that hundreds of variants cost one pass of each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.batches.features import NOISE_APART
from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.features import Features, block_of, block_outputs, features
from flashmaps.diffusion.images import Image
from flashmaps.diffusion.observe import find_layers
from flashmaps.files import open_run
from flashmaps.maps.grids import Grid
from flashmaps.matching.options import COMPARE
from flashmaps.matching.settings import MatchSettings

BATCH = 8  # images that the model sees together
_KEPT = 24  # tensors that stay in memory: those of the layers that are being compared
APART = NOISE_APART  # seeds of the second image of a pair when noise is to differ
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
        self._known: set[str] = set()  # passes that are there, and whole
        self._read = lru_cache(maxsize=_KEPT)(self._read_tensor)

    def features(self, settings: MatchSettings) -> tuple[Features, Features]:
        """The sources and the targets of all pairs as two ``Features`` with a batch each.

        Only what ``settings.compare`` needs is there; the rest has no tokens.
        """
        wanted = set(COMPARE[settings.compare])
        found: list[dict[str, Tensor]] = []
        for side in (0, 1):
            apart = APART if side and not settings.same_noise else 0
            parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
            for seed in settings.seeds:
                for timestep in settings.timesteps:
                    for layer in settings.layers or ():
                        for name in wanted:
                            key = (settings.size, timestep, seed + apart, layer, name)
                            parts[name].append(self._read(*key)[side::2].float())
            found.append({name: torch.cat(each, dim=1) for name, each in parts.items()})
        scale, grid = self._about(settings)
        passes = len(settings.seeds) * len(settings.timesteps)
        weights = [torch.full((heads,), 1 / heads) for heads in self._heads(settings)]
        joined = torch.cat(weights * passes)  # in the order of the parts above
        made = []
        for side, tensors in enumerate(found):
            empty = next(iter(tensors.values()))[:, :, :0]
            made.append(
                Features(
                    query=tensors.get("query", empty),
                    key=tensors.get("key", empty),
                    output=tensors.get("output"),
                    scale=scale,
                    head_weights=joined / joined.sum(),
                    grid=grid,
                    image=self.images[side],
                    input_size=(0, 0),
                    layers=settings.layers or (),
                    timestep=settings.timestep,
                    seeds=settings.seeds,
                    prompt="",
                )
            )
        return made[0], made[1]

    def grid(self, layer: str, size: int | None, timestep: int) -> Grid:
        """(height, width) of a layer's tokens, from a pass that is there or is made now."""
        tokens = self._read(size, timestep, 0, layer, "key").shape[2]
        side = round(tokens**0.5)  # the images are square, as the world draws them
        return side, side

    def _about(self, settings: MatchSettings) -> tuple[float, Grid]:
        layer, timestep = (settings.layers or ())[0], settings.timesteps[0]
        width = self._read(settings.size, timestep, settings.seeds[0], layer, "key").shape[3]
        return width**-0.5, self.grid(layer, settings.size, timestep)

    def _heads(self, settings: MatchSettings) -> list[int]:
        timestep = settings.timesteps[0]
        return [
            self._read(settings.size, timestep, settings.seeds[0], layer, "key").shape[1]
            for layer in settings.layers or ()
        ]

    def _read_tensor(
        self, size: int | None, timestep: int, seed: int, layer: str, name: str
    ) -> Tensor:
        from safetensors import safe_open

        path = f"size-{size or 'own'}/t{timestep}-seed{seed}.safetensors"
        if path not in self._known:
            with open_run(self.folder, "passes") as run:
                if not run.whole(path):
                    with run.file(path) as new:
                        self._run(new, size, timestep, seed)
            self._known.add(path)
        with safe_open(self.folder / path, framework="pt") as file:
            return file.get_tensor(f"{layer}:{name}")

    def _run(self, path: Path, size: int | None, timestep: int, seed: int) -> None:
        """One forward pass of every image."""
        from safetensors.torch import save_file
        from tqdm.auto import tqdm

        parts: dict[str, list[Tensor]] = {}
        title = f"t {timestep}, seed {seed}, {size or 'own'} px"
        starts = range(0, len(self.images), BATCH)
        for first in tqdm(starts, desc=title, disable=not self.progress, leave=False):
            with (
                # Halves: a cosine is then rounded by about 0.0003, far below any temperature.
                capture(self.pipe, self.layers, dtype=torch.float16) as record,
                block_outputs(self.pipe, self.layers) as seen,
            ):
                features(
                    self.pipe,
                    list(self.images[first : first + BATCH]),
                    layers=self.layers[0],
                    timestep=timestep,
                    seeds=seed,
                    size=size,
                    batch_size=BATCH,
                )
            for entry in record:
                block = seen[block_of(entry.layer)][:, None].half()
                for name, tensor in zip(WHAT, (entry.query, entry.key, block), strict=True):
                    parts.setdefault(f"{entry.layer}:{name}", []).append(tensor.cpu())
        joined = {key: torch.cat(each).contiguous() for key, each in parts.items()}
        save_file(joined, path)
