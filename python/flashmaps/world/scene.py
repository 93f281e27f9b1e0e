"""A scene: an image, and the whole truth about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from flashmaps.arguments import whole
from flashmaps.world.anatomy import Category
from flashmaps.world.categories import CATEGORIES
from flashmaps.world.plan import Looks, Options, Plan, make_plan
from flashmaps.world.render import Window, mark_inside, paint, thing_patches
from flashmaps.world.shapes import Box

VERSION = 1  # of the world: part of every key; goes up whenever a scene's pixels or labels change
SIZES = (16, 1024)  # smallest and largest side

_TRIES = 16
_GLANCE = 48  # pixels a side of the first look, which asks whether every object can be seen


@dataclass(frozen=True)
class Keypoint:
    """A named point of an object, at (x, y) pixels: (0, 0) is the centre of the top left one.

    ``visible``: nothing covers the point, and the pixel that holds it shows its part.
    """

    name: str
    part: str
    x: float
    y: float
    visible: bool


@dataclass(frozen=True)
class Instance:
    """One object of a scene.

    ``angle`` is in degrees clockwise; ``box`` is around all parts, seen or not, in pixels.
    """

    index: int
    category: str
    colour: str
    second_colour: str
    texture: str
    flipped: bool
    angle: float
    box: Box

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its parts; a part's label is its place here."""
        return CATEGORIES[self.category].part_names


@dataclass(frozen=True, eq=False)
class Scene:
    """One image with its truth.

    Args:
        image: [size, size, 3] uint8.
        instance: [size, size] int8, which object each pixel's centre shows; -1 for none.
        part: [size, size] int8, the label of that object's part; -1 for none.
        occluder: [size, size] bool, where something without a label stands in front.
        captions: from the fullest to the barest.
        instances: the objects, from the back to the front.

    Points are (x, y) in pixels, (0, 0) being the centre of the top left pixel.
    """

    image: np.ndarray
    instance: np.ndarray
    part: np.ndarray
    occluder: np.ndarray
    captions: tuple[str, ...]
    background: str
    instances: tuple[Instance, ...]
    plan: Plan
    _areas: tuple[tuple[tuple[int, Window, np.ndarray], ...], ...]

    @property
    def size(self) -> int:
        """Pixels a side."""
        return int(self.image.shape[0])

    @property
    def caption(self) -> str:
        """The fullest caption."""
        return self.captions[0]

    def category(self, instance: int) -> Category:
        """The category of an object."""
        return CATEGORIES[self.instances[self._checked(instance)].category]

    def looks(self, instance: int) -> Looks:
        """The paint of an object, for another picture of it."""
        thing = self.plan.things[self._checked(instance)]
        return Looks(thing.palette, thing.texture)

    def find(self, category: str) -> int:
        """The index of the one object of this category; ValueError if there is none, or several."""
        found = [each.index for each in self.instances if each.category == category]
        if len(found) != 1:
            here = ", ".join(each.category for each in self.instances)
            raise ValueError(f"wanted one {category!r} in the scene, which holds: {here}")
        return found[0]

    def mask(self, instance: int, part: str | None = None) -> np.ndarray:
        """[size, size] bool: where an object, or one part of it, is seen."""
        mask = self.instance == self._checked(instance)
        if part is not None:
            mask &= self.part == self._label(instance, part)
        return mask

    def amodal(self, instance: int, part: str | None = None) -> np.ndarray:
        """[size, size] bool: where it is within the frame, seen or hidden."""
        only = None if part is None else self._label(instance, part)
        mask = np.zeros(self.instance.shape, dtype=bool)
        for label, window, inside in self._areas[self._checked(instance)]:
            if only is None or label == only:
                mask[window] |= inside
        return mask

    def hidden(self, instance: int) -> np.ndarray:
        """[size, size] bool: where it is within the frame, behind something."""
        return self.amodal(instance) & ~self.mask(instance)

    def uncovered(self, instance: int | None = None) -> Scene:
        """The same scene without its occluders: what is behind them is seen, all else as it was.

        ``instance``: without the objects in front of that one too, so that it is seen whole. Their
        captions stay those of the scene. Pixels that nothing covered are the same to the bit, but
        for the blurred rim of what was taken away, and for the shadows of objects.
        """
        plan = replace(self.plan, occluders=())
        if instance is not None:
            plan = replace(plan, things=plan.things[: self._checked(instance) + 1])
        return _draw(plan, self.size)

    def visible_share(self, instance: int) -> float:
        """Share of an object's pixels within the frame that are seen; 0 where it has none."""
        there = int(self.amodal(instance).sum())
        return int(self.mask(instance).sum()) / there if there else 0.0

    @cached_property
    def coordinates(self) -> np.ndarray:
        """[size, size, 2] float64: (u, v) on the part that each pixel shows, NaN where none.

        (0, 0) to (1, 1) span the part's box in the drawing of its category: the part at rest.
        """
        uv = np.full((*self.instance.shape, 2), np.nan)
        for index, thing in enumerate(self.plan.things):
            category = CATEGORIES[thing.category]
            for label in range(len(category.parts)):
                rows, columns = np.nonzero((self.instance == index) & (self.part == label))
                x, y = thing.maps[label].to_drawing(*self._unit(columns, rows))
                uv[rows, columns, 0], uv[rows, columns, 1] = category.parts[label].to_uv(x, y)
        return uv

    @cached_property
    def rest(self) -> np.ndarray:
        """[size, size, 2] float64: where the pixel's point lies on the whole object at rest.

        In the drawing of its category, (0, 0) to (1, 1); NaN where there is no object.
        """
        place = np.full((*self.instance.shape, 2), np.nan)
        u, v = self.coordinates[:, :, 0], self.coordinates[:, :, 1]
        for index, thing in enumerate(self.plan.things):
            for label, part in enumerate(CATEGORIES[thing.category].parts):
                mask = (self.instance == index) & (self.part == label)
                x, y = part.from_uv(u[mask], v[mask])
                place[mask, 0], place[mask, 1] = x / 100, y / 100
        return place

    def keypoints(self, instance: int) -> tuple[Keypoint, ...]:
        """The named points of an object, in the order of its category's ``keypoint_names``."""
        category = self.category(instance)
        named = [
            (label, name, place)
            for label, part in enumerate(category.parts)
            for name, place in part.keypoints.items()
        ]
        labels = np.array([label for label, _, _ in named])
        places = np.array([place for _, _, place in named])
        points = self.locate(instance, labels, places)
        visible = self.shows(points, instance, labels)
        return tuple(
            Keypoint(name, category.part_names[label], float(x), float(y), bool(seen))
            for (label, name, _), (x, y), seen in zip(named, points, visible, strict=True)
        )

    def locate(self, instance: int, parts: np.ndarray, drawing: np.ndarray) -> np.ndarray:
        """Pixels [n, 2] of the points ``drawing`` [n, 2] on the parts labelled ``parts`` [n].

        Inside the frame or not, seen or hidden.
        """
        maps = self.plan.things[self._checked(instance)].maps
        points = np.empty((len(parts), 2))
        for label in np.unique(parts):
            rows = parts == label
            x, y = maps[label].to_image(drawing[rows, 0], drawing[rows, 1])
            points[rows, 0], points[rows, 1] = x * self.size - 0.5, y * self.size - 0.5
        return points

    def at(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the scene shows at any points [n, 2]: instance [n], part [n], drawing [n, 2].

        Worked out for the very points, so at pixel centres it gives the labels and between them it
        says more than they do. -1, -1 and NaN where there is no object or an occluder is in front.
        """
        x, y = self._unit(np.asarray(points)[:, 0], np.asarray(points)[:, 1])
        instance, part = np.full(len(x), -1, np.int8), np.full(len(x), -1, np.int8)
        drawing = np.full((len(x), 2), np.nan)
        free = np.ones(len(x), dtype=bool)
        for flat in self.plan.occluders:
            free &= flat.shape.distance(*flat.map.to_drawing(x, y)) > 0
        for index in reversed(range(len(self.plan.things))):
            thing = self.plan.things[index]
            category = CATEGORIES[thing.category]
            for label in reversed(category.drawing_order):
                dx, dy = thing.maps[label].to_drawing(x, y)
                here = free & (category.parts[label].shape.distance(dx, dy) <= 0)
                instance[here], part[here] = index, label
                drawing[here, 0], drawing[here, 1] = dx[here], dy[here]
                free &= ~here
        return instance, part, drawing

    def shows(self, points: np.ndarray, instance: int, parts: np.ndarray) -> np.ndarray:
        """[n] bool: whether these points [n, 2] of the parts labelled ``parts`` [n] are visible.

        Nothing covers the point itself, and the pixel that holds it is labelled with its part.
        """
        columns = np.floor(points[:, 0] + 0.5).astype(np.intp)
        rows = np.floor(points[:, 1] + 0.5).astype(np.intp)
        seen = (columns >= 0) & (columns < self.size) & (rows >= 0) & (rows < self.size)
        columns, rows = columns.clip(0, self.size - 1), rows.clip(0, self.size - 1)
        seen &= (self.instance[rows, columns] == instance) & (self.part[rows, columns] == parts)
        there, part, _ = self.at(points[seen])
        seen[seen] = (there == instance) & (part == parts[seen])
        return seen

    def _unit(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (x + 0.5) / self.size, (y + 0.5) / self.size

    def _checked(self, instance: int) -> int:
        if not 0 <= instance < len(self.instances):
            raise ValueError(
                f"there is no instance {instance}; the scene has {len(self.instances)}, from 0"
            )
        return instance

    def _label(self, instance: int, part: str) -> int:
        names = self.category(instance).part_names
        if part not in names:
            raise ValueError(
                f"a {self.instances[instance].category} has no part {part!r}; it has: "
                f"{', '.join(names)}"
            )
        return names.index(part)


def make_scene(
    key: Sequence[object],
    size: int,
    options: Options,
    category: str | None = None,
    looks: Looks | None = None,
) -> Scene:
    """The scene of a key, drawn at ``size`` pixels a side; the same scene at every size.

    ``category``, if given, is that of exactly one of its objects, and ``looks`` are that one's.
    """
    whole("size", size, *SIZES)
    plan, least = None, 1.0
    for attempt in range(_TRIES):
        trial = make_plan((VERSION, *key, attempt), options, category, looks)
        share = _least_visible(trial)
        off = max(options.visible - share, share + options.hidden - 1, 0.0)
        if off < least:
            plan, least = trial, off
        if off == 0:
            break
    assert plan is not None
    return _draw(plan, size)


def _least_visible(plan: Plan) -> float:
    """Of the most hidden object, the share that is seen of what it has within the frame."""
    if len(plan.things) == 1 and not plan.occluders:
        return 1.0
    covered = np.zeros((_GLANCE, _GLANCE), dtype=bool)
    for flat in plan.occluders:
        mark_inside(covered, flat.shape, flat.map)
    least = 1.0
    for thing in reversed(plan.things):
        own = np.zeros_like(covered)
        for part, its_map in zip(CATEGORIES[thing.category].parts, thing.maps, strict=True):
            mark_inside(own, part.shape, its_map)
        area = int(own.sum())
        least = min(least, int((own & ~covered).sum()) / area if area else 0.0)
        covered |= own
    return least


def _draw(plan: Plan, size: int) -> Scene:
    patches = [list(thing_patches(thing, size)) for thing in plan.things]
    instance, part = np.full((size, size), -1, np.int8), np.full((size, size), -1, np.int8)
    areas = []
    for index, its_patches in enumerate(patches):
        area = []
        for label, patch in its_patches:
            inside = patch.inside
            instance[patch.window][inside] = index
            part[patch.window][inside] = label
            area.append((label, patch.window, inside))
        areas.append(tuple(area))
    occluder = np.zeros((size, size), dtype=bool)
    for flat in plan.occluders:
        mark_inside(occluder, flat.shape, flat.map)
    instance[occluder] = part[occluder] = -1
    instances = tuple(
        Instance(
            index=index,
            category=thing.category,
            colour=thing.palette.main_name,
            second_colour=thing.palette.second_name,
            texture=thing.texture.kind,
            flipped=thing.flipped,
            angle=thing.angle,
            box=(
                thing.box[0] * size - 0.5,
                thing.box[1] * size - 0.5,
                thing.box[2] * size - 0.5,
                thing.box[3] * size - 0.5,
            ),
        )
        for index, thing in enumerate(plan.things)
    )
    return Scene(
        image=paint(plan, size, patches),
        instance=instance,
        part=part,
        occluder=occluder,
        captions=plan.captions,
        background=plan.background.kind,
        instances=instances,
        plan=plan,
        _areas=tuple(areas),
    )
