"""All methods on a chunk of pairs: where each puts every point, and what each score says of it."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.evaluation import points as carried
from flashmaps.evaluation.baselines import colours, dense_sift, nearest, unit_rows, untrained
from flashmaps.evaluation.benchmark import Pair
from flashmaps.images import Image
from flashmaps.match import READING, cross_map
from flashmaps.pairs import SCORES, match_pairs
from flashmaps.pipelines import Features, features

KEPT_BYTES = 2**30  # of features and descriptors of images that may come again
_NOISE_APART = 1_000_003

# Methods that look at no image.
CEILING = "best token there is"
FREE = ("identity", "random", CEILING)


@dataclass(frozen=True, eq=False)
class Described:
    """What the methods need of one image."""

    trained: Features
    untrained: Features
    descriptors: dict[str, Tensor]  # [N, c] each; nearest is best

    def size(self) -> int:
        """Bytes."""
        tensors = [f for each in (self.trained, self.untrained) for f in (each.query, each.key)]
        return sum(t.numel() * t.element_size() for t in (*tensors, *self.descriptors.values()))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one pair's points.

    Attributes:
        found: method to [n, 2], (x, y) in target pixels.
        scores: comparison to score (of ``flashmaps.pairs.SCORES``) to [n], NaN where undefined.
        grids: (height, width) of the source's and of the target's tokens.
    """

    found: dict[str, np.ndarray]
    scores: dict[str, dict[str, np.ndarray]]
    grids: tuple[tuple[int, int], tuple[int, int]]


def method_names(compare: Sequence[str]) -> list[str]:
    """The methods in the order of tables: matches, the same layer's cosine, baselines."""
    return [
        *(f"{READING[c]}, {kind}" for c in compare for kind in ("hard", "soft")),
        "cosine of keys",
        "cosine of queries",
        *(f"untrained, {READING[c]}" for c in compare),
        "SIFT",
        "raw colour, 3 x 3",
        "raw colour",
        *FREE,
    ]


class Methods:
    """Runs every method, each image through each model once.

    Args:
        pipe: a loaded pipeline.
        compare: which of "kk", "qk", "qq" to match by.
        backend: what computes the maps.
        seed: of the method "random".
        options: for :func:`flashmaps.pipelines.features`; ``prompt`` may hold "{category}", and
            with ``same_noise=False`` every image gets noise of its own.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        compare: Sequence[str] = ("kk",),
        backend: str = "auto",
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe, self.fresh = pipe, untrained(pipe)
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
            for batch in match_pairs(sets, local, compare=compare, backend=self.backend):
                for row in range(len(batch.pairs)):
                    pair = numbered[done][1]
                    put = _Put(pair, batch.source_grid, batch.target_grid)
                    forward = batch.trip.forward[row].cpu().numpy()
                    found[done][f"{READING[compare]}, hard"] = put.hard(forward[put.tokens])
                    found[done][f"{READING[compare]}, soft"] = put.soft(batch.expected_target[row])
                    scores[done][compare] = {
                        name: batch.score(name)[row].float().cpu().numpy()[put.tokens]
                        for name in SCORES
                    }
                    done += 1
        for place, (number, pair) in enumerate(numbered):
            here, there = (described[keys[i]] for i in local[place])
            put = _Put(pair, here.trained.grid, there.trained.grid)
            found[place].update(self._baselines(number, pair, put, here, there))
            yield number, Outcome(found[place], scores[place], (put.grid, put.target_grid))

    def _baselines(
        self, number: int, pair: Pair, put: _Put, here: Described, there: Described
    ) -> dict[str, np.ndarray]:
        found = {}
        for name, descriptors in here.descriptors.items():
            chosen = nearest(descriptors[put.tokens], there.descriptors[name])
            found[name] = put.hard(chosen.numpy())
        for compare in self.compare:
            fresh = cross_map(
                here.untrained, there.untrained, compare=compare, backend=self.backend
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
            return features(pipe, list(images.values()), prompt=prompts, **self.options)
        seeds = self.options.get("seeds", (0,))
        found = []
        for (name, prompt), image in images.items():
            # By its name, so that neither order nor chunks change what an image gets.
            apart = _NOISE_APART * (1 + zlib.crc32(name.encode()))
            options = {**self.options, "seeds": [seed + apart for seed in seeds]}
            found += features(pipe, [image], prompt=prompt, **options)
        return found

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
    return {
        "cosine of keys": unit_rows(of.key),
        "cosine of queries": unit_rows(of.query),
        "SIFT": dense_sift(of.image, of.grid),
        "raw colour, 3 x 3": colours(of, 3),
        "raw colour": colours(of, 1),
    }


def fingerprint(pipe: Any) -> str:
    """A few values of every weight of the UNet, hashed: tells one model from another."""
    import hashlib

    digest = hashlib.sha256()
    for name, weight in pipe.unet.state_dict().items():
        digest.update(name.encode())
        if weight.is_meta:  # offloaded: what it holds is elsewhere
            continue
        some = weight.detach().flatten()[:16].to("cpu", torch.float32)
        digest.update(some.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
