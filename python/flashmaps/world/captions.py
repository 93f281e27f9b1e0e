"""Sentences about a scene, in a small grammar.

caption    = objects [background]
objects    = object | object relation object | object, object ... and object
object     = a|an [texture] [colour] category
relation   = beside | left of | right of | above | below | in front of | behind
background = on grass|sand|snow|water | on a road | on a [pattern] colour background
"""

from __future__ import annotations

from collections.abc import Sequence

from flashmaps.world.backgrounds import BACKGROUNDS
from flashmaps.world.categories import CATEGORIES
from flashmaps.world.colours import COLOURS
from flashmaps.world.dice import Dice
from flashmaps.world.shapes import Box
from flashmaps.world.textures import TEXTURES

RELATIONS = ("beside", "left of", "right of", "above", "below", "in front of", "behind")


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted."""
    grammar = "a an and on background".split()
    relations = [word for relation in RELATIONS for word in relation.split()]
    kinds = [kind for kind in (*TEXTURES, *BACKGROUNDS) if kind not in ("plain", "gradient")]
    return tuple(sorted({*grammar, *relations, *kinds, *COLOURS, *CATEGORIES}))


def make_captions(
    objects: Sequence[str], categories: Sequence[str], relation: str, background: str
) -> tuple[str, ...]:
    """Three sentences, from the fullest to the barest.

    ``objects`` are the words for each object, such as "striped red bird"; ``relation`` holds from
    the first to the second where there are two.
    """
    full, bare = _listed(objects, relation), _listed(categories, relation)
    return f"{full} {background}", full, bare


def relation_of(a: Box, b: Box, a_is_nearer: bool, dice: Dice) -> str:
    """How the object in box ``a`` stands to that in ``b``."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    sideways = dice.chance(0.5)
    if width > 0 and height > 0 and width * height > 0.2 * smaller:
        return "in front of" if a_is_nearer else "behind"
    dx = (a[0] + a[2] - b[0] - b[2]) / 2
    dy = (a[1] + a[3] - b[1] - b[3]) / 2
    if abs(dy) > abs(dx):
        return "above" if dy < 0 else "below"
    return "beside" if sideways else "left of" if dx < 0 else "right of"


def _listed(objects: Sequence[str], relation: str) -> str:
    phrases = [f"{'an' if words[0] in 'aeiou' else 'a'} {words}" for words in objects]
    if len(phrases) == 2:
        return f"{phrases[0]} {relation} {phrases[1]}"
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
