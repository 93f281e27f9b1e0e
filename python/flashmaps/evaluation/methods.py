"""All methods on a chunk of pairs: where each puts every point, and what each score says of it."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.batches.features import with_own_noise
from flashmaps.diffusion.features import Features, features
from flashmaps.diffusion.images import Image
from flashmaps.evaluation import points as carried
from flashmaps.evaluation.baselines import colours, dense_sift, nearest, unit_rows, untrained
from flashmaps.evaluation.benchmark import Pair
from flashmaps.matching.confidence import SCORES
from flashmaps.matching.cross_map import cross_map, place_points
from flashmaps.matching.options import READING, MatchOptions
from flashmaps.matching.pairs import match_pairs
from flashmaps.matching.settings import MatchSettings, fingerprint
from flashmaps.matching.support import support

__all__ = ["Methods", "Outcome", "fingerprint", "judged_by", "method_names"]

KEPT_BYTES = 2**30  # of features and descriptors of images that may come again

DEFAULT = "fm.match"  # with the model's own settings, where they are more than a hard match
# Methods that look at no image.
CEILING = "best token there is"
FREE = ("identity", "random", CEILING)


@dataclass(frozen=True, eq=False)
class Described:
    """What the methods need of one image."""

    trained: Features
    untrained: Features | None = None
    descriptors: dict[str, Tensor] = field(default_factory=dict)  # [N, c] each; nearest is best

    def size(self) -> int:
        """Bytes."""
        both = [each for each in (self.trained, self.untrained) if each is not None]
        tensors = [f for each in both for f in (each.query, each.key, each.output) if f is not None]
        return sum(t.numel() * t.element_size() for t in (*tensors, *self.descriptors.values()))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one pair's points.

    Attributes:
        found: method to [n, 2], (x, y) in target pixels.
        scores: comparison to score (of ``flashmaps.matching.confidence.SCORES``, and "confidence"
            where there is a calibration) to [n], NaN where undefined. Of the token of each point;
            the support is of where the judged method puts it.
        grids: (height, width) of the source's and of the target's tokens.
    """

    found: dict[str, np.ndarray]
    scores: dict[str, dict[str, np.ndarray]]
    grids: tuple[tuple[int, int], tuple[int, int]]


def method_names(compare: Sequence[str], settings: MatchSettings | None = None) -> list[str]:
    """The methods in the order of tables: matches, the same layer's cosine, baselines."""
    return [
        *([DEFAULT] if settings is not None and _is_more(settings) else []),
        *(f"{READING[c]}, {kind}" for c in compare for kind in ("hard", "soft")),
        "cosine of keys",
        "cosine of queries",
        "cosine of features",
        *(f"untrained, {READING[c]}" for c in compare),
        "SIFT",
        "raw colour, 3 x 3",
        "raw colour",
        *FREE,
    ]


def judged_by(compare: str, settings: MatchSettings | None = None) -> str:
    """The method whose matches the scores of a comparison judge."""
    if settings is not None and _is_more(settings) and settings.compare == compare:
        return DEFAULT
    return f"{READING[compare]}, hard"


def _is_more(settings: MatchSettings) -> bool:
    return settings.readout != "hard" or settings.between not in (None, "token")


class Methods:
    """Runs every method, each image through each model once.

    Args:
        pipe: a loaded pipeline.
        compare: which of "kk", "qk", "qq" to match by.
        backend: what computes the maps.
        seed: of the method "random".
        options: for :func:`flashmaps.diffusion.features.features`; ``prompt`` may hold
        "{category}", and
            with ``same_noise=False`` every image gets noise of its own.
        settings: temperature, normalisation, readout and calibration of ``settings.compare``; the
            other comparisons have the defaults.
        baselines: whether to run what is not a match by ``compare``.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        compare: Sequence[str] = ("kk",),
        backend: str = "auto",
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        settings: MatchSettings | None = None,
        baselines: bool = True,
    ) -> None:
        self.pipe, self.fresh = pipe, untrained(pipe) if baselines else None
        self.settings = MatchSettings(compare=compare[0]) if settings is None else settings
        self.compare, self.backend, self.seed = tuple(compare), backend, seed
        self.options = dict(options or {})
        self.prompt = self.options.pop("prompt", "")
        self.same_noise = self.options.pop("same_noise", True)
        self._kept: OrderedDict[tuple[str, str], Described] = OrderedDict()

    def run(self, numbered: Sequence[tuple[int, Pair]]) -> Iterator[tuple[int, Outcome]]:
        """(number, outcome) of each numbered pair of a chunk, in its order."""
        described = self._describe([pair for _, pair in numbered])
        keys = list(described)
        local = [
            (keys.index(self._key(pair, "source")), keys.index(self._key(pair, "target")))
            for _, pair in numbered
        ]
        sets = [each.trained for each in described.values()]
        found: list[dict[str, np.ndarray]] = [{} for _ in numbered]
        scores: list[dict[str, dict[str, np.ndarray]]] = [{} for _ in numbered]
        for compare in self.compare:
            done = 0
            for batch in match_pairs(sets, local, self._own(compare), backend=self.backend):
                for row in range(len(batch.pairs)):
                    pair = numbered[done][1]
                    put = _Put(pair, batch.source_grid, batch.target_grid)
                    forward = batch.trip.forward[row].cpu().numpy()
                    found[done][f"{READING[compare]}, hard"] = put.hard(forward[put.tokens])
                    found[done][f"{READING[compare]}, soft"] = put.soft(batch.expected_target[row])
                    each = {n: batch.score(n)[row].float().cpu()[put.tokens] for n in SCORES}
                    if compare == self.settings.compare:
                        if _is_more(self.settings):  # these judge where that puts the points
                            both = [described[keys[i]].trained for i in local[done]]
                            own = found[done][DEFAULT] = self._default(put, *both)
                            placed = carried.tokens_at(own, put.target_grid, put.other)
                            each["support"] = support(
                                batch.trip.forward[row, None].cpu(),
                                batch.trip.backward[row, None].cpu(),
                                *(put.grid, put.target_grid),
                                *(torch.from_numpy(x)[None] for x in (put.tokens, placed)),
                            )[0]  # fmt: skip
                        if self.settings.calibration:
                            each["confidence"] = self.settings.calibration.probability(each)
                    scores[done][compare] = {n: v.numpy() for n, v in each.items()}
                    done += 1
        for place, (number, pair) in enumerate(numbered):
            here, there = (described[keys[i]] for i in local[place])
            put = _Put(pair, here.trained.grid, there.trained.grid)
            if _is_more(self.settings) and DEFAULT not in found[place]:
                found[place][DEFAULT] = self._default(put, here.trained, there.trained)
            if here.untrained is not None and there.untrained is not None:
                found[place].update(self._baselines(number, pair, put, here, there))
            yield number, Outcome(found[place], scores[place], (put.grid, put.target_grid))

    def _own(self, compare: str) -> MatchOptions:
        return self.settings.options.about(compare)

    def _default(self, put: _Put, here: Features, there: Features) -> np.ndarray:
        """As ``Match.transfer`` would, without what it would compute of other tokens."""
        unit = torch.from_numpy(carried.to_unit(put.points, put.size))
        found = place_points(here, there, unit[None], self.settings, backend=self.backend)
        return put.move(found[0].double().numpy() - unit.numpy())

    def _baselines(
        self, number: int, pair: Pair, put: _Put, here: Described, there: Described
    ) -> dict[str, np.ndarray]:
        found = {}
        for name, descriptors in here.descriptors.items():
            chosen = nearest(descriptors[put.tokens], there.descriptors[name])
            found[name] = put.hard(chosen.numpy())
        for compare in self.compare:
            assert here.untrained is not None and there.untrained is not None
            fresh = cross_map(
                here.untrained, there.untrained, self._own(compare), backend=self.backend
            )
            chosen = fresh.argmax()[0].cpu()[put.tokens]
            found[f"untrained, {READING[compare]}"] = put.hard(chosen.numpy())
        tokens = put.target_grid[0] * put.target_grid[1]
        drawn = np.random.default_rng([self.seed, number]).integers(tokens, size=len(put.tokens))
        true = carried.tokens_at(pair.target_points, put.target_grid, put.other)
        found["identity"] = put.move(np.zeros((len(put.tokens), 2)))
        found["random"] = put.hard(drawn)
        found[CEILING] = put.hard(true)
        return found

    def _describe(self, pairs: Sequence[Pair]) -> dict[tuple[str, str], Described]:
        """Every image of the chunk once, by name and prompt."""
        images: dict[tuple[str, str], Image] = {}
        for pair in pairs:
            images[self._key(pair, "source")] = pair.source_image
            images[self._key(pair, "target")] = pair.target_image
        missing = {key: image for key, image in images.items() if key not in self._kept}
        if missing:
            trained = self._features(self.pipe, missing)
            if self.fresh is None:
                self._kept.update({k: Described(f) for k, f in zip(missing, trained, strict=True)})
            else:
                fresh = self._features(self.fresh, missing)
                for key, one, other in zip(missing, trained, fresh, strict=True):
                    self._kept[key] = Described(one, other, _descriptors(one))
        chosen = {}
        for key in images:
            self._kept.move_to_end(key)
            chosen[key] = self._kept[key]
        held = sum(each.size() for each in self._kept.values())
        while held > KEPT_BYTES and len(self._kept) > len(images):
            held -= self._kept.popitem(last=False)[1].size()
        return chosen

    def _features(self, pipe: Any, images: Mapping[tuple[str, str], Image]) -> list[Features]:
        prompts = [prompt for _, prompt in images]
        if self.same_noise:
            return features(
                pipe, list(images.values()), prompt=prompts, outputs=True, **self.options
            )
        # By its name, so that neither order nor chunks change what an image gets.
        numbers = [1 + zlib.crc32(name.encode()) for name, _ in images]
        options = {**self.options, "outputs": True}
        return with_own_noise(pipe, list(images.values()), numbers, options, prompts)

    def _key(self, pair: Pair, side: str) -> tuple[str, str]:
        return getattr(pair, side), self.prompt.replace("{category}", pair.category)


class _Put:
    """Carries one pair's points."""

    def __init__(self, pair: Pair, grid: tuple[int, int], target_grid: tuple[int, int]) -> None:
        self.points, self.grid, self.target_grid = pair.source_points, grid, target_grid
        self.size, self.other = pair.source_image.shape[:2], pair.target_image.shape[:2]
        self.tokens = carried.tokens_at(self.points, grid, self.size)

    def hard(self, chosen: np.ndarray) -> np.ndarray:
        return carried.hard(self.points, chosen, self.grid, self.target_grid, self.size, self.other)

    def soft(self, expected: Tensor) -> np.ndarray:
        return carried.soft(self.points, expected, self.grid, self.size, self.other)

    def move(self, movement: np.ndarray) -> np.ndarray:
        return carried.carry(self.points, movement, self.size, self.other)


def _descriptors(of: Features) -> dict[str, Tensor]:
    assert of.output is not None  # asked for above
    return {
        "cosine of keys": unit_rows(of.key),
        "cosine of queries": unit_rows(of.query),
        "cosine of features": unit_rows(of.output),
        "SIFT": dense_sift(of.image, of.grid),
        "raw colour, 3 x 3": colours(of, 3),
        "raw colour": colours(of, 1),
    }
