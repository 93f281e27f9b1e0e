"""The tokens of one attention call: image, text, grids. What is known of them, and what is not.

An attention processor sees tokens only. Which of them are image and which text follows from what
the model was called with (`Tokens`) and from the order in which its processors concatenate them. An
order is written as names joined by plus signs, for both sides or as "queries -> keys":

    "text + image"              joint attention, both sides alike
    "image -> text"             cross-attention
    "image -> text + image"     keys of the text before the image's own

families.py lists the orders of diffusers' models. A layer whose class is not listed there, or whose
tokens do not have the lengths that its order says, has no parts: they are never guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashmaps.maps.grids import Grid

# What a layer attends with. "unknown": its layout is not known here, or did not fit its tokens.
KINDS = ("self", "cross", "joint", "temporal", "image_prompt", "unknown")

REMEDY = "give parts=, grid= or leave the layer out"


@dataclass(frozen=True)
class Tokens:
    """What a model was called with, in tokens.

    Attributes:
        grid: (height, width) of the finest image tokens; None: not known.
        frames: of a video whose tokens stand in one sequence: frames * height * width of them.
        rows: of a video whose frames are rows of the batch: how many; row b * rows + f is frame f.
        levels: whether layers may run on coarser grids (UNets), each half of the last.
        sizes: how many tokens each part has, by name; "image" at the finest level, all frames.
        items: the same for each image of the batch, where they are not alike.
        note: why a part is not known.
    """

    grid: Grid | None = None
    frames: int = 1
    rows: int = 1
    levels: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    items: tuple[Mapping[str, int], ...] = ()
    note: str = ""

    def of_items(self, start: int, stop: int) -> Tokens:
        """Those of some images of the batch: what they have in common."""
        items = self.items[start:stop]
        if not items:
            return self
        sizes = {**self.sizes, **common(items)}
        note = self.note if len(sizes) < len(items[0]) else ""
        return dataclasses.replace(self, sizes=sizes, items=(), note=note)


def common(items: tuple[Mapping[str, int], ...] | list[dict[str, int]]) -> dict[str, int]:
    """The sizes that all images of a batch share."""
    first = items[0]
    return {name: n for name, n in first.items() if all(each.get(name) == n for each in items)}


@dataclass(frozen=True)
class Forward:
    """One call of the denoiser: what its layers are told apart by, and never see themselves.

    Attributes:
        step: index of the denoising step, from 0; the two calls of separate guidance share one.
        timestep: what the model was called with; a [1] tensor, read when it is asked for.
        guidance, batch: which part of guidance this is, or which parts its batch holds; see
            `flashmaps.diffusion.entry.Entry`.
        images: how many images the model was called with; None: not known.
        found: layouts of calls with the same tokens; see `Layouts`.
    """

    step: int
    timestep: Any = None
    tokens: Tokens = field(default_factory=Tokens)
    guidance: str | None = None
    batch: tuple[str, ...] = ()
    images: int | None = None
    found: dict[Any, Layout] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Layout:
    """The tokens of one attention call.

    Attributes:
        kind: "self"; "cross": keys are text; "joint": queries, keys or both are image and text;
            "temporal": over frames, at one place; "image_prompt": keys are an image prompt
            (IP-Adapter, image-to-video); "unknown".
        grid, frames: of the image queries; frames * height * width of them.
        queries, keys: token range of each part by name. Empty where they are not known.
        why: why parts are not known; "" if they are.
    """

    kind: str
    grid: Grid | None = None
    frames: int = 1
    queries: Mapping[str, slice] = field(default_factory=dict)
    keys: Mapping[str, slice] = field(default_factory=dict)
    why: str = ""


# -- orders ----------------------------------------------------------------------------------------

_PART = re.compile(r"(\w+)(?::(\w+))?(\*)?")


@dataclass(frozen=True)
class Part:
    """One range of tokens.

    Attributes:
        name: "_text" is text whose tokens are not told; "__..." are tokens that mean nothing.
        size: which of `Tokens.sizes` it has.
        rest: whether it takes what is left where that size is not known.
    """

    name: str
    size: str
    rest: bool


@dataclass(frozen=True)
class Order:
    """Parts of queries and of keys, in the order in which they stand."""

    queries: tuple[Part, ...]
    keys: tuple[Part, ...]
    kind: str


@functools.cache
def order(text: str) -> Order:
    """An order as it is written: "text + image", "image -> text"; ValueError for anything else.

    ``name:size`` has the size of that name; ``name*`` takes what the other parts leave.
    """
    sides = text.split("->")
    if len(sides) > 2:
        raise ValueError(_malformed(text))
    read = [_side(side, text) for side in sides]
    names = [{part.name for part in side} for side in read]
    return Order(read[0], read[-1], _kind_of(names[0], names[-1]))


def _side(side: str, text: str) -> tuple[Part, ...]:
    parts = []
    for piece in side.split("+"):
        found = _PART.fullmatch(piece.strip())
        if found is None:
            raise ValueError(_malformed(text))
        name, size, rest = found.groups()
        parts.append(Part(name, size or name, rest is not None))
    names = [part.name for part in parts]
    if len(set(names)) < len(names) or sum(part.rest for part in parts) > 1:
        raise ValueError(_malformed(text))
    return tuple(parts)


def _malformed(text: str) -> str:
    return (
        f"parts={text!r} is no order of tokens; write the names in the order in which they stand, "
        "each once: 'text + image', or 'image -> text' where the keys are others than the queries"
    )


def _told(places: Mapping[str, slice]) -> dict[str, slice]:
    return {name: part for name, part in places.items() if not name.startswith("_")}


def _kind_of(queries: Iterable[str], keys: Iterable[str]) -> str:
    queries, keys = (
        {name.removeprefix("_") for name in side if not name.startswith("__")}
        for side in (queries, keys)
    )
    if queries == keys:
        if len(queries) != 1:
            return "joint" if queries else "unknown"
        return "temporal" if queries == {"frames"} else "self"
    if "image_prompt" in keys and "text" not in keys:
        return "image_prompt"
    if queries == {"image"} and keys == {"other"}:  # of another image
        return "self"
    return "joint" if queries & keys else "cross"


def place(
    parts: tuple[Part, ...],
    count: int,
    sizes: Mapping[str, int],
    image: int | None,
    rest: bool = False,
) -> dict[str, slice] | None:
    """Where the parts stand in ``count`` tokens; None if these are not their lengths.

    ``rest``: whether any part may take what the others leave.
    """
    known = [image if part.size == "image" else sizes.get(part.size) for part in parts]
    missing = [at for at, size in enumerate(known) if size is None]
    if missing and (len(missing) > 1 or not (rest or parts[missing[0]].rest)):
        return None
    left = count - sum(size for size in known if size is not None)
    lengths = [left if size is None else size for size in known]
    if sum(lengths) != count or min(lengths) < 0:
        return None
    places, start = {}, 0
    for part, size in zip(parts, lengths, strict=True):
        if size:
            places[part.name] = slice(start, start + size)
        start += size
    return places


# -- layers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How layers of a model attend.

    Attributes:
        layers: pattern of their names, in the manner of :mod:`fnmatch`.
        orders: of the tokens, the first of them that fits.
        alone: orders where the layer is given no context (encoder_hidden_states).
        later: orders of further attentions in one call (IP-Adapter), instead of ``orders``.
        processors: the processors that concatenate in this order; empty: the model does it, and
            any processor that finds as many tokens as it should is taken to keep it.
        each: whether the processor attends image by image, one call for each (Mochi).
        only_if: of the layer, a name of what it must have (Wan's image to video).
        said: whether a user says so: then one part of unknown size has the rest, and tokens of
            other lengths are an error.
        note: why a part is not told.
    """

    layers: str
    orders: tuple[str, ...]
    alone: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    processors: frozenset[str] = frozenset()
    each: bool = False
    only_if: str = ""
    said: bool = False
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What is known of one layer before it runs.

    Attributes:
        rule: how it attends; None: not known.
        level: how many times its grid is halved (UNets); None: not known.
        name: of the class that does not say how.
        given: parts by name, as the user gave them: (of queries, of keys).
    """

    rule: Rule | None
    level: int | None = None
    name: str = ""
    given: tuple[Mapping[str, slice], Mapping[str, slice]] | None = None


class Layouts:
    """Layouts that were found: a model is mostly called with as many tokens as before."""

    def __init__(self) -> None:
        self._recent: list[tuple[Tokens, dict[Any, Layout]]] = []

    def of(self, tokens: Tokens) -> dict[Any, Layout]:
        """Those of calls with these tokens, by whatever else they depend on."""
        for each, found in self._recent:
            if each == tokens:
                return found
        self._recent = [(tokens, {}), *self._recent[:7]]  # guidance may take turns
        return self._recent[0][1]

    def clear(self) -> None:
        """Forget them."""
        self._recent = []


def layout(plan: Plan, alone: bool, call: int, queries: int, keys: int, tokens: Tokens) -> Layout:
    """The layout of the ``call``-th attention (from 0) of one processor call.

    ``alone``: the processor was given no context.
    """
    if plan.given is not None:
        return _given(plan, queries, keys, tokens)
    index = min(call, 1) if plan.rule is not None and not plan.rule.each else 0
    return _layout(plan, alone, index, queries, keys, tokens)


def _layout(plan: Plan, alone: bool, call: int, queries: int, keys: int, tokens: Tokens) -> Layout:
    rule = plan.rule
    if rule is None:
        return Layout("unknown", why=f"the layout of {plan.name} is not known here; {REMEDY}")
    orders = rule.later if call else rule.alone if alone and rule.alone else rule.orders
    if not orders:
        what = "what a further attention is, of" if call else "the layout of"
        why = f"{what} {plan.name} is not known here; {REMEDY}"
        return Layout("unknown", why=why)
    grids = _grids(tokens, plan.level)
    half: Layout | None = None
    for each in map(order, orders):
        for grid, image in grids:
            rows = place(each.queries, queries, tokens.sizes, image, rule.said)
            columns = place(each.keys, keys, tokens.sizes, image, rule.said)
            if rows is not None and columns is not None:
                kind = _kind_of(rows, columns)
                told = _told(rows), _told(columns)
                why = tokens.note or rule.note
                return Layout(kind, *_gridded(grid, tokens, rows), *told, why)
            if rows is not None and half is None and len(rows) == 1:
                half = Layout("unknown", *_gridded(grid, tokens, rows), _told(rows))
            elif columns is not None and half is None and "image" not in columns:
                half = Layout("unknown", keys=_told(columns))
    found = half if half is not None else Layout("unknown")
    kinds = {order(each).kind for each in orders}
    kind = "unknown"
    if kinds == {"temporal"} or (kinds == {"self"} and alone and queries == keys and half is None):
        kind = kinds.pop()
    why = f"its {queries} queries and {keys} keys are not those of {_shown(orders, tokens, grids)}"
    why = tokens.note or why
    if rule.said:
        raise ValueError(
            f"a layer does not have the parts that it is said to have: {why}; give parts= by "
            "pattern of layers, ranges of tokens, or grid="
        )
    return Layout(kind, found.grid, found.frames, found.queries, found.keys, f"{why}; {REMEDY}")


def _gridded(
    grid: Grid | None, tokens: Tokens, queries: Mapping[str, slice]
) -> tuple[Grid | None, int]:
    if grid is None or "image" not in queries:
        return None, 1
    return grid, tokens.frames


def _grids(tokens: Tokens, level: int | None) -> list[tuple[Grid | None, int | None]]:
    """The grids that a layer may have, each with how many tokens are image on it."""
    if tokens.grid is None:
        return [(None, tokens.sizes.get("image"))]
    found = [tokens.grid]
    while tokens.levels and found[-1] != (1, 1):
        height, width = found[-1]
        found.append(((height + 1) // 2, (width + 1) // 2))
    if tokens.levels and level is not None:
        found = [found[min(level, len(found) - 1)]]
    return [(grid, math.prod(grid) * tokens.frames) for grid in found]


def _shown(
    orders: tuple[str, ...], tokens: Tokens, grids: list[tuple[Grid | None, int | None]]
) -> str:
    """What a layer should have had, for the error."""
    sizes = {name: n for name, n in tokens.sizes.items() if name != "image"}
    shown = [f"{name}: {n}" for name, n in sizes.items() if any(name in each for each in orders)]
    grid, image = grids[0] if len(grids) == 1 else (None, None)
    if grid is not None:
        frames = f"{tokens.frames} x " if tokens.frames > 1 else ""
        shown.insert(0, f"image: {frames}{grid[0]} x {grid[1]}")
    elif image is not None:
        shown.insert(0, f"image: {image}")
    of = f" ({', '.join(shown)})" if shown else ""
    return f"{' or '.join(map(repr, orders))}{of}"


def _given(plan: Plan, queries: int, keys: int, tokens: Tokens) -> Layout:
    assert plan.given is not None
    for side, count, parts in zip(("queries", "keys"), (queries, keys), plan.given, strict=True):
        for name, part in parts.items():
            if part.stop > count:
                raise ValueError(
                    f"parts= says that {name!r} of the {side} is tokens {part.start} to "
                    f"{part.stop}, but the layer has {count}; give parts= by layer: "
                    "parts={'pattern': {...}}"
                )
    rows, columns = plan.given
    grid, frames = None, 1
    if tokens.grid is not None and "image" in rows:
        size = rows["image"].stop - rows["image"].start
        for each, image in _grids(tokens, plan.level):
            if image == size:
                grid, frames = each, tokens.frames
        if grid is None:
            raise ValueError(
                f"parts= has {size} image queries, which is not "
                f"{tokens.frames} x {tokens.grid[0]} x {tokens.grid[1]}; give grid= to match"
            )
    return Layout(_kind_of(rows, columns), grid, frames, rows, columns)
