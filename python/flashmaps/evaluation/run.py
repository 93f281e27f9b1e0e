"""`flashmaps eval`: every method on every pair of a benchmark, and a folder with what came of it.

The folder while it runs: flashmaps.jsonl (what was asked, and which files are the run's),
parts/*.parquet (the points of a few pairs each). At the end: points.parquet (all of them), and
results.json, results.md and the plots, written together. A run which was interrupted goes on where
it was; parts that are damaged are made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmaps.batches.ahead import ahead, behind
from flashmaps.diffusion.features import BUILTIN, check_features, load_model
from flashmaps.diffusion.loading import name_of
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation import markdown
from flashmaps.evaluation.benchmark import Benchmark, Pair
from flashmaps.evaluation.bootstrap import RESAMPLES, check_resampling
from flashmaps.evaluation.methods import Methods, Outcome, fingerprint, judged_by, method_names
from flashmaps.evaluation.opening import open_benchmark
from flashmaps.evaluation.results import CURVE, Table, summarise
from flashmaps.files import Run, check_folder, open_run, write_json, write_text
from flashmaps.maps.backends.choice import check_name
from flashmaps.matching.options import comparisons
from flashmaps.matching.pairs import need_pyarrow
from flashmaps.matching.settings import MatchSettings, settings_of

KIND = "evaluation"  # of the folder
WHOLE = "points.parquet"
CHUNK = 8  # pairs a part: what an interruption loses at most, and what the model sees together
EXAMPLES = 4  # pairs that are drawn
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_OUT = "flashmaps-eval"


def evaluate(
    benchmark: str | Benchmark,
    out: str | Path = DEFAULT_OUT,
    *,
    pairs: int | None = None,
    points: int | None = None,
    seed: int = 0,
    data: str | Path | None = None,
    split: str = "test",
    image_size: int | None = None,
    model: Any = BUILTIN,
    compare: str | Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    prompt: str = "",
    seeds: Sequence[int] | None = None,
    size: int | None = None,
    same_noise: bool | None = None,
    settings: MatchSettings | None = None,
    device: str | None = None,
    dtype: str | None = None,
    backend: str = "auto",
    resamples: int = RESAMPLES,
    overwrite: bool = False,
    plots: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Score matches and baselines on a benchmark, and write the folder ``out``.

    Args:
        benchmark, pairs, points, seed, data, split, image_size: see
            :func:`flashmaps.evaluation.benchmark.open_benchmark`; or a Benchmark of your own.
        out: folder to write. One that holds an unfinished run of the same settings is continued,
            and of a finished one the report is made anew from its points.
        model, layers, timestep, seeds, size, same_noise: see
            :func:`flashmaps.diffusion.features.features`; any Stable Diffusion folder will do.
            Those left out are the model's own, as for :func:`flashmaps.match`.
        prompt: the text the model sees; "{category}" stands for the pair's.
        device: where the model runs, for instance "cuda"; default: where it is.
        dtype: "float32", "float16" or "bfloat16"; default: as it is.
        compare: one or several of "kk", "qk", "qq", "features"; default the model's own.
        settings: in place of the model's own.
        backend: what computes the maps; see :func:`flashmaps.maps.backends.choice`.
        resamples: of the bootstrap.
        overwrite: throw away what a run of other settings left in ``out``.
        plots: draw them too; they take some seconds.
        progress: show a bar over the pairs.

    Returns what results.json holds. Raises ValueError when ``out`` holds other things, or a run of
    other settings.
    """
    need_pyarrow()
    if compare is not None:
        compare = comparisons(compare)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not known; wanted {', '.join(DTYPES)}")
    check_name(backend)
    check_folder(out, KIND, grows=True)
    check_resampling(resamples, seed)
    if isinstance(benchmark, str):
        benchmark = open_benchmark(
            benchmark,
            pairs=pairs,
            points=points,
            seed=seed,
            data=data,
            split=split,
            image_size=image_size,
        )
    pipe = load_model(model, device=device, dtype=None if dtype is None else DTYPES[dtype])
    chosen = (settings_of(pipe) if settings is None else settings).with_given(
        layers=layers,
        timestep=timestep,
        seeds=None if seeds is None else tuple(seeds),
        size=size,
        same_noise=same_noise,
    )
    if compare is None:
        compare = (chosen.compare,)
    elif chosen.compare not in compare:
        chosen = chosen.with_given(compare=compare[0])
    if prompt:  # not what the confidence was fitted to
        chosen = replace(chosen, calibration=None)
    check_features(pipe, **chosen.for_features)
    options = {**chosen.for_features, "prompt": prompt}
    asked = {
        "flashmaps": metadata.version("flashmaps"),
        "benchmark": benchmark.name,
        "what": benchmark.what,
        "pairs": len(benchmark),
        "points": points,
        "seed": seed,
        "data": None if data is None else str(Path(data).expanduser().resolve()),
        "model": name_of(model),
        "weights": fingerprint(pipe),
        "compare": list(compare),
        "device": device,
        "dtype": dtype,
        "backend": backend,
        **options,
        "match": chosen.options.to_json(),
    }
    asked = json.loads(json.dumps(asked))  # as it will be read again
    names = method_names(compare, chosen)
    with open_run(out, KIND, asked, overwrite=overwrite) as run:
        if WHOLE not in run.names:
            methods = Methods(
                pipe, compare=compare, backend=backend, seed=seed, options=options, settings=chosen
            )
            with fit_threads(pipe):
                _compute(run, benchmark, methods, names, progress)
        elif not run.whole(WHOLE):
            raise ValueError(
                f"{str(run.folder / WHOLE)!r} is not what was written: it is damaged or was "
                "changed. Its numbers are still in results.json; to compute them again, give "
                "another folder"
            )
        table = read_table(run.folder / WHOLE)
        results: dict[str, Any] = {
            "settings": asked,
            **report(
                table, benchmark, names, {each: judged_by(each, chosen) for each in compare},
                resamples=resamples, seed=seed,
            ),
        }  # fmt: skip
        with run.files() as new:
            write_text(new / "results.md", markdown.page(results, plots=plots))
            if plots:
                draw(new, results, table, benchmark, names[0])
            write_json(new / "results.json", results)
    return results


def report(
    table: Table,
    benchmark: Benchmark,
    methods: Sequence[str],
    judged: Mapping[str, str],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that is told of a table of points but the settings of the run."""
    return {
        "benchmark": {
            "name": benchmark.name,
            "what": benchmark.what,
            "pck_base": benchmark.base,
            "interval_unit": benchmark.unit,
            "headline": benchmark.headline,
        },
        "curve_thresholds": list(CURVE),
        "tokens": _tokens(table),
        **summarise(
            table, methods, judged, headline=benchmark.headline, resamples=resamples, seed=seed
        ),
        "resamples": resamples,
    }


def _compute(
    run: Run, benchmark: Benchmark, methods: Methods, names: Sequence[str], progress: bool
) -> None:
    """Points of all pairs that have none yet, part by part; and points.parquet at the end."""
    from tqdm.auto import tqdm

    count = len(benchmark)
    parts = {first: f"parts/{first:06d}.parquet" for first in range(0, count, CHUNK)}
    missing = [first for first, part in parts.items() if not run.whole(part)]
    todo = sum(min(CHUNK, count - first) for first in missing)

    def drawn() -> Iterator[list[tuple[int, Pair]]]:
        for first in missing:
            yield [(i, benchmark.pair(i)) for i in range(first, min(first + CHUNK, count))]

    def computed() -> Iterator[tuple[int, int, Table]]:
        for chunk in ahead(drawn()):
            rows = [
                point_rows(number, pair, outcome, names)
                for (number, pair), (_, outcome) in zip(chunk, methods.run(chunk), strict=True)
            ]
            yield chunk[0][0], len(chunk), join(rows)

    def commit(done: tuple[int, int, Table]) -> None:
        with run.file(parts[done[0]]) as new:
            write_table(new, done[2])

    # As batches do: a chunk is read while one is computed and another is written.
    with tqdm(total=count, initial=count - todo, desc="pairs", disable=not progress) as bar:
        for _, pairs, _ in behind(computed(), commit):
            bar.update(pairs)
    every = [read_table(run.folder / part) for part in parts.values()]
    with run.files(instead_of=parts.values()) as new:
        write_table(new / WHOLE, join(every))


# -- tables ---------------------------------------------------------------------------------------


def write_table(path: Path, table: Table) -> None:
    """A table of points as Parquet."""
    pyarrow, parquet = need_pyarrow()
    columns = {
        name: pyarrow.array(values.tolist()).dictionary_encode()
        if values.dtype.kind == "U"
        else values
        for name, values in table.items()
    }
    parquet.write_table(pyarrow.table(columns), path)


def read_table(path: Path) -> Table:
    """A table of points from Parquet. Raises ValueError where it is not readable."""
    _, parquet = need_pyarrow()
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not readable as Parquet: {error}") from None
    found = {}
    for name in table.column_names:
        values = table[name].to_numpy(zero_copy_only=False)
        found[name] = values.astype(str) if values.dtype == object else values
    return found


def join(tables: Sequence[Table]) -> Table:
    """Tables of the same columns as one."""
    return {name: np.concatenate([each[name] for each in tables]) for name in tables[0]}


def point_rows(number: int, pair: Pair, outcome: Outcome, names: Sequence[str]) -> Table:
    """One pair's points as the columns of :mod:`flashmaps.evaluation.results`' table."""
    count = len(pair.source_points)
    here, there = pair.source_points, pair.target_points
    units = np.full(count, number) if pair.units is None else pair.units
    other = np.full((count, 2), np.nan) if pair.mirrored_points is None else pair.mirrored_points
    columns: Table = {
        "pair": np.full(count, number, np.int32),
        "unit": units.astype(np.int32),
        "category": np.full(count, pair.category),
        "source": np.full(count, pair.source),
        "target": np.full(count, pair.target),
        "x": here[:, 0].astype(np.float32),
        "y": here[:, 1].astype(np.float32),
        "true_x": there[:, 0].astype(np.float32),
        "true_y": there[:, 1].astype(np.float32),
        "mirrored_x": other[:, 0].astype(np.float32),
        "mirrored_y": other[:, 1].astype(np.float32),
        "base": np.full(count, pair.base, np.float32),
        "source_grid": np.full(count, "{} x {}".format(*outcome.grids[0])),
        "target_grid": np.full(count, "{} x {}".format(*outcome.grids[1])),
    }
    for name in names:
        for axis, values in zip("xy", outcome.found[name].T, strict=True):
            columns[f"{axis}: {name}"] = values.astype(np.float32)
    for compare, scores in outcome.scores.items():
        for name, values in scores.items():
            columns[f"score: {compare}: {name}"] = values.astype(np.float32)
    return columns


def _tokens(table: Table) -> dict[str, list[str]]:
    """Which grids of tokens there were, height x width."""
    return {side: sorted(set(table[f"{side}_grid"].tolist())) for side in ("source", "target")}


def draw(
    folder: Path, results: dict[str, Any], table: Table, benchmark: Benchmark, method: str
) -> None:
    """Every plot of a report, and examples of one method's matches, as PNG files."""
    from flashmaps.evaluation import figures

    shown = [benchmark.pair(i) for i in range(min(EXAMPLES, len(benchmark)))]
    found = []
    for number, _ in enumerate(shown):
        here = table["pair"] == number
        found.append(np.stack((table[f"x: {method}"][here], table[f"y: {method}"][here]), axis=1))
    drawn = figures.draw(results)
    drawn["examples"] = figures.examples(shown, found, results["benchmark"]["headline"], method)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=110, format="png")
