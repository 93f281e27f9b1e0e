"""A drawn world whose truth is known: creatures and vehicles made of parts, posed at random.

>>> from flashmaps import world
>>> scene = world.Split("test", size=64)[0]
>>> scene.image.shape, scene.image.dtype
((64, 64, 3), dtype('uint8'))
>>> pair = world.pairs("test", 1, category="cat")[0]
>>> found = world.correspondence(pair.a, pair.instance_a, pair.b, pair.instance_b)
>>> found.field.shape  # where each pixel of a's cat lies in b
(64, 64, 2)

docs/world.md says what is in it, what is exact and how ambiguous sides are treated. ``import
flashmaps`` does not load this package.
"""

from __future__ import annotations

from flashmaps.world.anatomy import Category, Part
from flashmaps.world.backgrounds import BACKGROUNDS
from flashmaps.world.captions import vocabulary
from flashmaps.world.categories import CATEGORIES
from flashmaps.world.colours import COLOURS
from flashmaps.world.correspondences import Correspondence, Points, correspondence, sample_points
from flashmaps.world.plan import OCCLUDED, Options
from flashmaps.world.scene import Instance, Keypoint, Scene
from flashmaps.world.splits import SPLITS, Pair, Pairs, Split, pairs
from flashmaps.world.textures import TEXTURES

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLOURS",
    "OCCLUDED",
    "SPLITS",
    "TEXTURES",
    "Category",
    "Correspondence",
    "Instance",
    "Keypoint",
    "Options",
    "Pair",
    "Pairs",
    "Part",
    "Points",
    "Scene",
    "Split",
    "correspondence",
    "pairs",
    "sample_points",
    "vocabulary",
]
