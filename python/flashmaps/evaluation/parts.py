"""``flashmaps eval parts``: what learned words are worth, by the loss that they are learned with.

For each seed, loss and category words are learned from images of a split and scored on others of
it, with the true parts as masks, and with those that ``fm.cosegment`` finds. Every job is a file of
the run: a killed one goes on, and the tables are of what is there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmaps.arguments import whole
from flashmaps.diffusion.images import load_image
from flashmaps.diffusion.latents import encode
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.bootstrap import RESAMPLES, check_resampling, interval, resample
from flashmaps.evaluation.part_missing import missing_scores, missing_tables
from flashmaps.evaluation.part_pictures import Judge, draw_of_word, draw_pictures, picture_scores
from flashmaps.evaluation.part_scenes import HELD_OUT, IMAGES, PartImages, lone_images
from flashmaps.evaluation.part_scores import (
    nearest_category,
    noise_loss,
    pair_up,
    part_scores,
    sight_scores,
)
from flashmaps.evaluation.segments import page, shown
from flashmaps.files import Run, check_folder, open_run
from flashmaps.parts.learn import learn_parts
from flashmaps.parts.losses import LOSSES
from flashmaps.parts.regions import common_parts
from flashmaps.parts.result import Parts
from flashmaps.segmentation.cosegment import cosegment
from flashmaps.world import CATEGORIES
from flashmaps.world.scene import SIZES

KIND = "parts-evaluation"
SEEDS = 3  # of the experiment
TRUE, FOUND = "true", "cosegment"
GAPS = {"category": "gap of the category's word", "parts": "gap with parts"}
MEANS = (
    "gap_category", "gap_category_inside", "gap_parts", "gap_parts_inside", "accuracy",
    "attention_accuracy", "majority",
)  # fmt: skip
GOOD_GAP, GOOD_PARTS, GOOD_ACCURACY = 0.95, 0.9, 0.8


@dataclass(frozen=True)
class Job:
    """One learning: of a category, with a loss, a seed, and masks that are true or found."""

    category: str
    loss: str
    seed: int
    masks: str

    @property
    def name(self) -> str:
        """Its folder, and without .json its file of scores."""
        return f"learned/{self.masks}-{self.loss}-{self.seed}-{self.category}"

    @property
    def drawn(self) -> str:
        """Its pictures, without .png."""
        return f"drawn/{self.masks}-{self.loss}-{self.seed}-{self.category}"

    @property
    def named(self) -> str:
        """What is said of its pictures, without .json."""
        return self.drawn.replace("drawn/", "named/")

    @property
    def read(self) -> str:
        """What :func:`flashmaps.find_parts` reads in held-out images, without .json."""
        return self.drawn.replace("drawn/", "read/")

    @property
    def missing(self) -> str:
        """Its words on scenes that hide their object, without .json."""
        return self.drawn.replace("drawn/", "missing/")


def jobs(categories: Sequence[str], losses: Sequence[str], seeds: int) -> list[Job]:
    """In the order of their worth: what is cut off is what is missed least."""
    main = "both" if "both" in losses else losses[0]
    others = [each for each in losses if each != main]
    out = [Job(each, main, 0, TRUE) for each in categories]
    for each in categories:
        out += [Job(each, loss, 0, TRUE) for loss in others]
        out.append(Job(each, main, 0, FOUND))
    for seed in range(1, seeds):
        out += [Job(each, loss, seed, TRUE) for each in categories for loss in (main, *others)]
    return out


def evaluate_parts(
    out: str | Path,
    *,
    split: str = "test",
    categories: Sequence[str] | None = None,
    losses: Sequence[str] = ("both",),
    seeds: int = 1,
    images: int = IMAGES,
    held_out: int = HELD_OUT,
    size: int = 128,
    model: Any = "builtin",
    learning: dict[str, Any] | None = None,
    pictures: int = 3,
    scenes: int = 5,
    resamples: int = RESAMPLES,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Learn words, score them, and write a folder that grows.

    Args:
        split: of the world: "test", or "validation" to choose on.
        losses: of "noise", "attention" and "both"; seeds: how many of each, 0 to seeds - 1.
        images: to learn from, the first of the split; held_out: the next ones, to score on.
        size: pixels a side.
        learning: more arguments of :func:`flashmaps.learn_parts`.
        pictures: generated of each category, 0: none; scenes: with occluders of each, 0: none.

    Returns what results.json holds.
    """
    from tqdm.auto import tqdm

    from flashmaps.diffusion.loading import load_model, name_of
    from flashmaps.matching.settings import fingerprint

    check_resampling(resamples, seed)
    whole("images", images, 2)
    whole("held_out", held_out, 2)
    whole("size", size, *SIZES)
    check_folder(out, KIND, grows=True)
    names = tuple(CATEGORIES) if categories is None else tuple(categories)
    for each in names:
        if each not in CATEGORIES:
            raise ValueError(f"there is no category {each!r}; there are: {', '.join(CATEGORIES)}")
    for each in losses:
        if each not in LOSSES:
            raise ValueError(f"loss={each!r} is not known; choose from {', '.join(LOSSES)}")
    if split not in ("test", "validation"):
        raise ValueError(f"split={split!r}; wanted 'test', or 'validation' to choose on")
    pipe = load_model(model)
    asked = {
        "flashmaps": metadata.version("flashmaps"), "model": name_of(model),
        "weights": fingerprint(pipe), "size": size, "learning": learning or {},
        "images": f"{images} scenes of each category with one object and nothing before it, the "
        f"first of the {split} split of flashmaps.world; scored on the {held_out} that follow",
    }  # fmt: skip
    todo = jobs(names, losses, seeds)
    results: dict[str, Any] = {}
    with open_run(out, KIND, asked, overwrite=overwrite) as run, fit_threads(pipe):
        for job in tqdm(todo, desc="learning", disable=not progress):
            if not run.whole(f"{job.name}.json"):
                own = lone_images(job.category, split, images, size=size)
                segments: Any = list(own.labels)
                if job.masks == FOUND:
                    segments = cosegment(list(own.images), model=pipe)
                    if not common_parts(segments):
                        run.write_json(f"{job.name}.json", {"failed": "no part in common"})
                        continue
                row = _learn(run, pipe, job, own, segments, split, held_out, size, learning)
                run.write_json(f"{job.name}.json", row)
            results = _told(run, asked, todo, resamples, seed)
            if job == todo[len(names) - 1]:  # the first of each category are there
                _use(
                    run, pipe, todo[: len(names)], split, held_out, size, pictures, scenes, progress
                )
        first = [each for each in todo if each.seed == 0]
        _use(run, pipe, first, split, held_out, size, pictures, scenes, progress)
        results = _told(run, asked, todo, resamples, seed)
    return results


def _told(
    run: Run, asked: dict[str, Any], todo: Sequence[Job], resamples: int, seed: int
) -> dict[str, Any]:
    """What results.json and results.md hold, of the jobs that are done."""
    results = {**asked, **summarise(run, todo, resamples, seed)}
    run.write_json("results.json", results)
    run.write_text("results.md", page(results, "Parts", tables(results)))
    return results


def _use(
    run: Run, pipe: Any, some: Sequence[Job], split: str, held_out: int, size: int, pictures: int,
    scenes: int, progress: bool,
) -> None:  # fmt: skip
    """What words that are done are good for: parts read and told missing, pictures made."""
    from tqdm.auto import tqdm

    judge = Judge(run) if pictures else None
    for job in tqdm(some, desc="words in use", disable=not progress):
        if not (run.folder / job.name / "parts.json").is_file():
            continue
        learned = Parts.load(run.child(job.name))
        if job.loss == some[0].loss:
            _read_images(run, pipe, job, learned, split, held_out, size, scenes)
        if judge is None:
            continue
        word = f"drawn/word-{job.category}"
        for name, draw in ((job.drawn, draw_pictures), (word, draw_of_word)):
            if not run.whole(f"{name}.png"):
                draw(pipe, learned, job.category, pictures, run, name)
        if not run.whole(f"{job.named}.json"):
            files = {"learned": job.drawn, "word": word}
            scores = picture_scores(pipe, learned, job.category, judge, run, files)
            run.write_json(f"{job.named}.json", scores)


def _read_images(
    run: Run, pipe: Any, job: Job, learned: Parts, split: str, held_out: int, size: int, scenes: int
) -> None:
    """Parts as ``fm.find_parts`` tells them: in held-out images, and in scenes that hide some."""
    todo = [] if run.whole(f"{job.read}.json") else [job.read]
    if scenes and not run.whole(f"{job.missing}.json"):
        todo.append(job.missing)
    if not todo:
        return
    count = len(learned.images)
    pairs = pair_up(learned.labels, lone_images(job.category, split, count, size=size).labels)
    if job.read in todo:
        held = lone_images(job.category, split, held_out, first=count, size=size)
        run.write_json(f"{job.read}.json", sight_scores(pipe, learned, held, pairs))
    if job.missing in todo:
        found = missing_scores(pipe, learned, job.category, pairs, split, scenes, size)
        run.write_json(f"{job.missing}.json", {"scenes": found})


def _learn(
    run: Run, pipe: Any, job: Job, own: PartImages, segments: Any, split: str, held_out: int,
    size: int, learning: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    learned = learn_parts(
        list(own.images), segments=segments, model=pipe, loss=job.loss, seed=job.seed, size=size,
        folder=run.child(job.name), progress=False, **(learning or {}),
    )  # fmt: skip
    held = lone_images(job.category, split, held_out, first=len(own.images), size=size)
    latents = torch.cat([encode(pipe, [load_image(each)]) for each in held.images])
    masks = torch.from_numpy(np.stack([each >= 0 for each in held.labels])).float()
    words = learned.words
    reference = f"noise/{job.category}.json"
    if not run.whole(reference):
        plain = {"empty": "", "word": f"a {job.category}"}
        found = {key: noise_loss(pipe, latents, masks, p, {}) for key, p in plain.items()}
        run.write_json(reference, found)
    told = {
        **json.loads((run.folder / reference).read_text("utf-8")),
        "category": noise_loss(pipe, latents, masks, learned.prompt(()), words),
        "parts": noise_loss(pipe, latents, masks, learned.prompt(), words),
    }
    pairs = pair_up(learned.labels, own.labels)
    nearest, rank = nearest_category(pipe, learned.category_embedding)
    return {
        "noise": told,
        "nearest": nearest,
        "rank": rank,
        "count": learned.count,
        **part_scores(pipe, learned, held, pairs),
    }


def summarise(run: Run, todo: Sequence[Job], resamples: int, seed: int) -> dict[str, Any]:
    """Of the jobs that are done: each one's scores, and their means by loss and masks."""
    rows, failed = [], []
    for job in todo:
        path = run.folder / f"{job.name}.json"
        if path.is_file():
            row = json.loads(path.read_text("utf-8"))
            if "failed" in row:
                failed.append({"category": job.category, "why": row["failed"]})
                continue
            row.pop("missing", None)
            if run.whole(f"{job.named}.json"):
                row["pictures"] = json.loads((run.folder / f"{job.named}.json").read_text("utf-8"))
            if run.whole(f"{job.missing}.json"):
                told = json.loads((run.folder / f"{job.missing}.json").read_text("utf-8"))
                row["missing"] = told["scenes"]
            if run.whole(f"{job.read}.json"):
                row["sight"] = json.loads((run.folder / f"{job.read}.json").read_text("utf-8"))
            rows.append({"category": job.category, "loss": job.loss, "seed": job.seed,
                         "masks": job.masks, **_scored(row, resamples, seed)})  # fmt: skip
    groups: dict[str, Any] = {}
    for row in rows:
        groups.setdefault(f"{row['loss']}, {row['masks']} masks", []).append(row)
    return {
        "rows": rows,
        "failed": failed,
        "groups": {name: _group(each, seed) for name, each in groups.items()},
    }


def _scored(row: dict[str, Any], resamples: int, seed: int) -> dict[str, Any]:
    """One learning's scores, with intervals over held-out images."""
    noise = {p: {w: np.array(v) for w, v in each.items()} for p, each in row["noise"].items()}
    counts = resample(len(noise["empty"]["whole"]), resamples, seed)
    out = {key: row[key] for key in ("nearest", "rank", "count", "attention_iou", "object_iou")}
    for prompt in GAPS:
        for where in ("whole", "inside"):
            top = noise["empty"][where] - noise[prompt][where]
            base = noise["empty"][where] - noise["word"][where]
            key = f"gap_{prompt}" if where == "whole" else f"gap_{prompt}_inside"
            out[key] = _ratio(top, base, counts)
    on = np.array(row["pixels"], dtype=float)
    for key in ("right", "attention_right", "majority_right"):
        name = {"right": "accuracy", "attention_right": "attention_accuracy"}.get(key, "majority")
        out[name] = _ratio(np.array(row[key], dtype=float), on, counts)
    if "sight" in row:
        read = {name: np.array(v, dtype=float) for name, v in row["sight"].items()}
        out["sight_accuracy"] = _ratio(read["right"], read["pixels"], counts)
    for key in ("pictures", "missing"):
        if key in row:
            out[key] = row[key]
    return out


def _ratio(top: np.ndarray, base: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (counts @ top) / (counts @ base)
    return {"mean": float(top.sum() / base.sum()), "interval": interval(drawn)}


def _group(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Means over learnings, with intervals over them."""
    counts = resample(len(rows), RESAMPLES, seed)
    out: dict[str, Any] = {"learnings": len(rows), "seeds": len({row["seed"] for row in rows})}
    for key in MEANS:
        values = np.array([row[key]["mean"] for row in rows])
        out[key] = {"mean": float(values.mean()), "interval": interval(counts @ values / len(rows))
                    if len(counts) else None}  # fmt: skip
    for key in ("attention_iou", "object_iou"):
        out[key] = {"mean": float(np.nanmean([row[key] for row in rows])), "interval": None}
    out["nearest_right"] = sum(row["nearest"] == row["category"] for row in rows)
    out["nearest_first"] = sum(
        row["nearest"] == row["category"] and row["rank"] == 1 for row in rows
    )
    out["good_category"] = sum(row["gap_category"]["mean"] >= GOOD_GAP for row in rows)
    out["good_parts"] = sum(
        row["gap_parts"]["mean"] >= GOOD_PARTS and row["accuracy"]["mean"] >= GOOD_ACCURACY
        for row in rows
    )
    read = [row for row in rows if "sight_accuracy" in row]
    if read:
        values = np.array([row["sight_accuracy"]["mean"] for row in read])
        out["sight_accuracy"] = {"mean": float(values.mean()), "interval": None}
        out["good_parts_read"] = sum(
            row["gap_parts"]["mean"] >= GOOD_PARTS
            and row["sight_accuracy"]["mean"] >= GOOD_ACCURACY
            for row in read
        )
    drawn = [row["pictures"] for row in rows if "pictures" in row]
    if drawn:
        out["pictures"] = {
            key: float(np.mean([each[key] for each in drawn]))
            for key in (
                "judge", "named", "named_parts", "named_word", "read_category", "read_parts",
                "read_word",
            )
        }  # fmt: skip
        out["pictures"]["count"] = int(sum(each["count"] for each in drawn))
    return out


def _pictures(groups: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Generated pictures: named right, and parts read in them, by the words they are made from."""
    body = [
        [name, str(each["pictures"]["count"]), f"{each['pictures']['judge']:.2f}",
         *(f"{each['pictures'][f'{what}_{of}' if of else what]:.2f}"
           for what, keys in (("named", ("", "parts", "word")),
                              ("read", ("category", "parts", "word")))
           for of in keys)]
        for name, each in groups.items() if "pictures" in each
    ]  # fmt: skip
    header = [
        "loss, masks", "pictures", "the judge is right about scenes", "named right: learned word",
        "all words", "true word", "parts read: learned word", "all words", "true word",
    ]  # fmt: skip
    return [("Pictures", header, body)] if body else []


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) for the means, each category, and missing parts."""
    header = [
        "loss, masks", "learnings", "gap, category", "inside", "gap, with parts", "inside",
        "part accuracy", "by find_parts", "by attention alone", "majority", "attention IoU",
        "object IoU", "nearest right", "pictures named right",
    ]  # fmt: skip
    body = []
    for name, each in results["groups"].items():
        keys = (*MEANS[:5], "sight_accuracy", *MEANS[5:], "attention_iou", "object_iou")
        drawn = each.get("pictures")
        body.append([
            name, str(each["learnings"]),
            *(shown(each[key], 2) if key in each else "-" for key in keys),
            f"{each['nearest_right']} of {each['learnings']}",
            "-" if drawn is None else f"{drawn['named']:.2f} / {drawn['named_parts']:.2f}",
        ])  # fmt: skip
    out = [("Means over categories and seeds", header, body), *_pictures(results["groups"])]
    for name in results["groups"]:
        loss, masks = name.split(", ")
        rows = [
            [
                row["category"], str(row["count"]), shown(row["gap_category"], 2),
                shown(row["gap_parts"], 2), shown(row["accuracy"], 2),
                shown(row["sight_accuracy"], 2) if "sight_accuracy" in row else "-",
                shown(row["attention_accuracy"], 2), f"{row['majority']['mean']:.2f}",
                f"{row['nearest']} ({row['rank']})",
                f"{row['pictures']['named']:.2f}" if "pictures" in row else "-",
            ]
            for row in results["rows"]
            if row["loss"] == loss and f"{row['masks']} masks" == masks and row["seed"] == 0
        ]  # fmt: skip
        head = [
            "category", "parts", "gap, category", "gap, with parts", "part accuracy",
            "by find_parts", "by attention alone", "majority", "nearest category (rank)",
            "named right",
        ]  # fmt: skip
        if rows:
            out.append((f"{name}, seed 0", head, rows))
    return out + missing_tables(results["rows"])
