"""``fm.batch``: features of n images, pairs over them, and a folder that goes on after any kill.

The folder: flashmaps.jsonl (what was asked, and every file that was written, with its checksum),
features/NNNNNN.safetensors (each image once), matches/NNNNNN.parquet (rows of tokens or points)
and summaries/NNNNNN.parquet (a row for each pair), a part of the pairs each. At the end:
pairs.parquet (all summaries, in the order of the pairs), images.parquet and batch.json.

What a part holds depends on what was asked alone, not on budgets or on where an earlier run was
killed: a run that was interrupted ends with the same bytes. Damaged parts are made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashmaps.arguments import switch, whole
from flashmaps.batches.choose import Pairs, choose
from flashmaps.batches.collection import Collection
from flashmaps.batches.features import FeatureStage
from flashmaps.batches.local_engine import Local
from flashmaps.batches.measure import DTYPES, measured_plan
from flashmaps.batches.parts import Parts, part_pairs, rows_bytes, tile_side
from flashmaps.batches.plan import BatchPlan
from flashmaps.diffusion.features import BUILTIN, load_model
from flashmaps.diffusion.loading import name_of
from flashmaps.files import Run, check_folder, open_run, write_json
from flashmaps.maps.backends.choice import check_name
from flashmaps.maps.budget import check_budget
from flashmaps.matching.pair_chunks import compared_bytes
from flashmaps.matching.pair_order import tile_order
from flashmaps.matching.pairs import need_pyarrow
from flashmaps.matching.settings import MatchSettings, fingerprint, settings_of

if TYPE_CHECKING:
    from flashmaps.batches.ray_engine import Cluster
    from flashmaps.batches.ray_worker import Question

__all__ = ["batch"]

KIND = "batch"  # of the folder
ROWS = ("tokens", "points", "pairs")
STAGES = ("features", "pairs")
ENGINES = ("local", "ray")
DEFAULT_MEMORY_BUDGET = 512 * 2**20


@dataclass(frozen=True)
class Asked:
    """What a run is of: everything that its files depend on."""

    collection: Collection
    pairs: Pairs
    settings: MatchSettings
    rows: str
    dtype: str | None
    backend: str
    pipe: Any
    budget: int

    @property
    def kept(self) -> torch.dtype | None:
        """What features are kept in; None: as the model makes them."""
        return None if self.dtype is None else DTYPES[self.dtype]


def batch(
    images: Any,
    pairs: Any = "all",
    out: str | Path = "flashmaps-batch",
    *,
    number: int | None = None,
    both_ways: bool = False,
    search: str = "mean",
    rows: str | None = None,
    stage: str | None = None,
    model: Any = BUILTIN,
    compare: str | None = None,
    layers: str | Sequence[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    size: int | None = None,
    same_noise: bool | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    rates: tuple[float, float] | None = None,
    progress: bool = False,
) -> BatchPlan | dict[str, Any]:
    """Match many pairs of a collection of images, and write the folder ``out``.

    Args:
        images: a folder, or several images, anything
            :func:`flashmaps.diffusion.images.load_image` takes.
        pairs: "all", "nearest", "chain" or "star"; a CSV or Parquet file, or columns; or (source,
            target) pairs: see :func:`flashmaps.batches.choose.choose`, for ``number``,
            ``both_ways`` and ``search`` too.
        out: folder to write. One that holds an unfinished run of the same question is continued.
        rows: "tokens", a row for each source token of each pair; "points", for each point of the
            table of pairs; "pairs", summaries alone. Default: points where there are some, else
            tokens.
        stage: "features" or "pairs": only this one now; default: both.
        model, compare, layers, timestep, seeds, size, same_noise: see :func:`flashmaps.match`;
            left out, they are the model's own. With ``same_noise=False`` each image has noise of
            its own, by its number.
        dtype: "float16" or "bfloat16": features are kept in half the bytes; default: as the model
            makes them.
        device: where the model runs; default: where it is.
        backend: what computes the maps; see :func:`flashmaps.maps.backends.choice`.
        memory_budget: bytes for features, maps and rows at a time, beyond the model; default
            512 MiB. With Ray, of each worker, and of the features that are kept placed.
        engine: "local", this process; or "ray", actors of a Ray cluster, which load ``model`` by
            its name. The same files, and the same bytes where workers compute as this process.
        address: of a Ray cluster, such as "auto" or "ray://head:10001"; default: this machine.
        workers: actors; default: one for each GPU of the cluster where ``device`` is one, else for
            each CPU, 16 at most.
        overwrite: throw away what a run of another question left in ``out``.
        dry_run: write nothing; say what it would take, at rates that are measured on one image and
            a few pairs.
        rates: of a dry run, in place of those that are measured: seconds of a forward pass and of
            a pair on the device that you think of.
        progress: show bars, with rates and the time that is left.

    Returns what batch.json holds; of a dry run the plan. Raises ValueError before any work for what
    cannot be asked, and for a folder that holds something else or that another process writes to;
    OSError in one sentence where it cannot be written: what was finished stays.
    """
    need_pyarrow()
    for name, value in (("overwrite", overwrite), ("dry_run", dry_run), ("progress", progress)):
        switch(name, value)
    if stage not in (None, *STAGES):
        raise ValueError(f"stage={stage!r}; wanted 'features' or 'pairs'")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not known; wanted {', '.join(DTYPES)}")
    if rates is not None and not dry_run:
        raise ValueError("rates belong to dry_run=True")
    check_name(backend)
    _check_engine(engine, address, workers, model)
    given = check_budget(memory_budget)
    budget = DEFAULT_MEMORY_BUDGET if given is None else whole("memory_budget", given, 1)
    collection = Collection.of(images)
    chosen = choose(pairs, collection, number=number, both_ways=both_ways, search=search)
    rows = ("tokens" if chosen.points is None else "points") if rows is None else rows
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r}; wanted {', '.join(ROWS)}")
    if rows == "points" and chosen.points is None:
        raise ValueError("rows='points' needs a table of pairs with columns x and y")
    if not dry_run:
        check_folder(out, KIND, grows=True)
    # The driver of a cluster may have no such device; workers have.
    pipe = load_model(model, device=device if engine == "local" else None)
    settings = settings_of(pipe).with_given(
        compare=compare, layers=layers, timestep=timestep, size=size, same_noise=same_noise,
        seeds=None if seeds is None else tuple(seeds),
    )  # fmt: skip
    asked = Asked(collection, chosen, settings, rows, dtype, backend, pipe, budget)
    if dry_run:
        return measured_plan(
            len(collection), chosen.count(len(collection)), collection.load(0), pipe, settings,
            rows=rows, points=None if chosen.points is None else sum(map(len, chosen.points)),
            dtype=asked.kept, backend=backend, rates=rates,
        )  # fmt: skip
    question = {
        "flashmaps": metadata.version("flashmaps"),
        "images": {"count": len(collection), "digest": collection.digest()},
        "pairs": chosen.to_json(),
        "rows": rows,
        "model": name_of(model),
        "weights": fingerprint(pipe),
        "device": device,
        "dtype": dtype,
        "backend": backend,
        **settings.for_features,
        "match": settings.options.to_json(),
    }
    with open_run(out, KIND, json.loads(json.dumps(question)), overwrite=overwrite) as run:
        if engine == "local":
            return _run(run, asked, question, stage, progress, nullcontext(_local(asked)))
        from flashmaps.batches.ray_engine import cluster

        return _run(
            run, asked, question, stage, progress,
            cluster(
                _for_workers(asked, question), address=address, workers=workers, store=3 * budget
            ),
        )  # fmt: skip


def _check_engine(engine: str, address: str | None, workers: int | None, model: Any) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}; wanted {' or '.join(map(repr, ENGINES))}")
    if engine == "local" and (address is not None or workers is not None):
        raise ValueError("address and workers belong to engine='ray'")
    if workers is not None:
        whole("workers", workers, 1)
    if engine == "ray" and not isinstance(model, (str, Path)):
        raise ValueError(
            "engine='ray': every worker loads the model; give its name or folder, not a pipeline"
        )


def _local(asked: Asked) -> Local:
    return Local(asked.pipe, asked.settings, asked.rows, asked.backend)


def _for_workers(asked: Asked, question: dict[str, Any]) -> Question:
    from flashmaps.batches.ray_worker import Question

    return Question(
        version=question["flashmaps"], model=question["model"], weights=question["weights"],
        device=question["device"], settings=asked.settings, rows=asked.rows, backend=asked.backend,
        images=len(asked.collection),
    )  # fmt: skip


def _run(
    run: Run, asked: Asked, question: dict[str, Any], stage: str | None, progress: bool,
    engines: AbstractContextManager[Local | Cluster],
) -> dict[str, Any]:  # fmt: skip
    """Both stages, and the files at the end. An engine is started if there is work for one."""
    collection, settings = asked.collection, asked.settings
    first = FeatureStage(run, collection, settings, asked.kept)
    missing = first.missing()
    if stage == "pairs" and missing:
        raise ValueError(
            f"the features of {len(missing)} images are not there (image "
            f"{collection.names[missing[0]]!r} for one); make them first, with stage='features'"
        )
    told = {"settings": question, "images": len(collection)}
    with ExitStack() as stack:
        engine: Local | Cluster | None = None
        if missing:
            engine = stack.enter_context(engines)
            first.write(engine.features(first, first.groups(missing)), len(missing), progress)
        if stage == "features":
            return told
        sets = first.sets()
        pairs = asked.pairs.resolved(len(sets), sets, settings.compare)
        first_grid = sets[int(pairs[0, 0])].grid
        tokens = max(1, first_grid[0] * first_grid[1])
        parts, budget = _parts(run, asked, pairs, tokens, compared_bytes(sets[0], settings.compare))
        todo = parts.missing()
        if todo:
            engine = stack.enter_context(engines) if engine is None else engine
            left = sum(len(numbers) for _, numbers in todo)
            parts.write(
                engine.pairs(todo, pairs, asked.pairs.points, sets, budget), left, progress
            )  # fmt: skip
    table = parts.summary()
    results = {
        **told,
        "pairs": len(pairs),
        "parts": len(parts),
        "tokens": tokens,
        "compare": settings.compare,
        "mean_hard_ims": float(table["hard_ims"].mean()),
        "mean_mutual_share": float(table["mutual_share"].mean()),
    }
    with run.files() as new:
        parts.write_table(new / "pairs.parquet", table)
        parts.write_table(new / "images.parquet", first.table())
        write_json(new / "batch.json", results)
    return results


def _parts(
    run: Run, asked: Asked, pairs: np.ndarray, tokens: int, image_bytes: int
) -> tuple[Parts, int]:
    """The parts of all pairs, and what their rows leave of the budget for matches."""
    each = part_pairs(len(pairs), tokens)
    side = tile_side(len(asked.collection), len(pairs), image_bytes)
    held = 0 if asked.rows == "pairs" else 2 * rows_bytes(each, tokens)
    if asked.budget <= held:
        raise ValueError(
            f"memory_budget = {asked.budget} bytes is too small: the rows of a part of {each} "
            f"pairs take {held}, while they are made and written"
        )
    return Parts(run, tile_order(pairs, side), each, asked.rows), asked.budget - held
