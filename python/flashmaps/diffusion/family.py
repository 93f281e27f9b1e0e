"""What is said of a family of models, and what many of them have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashmaps.diffusion.called import Given
from flashmaps.diffusion.layouts import Rule, Tokens


@dataclass(frozen=True)
class Family:
    """Models whose layers attend alike.

    Attributes:
        name: as people say it.
        models: names of the classes of diffusers.
        rules: of the layers, the first whose pattern matches.
        tokens: from a model and what it is called with.
        passes: whether its pipelines guide in two forward passes a step, first with the prompt.
        level: of a layer by name: how many times its grid is halved; None: not known.
    """

    name: str
    models: tuple[str, ...]
    rules: tuple[Rule, ...]
    tokens: Callable[[Any, Given], Tokens]
    passes: bool = False
    level: Callable[[Any, str], int | None] = lambda model, layer: None


def by(*names: str) -> frozenset[str]:
    """Names of processors."""
    return frozenset(names)


PROMPTED = ("image -> image_prompt*",)  # a further attention of an IP-Adapter
SELF = Rule("*.attn1", ("image",))
CROSS = Rule("*.attn2", ("image -> text",))
TIME = ("frames",)
