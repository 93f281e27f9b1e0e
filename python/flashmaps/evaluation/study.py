"""`flashmaps study`: how a model matches best, found on one split of the world, told of another.

1. Every variant of matching that the search asks for (``search.py``) is scored on pairs of the
   validation split, from passes of the model that are computed once (``store.py``).
2. The confidence is fitted to the best variant's matches, on the same pairs (``calibrate.py``).
3. The best variant is scored once on pairs of the test split, beside the baselines, under three
   noises.

The folder: flashmaps.jsonl (what was asked, and which files are the study's), passes/ and test-*/
while it runs; at the end match-settings.json, which :func:`flashmaps.match` reads beside a model's
weights, results.md, plots and results.json, written together. A study that was interrupted goes on
where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from flashmaps.arguments import whole
from flashmaps.diffusion.features import BUILTIN, check_features, load_model
from flashmaps.diffusion.loading import name_of
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.benchmark import Benchmark
from flashmaps.evaluation.bootstrap import RESAMPLES, check_resampling
from flashmaps.evaluation.calibrate import TAKEN, fit
from flashmaps.evaluation.methods import Methods, judged_by, method_names
from flashmaps.evaluation.opening import MOST
from flashmaps.evaluation.results import Table
from flashmaps.evaluation.run import (
    CHUNK,
    WHOLE,
    draw,
    evaluate,
    join,
    read_table,
    report,
)
from flashmaps.evaluation.search import NOISES, TIMESTEPS, Questions, Search, Trial, passes
from flashmaps.evaluation.store import Store
from flashmaps.evaluation.study_report import confidence_auroc, page
from flashmaps.evaluation.worlds import SIDE, Worlds
from flashmaps.files import Run, check_folder, open_run, write_json, write_text
from flashmaps.matching.options import COMPARE, comparisons
from flashmaps.matching.pairs import need_pyarrow
from flashmaps.matching.readout import WINDOWED
from flashmaps.matching.settings import FILE, MatchSettings, check_beside, fingerprint, folder_of

KIND = "study"  # of the folder
TEST_NOISES = 3
MOST_NOISES = 64  # averaged
_NOISE_STEP = 1000  # between the seeds of one test run and the next
_CALIBRATED_POINTS = 64  # of a pair, for the confidence
TOLERANCE = 0.1


def study(
    out: str | Path = "flashmaps-study",
    *,
    model: Any = BUILTIN,
    pairs: int = 96,
    points: int = 20,
    test_pairs: int = 204,
    seed: int = 0,
    image_size: int = SIDE,
    compare: Sequence[str] = tuple(COMPARE),
    timesteps: Sequence[int] = TIMESTEPS,
    sizes: Sequence[int | None] = (None,),
    noises: Sequence[int] = NOISES,
    resamples: int = RESAMPLES,
    device: str | None = None,
    keep: bool = False,
    overwrite: bool = False,
    plots: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Find how a model matches best, and write the folder ``out``.

    Args:
        out: folder to write. One that holds an unfinished study of the same settings is continued.
        model: as for :func:`flashmaps.match`.
        pairs: of the world's validation split, to choose and to calibrate on.
        points: of each pair, in validation and test; both scenes show them.
        test_pairs: of the test split, looked at once, at the end.
        seed: draws pairs and points.
        image_size: pixels a side of the scenes.
        compare, timesteps, sizes, noises: what to try; sizes in pixels that the model sees, None
            being what it was trained on; noises are how many are averaged.
        resamples: of the bootstrap over pairs.
        device: where the model runs, for instance "cuda"; default: where it is. Maps of the search
            are computed on the CPU.
        keep: write match-settings.json beside the model's weights too, where fm.match finds it;
            the model must be "builtin" or a folder.
        overwrite: throw away a study of other settings in ``out``.
        plots: draw them too.
        progress: show bars.

    Returns what results.json holds. Raises ValueError for arguments out of range, or when ``out``
    holds other things.
    """
    need_pyarrow()
    for name, value in (("pairs", pairs), ("points", points), ("test_pairs", test_pairs)):
        whole(name, value, 1, MOST)
    for name, several in (("timesteps", timesteps), ("noises", noises)):
        if not several:
            raise ValueError(f"{name} is empty; give at least one")
    compare = comparisons(compare)
    for each in noises:
        whole("noises", each, 1, MOST_NOISES)
    check_folder(out, KIND, grows=True)
    check_resampling(resamples, seed)
    pipe = load_model(model, device=device)
    for side in sizes:
        check_features(pipe, timestep=tuple(timesteps), size=side)
    beside = folder_of(pipe) if keep else None
    if keep and beside is None:
        raise ValueError("keep: the model was not loaded from a folder, so nothing can lie in it")
    if beside is not None:
        check_beside(beside)
    asked: dict[str, Any] = {
        "flashmaps": metadata.version("flashmaps"),
        "study": "matching",
        "model": name_of(model),
        "weights": fingerprint(pipe),
        "pairs": pairs,
        "points": points,
        "test_pairs": test_pairs,
        "seed": seed,
        "image_size": image_size,
        "compare": list(compare),
        "timesteps": list(timesteps),
        "sizes": list(sizes),
        "noises": list(noises),
        "resamples": resamples,
        "device": device,
    }

    def split(name: str, count: int, each: int) -> Benchmark:
        return Worlds(count, each, seed=seed, side=image_size, split=name, hidden=False)

    with open_run(out, KIND, asked, overwrite=overwrite) as run:
        if not run.whole("results.json"):
            _study(run, pipe, model, split, asked, plots, progress)
        results = json.loads((run.folder / "results.json").read_text("utf-8"))
        run.discard_children()
        if beside is not None:
            write_text(beside / FILE, (run.folder / FILE).read_text("utf-8"))
    return results


def _study(
    run: Run,
    pipe: Any,
    model: Any,
    split: Callable[[str, int, int], Benchmark],
    asked: dict[str, Any],
    plots: bool,
    progress: bool,
) -> None:
    """The search, the calibration, the test, and the files that tell of them."""
    with fit_threads(pipe):
        questions, images = Questions.of(split("validation", asked["pairs"], asked["points"]))
        store = Store(run.child("passes"), pipe, images, progress=progress)
        search = Search(
            store, questions, timesteps=asked["timesteps"], sizes=asked["sizes"],
            noises=asked["noises"], compare=asked["compare"], resamples=asked["resamples"],
            seed=asked["seed"], progress=progress,
        )  # fmt: skip
        best = search.run()
        calibration, candidates = _calibrate(
            pipe, best.settings, split("validation", asked["pairs"], _CALIBRATED_POINTS),
            asked["seed"], progress,
        )  # fmt: skip
    settings = replace(best.settings, calibration=calibration)
    test = split("test", asked["test_pairs"], asked["points"])
    tested, first = _test(run, pipe, model, settings, test, asked, progress)
    results = {
        "settings": asked,
        "trials": [_row(trial) for trial in search.trials.values()],
        "chosen": _row(best),
        "confidence": {"candidates": candidates},
        "test": tested,
    }
    with run.files() as new:
        if plots:
            draw(new, tested, first, test, next(iter(tested["methods"])))
        write_json(new / FILE, settings.to_file(asked["weights"], measured=_measured(results)))
        write_text(new / "results.md", page(results, plots=plots))
        write_json(new / "results.json", results)


def _calibrate(
    pipe: Any, settings: MatchSettings, benchmark: Benchmark, seed: int, progress: bool
) -> tuple[Any, dict[str, Any]]:
    """The confidence of the chosen way, through what fm.match itself runs."""
    from tqdm.auto import tqdm

    methods = Methods(
        pipe, compare=(settings.compare,), seed=seed, options=settings.for_features,
        settings=settings,
        baselines=False,
    )  # fmt: skip
    name = judged_by(settings.compare, settings)
    scores: dict[str, list[np.ndarray]] = {each: [] for each in TAKEN}
    right, number, share = [], [], []
    with tqdm(total=len(benchmark), desc="confidence", disable=not progress) as bar:
        for first in range(0, len(benchmark), CHUNK):
            last = min(first + CHUNK, len(benchmark))
            chunk = [(i, benchmark.pair(i)) for i in range(first, last)]
            for (i, pair), (_, outcome) in zip(chunk, methods.run(chunk), strict=True):
                error = np.linalg.norm(outcome.found[name] - pair.target_points, axis=1)
                right.append(error <= TOLERANCE * pair.base)
                number.append(np.full(len(error), i))
                share.append(TOLERANCE * pair.base / max(pair.target_image.shape[:2]))
                for each in TAKEN:
                    scores[each].append(outcome.scores[settings.compare][each])
                bar.update()
    return fit(
        {each: np.concatenate(values) for each, values in scores.items()},
        np.concatenate(right),
        np.concatenate(number),
        tolerance=TOLERANCE,
        of="the longer side of the object's box in the target, seen or not (where this was fitted, "
        f"the tolerance was {np.median(share):.3f} of the image's side in the median)",
        fitted_on=f"{benchmark.what}; {len(benchmark)} pairs",
    )


def _test(
    run: Run,
    pipe: Any,
    model: Any,
    settings: MatchSettings,
    benchmark: Benchmark,
    asked: dict[str, Any],
    progress: bool,
) -> tuple[dict[str, Any], Table]:
    """The report of the chosen way on the test split, all noises together; the first's points."""
    tables: list[Table] = []
    shown: dict[str, Any] = {}
    for number in range(TEST_NOISES):
        seeds = tuple(each + number * _NOISE_STEP for each in settings.seeds)
        one = run.child(f"test-{number}")
        told = evaluate(
            benchmark, one, model=pipe, compare=(settings.compare,), seed=asked["seed"],
            settings=replace(settings, seeds=seeds), resamples=asked["resamples"], plots=False,
            progress=progress,
        )  # fmt: skip
        shown = shown or told["settings"]
        tables.append(read_table(one / WHOLE))
    found = report(
        join(tables), benchmark, method_names((settings.compare,), settings),
        {settings.compare: judged_by(settings.compare, settings)},
        resamples=asked["resamples"], seed=asked["seed"],
    )  # fmt: skip
    key, name = f"{benchmark.headline:g}", next(iter(found["methods"]))
    found["noises"] = [float(_right(table, name, benchmark.headline).mean()) for table in tables]
    found["headline"] = {"method": name, "pck": key}
    return {**found, "settings": {**shown, "model": asked["model"]}}, tables[0]


def _right(table: Table, method: str, threshold: float) -> np.ndarray:
    x, y = table[f"x: {method}"] - table["true_x"], table[f"y: {method}"] - table["true_y"]
    return np.hypot(x, y) <= threshold * table["base"]


def _row(trial: Trial) -> dict[str, Any]:
    """One variant as plain values."""
    settings, scores = trial.settings, trial.scores
    return {
        "stage": trial.stage,
        "compare": settings.compare,
        "layers": list(settings.layers or ()),
        "timestep": list(settings.timesteps),
        "noises": len(settings.seeds),
        "same_noise": settings.same_noise,
        "size": settings.size,
        "temperature": settings.temperature,
        "normalize": settings.normalize,
        "readout": settings.readout,
        "window": settings.window if settings.readout in WINDOWED else None,
        "between": settings.carried_by,
        "passes": passes(settings),
        "value": trial.value,
        "pck": {
            each: {
                "value": scores["pck"][each]["per_point"],
                "interval": scores["pck"][each]["per_point_interval"],
            }
            for each in ("0.05", "0.1")
        },
        "mean_error": scores["error"]["mean_of_base"],
        "mean_px": scores["error"]["mean_px"],
        "mean_px_interval": scores["error"]["mean_px_interval"],
    }


def _measured(results: dict[str, Any]) -> dict[str, Any]:
    """The numbers of match-settings.json: where these settings come from and what they reach."""
    test, asked = results["test"], results["settings"]
    one = test["methods"][test["headline"]["method"]]["pck"][test["headline"]["pck"]]
    confidence = confidence_auroc(test)
    return {
        "chosen_on": f"{asked['pairs']} pairs of the world's validation split",
        "test": f"{test['pairs']} pairs of the test split, {TEST_NOISES} noises",
        "pck@" + test["headline"]["pck"]: round(one["per_point"], 4),
        "interval": one["per_point_interval"],
        "confidence_auroc": None if confidence is None else round(confidence[0], 4),
    }
