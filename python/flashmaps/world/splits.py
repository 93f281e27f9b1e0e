"""Endless scenes and pairs, in splits that cannot share one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashmaps.arguments import whole
from flashmaps.world.categories import find_category
from flashmaps.world.plan import Options
from flashmaps.world.scene import SIZES, Scene, make_scene

SPLITS = ("train", "validation", "test")

_COUNTS = {"train": 100_000, "validation": 2_000, "test": 2_000}


class Split:
    """The scenes of one split: ``Split("train")[i]`` is a :class:`Scene`, made when asked for.

    Scene i of a split is what SHA-256 makes of the split's name, the seed and i, so no scene of one
    split can turn up in another, whatever the counts. It looks the same at every size. A split has
    what a map-style PyTorch dataset needs, and can be pickled for worker processes.

    Args:
        name: "train", "validation" or "test".
        size: pixels a side, 16 to 1024.
        count: how many scenes it has; by default 100,000 for training and 2,000 for the others.
        seed: another seed, another set of scenes.
        options: what scenes may hold.
    """

    def __init__(
        self,
        name: str,
        *,
        size: int = 64,
        count: int | None = None,
        seed: int = 0,
        options: Options | None = None,
    ) -> None:
        self.name = _check_split(name)
        self.size = whole("size", size, *SIZES)
        self.count = _COUNTS[name] if count is None else whole("count", count, 1)
        self.seed = whole("seed", seed)
        self.options = options or Options()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        _check_index(index, self.count)
        return make_scene((self.name, "scene", self.seed, index), self.size, self.options)

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(self.count))


@dataclass(frozen=True, eq=False)
class Pair:
    """Two scenes, each with one object of ``category``: ``instance_a`` and ``instance_b``."""

    a: Scene
    b: Scene
    instance_a: int
    instance_b: int
    category: str


class Pairs:
    """Pairs of scenes with an object of the same category; see :func:`pairs`."""

    def __init__(
        self,
        split: str,
        count: int,
        seed: int,
        size: int,
        options: Options,
        names: tuple[str, ...],
        same: bool = False,
    ) -> None:
        self.split, self.count = _check_split(split), whole("count", count, 1)
        self.seed = whole("seed", seed)
        self.size = whole("size", size, *SIZES)
        self.options, self.names, self.same = options, names, same

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        _check_index(index, self.count)
        category = self.names[index % len(self.names)]
        key = (self.split, "pair", self.seed, index)
        a = make_scene((*key, "a"), self.size, self.options, category)
        looks = a.looks(a.find(category)) if self.same else None
        b = make_scene((*key, "b"), self.size, self.options, category, looks)
        return Pair(a, b, a.find(category), b.find(category), category)

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(self.count))


def pairs(
    split: str,
    count: int,
    *,
    seed: int = 0,
    size: int = 64,
    category: str | None = None,
    options: Options | None = None,
    same: bool = False,
) -> Pairs:
    """``count`` pairs of scenes with one object of a category in common, made when asked for.

    Categories take turns, so that each has its share; ``category`` keeps to one. What else the
    scenes hold is of other categories, so that the object to match is never in doubt. The pairs of
    a split are none of its scenes.

    With ``same`` both scenes show one object: the second is painted as the first is, in another
    pose, at another place and before another ground.
    """
    options = options or Options()
    names = options.categories if category is None else (find_category(category).name,)
    return Pairs(split, count, seed, size, options, names, same)


def _check_split(name: str) -> str:
    if name not in SPLITS:
        raise ValueError(f"there is no split {name!r}; there are: {', '.join(SPLITS)}")
    return name


def _check_index(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise IndexError(f"index {index} is not in 0 to {count - 1}")
