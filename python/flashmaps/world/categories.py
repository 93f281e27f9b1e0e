"""All categories by name."""

from __future__ import annotations

from flashmaps.world.anatomy import Category
from flashmaps.world.creatures import CREATURES
from flashmaps.world.vehicles import VEHICLES

CATEGORIES: dict[str, Category] = {each.name: each for each in (*CREATURES, *VEHICLES)}


def find_category(name: str) -> Category:
    """The category of this name; ValueError lists all names otherwise."""
    if name not in CATEGORIES:
        raise ValueError(f"there is no category {name!r}; there are: {', '.join(CATEGORIES)}")
    return CATEGORIES[name]
