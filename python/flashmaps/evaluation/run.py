"""`flashmaps eval`: every method on every pair of a benchmark, and a folder with what came of it.

The folder while it runs: run.json (what was asked), parts/*.parquet (the points of a few pairs
each). At the end: points.parquet (all of them), results.md, the plots, and results.json, which is
written last. Every file is written whole, so that a run which was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmaps.backends import check_name
from flashmaps.evaluation import markdown
from flashmaps.evaluation.benchmark import Benchmark, Pair, open_benchmark
from flashmaps.evaluation.bootstrap import RESAMPLES
from flashmaps.evaluation.methods import Methods, Outcome, fingerprint, method_names
from flashmaps.evaluation.results import CURVE, Table, summarise
from flashmaps.files import check_replaceable, whole_file, write_json, write_text
from flashmaps.match import COMPARE
from flashmaps.pairs import SCORES, need_pyarrow
from flashmaps.pipelines import BUILTIN, DEFAULT_TIMESTEP, load_model

MARKER = "run.json"
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
    compare: str | Sequence[str] = ("kk",),
    layers: str | Sequence[str] | None = None,
    timestep: int | Sequence[int] = DEFAULT_TIMESTEP,
    prompt: str = "",
    seeds: Sequence[int] = (0,),
    size: int | None = None,
    same_noise: bool = True,
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
            :func:`flashmaps.pipelines.features`; any Stable Diffusion folder will do.
        prompt: the text the model sees; "{category}" stands for the pair's.
        device: where the model runs, for instance "cuda"; default: where it is.
        dtype: "float32", "float16" or "bfloat16"; default: as it is.
        compare: one or several of "kk", "qk", "qq".
        backend: what computes the maps; see :func:`flashmaps.backends`.
        resamples: of the bootstrap.
        overwrite: throw away what a run of other settings left in ``out``.
        plots: draw them too; they take some seconds.
        progress: show a bar over the pairs.

    Returns what results.json holds. Raises ValueError when ``out`` holds other things, or a run of
    other settings.
    """
    need_pyarrow()
    compare = _check_compare(compare)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not known; wanted {', '.join(DTYPES)}")
    check_name(backend)
    check_replaceable(out, MARKER)
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
        "model": str(model) if isinstance(model, (str, Path)) else type(model).__name__,
        "weights": fingerprint(pipe),
        "compare": list(compare),
        "device": device,
        "dtype": dtype,
        "backend": backend,
        **options,
    }
    settings = json.loads(json.dumps(settings))  # as it will be read again
    folder = Path(out)
    _open_folder(folder, settings, overwrite)
    names = method_names(compare)
    if not (folder / WHOLE).is_file():
        methods = Methods(pipe, compare=compare, backend=backend, seed=seed, options=options)
        _compute(folder, benchmark, methods, names, progress)
    table = _read_table(folder / WHOLE)
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
    }
    write_text(folder / "results.md", markdown.page(results, plots=plots))
    if plots:
        _draw(folder, results, table, benchmark, names[0])
    write_json(folder / "results.json", results)
    return results


def _check_compare(compare: str | Sequence[str]) -> tuple[str, ...]:
    chosen = (compare,) if isinstance(compare, str) else tuple(dict.fromkeys(compare))
    for each in chosen:
        if each not in COMPARE:
            raise ValueError(f"compare={each!r} is not known; wanted {', '.join(COMPARE)}")
    if not chosen:
        raise ValueError(f"compare is empty; give at least one of {', '.join(COMPARE)}")
    return chosen


def _compute(
    folder: Path, benchmark: Benchmark, methods: Methods, names: Sequence[str], progress: bool
) -> None:
    """Points of all pairs that have none yet, part by part; and points.parquet at the end."""
    from tqdm.auto import tqdm

    count = len(benchmark)
    parts = {first: _part(folder, first) for first in range(0, count, CHUNK)}
    missing = [first for first, path in parts.items() if not path.is_file()]
    todo = sum(min(CHUNK, count - first) for first in missing)
    with tqdm(total=count, initial=count - todo, desc="pairs", disable=not progress) as bar:
        for first in missing:
            chunk = [(i, benchmark.pair(i)) for i in range(first, min(first + CHUNK, count))]
            rows = []
            for (number, pair), (_, outcome) in zip(chunk, methods.run(chunk), strict=True):
                rows.append(point_rows(number, pair, outcome, names))
                bar.update()
            _write_table(parts[first], _join(rows))
    _write_table(folder / WHOLE, _join([_read_table(path) for path in parts.values()]))
    shutil.rmtree(folder / "parts")


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
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    write_json(known, settings)


def _part(folder: Path, first: int) -> Path:
    return folder / "parts" / f"{first:06d}.parquet"


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
        for name in SCORES:
            columns[f"score: {compare}: {name}"] = scores[name].astype(np.float32)
    return columns


def _tokens(table: Table) -> dict[str, list[str]]:
    """Which grids of tokens there were, height x width."""
    return {side: sorted(set(table[f"{side}_grid"].tolist())) for side in ("source", "target")}


def _draw(
    folder: Path, results: dict[str, Any], table: Table, benchmark: Benchmark, method: str
) -> None:
    from flashmaps.evaluation import figures

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
