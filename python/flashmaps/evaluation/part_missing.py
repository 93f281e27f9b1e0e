"""Missing parts told from seen ones: scenes of the world that hide their object (``OCCLUDED``).

Two to four things stand before it, and 15 to 60 % of it is hidden.

A part is missing where less than a quarter of what would be seen of it without them is, and seen
where at least half is; what lies between is not scored. AUROC over all parts of all scenes, of 1
minus the probability of `fm.find_parts`; beside it the rival that looks at nothing: parts that are
small in the collection are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flashmaps.diffusion.images import load_image
from flashmaps.evaluation.bootstrap import RESAMPLES, interval, resample
from flashmaps.evaluation.markdown import number
from flashmaps.evaluation.metrics import auroc, resampled_auroc
from flashmaps.evaluation.part_scenes import part_groups
from flashmaps.parts.find import HIDDEN, find_each
from flashmaps.parts.presence import EVIDENCE, MISSING, SEEN
from flashmaps.parts.result import Parts
from flashmaps.world import OCCLUDED, Scene, Split


def missing_scores(
    pipe: Any, parts: Parts, category: str, pairs: dict[int, int], split: str, count: int, size: int
) -> list[dict[str, Any]]:
    """Of each scene: for each learned part its visible share, and what was found."""
    options = replace(OCCLUDED, categories=(category,), clutter=(0, 3))
    scenes = Split(split, size=size, count=count, seed=1, options=options)
    areas = [float(np.mean([(each == p).mean() for each in parts.labels])) for p in pairs]
    rows = []
    for scene in scenes:
        found = find_each([load_image(scene.image)], parts, pipe)[0]
        shares = visible_shares(scene, category)
        rows.append({
            "visible": [_plain(shares[true]) for true in pairs.values()],
            "probability": [float(found.probability[p]) for p in pairs],
            "hidden": [found.state[p] == HIDDEN for p in pairs],
            "size": areas,
            **{
                name: [float(found.evidence[p, k]) for p in pairs]
                for k, name in enumerate(EVIDENCE)
            },
        })  # fmt: skip
    return rows


def visible_shares(scene: Scene, category: str) -> np.ndarray:  # [parts]
    """Of each part, alike ones together, the share that is seen of what nothing before it hides.

    What the object hides of itself counts on neither side. NaN where nothing would be seen.
    """
    names, group = part_groups(category)
    index = scene.find(category)
    free = scene.uncovered(index)
    shares = np.full(len(names), np.nan)
    for part in range(len(names)):
        own = [name for name, g in zip(scene.instances[index].parts, group, strict=True)
               if g == part]  # fmt: skip
        whole = np.any([free.mask(index, name) for name in own], 0)
        seen = np.any([scene.mask(index, name) for name in own], 0)
        if whole.any():
            shares[part] = seen.sum() / whole.sum()
    return shares


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def missing_tables(
    rows: Sequence[dict[str, Any]],
) -> list[tuple[str, list[str], list[list[str]]]]:
    """AUROC of telling missing parts, for each way that masks were made."""
    out = []
    for masks in dict.fromkeys(row["masks"] for row in rows):
        scenes = [
            scene for row in rows if row["masks"] == masks for scene in row.get("missing", ())
        ]
        if scenes:
            found = missing_summary(scenes)
            body = [
                [name, number(one["auroc"], one["interval"], 3)]
                for name, one in found["scores"].items()
            ]
            title = (
                f"Missing parts, {masks} masks: {found['scenes']} scenes, {found['missing']} parts "
                f"missing, {found['seen']} seen"
            )
            out.append((title, ["told by", "AUROC"], body))
    return out


def missing_summary(scenes: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """AUROC of each score with intervals over scenes."""
    scores = {
        "find_parts": [[1 - p for p in each["probability"]] for each in scenes],
        "size in the collection": [[-a for a in each["size"]] for each in scenes],
        **{name: [[-v for v in each[name]] for each in scenes] for name in EVIDENCE},
    }
    shares = [[np.nan if v is None else v for v in each["visible"]] for each in scenes]
    counts = resample(len(scenes), RESAMPLES, seed)
    owner = np.concatenate([[i] * len(each) for i, each in enumerate(shares)])
    share = np.concatenate(shares)
    kept = (share < MISSING) | (share >= SEEN)
    wrong = share < MISSING
    out: dict[str, Any] = {
        "scenes": len(scenes), "missing": int(wrong[kept].sum()), "seen": int((~wrong)[kept].sum()),
        "scores": {},
    }  # fmt: skip
    for name, values in scores.items():
        value = np.concatenate(values)[kept]
        drawn = resampled_auroc(value, wrong[kept], counts[:, owner[kept]])
        out["scores"][name] = {"auroc": auroc(value, wrong[kept]), "interval": interval(drawn)}
    return out
