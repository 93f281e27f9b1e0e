"""What completion is scored on: objects that are partly hidden, and the truth of what is hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from flashmaps.arguments import whole

SIDE = 128  # pixels, what the built-in model was trained on
EXEMPLARS = 16  # images of a collection


@dataclass(frozen=True, eq=False)
class HiddenObject:
    """One object of an image.

    Attributes:
        name: of the image and the object in it.
        category: whose collection it belongs to.
        image: [h, w, 3], anything load_image takes as an array.
        visible: [h, w] bool, where it is seen; front: what stands in front of it.
        whole: [h, w] bool, where it is within the picture, seen or hidden.
        uncovered: [h, w, 3], the same without what stands in front; None where nobody knows.
    """

    name: str
    category: str
    image: np.ndarray
    visible: np.ndarray
    front: np.ndarray
    whole: np.ndarray
    uncovered: np.ndarray | None = None

    @property
    def hidden(self) -> np.ndarray:
        """[h, w] bool."""
        return self.whole & ~self.visible


class HiddenObjects(Protocol):
    """Numbered objects, and for each category a collection of others that are seen whole."""

    what: str

    def __len__(self) -> int:
        """How many objects."""
        ...

    def __getitem__(self, index: int) -> HiddenObject:
        """Object ``index``."""
        ...

    def exemplars(self, category: str) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """(image, mask of the whole object [h, w]) of a collection."""
        ...


class WorldHidden:
    """Scenes of the world with one object behind two to four things; categories take turns.

    The collections are scenes of the training split with one object alone, nothing in front.
    """

    name = "world"

    def __init__(
        self,
        split: str,
        count: int,
        seed: int = 0,
        side: int = SIDE,
        exemplars: int = EXEMPLARS,
        categories: tuple[str, ...] | None = None,
    ) -> None:
        from flashmaps import world

        self._names = categories or tuple(sorted(world.CATEGORIES))
        self._split, self._side, self._many = split, whole("size", side, 16, 1024), exemplars
        self._count, self._seed = whole("count", count, 1), whole("seed", seed, 0)
        self.what = (
            f"{count} scenes of the {split} split of flashmaps.world (seed {seed}), one object of "
            f"{len(self._names)} categories in turn behind two to four things, 15 to 60 % hidden, "
            f"{side} pixels a side; collections of {exemplars} scenes of the training split, one "
            "object alone"
        )

    def __len__(self) -> int:
        """How many scenes."""
        return self._count

    def __getitem__(self, index: int) -> HiddenObject:
        from flashmaps import world

        if not 0 <= index < self._count:
            raise IndexError(f"index {index} is not in 0 to {self._count - 1}")
        name = self._names[index % len(self._names)]
        options = replace(world.OCCLUDED, categories=(name,))
        scene = world.Split(self._split, size=self._side, seed=self._seed, options=options)[index]
        return HiddenObject(
            str(index), name, scene.image, scene.mask(0), scene.occluder, scene.amodal(0),
            scene.uncovered().image,
        )  # fmt: skip

    def exemplars(self, category: str) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """(image, mask of the whole object [h, w]) of a collection."""
        from flashmaps import world

        options = world.Options(objects=(1, 1), occluders=(0, 0), categories=(category,))
        scenes = world.Split("train", size=self._side, seed=self._seed, options=options)
        first = self._names.index(category) * self._many
        found = [scenes[first + k] for k in range(self._many)]
        return [(scene.image, scene.mask(0)) for scene in found]
