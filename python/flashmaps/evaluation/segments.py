"""``flashmaps eval segments``: segments of images beside rivals, against the truth.

The rules of scoring are those of :mod:`flashmaps.evaluation.segment_scores`, and the images those
of :mod:`flashmaps.evaluation.segment_scenes`. Every rival has a grid of settings, and the tables
show the best of them on the very images scored, for each level by the sum of IoU and ARI, with the
attention of our objects' layer or that of the layers that match: an oracle that ``fm.segment`` does
not have. Rivals on tokens are given the same pixel borders as ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.bootstrap import RESAMPLES, check_resampling, interval, resample
from flashmaps.evaluation.kept_features import KeptFeatures
from flashmaps.evaluation.markdown import table as markdown_table
from flashmaps.evaluation.segment_protocol import entry, given_labels, protocol
from flashmaps.evaluation.segment_rivals import kmeans, pixel_rivals, token_rivals
from flashmaps.evaluation.segment_scenes import LabelledImage
from flashmaps.evaluation.segment_scores import (
    SCORES,
    class_counts,
    class_iou,
    contingency,
    score,
)
from flashmaps.files import Run, check_folder, open_run
from flashmaps.matching.cross_map import cross_map
from flashmaps.segmentation.boundaries import patches, pixel_labels
from flashmaps.segmentation.seen import Seen, with_object_layers
from flashmaps.segmentation.segment import segment

KIND = "segments-evaluation"
OURS = "FlashMaps"
THEIRS = "labels given"
# Other ways of our own, for what each step is worth: name, and arguments of segment.
WAYS: dict[str, dict[str, Any]] = {
    OURS: {},
    f"{OURS}, borders of tokens": {"boundaries": False},
    f"{OURS}, temperature x 0.5": {"temperature": 0.5},
    f"{OURS}, temperature x 1.5": {"temperature": 1.5},
    f"{OURS}, attention alone": {"compare": "qk"},
}
_BATCH = 8
_COUNTS = "counts"  # of pixels by class

Rows = dict[str, dict[str, dict[str, dict[str, float]]]]  # level, method, setting, score


def evaluate_segments(
    scenes: Any,  # a sequence of LabelledImage
    out: str | Path,
    *,
    model: Any = "builtin",
    rivals: bool = True,
    labels: str | Path | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    features: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Segment every image, score it beside its rivals, and write a folder that grows.

    An interrupted run goes on where it was. ``labels``: a folder of label PNGs of another method,
    which gets a row (:mod:`flashmaps.evaluation.segment_protocol`). ``features``: a folder that
    keeps what the model saw, for the next table of the same images. Returns what results.json
    holds: for each level and method the best setting's scores with 95 % intervals, and the
    difference of ours to it.
    """
    from tqdm.auto import tqdm

    from flashmaps.diffusion.loading import load_model, name_of
    from flashmaps.matching.settings import fingerprint

    check_resampling(resamples, seed)
    check_folder(out, KIND, grows=True)
    pipe = load_model(model)
    asked = {
        "flashmaps": metadata.version("flashmaps"), "images": scenes.what, "model": name_of(model),
        "weights": fingerprint(pipe), "rivals": rivals,
        "labels": None if labels is None else str(Path(labels).absolute()),
    }  # fmt: skip
    found: list[Rows] = []
    entries: list[dict[str, Any]] = []
    kept = KeptFeatures(pipe, scenes.what, features)
    with open_run(out, KIND, asked, overwrite=overwrite) as run, fit_threads(pipe):
        bar = tqdm(total=len(scenes), desc="images", disable=not progress)
        for start in range(0, len(scenes), _BATCH):
            name = f"parts/{start:06d}.json"
            if not run.whole(name):
                some = [scenes[i] for i in range(start, min(start + _BATCH, len(scenes)))]
                seen = with_object_layers(pipe, kept.see(start, [each.image for each in some]))
                made = list(_rows(some, seen, scenes.levels, rivals, labels))
                about = [entry(each.name, [each.image], each.truth.values()) for each in some]
                run.write_json(name, {"rows": made, "images": about})
            part = json.loads((run.folder / name).read_text("utf-8"))
            found.extend(part["rows"])
            entries.extend(part["images"])
            bar.update(len(part["rows"]))
        bar.close()
        run.write_json("protocol.json", protocol(scenes.what, entries))
        results = {**asked, **summarise(found, resamples, seed)}
        write_results(run, results, "Segments")
    return results


def _rows(
    some: list[LabelledImage],
    seen: list[Seen],
    levels: tuple[str, ...],
    rivals: bool,
    theirs: str | Path | None,
) -> Iterator[Rows]:
    for each, sight in zip(some, seen, strict=True):
        rows: Rows = {level: {} for level in levels}
        for way, given in WAYS.items():
            made = segment(sight, **given)
            for level in levels:
                place = len(made.tree) - 1 if level == "parts" else 0
                if "temperature" in given and place:  # which is that of objects
                    continue
                labels = made.level(place).labels
                rows[level][way] = {"-": _score(labels, each.truth[level], level)}
        if theirs is not None:
            for level in levels:
                labels = given_labels(theirs, each.name, each.truth[level].shape)
                rows[level][THEIRS] = {"-": _score(labels, each.truth[level], level)}
        if rivals:
            _add_rivals(rows, each, sight)
        yield rows


def _add_rivals(rows: Rows, each: LabelledImage, seen: Seen) -> None:
    size = each.image.shape[:2]
    features, of = seen.likeness, seen.attention
    voters = patches(features.image)
    attention = {"": cross_map(of, of, compare="qk")}  # that our objects read
    if of is not features:
        attention[", matching layers"] = cross_map(features, features, compare="qk")

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
            by_method.setdefault(name, {})[setting] = _score(labels, truth, level)


def _score(labels: np.ndarray, truth: np.ndarray, level: str) -> dict[str, Any]:
    found: dict[str, Any] = {k: None if np.isnan(v) else v for k, v in score(labels, truth).items()}
    if level == "classes":
        table, values = contingency(labels, truth)
        found[_COUNTS] = {str(k): v for k, v in class_counts(table, values).items()}
    return found


def _class_scores(found: list[dict[str, Any]], counts: np.ndarray) -> dict[str, Any]:
    """The data set's mean IoU over classes, and its interval."""
    names = sorted({name for each in found for name in each[_COUNTS]})
    table = np.array(
        [[each[_COUNTS].get(name, (0, 0, 0)) for name in names] for each in found], dtype=float
    )  # [images, classes, 3]
    drawn = np.tensordot(counts, table, 1)
    mean = class_iou(*np.moveaxis(table.sum(0), -1, 0))
    spread = class_iou(*np.moveaxis(drawn, -1, 0)) if len(counts) else None
    return {"mean": float(mean), "interval": None if spread is None else interval(spread)}


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
                    for key in found[0][level][method][setting]
                    if key != _COUNTS
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
                **(
                    {"class_iou": _class_scores([e[level][method][best[1]] for e in found], counts)}
                    if _COUNTS in found[0][level][method][best[1]]
                    else {}
                ),
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
    out = []
    for level, rows in results["levels"].items():
        scores = {key: name for key, name in SCORES.items() if key in rows[OURS]}
        header = ["method", "setting", *scores.values(), "ours minus it: IoU", "ARI"]
        body = []
        for method, row in rows.items():
            less = row.get("ours_minus_this", {})
            body.append(
                [
                    method,
                    row["setting"],
                    *(shown(row[key], 1 if key == "count" else 3) for key in scores),
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


Tables = list[tuple[str, list[str], list[list[str]]]]


def write_results(
    run: Run,
    results: dict[str, Any],
    title: str,
    about: Callable[[dict[str, Any]], Tables] = tables,
) -> None:
    """results.json and results.md of a run."""
    run.write_json("results.json", results)
    run.write_text("results.md", page(results, title, about(results)))


def page(results: dict[str, Any], title: str, found: Tables) -> str:
    """results.md."""
    lines = [
        f"# {title}", "", f"Images: {results['images']}. Model: {results['model']}.",
        "Intervals are of 95 %, images drawn again."
        + (" Rivals are at their best setting on these images." if "levels" in results else ""),
        "",
    ]  # fmt: skip
    for about, header, body in found:
        lines += [f"## {about}", "", *markdown_table(header, body), ""]
    return "\n".join(lines)
