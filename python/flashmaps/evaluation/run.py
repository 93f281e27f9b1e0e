"""`flashmaps eval`: every method on every pair of a benchmark, and a folder with what came of it.

The folder while it runs: run.json (what was asked), parts/*.parquet (the points of a few pairs
each). At the end: points.parquet (all of them), results.md, the plots, and results.json, which is
written last. Every file is written whole, so that a run which was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from flashmaps.backends import check_name
from flashmaps.evaluation.benchmark import Benchmark, Pair, open_benchmark
from flashmaps.evaluation.bootstrap import RESAMPLES
from flashmaps.evaluation.methods import Methods, Outcome, fingerprint, method_names
from flashmaps.evaluation.results import CURVE, Table, summarise
from flashmaps.files import check_replaceable, whole_file, write_json
from flashmaps.match import COMPARE
from flashmaps.pairs import SCORES, need_pyarrow
from flashmaps.pipelines import BUILTIN, DEFAULT_TIMESTEP, load_model

MARKER = "run.json"
CHUNK = 8  # pairs a part: what an interruption loses at most, and what the model sees together
EXAMPLES = 4  # pairs that are drawn
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
    model: Any = BUILTIN,
    compare: str | Sequence[str] = ("kk",),
    layers: str | Sequence[str] | None = None,
    timestep: int | Sequence[int] = DEFAULT_TIMESTEP,
    prompt: str = "",
    seeds: Sequence[int] = (0,),
    size: int | None = None,
    same_noise: bool = True,
    backend: str = "auto",
    resamples: int = RESAMPLES,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score matches and baselines on a benchmark, and write the folder ``out``.

    Args:
        benchmark, pairs, points, seed, data, split: see
            :func:`flashmaps.evaluation.benchmark.open_benchmark`; or a Benchmark of your own.
        out: folder to write. One that holds an unfinished run of the same settings is continued,
            and of a finished one the report is made anew from its points.
        model, layers, timestep, seeds, size, same_noise: see
            :func:`flashmaps.pipelines.features`; any Stable Diffusion folder will do.
        prompt: the text the model sees; "{category}" stands for the pair's.
        compare: one or several of "kk", "qk", "qq".
        backend: what computes the maps; see :func:`flashmaps.backends`.
        resamples: of the bootstrap.
        overwrite: throw away what a run of other settings left in ``out``.
        progress: show a bar over the pairs.

    Returns what results.json holds. Raises ValueError when ``out`` holds other things, or a run of
    other settings.
    """
    from tqdm.auto import tqdm

    need_pyarrow()
    compare = (compare,) if isinstance(compare, str) else tuple(dict.fromkeys(compare))
    for each in compare:
        if each not in COMPARE:
            raise ValueError(f"compare={each!r} is not known; wanted {', '.join(COMPARE)}")
    if not compare:
        raise ValueError("compare is empty; give at least one of kk, qk, qq")
    check_name(backend)
    check_replaceable(out, MARKER)
    if isinstance(benchmark, str):
        benchmark = open_benchmark(
            benchmark, pairs=pairs, points=points, seed=seed, data=data, split=split
        )
    pipe = load_model(model)
    options = {
        "layers": layers, "timestep": timestep, "prompt": prompt, "seeds": tuple(seeds),
        "size": size, "same_noise": same_noise,
    }  # fmt: skip
    settings = {
        "flashmaps": metadata.version("flashmaps"),
        "benchmark": benchmark.name,
        "what": benchmark.what,
        "pairs": len(benchmark),
        "points": points,
        "seed": seed,
        "data": None if data is None else str(Path(data).expanduser().resolve()),
        "split": split if data is not None else None,
        "model": str(model) if isinstance(model, (str, Path)) else type(model).__name__,
        "weights": fingerprint(pipe),
        "compare": list(compare),
        "backend": backend,
        **options,
    }
    settings = json.loads(json.dumps(settings))  # as it will be read again
    folder = Path(out)
    _open_folder(folder, settings, overwrite)
    started = time.perf_counter()
    methods = Methods(pipe, compare=compare, backend=backend, seed=seed, options=options)
    names = method_names(compare)
    missing = (
        [] if (folder / "points.parquet").is_file() else list(_missing(folder, len(benchmark)))
    )
    todo = sum(len(numbers) for numbers in missing)
    computed = todo
    with tqdm(
        total=len(benchmark), initial=len(benchmark) - todo, desc="pairs", disable=not progress
    ) as bar:
        for numbers in missing:
            chunk = [(number, benchmark.pair(number)) for number in numbers]
            rows: list[Table] = []
            for (number, pair), (_, outcome) in zip(chunk, methods.run(chunk), strict=True):
                rows.append(_rows(number, pair, outcome, names))
                bar.update()
            _write_table(_part(folder, numbers[0]), _join(rows))
    table = _gather(folder)
    seconds = time.perf_counter() - started
    results: dict[str, Any] = {
        "settings": settings,
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
            table, names, compare, headline=benchmark.headline, resamples=resamples, seed=seed
        ),
        "resamples": resamples,
        "seconds": {"matching": seconds, "pairs_computed_now": computed},
    }
    _report(folder, results, table, benchmark, f"{names[0]}")
    write_json(folder / "results.json", results)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return results


# -- the folder ------------------------------------------------------------------------------------


def _open_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder, or make sure that it holds a run of the same settings."""
    known = folder / MARKER
    if known.is_file():
        try:
            before = json.loads(known.read_text("utf-8"))
        except ValueError:
            before = {}
        differing = [k for k in {**settings, **before} if before.get(k) != settings.get(k)]
        if not differing:
            (folder / "results.json").unlink(missing_ok=True)  # until the new report is there
            return
        if not overwrite:
            told = "; ".join(
                f"{key}: {before.get(key)!r} there, {settings.get(key)!r} now" for key in differing
            )
            raise ValueError(
                f"out: {str(folder)!r} holds a run of other settings ({told}); give another "
                "folder, or overwrite it (--overwrite)"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parts").mkdir(exist_ok=True)
    write_json(known, settings)


def _part(folder: Path, first: int) -> Path:
    return folder / "parts" / f"{first:06d}.parquet"


def _missing(folder: Path, count: int) -> Iterator[list[int]]:
    """The numbers of each part that is not there yet."""
    (folder / "parts").mkdir(exist_ok=True)
    for first in range(0, count, CHUNK):
        if not _part(folder, first).is_file():
            yield list(range(first, min(first + CHUNK, count)))


def _gather(folder: Path) -> Table:
    """All points, and points.parquet if it was not there."""
    whole = folder / "points.parquet"
    if whole.is_file():
        return _read_table(whole)
    table = _join([_read_table(path) for path in sorted((folder / "parts").glob("*.parquet"))])
    _write_table(whole, table)
    return table


def _write_table(path: Path, table: Table) -> None:
    pyarrow, parquet = need_pyarrow()
    columns = {
        name: pyarrow.array(values.tolist()).dictionary_encode()
        if values.dtype.kind == "U"
        else values
        for name, values in table.items()
    }
    with whole_file(path) as new:
        parquet.write_table(pyarrow.table(columns), new)


def _read_table(path: Path) -> Table:
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


def _join(tables: Sequence[Table]) -> Table:
    return {name: np.concatenate([each[name] for each in tables]) for name in tables[0]}


def _rows(number: int, pair: Pair, outcome: Outcome, names: Sequence[str]) -> Table:
    """One pair's points as columns."""
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
        "source_tokens": np.full(count, outcome.grids[0][0] * outcome.grids[0][1], np.int32),
        "target_tokens": np.full(count, outcome.grids[1][0] * outcome.grids[1][1], np.int32),
    }
    for name in names:
        for axis, values in zip("xy", outcome.found[name].T, strict=True):
            columns[f"{axis}: {name}"] = values.astype(np.float32)
    for compare, scores in outcome.scores.items():
        for name in SCORES:
            columns[f"score: {compare}: {name}"] = scores[name].astype(np.float32)
    return columns


def _tokens(table: Table) -> dict[str, Any]:
    """How many tokens there were."""
    return {
        side: sorted({int(n) for n in table[f"{side}_tokens"]}) for side in ("source", "target")
    }


def _report(
    folder: Path, results: dict[str, Any], table: Table, benchmark: Benchmark, method: str
) -> None:
    from flashmaps.evaluation import figures, markdown
    from flashmaps.files import write_text

    shown = [benchmark.pair(i) for i in range(min(EXAMPLES, len(benchmark)))]
    found = []
    for number, _ in enumerate(shown):
        here = table["pair"] == number
        found.append(np.stack((table[f"x: {method}"][here], table[f"y: {method}"][here]), axis=1))
    drawn = figures.draw(results)
    drawn["examples"] = figures.examples(shown, found, results["benchmark"]["headline"], method)
    for name, figure in drawn.items():
        with whole_file(folder / f"{name}.png") as new:
            figure.savefig(new, dpi=110, format="png")
    write_text(folder / "results.md", markdown.page(results))
