"""What the miniature is trained on: scenes of the drawn world and patches of photos, by number."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from flashmaps.world import Options, Split

from .alignment import labels, unknown
from .photos import Photos

REDUCTION = 4  # pixels a side of what a latent stands for
# One object with nothing before it: what a caption's word looks like is learnt from these first.
ALONE = Options(objects=(1, 1), occluders=(0, 0), clutter=(0, 3))


class Pictures:
    """Picture i of a split is always the same: a map-style dataset that can be pickled.

    Args:
        split: the world's split, "train" or "validation".
        size: side in pixels.
        count: how many there are.
        seed: another seed, other pictures.
        photos: share of them that are patches of photos.
        alone: share of the world's scenes with one object alone (``ALONE``).
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 128,
        count: int = 24_576,
        seed: int = 0,
        photos: float = 0.2,
        alone: float = 0.5,
    ) -> None:
        self.size, self.count, self.seed = size, count, seed
        self.photo_share, self.alone_share = photos, alone
        self.scenes = Split(split, size=size, count=count, seed=seed)
        self.lone = Split(split, size=size, count=count, seed=seed, options=ALONE)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
        """Pixels, uint8 [size, size, 3], three captions, and what the latents' cells show.

        The last as :func:`flashmaps.models.alignment.labels` has it.
        """
        rng = np.random.default_rng((self.seed, index))
        is_photo, is_alone = rng.random(2) < (self.photo_share, self.alone_share)
        side = self.size // REDUCTION
        if is_photo:
            return *self._photos.patch(rng), unknown(side)
        scene = (self.lone if is_alone else self.scenes)[index]
        return scene.image, scene.captions, labels(scene, side)

    @cached_property
    def _photos(self) -> Photos:
        return Photos(self.size)
