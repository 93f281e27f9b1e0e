"""What is known of a layer's tokens: what the user says, what was registered, or the table.

fm.capture(pipe, parts="text + image", grid=(64, 64))
fm.capture(pipe, parts={"blocks.*": "text + image", "refiner.*": "text"}, grid=(64, 64))
fm.capture(pipe, parts={"text": slice(0, 77), "image": slice(77, 4173)})
fm.register_layout(MyProcessor, "image -> text")
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flashmaps.diffusion.families import FAMILIES
from flashmaps.diffusion.family import Family
from flashmaps.diffusion.layouts import Plan, Rule, Tokens, order
from flashmaps.maps.grids import Grid

# (of queries, of keys), by name
Ranges = tuple[Mapping[str, slice], Mapping[str, slice]]
Parts = tuple[tuple[str, Rule | Ranges], ...]  # by pattern of layer names

# Processors of IP-Adapters, in whichever model: their text comes first, then each image prompt.
_PROMPTS = frozenset({"IPAdapterAttnProcessor2_0"})
_PROMPTED = Rule("*", ("__* -> text*",), later=("__* -> image_prompt*",))
# Processors that put keys of another image, or of the first frame, in place of a layer's own.
_REPLACES_KEYS = frozenset(
    {"CrossSelfAttnProcessor", "CrossFrameAttnProcessor", "CrossFrameAttnProcessor2_0"}
)
_REPLACED = Rule(
    "*",
    ("image -> text",),
    alone=("image -> _other*",),
    note="its processor may attend to another image's keys; read its own record, or give parts=",
)


_registered: dict[type, Rule] = {}
_registering = threading.Lock()


def register_layout(processor: type, parts: str | None) -> None:
    """Say in which order attention processors of a class of yours have their tokens.

        fm.register_layout(MyProcessor, "text + image")

    Captures then name these parts in every model that has such processors. It holds for the class
    itself, and for subclasses without a ``__call__`` of their own.

    Args:
        processor: the class.
        parts: names in the order in which they stand, joined by plus signs; "queries -> keys" where
            the keys are others: ``"image -> text"``. "text" has as many tokens as the model's
            ``encoder_hidden_states``, "image" those of its grid (or of ``fm.capture(grid=)``); one
            part of unknown size has the rest. None: forget the class.

    Raises TypeError for what is no class, ValueError for what is no order.
    """
    if not isinstance(processor, type):
        raise TypeError(
            f"register_layout wants the class of a processor, got {processor!r}; give "
            f"{type(processor).__name__}"
        )
    with _registering:
        if parts is None:
            _registered.pop(processor, None)
        else:
            _registered[processor] = _rule(parts)


def _rule(parts: str) -> Rule:
    order(parts)  # raises ValueError
    return Rule("*", (parts,), said=True)


# -- what the user says of one capture -------------------------------------------------------------


def said(parts: Any) -> Parts:
    """``parts=`` of a capture: patterns of layers, each with an order or with ranges."""
    if parts is None:
        return ()
    if isinstance(parts, str):
        return (("*", _rule(parts)),)
    if not isinstance(parts, Mapping) or not parts:
        raise TypeError(_WANTED.format(parts))
    if set(parts) == {"queries", "keys"}:
        return (("*", (_ranges(parts["queries"]), _ranges(parts["keys"]))),)
    if any(_is_range(each) for each in parts.values()):
        ranges = _ranges(parts)
        return (("*", (ranges, ranges)),)
    return tuple(
        (str(pattern).removesuffix(".processor"), said(each)[0][1])
        for pattern, each in parts.items()
    )


_WANTED = (
    "parts={!r}; wanted an order such as 'text + image', ranges by name such as "
    "{{'text': slice(0, 77), 'image': slice(77, 333)}}, or these by pattern of layers: "
    "{{'blocks.*': 'text + image'}}"
)


def _is_range(value: Any) -> bool:
    return isinstance(value, slice) or (
        isinstance(value, (tuple, list)) and all(isinstance(n, int) for n in value)
    )


def _ranges(parts: Any) -> Mapping[str, slice]:
    found = {}
    for name, each in parts.items() if isinstance(parts, Mapping) else ():
        part = slice(*each) if isinstance(each, (tuple, list)) else each
        whole = isinstance(part, slice) and part.step in (None, 1)
        if not (whole and isinstance(part.start, int) and isinstance(part.stop, int)):
            raise TypeError(_WANTED.format(parts))
        if not 0 <= part.start < part.stop:
            raise ValueError(
                f"parts= has {name!r} at tokens {part.start} to {part.stop}; wanted a start of 0 "
                "or more, and a stop after it"
            )
        found[name] = slice(part.start, part.stop)
    if not found:
        raise TypeError(_WANTED.format(parts))
    return found


def said_grid(grid: Any) -> tuple[int, Grid] | None:
    """``grid=`` of a capture as (frames, (height, width))."""
    if grid is None:
        return None
    whole = isinstance(grid, (tuple, list)) and all(isinstance(n, int) and n > 0 for n in grid)
    if not whole or len(grid) not in (2, 3):
        raise ValueError(
            f"grid={grid!r}; wanted (height, width) of the finest image tokens, or (frames, "
            "height, width) of a video's, all at least 1"
        )
    frames = grid[0] if len(grid) == 3 else 1
    return frames, (grid[-2], grid[-1])


def with_grid(tokens: Tokens, said: tuple[int, Grid] | None) -> Tokens:
    """The tokens, on the grid that the user says they have."""
    if said is None:
        return tokens
    frames, grid = said
    sizes = dict(tokens.sizes)
    whole = sizes.get("image", 0) + sizes.get("reference", 0)
    sizes["image"] = frames * math.prod(grid)
    if "reference" in sizes:
        sizes["reference"] = whole - sizes["image"]
    return dataclasses.replace(tokens, grid=grid, frames=frames, sizes=sizes)


# -- models and processors -------------------------------------------------------------------------

_FAMILY_OF = {name: family for family in FAMILIES for name in family.models}


def family_of(model: Any) -> Family | None:
    """The family of a model: its class is listed, or it inherits ``forward`` from one that is."""
    kind: Any = type(model)
    return _family(kind)


@functools.cache
def _family(kind: Any) -> Family | None:
    found = _that_defines(kind, ("forward",))
    return None if found is None or not _of_diffusers(found) else _FAMILY_OF.get(found.__name__)


def guides_in_two_passes(model: Any) -> bool:
    """Whether the model's pipelines run it twice a step for guidance, rather than on one batch."""
    family = family_of(model)
    return family is not None and family.passes


def _that_defines(kind: type, names: tuple[str, ...]) -> type | None:
    for each in kind.__mro__:
        if each is nn.Module:
            return None
        if any(name in vars(each) for name in names):
            return each
    return None


def _of_diffusers(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "diffusers"


def tokens_of(model: Any, given: Mapping[str, Any]) -> Tokens:
    """What a model was called with, in tokens: of a class not listed, the length of its text."""
    family = family_of(model)
    if family is not None:
        return family.tokens(model, given)
    text = given.get("encoder_hidden_states")
    sizes = {"text": text.shape[1]} if isinstance(text, Tensor) and text.ndim == 3 else {}
    return Tokens(sizes=sizes)


def plan_of(
    model: Any, layer: str, attn: Any, processor: Any, parts: Parts = (), full: str | None = None
) -> Plan:
    """What is known of a layer before it runs.

    Args:
        layer: its name in the model; ``full``: in the pipeline, for the patterns of ``parts``.
        processor: the very processor, not a stand-in.
    """
    family = family_of(model)
    level = None if family is None else family.level(model, layer)
    kind = _that_defines(type(processor), ("__call__", "forward"))
    name = f"{type(processor).__name__} in {type(model).__name__}"
    for pattern, each in parts:
        if fnmatch.fnmatchcase(full or layer, pattern):
            if isinstance(each, Rule):
                return Plan(each, level, name)
            return Plan(None, level, name, each)
    if kind in _registered:
        return Plan(_registered[kind], level, name)
    if family is not None and type(processor).__name__ in _REPLACES_KEYS:
        return Plan(_REPLACED, level, name)
    listed = kind.__name__ if kind is not None and _of_diffusers(kind) else ""
    for rule in () if family is None else family.rules:
        if (
            fnmatch.fnmatchcase(layer, rule.layers)
            and (not rule.processors or listed in rule.processors)
            and (not rule.only_if or getattr(attn, rule.only_if, None) is not None)
        ):
            return Plan(rule, level, name)
    if listed in _PROMPTS:
        return Plan(_PROMPTED, level, name)
    return Plan(None, level, name)
