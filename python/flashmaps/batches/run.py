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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmaps.arguments import switch, whole
from flashmaps.batches.choose import Pairs, choose
from flashmaps.batches.collection import Collection
from flashmaps.batches.features import FeatureStage, only_of
from flashmaps.batches.parts import Parts, part_pairs, rows_bytes, tile_side
from flashmaps.batches.plan import BatchPlan, Rates, plan
from flashmaps.diffusion.features import BUILTIN, Features, default_size, features, load_model
from flashmaps.diffusion.loading import name_of
from flashmaps.files import Run, check_folder, open_run, write_json
from flashmaps.maps.backends.choice import check_name
from flashmaps.maps.budget import check_budget
from flashmaps.matching.pair_chunks import compared_bytes
from flashmaps.matching.pair_order import tile_order
from flashmaps.matching.pairs import match_pairs, need_pyarrow
from flashmaps.matching.settings import MatchSettings, fingerprint, settings_of

__all__ = ["batch"]

KIND = "batch"  # of the folder
ROWS = ("tokens", "points", "pairs")
STAGES = ("features", "pairs")
DEFAULT_MEMORY_BUDGET = 512 * 2**20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TRIED = 4  # pairs that are timed for a plan


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
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> BatchPlan | dict[str, Any]:
    """Match many pairs of a collection of images, and write the folder ``out``.

    Args:
        images: a folder, or several images, anything
            :func:`flashmaps.diffusion.images.load_image` takes.
        pairs: "all", "nearest", "chain" or "star"; a CSV or Parquet file, or columns; or (source,
            target) pairs: see :func:`flashmaps.batches.choose.choose`, for ``number`` and
            ``both_ways`` too.
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
            512 MiB.
        overwrite: throw away what a run of another question left in ``out``.
        dry_run: write nothing; say what it would take, at rates that are measured on one image and
            a few pairs.
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
    check_name(backend)
    budget = check_budget(memory_budget) or DEFAULT_MEMORY_BUDGET
    collection = Collection.of(images)
    chosen = choose(pairs, collection, number=number, both_ways=both_ways)
    rows = ("tokens" if chosen.points is None else "points") if rows is None else rows
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r}; wanted {', '.join(ROWS)}")
    if rows == "points" and chosen.points is None:
        raise ValueError("rows='points' needs a table of pairs with columns x and y")
    if not dry_run:
        check_folder(out, KIND, grows=True)
    pipe = load_model(model, device=device)
    settings = settings_of(pipe).with_given(
        compare=compare, layers=layers, timestep=timestep, size=size, same_noise=same_noise,
        seeds=None if seeds is None else tuple(seeds),
    )  # fmt: skip
    asked = Asked(collection, chosen, settings, rows, dtype, backend, pipe)
    if dry_run:
        return _plan(asked)
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
        return _run(run, asked, question, stage, budget, progress)


def _run(
    run: Run, asked: Asked, question: dict[str, Any], stage: str | None, budget: int, progress: bool
) -> dict[str, Any]:
    """Both stages, and the files at the end."""
    collection, settings = asked.collection, asked.settings
    first = FeatureStage(run, collection, asked.pipe, settings, asked.kept)
    missing = first.missing()
    if stage == "pairs" and missing:
        raise ValueError(
            f"the features of {len(missing)} images are not there (image "
            f"{collection.names[missing[0]]!r} for one); make them first, with stage='features'"
        )
    first.make(missing, progress)
    told = {"settings": question, "images": len(collection)}
    if stage == "features":
        return told
    sets = first.sets()
    compare = settings.compare
    wanted = asked.pairs.resolved(
        len(sets), first.descriptors() if asked.pairs.kind == "nearest" else None
    )
    tokens = max(1, sets[wanted[0][0]].grid[0] * sets[wanted[0][0]].grid[1])
    each = part_pairs(len(wanted), tokens)
    side = tile_side(len(sets), len(wanted), compared_bytes(sets[0], compare))
    parts = Parts(
        run, wanted, tile_order(wanted, side), each, asked.rows, asked.pairs.points, settings, sets,
        asked.backend,
    )  # fmt: skip
    held = 0 if asked.rows == "pairs" else 2 * rows_bytes(each, tokens)
    if budget <= held:
        raise ValueError(
            f"memory_budget = {budget} bytes is too small: the rows of a part of {each} pairs take "
            f"{held}, while they are made and written"
        )
    todo = parts.missing()
    if todo:
        chunks = match_pairs(
            sets, [wanted[i] for i in todo], settings.options, memory_budget=budget - held,
            order="given", backend=asked.backend,
        )  # fmt: skip
        parts.write(todo, chunks, progress)
    table = parts.summary()
    results = {
        **told,
        "pairs": len(wanted),
        "parts": len(parts),
        "tokens": tokens,
        "compare": compare,
        "mean_hard_ims": float(table["hard_ims"].mean()),
        "mean_mutual_share": float(table["mutual_share"].mean()),
    }
    with run.files() as new:
        parts.write_table(new / "pairs.parquet", table)
        parts.write_table(new / "images.parquet", first.table())
        write_json(new / "batch.json", results)
    return results


def assumed(
    images: int, pairs: int, *, rows: str = "tokens", model: Any = BUILTIN,
    dtype: str | None = None, device: str | None = None, backend: str = "auto", **given: Any,
) -> BatchPlan:  # fmt: skip
    """The plan of a collection that is not here: square images of the size that the model sees.

    Args:
        rows, model, dtype, device, backend, given: as of :func:`batch`.
    """
    pipe = load_model(model, device=device)
    seeds = given.pop("seeds", None)
    settings = settings_of(pipe).with_given(
        **given, seeds=None if seeds is None else tuple(seeds)
    )  # fmt: skip
    side = default_size(pipe) if settings.size is None else settings.size
    noise = np.random.default_rng(0).random((side, side, 3), np.float32)
    return measured_plan(
        whole("images", images, 1), whole("pairs", pairs, 1), noise, pipe, settings, rows=rows,
        dtype=None if dtype is None else DTYPES[dtype], backend=backend,
    )  # fmt: skip


def _plan(asked: Asked) -> BatchPlan:
    """What a run would take, at rates that are measured on its first image."""
    collection, settings = asked.collection, asked.settings
    return measured_plan(
        len(collection),
        asked.pairs.count(len(collection)),
        collection.load(0),
        asked.pipe,
        settings,
        rows=asked.rows,
        points=None if asked.pairs.points is None else sum(map(len, asked.pairs.points)),
        dtype=asked.kept,
        backend=asked.backend,
    )


def measured_plan(
    images: int,
    pairs: int,
    like: Any,
    pipe: Any,
    settings: MatchSettings,
    *,
    rows: str = "tokens",
    points: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> BatchPlan:
    """The plan of so many images like one, and pairs, at the rates of this machine now.

    The rates: of the second of two forward passes, and of pairs of that image with itself.
    """
    options = {**settings.for_features, "outputs": settings.compare == "features"}
    passes = len(settings.seeds) * len(settings.timesteps)

    def once() -> tuple[float, Features]:
        start = time.perf_counter()
        (found,) = features(pipe, [like], **options)
        return time.perf_counter() - start, found

    once()
    seconds, one = once()
    spent = 0.0
    for _ in range(2):  # the first time loads what is loaded once
        start = time.perf_counter()
        for _ in match_pairs([one], [(0, 0)] * _TRIED, settings.options, backend=backend):
            pass
        spent = time.perf_counter() - start
    rates = Rates(seconds / passes, spent / _TRIED)
    kept = [getattr(one, name) for name in only_of(settings)]
    itemsize = (lambda x: x.element_size()) if dtype is None else (lambda x: dtype.itemsize)
    size = sum(x.numel() * itemsize(x) for x in kept if x is not None)
    return plan(
        images, pairs, left=(images, pairs), tokens=one.grid[0] * one.grid[1], points=points,
        rows=rows, feature_bytes=size, passes=passes, side=tile_side(images, pairs, size),
        rates=rates,
    )  # fmt: skip
