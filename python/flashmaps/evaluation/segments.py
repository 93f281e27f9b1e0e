"""``flashmaps eval segments``: segments of images beside rivals, against the truth.

The rules of scoring are those of :mod:`flashmaps.evaluation.segment_scores`, and the images those
of :mod:`flashmaps.evaluation.segment_scenes`. Every rival has a grid of settings, and the tables
show the best of them on the very images scored, for each level by the sum of IoU and ARI: an oracle
that ``fm.segment`` does not have. Rivals on tokens are given the same pixel borders as ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmaps.evaluation.bootstrap import RESAMPLES, interval, resample
from flashmaps.evaluation.markdown import table as markdown_table
from flashmaps.evaluation.segment_rivals import kmeans, pixel_rivals, token_rivals
from flashmaps.evaluation.segment_scenes import LabelledImage
from flashmaps.evaluation.segment_scores import SCORES, score
from flashmaps.evaluation.threads import fit_threads
from flashmaps.files import Run, check_folder, open_run
from flashmaps.matching.cross_map import cross_map
from flashmaps.segmentation.boundaries import patches, pixel_labels
from flashmaps.segmentation.segment import see, segment

KIND = "segments-evaluation"
OURS = "FlashMaps"
# Other ways of our own, for what each step is worth: name, and arguments of segment.
WAYS: dict[str, dict[str, Any]] = {
    OURS: {},
    f"{OURS}, borders of tokens": {"boundaries": False},
    f"{OURS}, temperature x 0.5": {"temperature": 0.5},
    f"{OURS}, temperature x 1.5": {"temperature": 1.5},
    f"{OURS}, attention alone": {"compare": "qk"},
}
_BATCH = 8

Rows = dict[str, dict[str, dict[str, dict[str, float]]]]  # level, method, setting, score


def evaluate_segments(
    scenes: Any,  # a sequence of LabelledImage
    out: str | Path,
    *,
    model: Any = "builtin",
    rivals: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Segment every image, score it beside its rivals, and write a folder that grows.

    An interrupted run goes on where it was. Returns what results.json holds: for each level and
    method the best setting's scores with 95 % intervals, and the difference of ours to it.
    """
    from tqdm.auto import tqdm

    from flashmaps.diffusion.loading import load_model, name_of
    from flashmaps.matching.settings import fingerprint

    check_folder(out, KIND, grows=True)
    pipe = load_model(model)
    asked = {
        "flashmaps": metadata.version("flashmaps"), "images": scenes.what, "model": name_of(model),
        "weights": fingerprint(pipe), "rivals": rivals,
    }  # fmt: skip
    found: list[Rows] = []
    with open_run(out, KIND, asked, overwrite=overwrite) as run, fit_threads(pipe):
        bar = tqdm(total=len(scenes), desc="images", disable=not progress)
        for start in range(0, len(scenes), _BATCH):
            name = f"parts/{start:06d}.json"
            if not run.whole(name):
                some = [scenes[i] for i in range(start, min(start + _BATCH, len(scenes)))]
                made = list(_rows(pipe, some, scenes.levels, rivals))
                run.write_json(name, made)
            part = json.loads((run.folder / name).read_text("utf-8"))
            found.extend(part)
            bar.update(len(part))
        bar.close()
        results = {**asked, **summarise(found, resamples, seed)}
        write_results(run, results, "Segments")
    return results


def _rows(
    pipe: Any, some: list[LabelledImage], levels: tuple[str, ...], rivals: bool
) -> Iterator[Rows]:
    seen = see(pipe, [each.image for each in some])
    for each, features in zip(some, seen, strict=True):
        rows: Rows = {level: {} for level in levels}
        for way, given in WAYS.items():
            made = segment(features, **given)
            for place, level in enumerate(levels):
                if len(made.tree) > 1 and ("temperature" not in given or place == 0):
                    labels = made.level(place).labels
                elif len(made.tree) == 1:
                    labels = made.labels
                else:
                    continue
                rows[level][way] = {"-": _score(labels, each.truth[level])}
        if rivals:
            _add_rivals(rows, each, features)
        yield rows


def _add_rivals(rows: Rows, each: LabelledImage, features: Any) -> None:
    size = each.image.shape[:2]
    voters = patches(features.image)
    attention = cross_map(features, features, compare="qk")

    def pixels(tokens: np.ndarray) -> np.ndarray:
        one = torch.nn.functional.one_hot(torch.from_numpy(tokens)).float()
        return pixel_labels(one, features.grid, size, voters)

    made = list(pixel_rivals(features.image))
    made += [(name, how, pixels(t)) for name, how, t in token_rivals(features, attention)]
    for level, by_method in rows.items():
        truth = each.truth[level]
        targets = len(np.unique(truth[truth >= 0]))
        with_k = [
            (f"k-means, {times} x true k", "-", pixels(kmeans(features, times * (targets + 1))))
            for times in (1, 2)
        ]
        for name, setting, labels in (*made, *with_k):
            by_method.setdefault(name, {})[setting] = _score(labels, truth)


def _score(labels: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    return {k: None if np.isnan(v) else v for k, v in score(labels, truth).items()}


def summarise(found: list[Rows], resamples: int, seed: int) -> dict[str, Any]:
    """Means with intervals over images; the best setting of each method."""
    counts = resample(len(found), resamples, seed)
    out: dict[str, Any] = {"scored": len(found), "levels": {}}
    for level in found[0]:
        rows: dict[str, Any] = {}
        kept: dict[str, dict[str, np.ndarray]] = {}
        for method, settings in found[0][level].items():
            best: tuple[float, str, dict[str, np.ndarray]] | None = None
            every = {}
            for setting in settings:
                values = {
                    key: np.array(
                        [
                            np.nan if one is None else one
                            for each in found
                            for one in [each[level][method][setting][key]]
                        ]
                    )
                    for key in SCORES
                }
                both = float(np.nanmean(values["iou"]) + np.nanmean(values["ari"]))
                every[setting] = {key: float(np.nanmean(v)) for key, v in values.items()}
                if best is None or both > best[0]:
                    best = (both, setting, values)
            assert best is not None
            kept[method] = best[2]
            rows[method] = {
                "setting": best[1],
                **{key: told(values, counts) for key, values in best[2].items()},
                "every_setting": every,
            }
        for method, values in kept.items():
            if method != OURS:
                rows[method]["ours_minus_this"] = {
                    key: told(kept[OURS][key] - values[key], counts) for key in ("iou", "ari")
                }
        out["levels"][level] = rows
    return out


def told(values: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """The mean of images where a value is defined, and its interval."""
    there = np.isfinite(values)
    if not there.any():
        return {"mean": None, "interval": None}
    weights = counts[:, there]
    with np.errstate(invalid="ignore"):
        means = weights @ values[there] / weights.sum(1)
    return {
        "mean": float(values[there].mean()),
        "interval": interval(means) if len(counts) else None,
    }


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) for each level."""
    header = ["method", "setting", *SCORES.values(), "ours minus it: IoU", "ARI"]
    out = []
    for level, rows in results["levels"].items():
        body = []
        for method, row in rows.items():
            less = row.get("ours_minus_this", {})
            body.append(
                [
                    method,
                    row["setting"],
                    *(shown(row[key], 1 if key == "count" else 3) for key in SCORES),
                    *(shown(less[key], 3, "+") if less else "" for key in ("iou", "ari")),
                ]
            )
        out.append((f"{level}: {results['scored']} images", header, body))
    return out


def shown(value: dict[str, Any], digits: int, sign: str = "") -> str:
    """A mean and its interval, in a table."""
    if value["mean"] is None:
        return "-"
    text = f"{value['mean']:{sign}.{digits}f}"
    if value["interval"] is not None:
        low, high = value["interval"]
        text += f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return text


def write_results(run: Run, results: dict[str, Any], title: str) -> None:
    """results.json and results.md of a run."""
    run.write_json("results.json", results)
    run.write_text("results.md", page(results, title))


def page(results: dict[str, Any], title: str) -> str:
    """results.md."""
    lines = [
        f"# {title}", "", f"Images: {results['images']}. Model: {results['model']}.",
        "Intervals are of 95 %, images drawn again. Rivals are shown at their best setting on "
        "these images.", "",
    ]  # fmt: skip
    for about, header, body in tables(results):
        lines += [f"## {about}", "", *markdown_table(header, body), ""]
    return "\n".join(lines)
