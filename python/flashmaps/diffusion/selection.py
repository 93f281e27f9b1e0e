"""Which layers, steps, grids and halves of the guidance are meant: for captures and for records."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Any

from flashmaps.arguments import as_whole, sides
from flashmaps.diffusion.entry import Entry
from flashmaps.maps.grids import Grid


def patterns(layers: str | Iterable[str]) -> list[str]:
    """``layers`` as a list of :mod:`fnmatch` patterns."""
    found = [layers] if isinstance(layers, str) else list(layers)
    for each in found:
        if not isinstance(each, str):
            raise TypeError(f"layers must be patterns of layer names, got {each!r}")
    # `model.attn_processors` names layers with this ending; take its names too.
    return [each.removesuffix(".processor") for each in found]


def whole_numbers(name: str, value: Any) -> set[int]:
    """One index or several, of any integer type (numpy's, torch's); ValueError for others."""
    one = as_whole(value)
    found: set[int | None]
    try:
        found = {as_whole(each) for each in value} if one is None else {one}
    except TypeError:
        found = {None}
    if any(each is None or each < 0 for each in found):
        raise ValueError(f"{name} must be indices of denoising steps, 0 or more; got {value!r}")
    return {each for each in found if each is not None}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's full name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def resolutions(value: Any) -> set[Grid]:
    """``resolution=`` as grids: n means (n, n), a tuple is one grid, a list has several."""
    found = set()
    for each in value if isinstance(value, (list, set, frozenset)) else [value]:
        side = as_whole(each)
        grid = (side, side) if side is not None else sides(each)
        if grid is None or min(grid) < 1:
            raise ValueError(
                f"resolution={value!r}; wanted a side such as 32, a grid (height, width), or a "
                "list of them"
            )
        found.add(grid)
    if not found:
        raise ValueError("resolution is empty; give at least one grid")
    return found


def of_guidance(entry: Entry, which: str) -> Entry | None:
    """The wanted part of an entry; None if it has none."""
    if entry.guidance is None:  # named, so that its statistics join those of guided steps
        named = dataclasses.replace(entry, guidance="conditional")
        return named if which == "conditional" else None
    return entry.part(which) if which in entry.parts else None
