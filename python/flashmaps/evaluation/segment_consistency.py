"""``flashmaps eval segments-warps`` and ``segments-stereo``: do segments stay on a thing?

Two views of one thing are segmented, each for itself, and its pixels are known to lie at certain
pixels of the other: under a warp that was drawn, or by a true disparity. The labels of one view,
carried there, are compared with the labels found there: ARI and NMI over all pixels that both
show. A collection of the two views must do more: there a label is one name, and the share of
pixels that keep theirs is given too. No truth about objects is needed.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.benchmark import Benchmark, Pair
from flashmaps.evaluation.bootstrap import RESAMPLES, check_resampling, resample
from flashmaps.evaluation.segment_scores import adjusted_rand, contingency, mutual_information
from flashmaps.evaluation.segments import shown, told, write_results
from flashmaps.files import check_folder, open_run
from flashmaps.segmentation.cosegment import cosegment
from flashmaps.segmentation.segment import see_objects, segment

KIND = "segment-consistency"
ALL = 2**22  # points of a pair: every pixel
TOGETHER = "both views as a collection"


def agreement(pair: Pair, source: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Of labels [h, w] of both views: ARI, NMI, and the share of pixels with one and the same."""
    there = np.isfinite(pair.target_points).all(1)
    mine = _at(source, pair.source_points[there])
    theirs = _at(target, pair.target_points[there])
    table, _ = contingency(mine, theirs)
    return {
        "ari": adjusted_rand(table),
        "nmi": mutual_information(table),
        "same": float((mine == theirs).mean()),
        "segments": float(len(np.unique(mine))),
    }


def _at(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    x, y = np.rint(points).astype(np.int64).T
    return labels[y.clip(0, labels.shape[0] - 1), x.clip(0, labels.shape[1] - 1)]


def evaluate_consistency(
    pairs: Benchmark,
    out: str | Path,
    *,
    model: Any = "builtin",
    size: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Segment both views of every pair, and write how far they agree; goes on where it was.

    ``pairs`` should know the place of every pixel (``Warps(points=ALL)``, ``Stereo(points=ALL)``).
    """
    from tqdm.auto import tqdm

    from flashmaps.diffusion.loading import load_model, name_of
    from flashmaps.matching.settings import fingerprint

    check_resampling(resamples, seed)
    check_folder(out, KIND, grows=True)
    pipe = load_model(model)
    asked = {
        "flashmaps": metadata.version("flashmaps"), "images": f"{len(pairs)} pairs: {pairs.what}",
        "model": name_of(model), "weights": fingerprint(pipe), "size": size, "seed": seed,
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    with open_run(out, KIND, asked, overwrite=overwrite) as run, fit_threads(pipe):
        for index in tqdm(range(len(pairs)), desc="pairs", disable=not progress):
            name = f"parts/{index:06d}.json"
            if not run.whole(name):
                run.write_json(name, _one(pipe, pairs.pair(index), size))
            found.append(json.loads((run.folder / name).read_text("utf-8")))
        counts = resample(len(found), resamples, seed)
        kinds = sorted({each["kind"] for each in found})
        groups = {"all": np.ones(len(found), bool)}
        if len(kinds) > 1:
            groups |= {kind: np.array([each["kind"] == kind for each in found]) for kind in kinds}
        levels = {
            f"{level}, {group}": {
                key: told(
                    np.array([each["levels"][level][key] for each in found])[some],
                    counts[:, some],
                )
                for key in found[0]["levels"][level]
            }
            for level in found[0]["levels"]
            for group, some in groups.items()
        }
        results = {**asked, "scored": len(found), "agreement": levels}
        write_results(run, results, "Segments of two views", tables)
    return results


def _one(pipe: Any, pair: Pair, size: int | None) -> dict[str, Any]:
    both = see_objects(pipe, [pair.source_image, pair.target_image], size=size)
    one, other = (segment(each) for each in both)
    levels = {
        level.name: agreement(pair, level.labels, other.tree[place].labels)
        for place, level in enumerate(one.tree)
    }
    joint = cosegment(both)
    levels[TOGETHER] = agreement(pair, joint.labels[0], joint.labels[1])
    return {"kind": pair.category, "levels": levels}


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows)."""
    header = ["level, pairs", "ARI", "NMI", "same label", "segments"]
    rows = [
        [
            level,
            shown(row["ari"], 3),
            shown(row["nmi"], 3),
            shown(row["same"], 3) if level.startswith(TOGETHER) else "",
            shown(row["segments"], 1),
        ]
        for level, row in results["agreement"].items()
    ]
    return [(f"{results['scored']} pairs", header, rows)]
