"""Whether going through other images helps: direct against fused matches on the world.

    python -m flashmaps.evaluation.fused --pairs 48 --test-pairs 204

The paths lead through the nearest images (by mean features) among all images of the split's pairs.
How many, and with which weight, is chosen on the validation split; the test split is looked at
once.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from typing import Any

import numpy as np
import torch

from flashmaps.batches.choose import descriptor
from flashmaps.batches.fuse import fused_rows
from flashmaps.diffusion.features import BUILTIN, Features, features, load_model
from flashmaps.evaluation.worlds import Worlds
from flashmaps.matching.readout import read
from flashmaps.matching.settings import settings_of

COUNTS, WEIGHTS = (4, 8), (0.5, 1.0)
THRESHOLD = 0.1


def scored(
    pipe: Any, split: str, pairs: int, points: int, seed: int, tried: list[tuple[int, float]]
) -> dict[tuple[int, float], np.ndarray]:
    """For each (images, weight): [pairs, points], 1 where right, 0 where wrong.

    (0, 0) is the direct match.
    """
    settings = settings_of(pipe)
    options = {**settings.for_features, "outputs": settings.compare == "features"}
    world = Worlds(pairs, points, seed=seed, split=split, hidden=False)
    asked = [world.pair(i) for i in range(pairs)]
    sets: list[Features] = []
    for pair in asked:
        sets += features(pipe, [pair.source_image, pair.target_image], **options)
    unit = torch.stack([descriptor(each, settings.compare) for each in sets])
    alike = unit @ unit.T
    right: dict[tuple[int, float], list[np.ndarray]] = {each: [] for each in tried}
    for number, pair in enumerate(asked):
        s, t = 2 * number, 2 * number + 1
        near = alike[s] + alike[t]
        near[[s, t]] = -torch.inf
        order = near.argsort(descending=True).tolist()
        size = np.array(pair.target_image.shape[1::-1])
        at = torch.from_numpy((pair.source_points + 0.5) / pair.source_image.shape[1::-1])
        for count, weight in tried:
            rows = fused_rows(
                sets[s], sets[t], [sets[i] for i in order[:count]], at, settings.options,
                weight=weight,
            )  # fmt: skip
            there = read(rows[None], sets[t].grid, settings.readout, settings.window)[0]
            placed = there.double().clamp(0, 1).numpy() * size - 0.5
            error = np.linalg.norm(placed - pair.target_points, axis=1)
            right[count, weight].append(error <= THRESHOLD * pair.base)
    return {each: np.stack(values).astype(float) for each, values in right.items()}


def study(
    pairs: int = 48, test_pairs: int = 204, points: int = 20, seed: int = 0, model: Any = BUILTIN
) -> dict[str, Any]:
    """PCK@0.1 of the direct and of the fused match, and their difference with its interval.

    Args:
        pairs: of the validation split, to choose on; test_pairs: of the test split.
        points: of each pair; both scenes show them.
        seed: draws them.
    """
    pipe = load_model(model)
    tried = [(0, 0.0), *product(COUNTS, WEIGHTS)]
    chosen_on = scored(pipe, "validation", pairs, points, seed, tried)
    best = max(tried[1:], key=lambda each: chosen_on[each].mean())
    tested = scored(pipe, "test", test_pairs, points, seed, [tried[0], best])
    gain = (tested[best] - tested[tried[0]]).mean(1)
    drawn = np.random.default_rng(seed).integers(len(gain), size=(1000, len(gain)))
    interval = np.quantile(gain[drawn].mean(1), (0.025, 0.975))
    return {
        "validation": {
            f"{n} images, weight {w:g}": float(chosen_on[n, w].mean()) for n, w in tried
        },
        "chosen": {"images": best[0], "weight": best[1]},
        "test": {
            "direct": float(tested[tried[0]].mean()),
            "fused": float(tested[best].mean()),
            "gain": float(gain.mean()),
            "interval": interval.tolist(),
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("pairs", 48), ("test-pairs", 204), ("points", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(json.dumps(study(**vars(parser.parse_args())), indent=2))
