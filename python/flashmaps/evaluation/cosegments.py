"""``flashmaps eval cosegments``: parts of collections beside rivals, against the truth.

A collection is scored as one image, with one assignment of labels to the parts of its category: a
label that changes its part from image to image is punished. Everything but the object in common is
background. Rivals on tokens are given the same pixel borders as ours; those that need a number of
labels are given the true one, parts and background, or twice it.

Weighing links by scores of the round trip is an ablation: none, each score alone, all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmaps.diffusion.features import Features
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.bootstrap import RESAMPLES, check_resampling
from flashmaps.evaluation.kept_features import KeptFeatures
from flashmaps.evaluation.landmarks import landmark_error
from flashmaps.evaluation.segment_protocol import entry, protocol
from flashmaps.evaluation.segment_rivals import kmeans_rows, spectral_rows, unit_features
from flashmaps.evaluation.segment_scenes import Collection
from flashmaps.evaluation.segment_scores import score
from flashmaps.evaluation.segments import OURS, Rows, summarise, write_results
from flashmaps.files import check_folder, open_run
from flashmaps.segmentation.boundaries import patches, pixel_labels
from flashmaps.segmentation.cosegment import EVIDENCE, cosegment
from flashmaps.segmentation.seen import Seen, with_object_layers

KIND = "cosegments-evaluation"
LEVEL = "parts of collections"


def evaluate_cosegments(
    collections: Any,  # a sequence of Collection
    out: str | Path,
    *,
    model: Any = "builtin",
    rivals: bool = True,
    ablation: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    features: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Co-segment every collection, score it beside its rivals, and write a folder that grows.

    An interrupted run goes on where it was. ``ablation``: also with links weighed by other scores
    of the round trip, and by none. Returns what results.json holds.
    """
    from tqdm.auto import tqdm

    from flashmaps.diffusion.loading import load_model, name_of
    from flashmaps.matching.settings import fingerprint

    check_resampling(resamples, seed)
    check_folder(out, KIND, grows=True)
    pipe = load_model(model)
    asked = {
        "flashmaps": metadata.version("flashmaps"), "images": collections.what,
        "model": name_of(model), "weights": fingerprint(pipe), "rivals": rivals,
        "ablation": ablation,
    }  # fmt: skip
    found: list[Rows] = []
    entries: list[dict[str, Any]] = []
    kept = KeptFeatures(pipe, collections.what, features)
    with open_run(out, KIND, asked, overwrite=overwrite) as run, fit_threads(pipe):
        for index in tqdm(range(len(collections)), desc="collections", disable=not progress):
            name = f"parts/{index:06d}.json"
            if not run.whole(name):
                one = collections[index]
                seen = with_object_layers(pipe, kept.see(index, one.images))
                rows = _rows(one, seen, rivals, ablation)
                about = entry(f"{index} {one.category}", one.images, one.truth)
                run.write_json(name, {"rows": rows, "collection": about})
            part = json.loads((run.folder / name).read_text("utf-8"))
            found.append(part["rows"])
            entries.append(part["collection"])
        run.write_json("protocol.json", protocol(collections.what, entries))
        results = {**asked, **summarise(found, resamples, seed)}
        write_results(run, results, "Co-segments")
    return results


def _rows(collection: Collection, seen: list[Seen], rivals: bool, ablation: bool) -> Rows:
    truth = np.concatenate([each.ravel() for each in collection.truth])
    own: dict[str, Any] = {}
    ways = {OURS: own}
    if ablation:
        ways[f"{OURS}, borders of tokens"] = {"boundaries": False}
        ways[f"{OURS}, links not weighed"] = {"evidence": ()}
        for name in EVIDENCE[1:]:  # the first is what is done anyway
            ways[f"{OURS}, links weighed by {name.replace('_', ' ')}"] = {"evidence": name}
        ways[f"{OURS}, links weighed by all three"] = {"evidence": EVIDENCE}
    rows: dict[str, dict[str, dict[str, Any]]] = {}

    def add(name: str, labels: list[np.ndarray]) -> None:
        found = score(np.concatenate([each.ravel() for each in labels]), truth)
        found["landmark"] = landmark_error(labels, collection.keypoints, collection.bases)
        rows[name] = {"-": {k: None if np.isnan(v) else v for k, v in found.items()}}

    for way, given in ways.items():
        add(way, list(cosegment(seen, **given).labels))
    if rivals:
        sets = [each.likeness for each in seen]
        voters = [patches(each.image) for each in sets]
        for name, tokens in joint_rivals(sets, collection.targets + 1):
            add(name, _pixels(sets, tokens, voters))
        add("single segment", [np.zeros_like(each) for each in collection.truth])
    return {LEVEL: rows}


def joint_rivals(sets: list[Features], true_count: int) -> Iterator[tuple[str, np.ndarray]]:
    """(method, labels of the tokens of all images, one after the other)."""
    x = np.concatenate([unit_features(each) for each in sets])
    for times in (1, 2):
        yield f"joint k-means, {times} x true k", kmeans_rows(x, times * true_count)
    yield "joint spectral, true k", spectral_rows(x, true_count)


def _pixels(sets: list[Features], tokens: np.ndarray, voters: list[np.ndarray]) -> list[np.ndarray]:
    cuts = np.cumsum([each.grid[0] * each.grid[1] for each in sets])[:-1]
    out = []
    count = int(tokens.max()) + 1
    for found, own, patch in zip(sets, np.split(tokens, cuts), voters, strict=True):
        share = torch.nn.functional.one_hot(torch.from_numpy(own), count).float()
        size = (int(found.image.shape[0]), int(found.image.shape[1]))
        out.append(pixel_labels(share, found.grid, size, patch))
    return out
