"""How a page looks: which layers, timesteps, heads and comparison; lazy maps of two pictures."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashmaps.diffusion.capture import capture, find_layers
from flashmaps.diffusion.features import (
    OTHER_NOISE,
    Features,
    default_layers,
    default_size,
    features,
    size_multiple,
)
from flashmaps.explorer.parameters import Parameters
from flashmaps.explorer.pictures import Picture
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.matching.cross_map import cross_map
from flashmaps.matching.match import match_features
from flashmaps.matching.options import COMPARE, NORMALIZE
from flashmaps.matching.result import Match
from flashmaps.matching.settings import MatchSettings, settings_of
from flashmaps.segmentation.seen import Seen, as_seen, with_object_layers

MOST_MEMORY = 2**30  # bytes of features that are kept, of all visitors
MOST_TOKENS = 128 * 128  # of an image, that a page may ask for


@dataclass(frozen=True)
class View:
    """What a page chose; None is the model's own."""

    layers: tuple[str, ...] | None = None
    timestep: tuple[int, ...] | None = None
    size: int | None = None
    head: int | None = None  # None: their mean
    compare: str | None = None
    temperature: float | None = None
    normalize: str | None = None


class Model:
    """A loaded pipeline and what a page may choose of it."""

    pipe: Any

    def __init__(self, pipe: Any, name: str) -> None:
        self.pipe, self.name = pipe, name
        self.own = settings_of(pipe)
        self.layers = tuple(find_layers(pipe.unet, "*.attn1"))
        self.timesteps = int(pipe.scheduler.config.num_train_timesteps)
        self.size, self.multiple = default_size(pipe), size_multiple(pipe)
        self._seen: OrderedDict[Any, Features] = OrderedDict()

    def told(self) -> dict[str, Any]:
        """For the page: names, ranges and defaults."""
        own = self.own
        with capture(self.pipe.unet, own.layers or self._default()):
            pass  # refuses what cannot be observed, in a sentence
        return {
            "name": self.name,
            "layers": list(self.layers),
            "timesteps": self.timesteps,
            "sizes": self.sizes(),
            "compare": list(COMPARE),
            "normalize": list(NORMALIZE),
            "own": {
                "layers": list(find_layers(self.pipe.unet, own.layers or self._default())),
                "timestep": list(own.timesteps),
                "size": own.size or self.size,
                "compare": own.compare,
                "temperature": own.temperature,
                "normalize": own.normalize,
            },
        }

    def sizes(self) -> list[int]:
        """Longer sides in pixels that a page may choose."""
        side = self.size
        found = {side * k // 4 // self.multiple * self.multiple for k in (2, 4, 6, 8)}
        return sorted(each for each in found | {side} if each >= self.multiple)

    def view(self, given: Parameters) -> View:
        """The view that parameters name. Raises ValueError for what cannot be chosen."""
        return View(
            layers=given.names("layers", self.layers),
            timestep=given.wholes("timestep", 0, self.timesteps - 1),
            size=_among("size", given.whole("size", 1, 1 << 20), self.sizes()),
            head=given.whole("head", 0, 1 << 16),
            compare=given.choice("compare", tuple(COMPARE)),
            temperature=given.number("temperature", 1e-4, 100.0),
            normalize=given.choice("normalize", NORMALIZE),
        )

    def settings(self, view: View) -> MatchSettings:
        """The view as arguments of :func:`flashmaps.match`."""
        return self.own.with_given(
            layers=view.layers, timestep=view.timestep, size=view.size, compare=view.compare,
            temperature=view.temperature, normalize=view.normalize,
        )  # fmt: skip

    def see(self, pictures: list[Picture], view: View, *, outputs: bool) -> list[Features]:
        """Features of pictures, the first as a source, the others as targets; all are kept.

        Where images get noise of their own, targets get that of the second image of a match.
        """
        settings = self.settings(view)
        found: list[Features] = []
        for place, each in enumerate(pictures):
            shift = OTHER_NOISE if place and not settings.same_noise else 0
            arguments = {
                **settings.for_features,
                "seeds": tuple(seed + shift for seed in settings.seeds),
            }
            told = {**arguments, "outputs": outputs}
            key = (each, *sorted((name, str(value)) for name, value in told.items()))
            seen = self._kept(key)
            if seen is None:
                seen = features(self.pipe, [each.image], **arguments, outputs=outputs)[0]
                if seen.grid[0] * seen.grid[1] > MOST_TOKENS:
                    raise ValueError(
                        f"{seen.grid[0]} x {seen.grid[1]} tokens are more than the page shows; "
                        f"choose coarser layers or a smaller size"
                    )
                self._keep(key, seen)
            found.append(seen)
        return found

    def sight(self, one: Picture, view: View) -> Seen:
        """What segments read of a picture, as :func:`flashmaps.segment` does."""
        found = self.see([one], view, outputs=True)
        return as_seen(found[0]) if view.layers else with_object_layers(self.pipe, found)[0]

    def _kept(self, key: Any) -> Features | None:
        if key in self._seen:
            self._seen.move_to_end(key)
        return self._seen.get(key)

    def _keep(self, key: Any, found: Features) -> None:
        """Remember features, and forget the oldest beyond MOST_MEMORY."""
        self._seen[key] = found
        total = sum(each.nbytes for each in self._seen.values())
        while total > MOST_MEMORY and len(self._seen) > 1:
            total -= self._seen.popitem(last=False)[1].nbytes

    def _default(self) -> str:
        return default_layers(self.pipe)


class Pair:
    """Two pictures seen one way: lazy maps between them, and their match once it is asked for."""

    def __init__(self, model: Model, source: Picture, target: Picture, view: View) -> None:
        settings = model.settings(view)
        self.settings, self.source, self.target = settings, source, target
        self.view, self.others = view, tuple[str, ...]()
        outputs = settings.compare == "features"
        here, there = model.see([source, target], view, outputs=outputs)
        self.heads = len(_weights(here, settings.compare))
        self.head = view.head
        if view.head is not None:
            if view.head >= self.heads:
                raise ValueError(f"head is {view.head}; this map has {self.heads}, from 0")
            here, there = (_one_head(each, view.head, settings.compare) for each in (here, there))
            settings = replace(settings, calibration=None)
        self.features = {"source": here, "target": there}
        self.options = settings.options
        self._match: Match | None = None
        self._maps: dict[tuple[str, str], AttentionMap] = {}

    def add(self, name: str, found: Features) -> None:
        """Another picture that the source may look in."""
        head = self.head
        self.features[name] = (
            found if head is None else _one_head(found, head, self.options.compare)
        )

    def map(self, of: str, to: str) -> AttentionMap:
        """The lazy map from one side to another, which may be the same. Nothing is computed."""
        if (of, to) not in self._maps:
            self._maps[of, to] = cross_map(
                self.features[of], self.features[to], replace(self.options, calibration=None)
            )
        return self._maps[of, to]

    def row(self, of: str, to: str, token: int) -> Tensor:
        """One row of the map: [M] float32."""
        with torch.no_grad():
            row = self.map(of, to).rows([token])[0, 0]
        return row.float().cpu()

    @property
    def match(self) -> Match:
        """The match and all its statistics."""
        if self._match is None:
            with torch.no_grad():
                self._match = match_features(
                    self.features["source"], self.features["target"], self.options
                )
        return self._match

    def check_token(self, side: str, token: int | None) -> int:
        """ValueError unless ``token`` is one of that side's."""
        height, width = self.features[side].grid
        if token is None or not 0 <= token < height * width:
            raise ValueError(f"token is {token}; the {side} has {height * width}, from 0")
        return token


def _weights(found: Features, compare: str) -> Tensor:
    if compare == "features":
        assert found.output is not None  # asked for in `see`
        return torch.ones(found.output.shape[1])
    return found.head_weights


def _one_head(found: Features, head: int, compare: str) -> Features:
    if compare == "features":
        assert found.output is not None
        return replace(found, output=found.output[:, head : head + 1])
    return replace(
        found, query=found.query[:, head : head + 1], key=found.key[:, head : head + 1],
        head_weights=torch.ones_like(found.head_weights[:1]),
    )  # fmt: skip


def _among(name: str, value: int | None, among: list[int]) -> int | None:
    if value is not None and value not in among:
        raise ValueError(f"{name} is {value}; wanted one of {', '.join(map(str, among))}")
    return value
