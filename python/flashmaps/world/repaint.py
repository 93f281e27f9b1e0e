"""The same things in other paint, before another ground and in another light."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flashmaps.world.backgrounds import BACKGROUNDS, sample_background
from flashmaps.world.colours import COLOURS, sample_colour, sample_palette
from flashmaps.world.dice import Dice, hashed
from flashmaps.world.plan import Flat, Options, make_flat, make_light
from flashmaps.world.render import paint, thing_patches
from flashmaps.world.scene import Scene
from flashmaps.world.textures import TEXTURES, sample_texture

_BARE = 0.5  # share of the pictures from which the occluders are taken away


def repainted(scene: Scene, *key: object) -> np.ndarray:
    """The picture of a scene's objects as they stand, all else drawn anew: uint8 [size, size, 3].

    Each object keeps its shape, pose and place, and gets another palette and texture; ground,
    clutter and light are others, and what stands in front is painted otherwise or taken away. So
    a point of an object is at the same (x, y) in both pictures, and nothing else is said of it.

    Args:
        scene: whose objects.
        key: the same key, the same picture.
    """
    options, plan, size = Options(), scene.plan, scene.size
    dice = Dice(*key, "paint")
    things = tuple(
        replace(
            thing,
            palette=sample_palette(dice),
            texture=sample_texture(dice, dice.pick(options.textures)),
        )
        for thing in plan.things
    )
    dice = Dice(*key, "around")
    kind = dice.pick(BACKGROUNDS)
    occluders = () if dice.chance(_BARE) else tuple(_painted(f, dice) for f in plan.occluders)
    other = replace(
        plan,
        background=sample_background(dice, kind, avoid=things[0].palette.main_name),
        clutter=tuple(make_flat(dice) for _ in range(dice.whole(*options.clutter))),
        things=things,
        occluders=occluders,
        light=make_light(Dice(*key, "light"), options),
        grain_seed=hashed(*key, "grain"),
    )
    return paint(other, size, [list(thing_patches(thing, size)) for thing in things])


def _painted(flat: Flat, dice: Dice) -> Flat:
    colour, second = (sample_colour(dice.pick(COLOURS), dice) for _ in range(2))
    return replace(
        flat,
        colour=colour,
        second=second,
        texture=sample_texture(dice, dice.pick(TEXTURES)),
    )
