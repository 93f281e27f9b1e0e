"""What a scene holds, before a single pixel: drawn from a key, at no resolution in particular."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flashmaps.arguments import number
from flashmaps.world.anatomy import Part, pose
from flashmaps.world.backgrounds import BACKGROUNDS, Background, sample_background
from flashmaps.world.captions import make_captions, relation_of
from flashmaps.world.categories import CATEGORIES, find_category
from flashmaps.world.colours import COLOURS, Colour, Palette, sample_colour, sample_palette
from flashmaps.world.dice import Dice, hashed, turn
from flashmaps.world.maps import Bend, Matrix, PartMap, product
from flashmaps.world.shapes import Box, Point, Shape, box, ellipse, limb, polygon, spline
from flashmaps.world.textures import TEXTURES, Texture, sample_texture

_SHARES = (1.0, 0.72, 0.6, 0.52, 0.46, 0.42)  # of the scale, by the number of objects


@dataclass(frozen=True)
class Options:
    """What scenes may hold, and how much they vary.

    Args:
        categories: names to choose from.
        objects: how many objects, (fewest, most).
        occluders: how many things stand in front of them, (fewest, most).
        clutter: how many small things lie behind them, (fewest, most).
        scale: longer side of a lone object, as a share of the image's side; several objects share
            the room.
        rotation: times the category's own range of rotation; 0 keeps everything upright.
        articulation, proportions: times the category's own ranges; 0 is the pose of the drawing.
        flip: whether side views may face left.
        textures, backgrounds: kinds to choose from.
        light: strength of shading and shadows, 0 to 1.
        grain: strength of pixel noise, 0 to 1.
        visible: every object shows at least this share of what it has within the frame.
        hidden: the object that is hidden most hides at least this share; 0 asks for nothing.
    """

    categories: tuple[str, ...] = tuple(CATEGORIES)
    objects: tuple[int, int] = (1, 3)
    occluders: tuple[int, int] = (0, 2)
    clutter: tuple[int, int] = (0, 6)
    scale: tuple[float, float] = (0.55, 0.95)
    rotation: float = 1.0
    articulation: float = 1.0
    proportions: float = 1.0
    flip: bool = True
    textures: tuple[str, ...] = TEXTURES
    backgrounds: tuple[str, ...] = BACKGROUNDS
    light: float = 1.0
    grain: float = 1.0
    visible: float = 0.4
    hidden: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (
            ("categories", tuple(CATEGORIES)),
            ("textures", TEXTURES),
            ("backgrounds", BACKGROUNDS),
        ):
            chosen = getattr(self, name)
            if isinstance(chosen, str) or not chosen:
                raise ValueError(f"{name}={chosen!r} must be a tuple of names, at least one")
            for each in chosen:
                if each not in known:
                    raise ValueError(f"{name}: there is no {each!r}; there are: {', '.join(known)}")
        for name, least, most in (("objects", 1, 6), ("occluders", 0, 8), ("clutter", 0, 40)):
            _check_range(name, getattr(self, name), least, most, whole=True)
        _check_range("scale", self.scale, 0.1, 1.5)
        for name, limit in (
            ("rotation", 20.0),
            ("articulation", 2.0),
            ("proportions", 2.0),
            ("light", 1.0),
            ("grain", 1.0),
            ("visible", 0.9),
            ("hidden", 0.9),
        ):
            number(name, getattr(self, name), least=0, most=limit)
        if self.visible + self.hidden > 0.9:
            raise ValueError(
                f"visible={self.visible} and hidden={self.hidden} leave less than a tenth between "
                "them; no scene would be found"
            )
        if self.hidden and self.objects[1] == 1 and self.occluders[1] == 0:
            raise ValueError(
                f"hidden={self.hidden}: one object and no occluders have nothing to hide it"
            )


def _check_range(name: str, given: object, least: float, most: float, whole: bool = False) -> None:
    kind = "whole numbers" if whole else "numbers"
    if (
        not isinstance(given, tuple)
        or len(given) != 2
        or not all(isinstance(end, int if whole else (int, float)) for end in given)
        or not least <= given[0] <= given[1] <= most
    ):
        raise ValueError(
            f"{name}={given!r} must be (fewest, most), two {kind} in order from {least} to {most}"
        )


# One object behind two to four things, of which 15 to 60 % is hidden.
OCCLUDED = Options(objects=(1, 1), occluders=(2, 4), hidden=0.15)


@dataclass(frozen=True)
class Thing:
    """One object: its category, one map for each part, and its looks."""

    category: str
    maps: tuple[PartMap, ...]
    palette: Palette
    texture: Texture
    flipped: bool
    angle: float  # degrees clockwise
    box: Box  # in image sides, around all parts whether seen or not

    @property
    def words(self) -> str:
        """As in a caption: "striped red bird"."""
        kind = "" if self.texture.kind == "plain" else f"{self.texture.kind} "
        return f"{kind}{self.palette.main_name} {self.category}"


@dataclass(frozen=True)
class Looks:
    """What an object keeps from picture to picture: its paint, not its pose."""

    palette: Palette
    texture: Texture


@dataclass(frozen=True)
class Flat:
    """A thing without parts or labels: clutter behind objects, occluders in front."""

    shape: Shape
    map: PartMap
    colour: Colour
    second: Colour
    texture: Texture


@dataclass(frozen=True)
class Light:
    """Where it comes from (a unit vector, y down), and the style of drawing."""

    direction: Point
    relief: float
    slope: float
    shadow: float
    outline: float
    tint: Colour
    grain: float


@dataclass(frozen=True)
class Plan:
    """Everything that is needed to draw a scene at any size."""

    background: Background
    clutter: tuple[Flat, ...]
    things: tuple[Thing, ...]  # from the back to the front
    occluders: tuple[Flat, ...]
    light: Light
    grain_seed: int
    captions: tuple[str, ...]


_FLATS: tuple[Shape, ...] = (
    Shape(ellipse(50, 50, 50, 50)),
    Shape(box(5, 10, 95, 90), round=5),
    Shape(polygon((50, 5), (95, 90), (5, 90)), round=4),
    Shape(spline((50, 0), (50, 0), (80, 30), (80, 65), (50, 100), (50, 100), (20, 65), (20, 30))),
    Shape(spline((10, 60), (25, 30), (55, 18), (85, 35), (95, 65), (70, 85), (30, 84))),
    Shape(limb((5, 50, 7), (95, 50, 7))),
    Shape(ellipse(28, 58, 22, 20), ellipse(52, 44, 26, 24), ellipse(76, 60, 22, 18)),
)
_POLE = Shape(box(-200, 40, 300, 60))


def make_plan(
    key: tuple[object, ...],
    options: Options,
    category: str | None = None,
    looks: Looks | None = None,
) -> Plan:
    """The scene of a key.

    ``category``, if given, is that of exactly one of its objects; ``looks``, if given, are those of
    its first object, which is the one of the category. All else stays as the key has it.
    """
    # Streams of their own: leaving out occluders, say, leaves all the rest as it was.
    layout = Dice(*key, "layout")
    count = layout.whole(*options.objects)
    names = [layout.pick(options.categories) for _ in range(count)]
    if category is not None:
        others = [name for name in options.categories if name != find_category(category).name]
        names = [category, *(layout.pick(others) for _ in range(count - 1 if others else 0))]
        count = len(names)
    share = _SHARES[count - 1]
    sides = options.scale[0] * share, options.scale[1] * share
    made: list[Thing] = []
    for n, name in enumerate(names):
        made.append(_make_thing(name, Dice(*key, "object", n), options, sides, made))
    if looks is not None:
        made[0] = replace(made[0], palette=looks.palette, texture=looks.texture)
    things = sorted(made, key=lambda thing: thing.box[3])  # lower things are nearer
    dice = Dice(*key, "background")
    kind = dice.pick(options.backgrounds)
    background = sample_background(dice, kind, avoid=made[0].palette.main_name)
    dice = Dice(*key, "clutter")
    clutter = tuple(make_flat(dice) for _ in range(dice.whole(*options.clutter)))
    dice = Dice(*key, "occluders")
    occluders = tuple(
        _make_occluder(dice, dice.pick(made).box) for _ in range(dice.whole(*options.occluders))
    )
    relation = ""
    if count == 2:
        nearer = things[1] is made[0]
        relation = relation_of(made[0].box, made[1].box, nearer, Dice(*key, "words"))
    return Plan(
        background=background,
        clutter=clutter,
        things=tuple(things),
        occluders=occluders,
        light=make_light(Dice(*key, "light"), options),
        grain_seed=hashed(*key, "grain"),
        captions=make_captions([each.words for each in made], names, relation, background.words),
    )


def _make_thing(
    name: str, dice: Dice, options: Options, sides: tuple[float, float], others: list[Thing]
) -> Thing:
    category = CATEGORIES[name]
    angle = dice.near(-1, 1) if category.rotation < 180 else dice.between(-1, 1)
    angle *= min(category.rotation * options.rotation, 180.0)
    flipped = dice.chance(0.5) and options.flip and not category.symmetric
    aspect, skew = dice.near(0.88, 1.14), dice.near(-0.12, 0.12)
    aspect, skew = 1 + (aspect - 1) * options.proportions, skew * options.proportions
    c, s = turn(angle)
    root: Matrix = product((c, -s, s, c), (-aspect if flipped else aspect, skew, 0.0, 1 / aspect))
    maps = pose(
        category, root, dice,
        articulation=options.articulation, proportions=options.proportions,
    )  # fmt: skip
    extent = _around(maps, category.parts)
    side = dice.between(*sides)
    scale = side / max(extent[2] - extent[0], extent[3] - extent[1])
    width, height = (extent[2] - extent[0]) * scale, (extent[3] - extent[1]) * scale
    best, best_cost = (0.5, 0.5), float("inf")
    for _ in range(10):
        # A tenth of the object may leave the frame.
        centre = tuple(
            dice.between(0.4 * long, 1 - 0.4 * long) if long < 1 else 0.5
            for long in (width, height)
        )
        placed = _box_at(centre, width, height)
        cost = sum(_overlap(placed, other.box) for other in others)
        if cost < best_cost:
            best, best_cost = (centre[0], centre[1]), cost
        if cost < 0.1:
            break
    shift = (
        best[0] - scale * (extent[0] + extent[2]) / 2,
        best[1] - scale * (extent[1] + extent[3]) / 2,
    )
    palette = sample_palette(dice)
    return Thing(
        category=name,
        maps=tuple(each.placed(scale, shift) for each in maps),
        palette=palette,
        texture=sample_texture(dice, dice.pick(options.textures)),
        flipped=flipped,
        angle=angle,
        box=_box_at(best, width, height),
    )


def make_flat(dice: Dice) -> Flat:
    """A small thing that lies behind the objects."""
    shape = dice.pick(_FLATS)
    colour, second = (sample_colour(dice.pick(COLOURS), dice) for _ in range(2))
    side = dice.between(0.06, 0.25)
    map_ = _flat_map(dice.between(0, 360), side * dice.between(0.6, 1.0), side,
                     (dice.unit(), dice.unit()))  # fmt: skip
    return Flat(shape, map_, colour, second, sample_texture(dice, dice.pick(TEXTURES)))


def _make_occluder(dice: Dice, target: Box) -> Flat:
    """Something that covers part of the box ``target``."""
    colour, second = (sample_colour(dice.pick(COLOURS), dice) for _ in range(2))
    texture = sample_texture(dice, dice.pick(TEXTURES))
    width, height = target[2] - target[0], target[3] - target[1]
    place = (
        target[0] + width * dice.between(0.05, 0.95),
        target[1] + height * dice.between(0.1, 0.95),
    )
    if dice.chance(0.3):
        angle = dice.pick((0.0, 90.0)) + dice.near(-20, 20)
        thickness = (width + height) / 2 * dice.between(0.5, 0.8)
        return Flat(_POLE, _flat_map(angle, 1.0, thickness, place), colour, second, texture)
    side = (width + height) / 2 * dice.between(0.25, 0.5)
    map_ = _flat_map(dice.between(0, 360), side * dice.between(0.7, 1.3), side, place)
    return Flat(dice.pick(_FLATS), map_, colour, second, texture)


def _flat_map(angle: float, width: float, height: float, place: Point) -> PartMap:
    c, s = turn(angle)
    w, h = width / 100, height / 100
    return PartMap((50.0, 50.0), (1.0, 0.0), Bend(), (c * w, -s * h, s * w, c * h), place)


def make_light(dice: Dice, options: Options) -> Light:
    """A light and a style of drawing."""
    tint = tuple(1 + options.light * dice.near(-0.08, 0.08) for _ in range(3))
    return Light(
        direction=turn(dice.between(-160, -20)),
        relief=options.light * dice.between(0.15, 0.4),
        slope=options.light * dice.between(0.1, 0.45),
        shadow=options.light * dice.between(0.1, 0.45),
        outline=dice.between(0.15, 0.75),
        tint=(tint[0], tint[1], tint[2]),
        grain=options.grain * dice.between(0.0, 0.04),
    )


def _around(maps: tuple[PartMap, ...], parts: tuple[Part, ...]) -> Box:
    boxes = [map_.box(part.shape.cover) for map_, part in zip(maps, parts, strict=True)]
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def _box_at(centre: tuple[float, ...], width: float, height: float) -> Box:
    x, y = centre
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    """Shared area over that of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller
