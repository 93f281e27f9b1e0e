"""What the miniature is trained on: scenes of the drawn world and patches of photos, by number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from flashmaps.world import Options, pairs
from flashmaps.world.repaint import repainted

from .alignment import labels, unknown
from .photos import Photos
from .views import recoloured, warped

REDUCTION = 4  # pixels a side of what a latent stands for
# One object with nothing before it: what a caption's word looks like is learnt from these first.
ALONE = Options(objects=(1, 1), occluders=(0, 0), clutter=(0, 3))
COLOURS_OF_VIEWS = "redrawn"  # what a card calls that
_REDRAWN = 0.75  # share of the world's views that the world itself paints otherwise
FIRST, SECOND, VIEW = range(3)  # the views of an example, by their place


@dataclass(frozen=True, eq=False)
class Example:
    """Pictures of one thing.

    Args:
        images: uint8 [3, size, size, 3]: a picture (``FIRST``); another of the same object or of
            one of its kin, in another pose, at another place and before another ground
            (``SECOND``); and the first one again in other paint (``VIEW``), which a training warps
            (:mod:`flashmaps.models.views`). Of photos the second is a warp of the first.
        captions: three of the first picture and three of the second.
        labels: int16 [side, side, 2], what the first picture's cells show, see
            :func:`flashmaps.models.alignment.labels`; None unless asked for.
    """

    images: np.ndarray
    captions: tuple[tuple[str, ...], tuple[str, ...]]
    labels: np.ndarray | None


class Pictures:
    """Example i of a split is always the same: a map-style dataset that can be pickled.

    Nothing that the world knows of its scenes is in an example but captions, and that two pictures
    show one object, or two of one category; unless ``labelled`` asks for more.

    Args:
        split: the world's split, "train" or "validation".
        size: side in pixels.
        count: how many there are.
        seed: another seed, other pictures.
        photos: share of them that are patches of photos.
        alone: share of the world's scenes with one object alone (``ALONE``).
        kin: share of the world's second pictures that show another object of the first one's
            category, as their captions say, in paint of its own.
        labelled: whether to say which part of which object is where.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 128,
        count: int = 12_288,
        seed: int = 0,
        photos: float = 0.2,
        alone: float = 0.5,
        kin: float = 0.0,
        labelled: bool = False,
    ) -> None:
        self.size, self.count, self.seed, self.labelled = size, count, seed, labelled
        self.photo_share, self.alone_share, self.kin_share = photos, alone, kin
        self.scenes, self.lone = (
            {
                same: pairs(split, count, size=size, seed=seed, same=same, options=options)
                for same in (True, False)
            }
            for options in (None, ALONE)
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng((self.seed, index))
        is_photo, is_alone = rng.random(2) < (self.photo_share, self.alone_share)
        same = np.random.default_rng((self.seed, index, 1)).random() >= self.kin_share
        side = self.size // REDUCTION
        shown = None
        if is_photo:
            first, texts = self._photos.patch(rng)
            chance = torch.Generator().manual_seed(int(rng.integers(2**62)))
            second = warped(torch.from_numpy(first[None].copy()), side, chance)[0][0].numpy()
            captions = texts, texts
            shown = unknown(side) if self.labelled else None
        else:
            pair = (self.lone if is_alone else self.scenes)[same][index]
            first, second = pair.a.image, pair.b.image
            captions = pair.a.captions, pair.b.captions
            shown = labels(pair.a, side) if self.labelled else None
        if not is_photo and rng.random() < _REDRAWN:
            view = repainted(pair.a, "view", self.seed, index)
        else:
            view = recoloured(first, rng)
        return Example(np.stack([first, second, view]), captions, shown)

    @cached_property
    def _photos(self) -> Photos:
        return Photos(self.size)
