"""Which way of matching is best for a model: a greedy search over named axes, on one set of pairs.

Not a full product, which would be some 100,000 variants, but stages. The first tries every
comparison at every layer and timestep, since what is compared and where depend on each other most.
Each later stage changes one axis, or a few that depend on each other (temperature and readout), of
the best variant so far. Then all stages are gone through once more from where that ended, so that
an early choice can be taken back.

A variant is better when its value is higher: PCK@0.1, minus half a percentage point for each
doubling of the forward passes that it takes. Ties go to PCK@0.05, then to the smaller mean error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flashmaps.evaluation.benchmark import Benchmark
from flashmaps.evaluation.bootstrap import resample
from flashmaps.evaluation.results import Points
from flashmaps.evaluation.store import Store
from flashmaps.matching.cross_map import place_points
from flashmaps.matching.options import BETWEEN, COMPARE, NORMALIZE
from flashmaps.matching.settings import MatchSettings

TIMESTEPS = (1, 51, 101, 201, 301, 401)
NOISES = (1, 2, 4)  # how many are averaged
COSINES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2)  # temperatures
ATTENTION = (0.25, 0.5, 1.0, 2.0)  # temperatures of queries on keys
READOUTS = (("hard", 1), ("soft", 1), ("window", 1), ("window", 2), ("window", 4), ("parabola", 1))
PRICE = 0.005  # of PCK@0.1, for each doubling of the forward passes
ROUNDS = 2
_ALLOWED = 4  # layers, and timesteps, that are averaged at most


@dataclass(frozen=True, eq=False)
class Questions:
    """Points of P pairs whose places are known, n each, padded with NaN."""

    unit: torch.Tensor  # [P, n, 2] in the source's unit square
    true: np.ndarray  # [P, n, 2] in target pixels
    base: np.ndarray  # [P]
    size: tuple[int, int]  # (height, width) of the targets

    @classmethod
    def of(cls, benchmark: Benchmark) -> tuple[Questions, list[Any]]:
        """The points of a benchmark whose images have one size, and its images by turns."""
        pairs = [benchmark.pair(i) for i in range(len(benchmark))]
        most = max(len(pair.source_points) for pair in pairs)
        size = pairs[0].target_image.shape[:2]
        points = np.zeros((len(pairs), most, 2))
        true = np.full((len(pairs), most, 2), np.nan)
        for place, pair in enumerate(pairs):
            height, width = pair.source_image.shape[:2]
            count = len(pair.source_points)
            points[place, :count] = (pair.source_points + 0.5) / (width, height)
            true[place, :count] = pair.target_points
        images = [each for pair in pairs for each in (pair.source_image, pair.target_image)]
        base = np.array([pair.base for pair in pairs])
        return cls(torch.from_numpy(points).float(), true, base, (size[0], size[1])), images


@dataclass(frozen=True)
class Trial:
    """One variant and what it scored."""

    stage: str
    settings: MatchSettings
    scores: dict[str, Any]  # as `Points.score` has them
    value: float

    @property
    def order(self) -> tuple[float, float, float]:
        """Larger is better."""
        pck = self.scores["pck"]
        return self.value, pck["0.05"]["per_point"], -self.scores["error"]["mean_of_base"]


class Search:
    """The search over one store; ``trials`` has every variant that was tried, in order.

    Args:
        store: the passes of the images of ``questions``.
        timesteps, sizes, noises: what to try of each; a size of None is the model's own.
        resamples, seed: of the bootstrap over pairs.
    """

    def __init__(
        self,
        store: Store,
        questions: Questions,
        *,
        timesteps: Sequence[int] = TIMESTEPS,
        sizes: Sequence[int | None] = (None,),
        noises: Sequence[int] = NOISES,
        compare: Sequence[str] = tuple(COMPARE),
        resamples: int = 1000,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.store, self.questions = store, questions
        self.timesteps, self.sizes, self.noises = timesteps, sizes, noises
        self.compare, self.progress = compare, progress
        self.counts = resample(len(questions.base), resamples, seed)
        self.trials: dict[MatchSettings, Trial] = {}

    def run(self) -> Trial:
        """The best variant."""
        best: Trial | None = None
        for number in range(ROUNDS):
            before = best
            for name, candidates in self._stages():
                stage = name if number == 0 else f"{name}, again"
                best = self._best(stage, best, candidates(best))
            if before is not None and best is before:
                break
        assert best is not None
        return best

    def _stages(self) -> list[tuple[str, Any]]:
        return [
            ("what, where and when", self._grid),
            ("layers averaged", self._layers),
            ("timesteps averaged", self._timesteps),
            ("size", self._sizes),
            ("noises averaged", self._noises),
            ("temperature and readout", self._readouts),
            ("normalisation", self._normalize),
            ("neighbours' consensus", self._consensus),
        ]

    def _grid(self, best: Trial | None) -> Iterable[MatchSettings]:
        start = (
            MatchSettings(readout="window", between="query", size=self.sizes[0])
            if best is None
            else best.settings
        )
        for compare in self.compare:
            for timestep in self.timesteps:
                for layer in self.store.layers:
                    one = replace(start, layers=(layer,), timestep=timestep)
                    changed = compare != start.compare
                    # A temperature of cosines says nothing of queries on keys, and back.
                    if changed and "qk" in (compare, start.compare):
                        one = replace(one, temperature=None)
                    yield replace(one, compare=compare)

    def _layers(self, best: Trial) -> Iterable[MatchSettings]:
        """One more layer of the same grid, or one less, until nothing is gained."""
        yield from self._grown(best, "layers", self._alike(best.settings))

    def _timesteps(self, best: Trial) -> Iterable[MatchSettings]:
        yield from self._grown(best, "timestep", self.timesteps)

    def _grown(self, best: Trial, name: str, every: Sequence[Any]) -> Iterable[MatchSettings]:
        current = best
        while True:
            held = getattr(current.settings, name)
            held = held if isinstance(held, tuple) else (held,)
            wider = [(*held, each) for each in every if each not in held]
            fewer = [tuple(x for x in held if x != each) for each in held]
            found = wider * (len(held) < _ALLOWED) + fewer * (len(held) > 1)
            candidates = []
            for each in found:
                changed: dict[str, Any] = {name: tuple(sorted(each, key=list(every).index))}
                candidates.append(replace(current.settings, **changed))
            yield from candidates
            tried = [self.trials[each] for each in candidates]
            better = max(tried, key=lambda trial: trial.order, default=current)
            if better.order <= current.order:
                return
            current = better

    def _alike(self, settings: MatchSettings) -> list[str]:
        """The layers with as many tokens as the first of the chosen ones."""
        assert settings.layers is not None
        first = settings.timesteps[0]
        grid = self.store.grid(settings.layers[0], settings.size, first)
        return [
            layer
            for layer in self.store.layers
            if self.store.grid(layer, settings.size, first) == grid
        ]

    def _sizes(self, best: Trial) -> Iterable[MatchSettings]:
        """Other sizes, each at every layer that takes part or could: tokens are finer there."""
        for size in self.sizes:
            if size != best.settings.size:
                yield replace(best.settings, size=size)
                for layer in self.store.layers:
                    yield replace(best.settings, size=size, layers=(layer,))

    def _noises(self, best: Trial) -> Iterable[MatchSettings]:
        for count in self.noises:
            for same in (True, False):
                yield replace(best.settings, seeds=tuple(range(count)), same_noise=same)

    def _readouts(self, best: Trial) -> Iterable[MatchSettings]:
        for temperature in ATTENTION if best.settings.compare == "qk" else COSINES:
            for readout, window in READOUTS:
                for between in BETWEEN:
                    yield replace(
                        best.settings,
                        temperature=temperature,
                        readout=readout,
                        window=window,
                        between=between,
                    )

    def _normalize(self, best: Trial) -> Iterable[MatchSettings]:
        for normalize in NORMALIZE:
            yield replace(best.settings, normalize=normalize)

    def _consensus(self, best: Trial) -> Iterable[MatchSettings]:
        """At the temperature so far and those beside it: fifty rows a point take their time."""
        held = best.settings.temperature
        scale = ATTENTION if best.settings.compare == "qk" else COSINES
        around = range(len(scale))
        if held in scale:
            around = range(scale.index(held) - 1, scale.index(held) + 2)
        for place in around:
            if 0 <= place < len(scale):
                yield replace(
                    best.settings,
                    temperature=scale[place],
                    readout="consensus",
                    window=4,
                    between="query",
                )

    # -- one variant -------------------------------------------------------------------------------

    def _best(
        self, stage: str, best: Trial | None, candidates: Iterable[MatchSettings]
    ) -> Trial | None:
        from tqdm.auto import tqdm

        for settings in tqdm(candidates, desc=f"{stage:<26}", disable=not self.progress):
            trial = self._try(stage, settings)
            if best is None or trial.order > best.order:
                best = trial
        return best

    def _try(self, stage: str, settings: MatchSettings) -> Trial:
        if settings not in self.trials:
            scores = self._score(settings)
            value = scores["pck"]["0.1"]["per_point"] - PRICE * math.log2(passes(settings))
            self.trials[settings] = Trial(stage, settings, scores, value)
        return self.trials[settings]

    def _score(self, settings: MatchSettings) -> dict[str, Any]:
        asked = self.questions
        source, target = self.store.features(settings)
        there = place_points(source, target, asked.unit, settings)
        height, width = asked.size
        found = there.double().clamp(0, 1).numpy() * (width, height) - 0.5
        found = found.clip(0, (width - 1, height - 1))
        errors = np.linalg.norm(found - asked.true, axis=-1)
        pair, known = np.nonzero(np.isfinite(errors))
        return Points(pair, pair, asked.base[pair], self.counts).score(errors[pair, known])


def passes(settings: MatchSettings) -> int:
    """Forward passes of the UNet for one image."""
    return len(settings.seeds) * len(settings.timesteps)
