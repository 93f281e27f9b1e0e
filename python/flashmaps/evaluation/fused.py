"""Whether going through other images helps: direct against fused matches on the world.

    python -m flashmaps.evaluation.fused --pairs 48 --test-pairs 204 --out flashmaps-fused

The paths lead through the nearest images (by mean features) among all images of the split's pairs.
How many images, how they are fused and with which weight is chosen on the validation split, and the
confidence is fitted there; the test split is looked at once. Features are made by
:func:`flashmaps.batches.run.batch`, each image's once, and are used again when the study goes on
after a kill.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.batches.choose import descriptor
from flashmaps.batches.fuse import FUSED_SCORES, fuse, judged, paths
from flashmaps.batches.run import batch
from flashmaps.diffusion.feature_folder import FeatureFolder
from flashmaps.diffusion.features import BUILTIN, Features, load_model
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.benchmark import Pair
from flashmaps.evaluation.bootstrap import RESAMPLES
from flashmaps.evaluation.calibrate import fit
from flashmaps.evaluation.metrics import auroc, calibration_error, reliability
from flashmaps.evaluation.worlds import Worlds
from flashmaps.files import open_run
from flashmaps.matching.confidence import Calibration
from flashmaps.matching.cross_map import at_points, cross_map
from flashmaps.matching.readout import read, without_neighbours
from flashmaps.matching.settings import MatchSettings, settings_of

KIND = "fused"  # of the folder
COUNTS, WEIGHTS = (4, 8, 16), (0.5, 1.0, 2.0, 4.0)
THRESHOLD = 0.1
TOLERANCE_OF = "the longer side of the object's box in the target, seen or not"


@dataclass(frozen=True)
class Way:
    """One way to fuse: through how many images, how, and with which weight."""

    images: int
    how: str
    weight: float

    def __str__(self) -> str:
        return f"{self.how}, {self.images} images, weight {self.weight:g}"


DIRECT = Way(0, "mean", 0.0)
TRIED = [DIRECT, *(Way(*each) for each in product(COUNTS, ("mean", "sharp", "product"), WEIGHTS))]
TRIED += [Way(count, "meet", weight) for count, weight in product(COUNTS, WEIGHTS)]


class Asked:
    """The pairs of one split, with the features of their images, in a folder of their own."""

    def __init__(
        self, folder: Path, pipe: Any, split: str, pairs: int, points: int, seed: int,
        progress: bool,
    ) -> None:  # fmt: skip
        world = Worlds(pairs, points, seed=seed, split=split, hidden=False)
        self.settings: MatchSettings = settings_of(pipe)
        images: list[np.ndarray] = []
        self.pairs: list[Pair] = []
        for number in range(pairs):
            pair = world.pair(number)
            # As bytes, which is what the world draws: a quarter of the memory.
            images += [
                np.rint(x * 255).astype(np.uint8) for x in (pair.source_image, pair.target_image)
            ]
            self.pairs.append(pair)
        with fit_threads(pipe):
            batch(
                images, "chain", folder, stage="features", rows="pairs", model=pipe,
                progress=progress,
            )  # fmt: skip
        self.sets = FeatureFolder(folder / "features")
        unit = torch.stack([descriptor(each, self.settings.compare) for each in self.sets])
        self.alike = unit @ unit.T

    def __len__(self) -> int:
        """How many pairs."""
        return len(self.pairs)

    def nearest(self, number: int, most: int) -> list[Features]:
        """The images that are most like both of a pair, among those of all other pairs."""
        s, t = 2 * number, 2 * number + 1
        near = self.alike[s] + self.alike[t]
        near[[s, t]] = -torch.inf
        return [self.sets[i] for i in near.argsort(descending=True).tolist()[:most]]

    def sides(self, number: int) -> tuple[Features, Features]:
        """Features of the source and of the target of a pair."""
        return self.sets[2 * number], self.sets[2 * number + 1]

    def points(self, number: int) -> Tensor:  # [n, 2] in the unit square
        """The points that are asked for in the source."""
        pair = self.pairs[number]
        return torch.from_numpy((pair.source_points + 0.5) / pair.source_image.shape[1::-1])

    def right(self, number: int, there: Tensor) -> np.ndarray:  # [n] bool
        """Whether places [n, 2] in the unit square of the target are the true ones."""
        pair = self.pairs[number]
        size = np.array(pair.target_image.shape[1::-1])
        placed = there.double().clamp(0, 1).numpy() * size - 0.5
        return np.linalg.norm(placed - pair.target_points, axis=1) <= THRESHOLD * pair.base

    def rows(self, number: int, ways: list[Way]) -> dict[Way, Tensor]:
        """Rows of the points of a pair by each way; each path is walked once for all of them."""
        source, target = self.sides(number)
        through = self.nearest(number, max(way.images for way in ways))
        here, options = at_points(source, self.points(number)[None]), self.settings.options
        direct = cross_map(here, target, options).to_dense()[0]
        kinds = {way.how == "meet" for way in ways if way.images}
        between = {
            meet: paths(here, target, through, options, meet=meet) for meet in sorted(kinds)
        }  # fmt: skip
        return {
            way: fuse(direct, between[way.how == "meet"][: way.images], way.weight, way.how)
            if way.images
            else direct
            for way in ways
        }


def scored(asked: Asked, ways: list[Way], progress: bool = False) -> dict[Way, np.ndarray]:
    """For each way [pairs, points], 1 where right, 0 where wrong."""
    from tqdm.auto import tqdm

    right: dict[Way, list[np.ndarray]] = {each: [] for each in ways}
    for number in tqdm(range(len(asked)), desc="pairs", disable=not progress):
        grid, settings = asked.sides(number)[1].grid, asked.settings
        for way, rows in asked.rows(number, ways).items():
            there = read(rows[None], grid, without_neighbours(settings.readout), settings.window)[0]
            right[way].append(asked.right(number, there))
    return {each: np.stack(values).astype(float) for each, values in right.items()}


def scores_of(asked: Asked, way: Way) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Of all points: each of FUSED_SCORES, whether the match is right, and its pair."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in FUSED_SCORES}
    right, pair = [], []
    for number in range(len(asked)):
        source, target = asked.sides(number)
        rows = asked.rows(number, [way])[way]
        one = judged(source, target, asked.points(number), rows, asked.settings.options)
        right.append(asked.right(number, one.places))
        pair.append(np.full(len(rows), number))
        for name in FUSED_SCORES:
            found[name].append(one.scores[name].double().numpy())
    joined = {name: np.concatenate(values) for name, values in found.items()}
    return joined, np.concatenate(right), np.concatenate(pair)


def trusted(fitted: Asked, tested: Asked, way: Way) -> tuple[Calibration | None, dict[str, float]]:
    """The confidence of a way, fitted on one split, and how good it is on the other."""
    scores, right, pair = scores_of(fitted, way)
    calibration, _ = fit(
        scores, right, pair, tolerance=THRESHOLD, of=TOLERANCE_OF, names=FUSED_SCORES,
        fitted_on=f"{len(fitted)} pairs of the world's validation split, {way}",
    )  # fmt: skip
    if calibration is None:
        return None, {}
    scores, right, _ = scores_of(tested, way)
    said = calibration.probability({k: torch.from_numpy(v) for k, v in scores.items()}).numpy()
    area = auroc(-said, ~right)
    return calibration, {
        "auroc": float("nan") if area is None else area,
        "calibration_error": calibration_error(reliability(said, right)),
        "brier": float(np.square(said - right).mean()),
    }


def limits(asked: Asked, images: int, meet: bool) -> dict[str, float]:
    """What paths know that direct matches do not: shares of all points, by majority of the paths.

    "direct" and "one path" alone; "gained at most": direct is wrong and at least half of the paths
    are right; "lost at most": direct is right and fewer than half are. Who always knew which of
    both to follow would gain the former and lose nothing.
    """
    settings = asked.settings
    direct, alone = [], []
    for number in range(len(asked)):
        source, target = asked.sides(number)
        here = at_points(source, asked.points(number)[None])

        def right(rows: Tensor, number: int = number, target: Features = target) -> np.ndarray:
            there = read(
                rows[None], target.grid, without_neighbours(settings.readout), settings.window
            )[0]
            return asked.right(number, there)

        direct.append(right(cross_map(here, target, settings.options).to_dense()[0]))
        through = asked.nearest(number, images)
        between = paths(here, target, through, settings.options, meet=meet)
        alone.append(np.stack([right(rows) for rows in between]))
    found, one = np.concatenate(direct), np.concatenate(alone, axis=1)
    half = one.mean(0) >= 0.5
    return {
        "direct": float(found.mean()),
        "one path": float(one.mean()),
        "gained at most": float((half & ~found).mean()),
        "lost at most": float((~half & found).mean()),
    }


def study(
    pairs: int = 48, test_pairs: int = 204, points: int = 20, seed: int = 0, model: Any = BUILTIN,
    out: str | Path = "flashmaps-fused", progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """PCK@0.1 of the direct and of the fused match, their difference with its interval, and how
    far the confidence of each can be trusted.

    Args:
        pairs: of the validation split, to choose and to fit on; test_pairs: of the test split.
        points: of each pair; both scenes show them.
        seed: draws them.
        out: folder to write: results.json, and the features of both splits.
    """
    pipe = load_model(model)
    asked = {"pairs": pairs, "test_pairs": test_pairs, "points": points, "seed": seed}
    with open_run(out, KIND, asked) as run:
        first = Asked(run.child("validation"), pipe, "validation", pairs, points, seed, progress)
        chosen_on = scored(first, TRIED, progress)
        best = max(TRIED[1:], key=lambda each: chosen_on[each].mean())
        last = Asked(run.child("test"), pipe, "test", test_pairs, points, seed, progress)
        tested = scored(last, [DIRECT, best], progress)
        gain = (tested[best] - tested[DIRECT]).mean(1)
        drawn = np.random.default_rng(seed).integers(len(gain), size=(RESAMPLES, len(gain)))
        interval = np.quantile(gain[drawn].mean(1), (0.025, 0.975))
        calibration, confidence = trusted(first, last, best)
        found = {
            "asked": asked,
            "validation": {str(way): float(chosen_on[way].mean()) for way in TRIED},
            "chosen": {"images": best.images, "how": best.how, "weight": best.weight},
            "test": {
                "direct": float(tested[DIRECT].mean()),
                "fused": float(tested[best].mean()),
                "gain": float(gain.mean()),
                "interval": interval.tolist(),
            },
            "limits": limits(first, best.images, best.how == "meet"),
            "confidence": {"direct": trusted(first, last, DIRECT)[1], "fused": confidence},
            "calibration": None if calibration is None else calibration.to_json(),
        }
        run.write_json("results.json", found)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("pairs", 48), ("test-pairs", 204), ("points", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", default="flashmaps-fused")
    print(json.dumps(study(**vars(parser.parse_args()), progress=True), indent=2))
