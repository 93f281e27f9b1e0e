"""The main job, shown: a real stereo pair and pairs of drawn scenes, matched beside the truth.

And segments of a photograph and of a collection (:mod:`flashmaps.app.demo_segments`), and at last
one hidden animal imagined whole (:mod:`flashmaps.app.demo_completion`).

The stereo pair and its true disparity are those of :mod:`flashmaps.evaluation.stereo`; the scenes
are of the world's test split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps import evaluation
from flashmaps.app import costs
from flashmaps.app.demo_completion import ShownCompletion
from flashmaps.app.demo_segments import ShownSegments
from flashmaps.diffusion.features import BUILTIN, Features, features, load_model
from flashmaps.diffusion.loading import name_of
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.baselines import colours, nearest, unit_rows, untrained
from flashmaps.evaluation.benchmark import Pair
from flashmaps.evaluation.methods import CEILING, Methods, judged_by
from flashmaps.evaluation.metrics import pck
from flashmaps.evaluation.scene_figure import scene_pairs
from flashmaps.evaluation.stereo import StereoPair, load_pair
from flashmaps.evaluation.worlds import Worlds
from flashmaps.files import whole_folder, write_json
from flashmaps.maps.backends.choice import check_name
from flashmaps.maps.grids import centres
from flashmaps.matching.confidence import local_ims
from flashmaps.matching.match import match_features
from flashmaps.matching.options import COMPARE, READING, MatchOptions
from flashmaps.matching.points import pixel_field
from flashmaps.matching.result import Match
from flashmaps.matching.settings import MatchSettings, settings_of
from flashmaps.matching.support import support
from flashmaps.segmentation.seen import with_object_layers

NOTE = "qk"  # the note's attention from one image to the other, A_st: what the demo leads with
DEMO_SIZE = 288  # longer side in pixels: 48 x 72 tokens at a quarter of the pixels
KIND = "demo"  # of the folder

CLICKED = (372, 268)  # a pixel of the left view: on the engine, with texture and a true disparity
_RANDOM_SEED = 0

# Drawn scenes: the first pairs of the test split, which take the categories in turn.
SCENES = 6
SCENE_POINTS = 9
SCENE_TOLERANCE = 0.1  # of the longer side of the target object's box


def run(
    out: str | Path = "demo-output",
    *,
    model: Any = BUILTIN,
    layers: str | Sequence[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    size: int = DEMO_SIZE,
    compare: str | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Match the stereo pair and drawn scenes, score them, and write the folder ``out``.

    On the stereo pair queries on keys (the note's attention), keys on keys, queries on queries and
    features on features are all scored; the pictures and the prediction of wrong matches are of
    ``compare``, queries on keys unless it is given. Beside it is what the model's settings compare
    or, where that is the same, features on features. ``layers``, ``timestep`` and ``seeds`` are the
    model's own unless they are given. ``size`` is that of the stereo pair; drawn scenes are shown
    at the model's own.
    The folder holds ``report.html`` (self-contained), the pictures and ``results.json``, which has
    every number and is what this returns. It is written whole or not at all.
    """
    from tqdm.auto import tqdm

    check_name(backend)
    MatchOptions().with_given(compare=compare)
    started = time.perf_counter()
    with (
        whole_folder(out, KIND) as folder,  # from the first, so that it is refused before the work
        tqdm(total=10, disable=not progress, bar_format=_BAR) as bar,
    ):

        def step(name: str) -> None:
            bar.set_description_str(f"{name:<34}")
            bar.update()

        bar.set_description_str(f"{'loading model and photographs':<34}")
        pair = load_pair()
        pipe = load_model(model)
        model_own = settings_of(pipe).with_given(
            layers=layers,
            timestep=timestep,
            seeds=None if seeds is None else tuple(seeds),
        )
        settings = model_own.with_given(compare=NOTE if compare is None else compare)
        beside = model_own
        if beside.compare == settings.compare:
            beside = model_own.with_given(compare="features" if settings.compare == NOTE else NOTE)
        options = {**settings.for_features, "size": size, "outputs": True}
        # Without the confidence, which was fitted to pictures of another size.
        ways = {
            each.compare: replace(each.options, calibration=None) for each in (settings, beside)
        }
        step("running the model on both views")
        began = time.perf_counter()
        left, right = features(pipe, [pair.left, pair.right], **options)
        feature_seconds = time.perf_counter() - began
        step("matching")
        began = time.perf_counter()
        matches = {
            name: match_features(left, right, ways.get(name, MatchOptions(name)), backend=backend)
            for name in COMPARE
        }
        match = matches[settings.compare]
        match_seconds = time.perf_counter() - began
        step("running the untrained model")
        one, other = features(untrained(pipe), [pair.left, pair.right], **options)
        fresh = match_features(one, other, ways[settings.compare], backend=backend)
        step("scoring against the truth")
        methods = _score_methods(pair, matches, fresh)
        predictors = _score_predictors(pair, match)
        step("matching drawn scenes")
        scenes = _Scenes(pipe, settings, beside, backend)
        step("segmenting")
        shown = with_object_layers(pipe, [left])[0] if layers is None else left
        segments = ShownSegments(pipe, shown, backend)
        step("imagining a hidden animal")
        # SDXL has two text encoders, which the inpainting here does not know.
        one_encoder = getattr(pipe, "text_encoder_2", None) is None
        completion = ShownCompletion(pipe) if one_encoder else None
        step("measuring time and memory")
        cost = {name: costs.measure(left, right, name, backend=backend) for name in costs.METHODS}
        step("drawing and writing the report")
        known = np.isfinite(pair.truth).all(axis=-1)
        results: dict[str, Any] = {
            "model": name_of(model),
            "beside": _way(beside),
            "settings": match.summary(),
            "truth": _describe_truth(pair, known),
            "methods": methods,
            "scenes": scenes.results,
            "segments": segments.results,
            "completion": None if completion is None else completion.results,
            "maps": {
                **{READING[name]: _map_statistics(each) for name, each in matches.items()},
                f"untrained, {READING[settings.compare]}": _map_statistics(fresh),
            },
            "predictors_of_wrong_matches": predictors,
            "cost": cost,
            "seconds": {"model": feature_seconds, "matching": match_seconds},
        }
        results["seconds"]["before_drawing"] = time.perf_counter() - started
        _write(folder, matches, match, ways, pair, scenes, segments, completion, results)
        bar.update()
    return results


def _spread(pair: Pair, count: int) -> Pair:
    """The pair with ``count`` of its points, each as far as can be from those before it."""
    points = pair.source_points
    chosen = [int(points[:, 1].argmin())]
    far = np.full(len(points), np.inf)
    while len(chosen) < min(count, len(points)):
        far = np.minimum(far, np.linalg.norm(points - points[chosen[-1]], axis=1))
        chosen.append(int(far.argmax()))
    return replace(
        pair,
        source_points=points[chosen],
        target_points=pair.target_points[chosen],
        mirrored_points=None,
    )


class _Scenes:
    """Pairs of drawn scenes: their true points, where they were found, and how right that is."""

    def __init__(
        self, pipe: Any, settings: MatchSettings, beside: MatchSettings, backend: str
    ) -> None:
        benchmark = Worlds(SCENES, 200, hidden=False)
        self.pairs = [_spread(benchmark.pair(i), SCENE_POINTS) for i in range(len(benchmark))]
        numbered = list(enumerate(self.pairs))
        with fit_threads(pipe):
            found = [each for _, each in _methods(pipe, settings, backend).run(numbered)]
            self.method = _way(settings)
            placed = {self.method: [each.found[_judged(settings)] for each in found]}
            others = _methods(pipe, beside, backend, baselines=False).run(numbered)
            placed[_way(beside)] = [each.found[_judged(beside)] for _, each in others]
        self.found = placed[self.method]
        confidence = [each.scores[settings.compare].get("confidence") for each in found]
        self.confidence = None if any(c is None for c in confidence) else confidence
        for name in (
            f"untrained, {READING[settings.compare]}", "SIFT", "raw colour, 3 x 3", "identity",
            "random", CEILING,
        ):  # fmt: skip
            placed[name] = [each.found[name] for each in found]
        errors = {
            name: np.concatenate(
                [
                    np.linalg.norm(points - pair.target_points, axis=1) / pair.base
                    for pair, points in zip(self.pairs, each, strict=True)
                ]
            )
            for name, each in placed.items()
        }
        self.results = {
            "method": self.method,
            "pairs": len(self.pairs),
            "points": len(errors[self.method]),
            "tolerance": SCENE_TOLERANCE,
            "calibrated": self.confidence is not None,
            "methods": {
                name: {
                    "pck@0.05": pck(each, 1.0, (0.05,))[0],
                    "pck@0.1": pck(each, 1.0, (0.1,))[0],
                    "median_error_of_box": float(np.median(each)),
                }
                for name, each in errors.items()
            },
        }


def _methods(pipe: Any, settings: MatchSettings, backend: str, **options: Any) -> Methods:
    return Methods(
        pipe, compare=(settings.compare,), backend=backend, options=settings.for_features,
        settings=settings, **options,
    )  # fmt: skip


def _judged(settings: MatchSettings) -> str:
    return judged_by(settings.compare, settings)


def _way(settings: MatchSettings) -> str:
    return f"{READING[settings.compare]}, {settings.readout}"


_BAR = "{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}]"


def token_field(matched: Tensor, match: Match) -> np.ndarray:
    """[h, w, 2] of the left view from [N_s, 2] target positions, each token's pixels alike."""
    here, there = match.source, match.target
    sizes = here.image.shape[:2], there.image.shape[:2]
    return pixel_field(matched, here.grid, *sizes, smooth=False)


def _score_methods(
    pair: StereoPair, matches: dict[str, Match], untrained: Match
) -> dict[str, dict[str, float]]:
    """PCK and errors in pixels of every method, all on the same tokens and pixels."""
    match = matches["qk"]
    target = centres(match.target.grid)
    tokens = len(match.forward)
    generator = torch.Generator().manual_seed(_RANDOM_SEED)
    chosen = torch.randint(len(target), (tokens,), generator=generator)

    def by(describe: Callable[[Features], Tensor]) -> np.ndarray:
        return token_field(target[nearest(describe(match.source), describe(match.target))], match)

    fields = {
        **_more(matches),
        **{f"{READING[n]}, hard": m.source_to_target for n, m in matches.items()},
        **{f"{READING[n]}, soft": m.source_to_target_soft for n, m in matches.items()},
        "cosine of keys": by(lambda f: unit_rows(f.key)),
        "cosine of features": by(lambda f: unit_rows(_output(f))),
        f"untrained {READING[untrained.compare]}": untrained.source_to_target,
        "raw colour": by(lambda f: colours(f, 1)),
        "raw colour, 3 x 3": by(lambda f: colours(f, 3)),
        "identity": token_field(centres(match.source.grid), match),
        "random": token_field(target[chosen], match),
    }
    base = max(pair.right.shape[:2])
    return {name: evaluation.score_field(field, pair.truth, base) for name, field in fields.items()}


def _more(matches: dict[str, Match]) -> dict[str, np.ndarray]:
    """The model's own way, where that is more than a hard or a soft match: its field, by name."""
    return {
        f"{READING[name]}, {match.readout}": match.field()
        for name, match in matches.items()
        if match.readout not in ("hard", "soft")
    }


def _output(of: Features) -> Tensor:
    assert of.output is not None  # asked for in `run`
    return of.output


def _score_predictors(pair: StereoPair, match: Match) -> dict[str, dict[str, Any]]:
    """How well each score tells wrong hard matches from right ones, per source token.

    A token's match is wrong when it is off by more than two tokens (the longer side of one), at the
    token's centre. Scores of target tokens are read at the matched token f(i).
    """
    rt = match.round_trip
    errors = evaluation.endpoint_errors(match.source_to_target, pair.truth)
    height, width = errors.shape
    rows, columns = match.source.grid
    middle = centres(match.source.grid).numpy() * (width, height)
    error = errors[middle[:, 1].astype(int), middle[:, 0].astype(int)]
    known = np.isfinite(error)
    limit = 2 * max(height / rows, width / columns)
    wrong = error > limit
    forward = rt.forward[0]

    def at_target(values: Tensor) -> Tensor:
        return values[0][forward].float()

    scores = {
        "cycle error, hard": rt.hard_distance[0],
        "cycle error, soft": rt.soft_distance[0],
        "IMS of the tokens around": local_ims(rt.hard_distance, match.source.grid)[0],
        "round-trip spread": rt.spread[0],
        "return probability": rt.return_probability[0],
        "IME at the match": at_target(rt.inverse_entropy),
        "MD at the match": at_target(rt.density),
        "NIMS at the match": at_target(rt.nims),
        "IME / log(1 + MD) at the match": at_target(rt.nims_log1p),
        "neighbours' support": support(
            rt.forward, rt.backward, match.source.grid, match.target.grid
        )[0],
    }
    report: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        values_here = values.cpu().numpy()[known]
        report[name] = {
            "auroc_wrong_if_high": evaluation.auroc(values_here, wrong[known]),
            "defined_share": float(np.isfinite(values_here).mean()),
        }
    mutual = match.mutual.cpu().numpy() & known
    report["_task"] = {
        "wrong_if_off_by_px": limit,
        "wrong_share": float(wrong[known].mean()),
        "wrong_share_of_mutual": float(wrong[mutual].mean()) if mutual.any() else None,
        "mutual_tokens": int(mutual.sum()),
        "tokens": int(known.sum()),
        "right_tokens": int((~wrong[known]).sum()),
    }
    return report


def _map_statistics(match: Match) -> dict[str, float]:
    keys = (
        "hard_ims", "soft_ims", "mean_ime_nats", "max_ime_nats", "density_min", "density_max",
        "targets_hit_share", "mutual_share", "mean_return_probability",
    )  # fmt: skip
    summary = match.summary()
    return {key: summary[key] for key in keys}


def _describe_truth(pair: StereoPair, known: np.ndarray) -> dict[str, Any]:
    columns = np.broadcast_to(np.arange(known.shape[1])[None, :], known.shape)
    moved = (columns - pair.truth[:, :, 0])[known]
    return {
        "pixels": int(known.sum()),
        "share_of_pixels": float(known.mean()),
        "disparity_px_min": float(moved.min()),
        "disparity_px_median": float(np.median(moved)),
        "disparity_px_max": float(moved.max()),
        "pck_base_px": int(max(pair.right.shape[:2])),
        "pck_base": "longer side of the target image; every pixel with truth counts once",
    }


def _write(
    folder: Path,
    matches: dict[str, Match],
    match: Match,
    ways: Iterable[str],
    pair: StereoPair,
    scenes: _Scenes,
    segments: ShownSegments,
    completion: ShownCompletion | None,
    results: dict[str, Any],
) -> None:
    from flashmaps.app import report
    from flashmaps.matching import plots

    x, y = CLICKED
    columns = np.arange(pair.truth.shape[1])[None, :]
    moved = columns - pair.truth[:, :, 0]
    low, high = (float(v) for v in np.nanpercentile(moved, (1, 99)))
    methods = results["methods"]
    figures = {
        "scenes": scene_pairs(scenes.pairs, scenes.found, SCENE_TOLERANCE),
        **segments.figures(),
        "matches": plots.matches(match, truth=pair.truth),
        "shifts": plots.shifts(
            {
                "truth: how far each pixel moves (white: not known)": pair.truth,
                **{f"found by {READING[name]}": matches[name].field() for name in ways},
            },
            pair.left,
            limits=(low, high),
        ),
        "heatmap": plots.heatmap(match, CLICKED, truth=pair.truth[y, x]),
        "cycle_error": plots.cycle_error(match),
        "entropy": plots.entropy(match),
        "density": plots.density(match),
        "methods": plots.bars(
            {name: score["median_error_px"] for name, score in methods.items()},
            "Median distance between the found and the true place (shorter is better)",
            f"pixels (the image is {pair.right.shape[1]} wide)",
            highlighted=[name for name in methods if name.startswith(tuple(READING.values()))],
        ),
    }
    if completion is not None:
        figures["completion"] = completion.figure()
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
    report.write(folder / "report.html", results, folder)
    write_json(folder / "results.json", results)
