"""Many pairs of images at once: matched in chunks under a byte budget, and written to Parquet.

    sets = features("builtin", images)                   # one forward pass an image
    for chunk in match_pairs(sets):                      # all pairs i < j
        chunk.pairs, chunk.trip.hard_ims                 # [P, 2], [P]
    write_pairs("matches.parquet", sets)                 # a row for each source token of each pair

All pairs of n images need the queries and keys of n images, and those of a few tiles are all that
is held besides what the caller holds: ``sets`` may be any sequence that reads an image's features
when it is indexed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from flashmaps.arguments import switch
from flashmaps.diffusion.features import Features
from flashmaps.diffusion.record import Record
from flashmaps.files import whole_file
from flashmaps.maps.budget import check_budget
from flashmaps.maps.statistics import round_trip
from flashmaps.matching.cross_map import cross_maps
from flashmaps.matching.options import COMPARE, MapKeywords, MatchOptions, map_options
from flashmaps.matching.pair_batch import PairBatch, need_pyarrow, pair_columns, token_columns
from flashmaps.matching.pair_chunks import Images, Room, chunks, give_back
from flashmaps.matching.pair_order import all_pairs, check_pairs, tile_order

__all__ = ["PairBatch", "all_pairs", "match_pairs", "need_pyarrow", "write_pairs"]

DEFAULT_MEMORY_BUDGET = 256 * 2**20
ORDERS = ("given", "tiles")


def match_pairs(
    sets: Sequence[Features],
    pairs: Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
    options: MatchOptions | None = None,
    *,
    memory_budget: int | None = None,
    order: str | None = None,
    backend: str = "auto",
    progress: bool = False,
    **given: Unpack[MapKeywords],
) -> Iterator[PairBatch]:
    """Match many pairs of images, in chunks that fit ``memory_budget``.

    Args:
        sets: features of n images, from one model with the same layers and seeds: a list, or a
            sequence that reads an image's features when it is indexed
            (:class:`flashmaps.diffusion.feature_folder.FeatureFolder`). Records are taken as
            :meth:`Features.from_record` takes them. Grids may differ: consecutive pairs of equal
            grids go through the kernels together.
        pairs: [P, 2] integers (source, target); default ``all_pairs(len(sets))``.
        options: how the maps are made; or compare, temperature and normalize as keywords, see
            :func:`flashmaps.matching.cross_map.cross_map`.
        memory_budget: bytes for the features that were read and are kept (those of a list are the
            caller's), their copies in a chunk, and its results; default 256 MiB. The kernels' own
            workspace of a few MB comes on top, and so do batches that the caller keeps.
        order: "given", or "tiles", in which each image is read least often, see
            :func:`flashmaps.matching.pair_order.tile_order`; default: "given" for a list, else
            "tiles". ``PairBatch.numbers`` says which pairs a batch is of.
        backend: what computes the maps; see :func:`flashmaps.maps.backends.choice`.
        progress: show a bar over the pairs.

    Raises ValueError: at once, for pairs out of range or an unknown ``compare``; at the chunk that
    shows it, for features that do not go together, and for a budget below what one pair takes (the
    message says how much that is).
    """
    chosen = check_pairs(pairs, len(sets))
    options = map_options(options, given)
    switch("progress", progress)
    asked = check_budget(memory_budget)
    budget = DEFAULT_MEMORY_BUDGET if asked is None else asked
    if order not in (None, *ORDERS):
        raise ValueError(f"order={order!r}; wanted 'given' or 'tiles'")
    # The checks above run when the function is called, not at the first next().
    return _match_chunks(sets, chosen, budget, options, order, backend, progress)


def _match_chunks(
    sets: Sequence[Features],
    pairs: np.ndarray,
    budget: int,
    options: MatchOptions,
    order: str | None,
    backend: str,
    progress: bool,
) -> Iterator[PairBatch]:
    from tqdm.auto import tqdm

    if isinstance(sets, (list, tuple)):
        sets = [_features(each) for each in sets]
    resident = isinstance(sets, (list, tuple))
    room = Room.of(_features(sets[pairs[0][0]]), options.compare, budget)
    positions: np.ndarray | None = None
    if order == "tiles" or (order is None and not resident):
        positions = tile_order(pairs, room.side)
    ordered = pairs if positions is None else pairs[positions]
    images = Images(sets, options.compare, ordered)
    with tqdm(total=len(pairs), desc="pairs", disable=not progress, unit="pair") as bar:
        for chunk, loaded in chunks(images, ordered, budget, room.kept):
            numbers = chunk if positions is None else positions[chunk].tolist()
            chunk_pairs = [(s, t) for s, t in ordered[chunk].tolist()]
            matched = _match_chunk(numbers, chunk_pairs, loaded, options, backend)
            give_back()
            yield matched
            del matched
            bar.update(len(chunk))


def _features(given: Any) -> Features:
    return Features.from_record(given) if isinstance(given, Record) else given


def _match_chunk(
    numbers: list[int],
    chunk: list[tuple[int, int]],
    loaded: dict[int, Features],
    options: MatchOptions,
    backend: str,
) -> PairBatch:
    compare = options.compare
    sources = sorted({source for source, _ in chunk})
    targets = sorted({target for _, target in chunk})
    if loaded[sources[0]].grid == loaded[targets[0]].grid:  # then one stack serves both sides
        sources = targets = sorted({*sources, *targets})
    of = _stack([loaded[i] for i in sources], sources, compare)
    to = of if targets is sources else _stack([loaded[i] for i in targets], targets, compare)
    local = torch.tensor([(sources.index(s), targets.index(t)) for s, t in chunk])
    local = local.to(of.key.device)
    forward, backward = cross_maps(of, to, options, pairs=local, backend=backend)
    rows = forward.reduce("expectation", "max", "entropy")
    return PairBatch(
        pairs=torch.tensor(chunk),
        numbers=torch.tensor(numbers),
        source_grid=of.grid,
        target_grid=to.grid,
        trip=round_trip(forward, backward),
        expected_target=rows.expectation,
        max_probability=rows.max,
        entropy=rows.entropy,
    )


def _stack(several: list[Features], numbers: list[int], compare: str) -> Features:
    """One ``Features`` with the queries and keys of several images along the batch."""
    first = several[0]
    for number, other in zip(numbers, several, strict=True):
        alike = (
            other.key.shape == first.key.shape
            and other.scale == first.scale
            and other.layers == first.layers
            and torch.equal(other.head_weights, first.head_weights)
        )
        if not alike:
            raise ValueError(
                f"the features of image {number} do not go with those of image {numbers[0]}: "
                f"{_describe(other)}; and {_describe(first)}. Take all of them with one call, or "
                "with the same model, layers and number of seeds"
            )
    lacking = [n for n, f in zip(numbers, several, strict=True) if f.output is None]
    if compare == "features" and lacking:
        raise ValueError(
            f"compare='features': the features of image {lacking[0]} were taken without outputs; "
            "take them with outputs=True"
        )
    joined = {name: torch.cat([getattr(f, name) for f in several]) for name in COMPARE[compare]}
    nothing = first.key[:, :, :0]  # what is not compared is not stacked
    return replace(
        first,
        query=joined.get("query", nothing),
        key=joined.get("key", nothing),
        output=joined.get("output"),
    )


def _describe(features: Features) -> str:
    _, heads, tokens, width = features.key.shape
    return f"{heads} heads of {width} on {tokens} tokens of {', '.join(features.layers)}"


# -- Parquet ---------------------------------------------------------------------------------------

ROWS = ("tokens", "pairs")


def write_pairs(
    path: str | Path,
    sets: Sequence[Features],
    pairs: Tensor | Sequence[Sequence[int]] | None = None,
    options: MatchOptions | None = None,
    *,
    rows: str = "tokens",
    memory_budget: int | None = None,
    order: str | None = None,
    backend: str = "auto",
    progress: bool = False,
    **given: Unpack[MapKeywords],
) -> Path:
    """Match many pairs and write one Parquet file, whole or not at all.

    Args:
        path: file to write; one that is there is replaced at the end.
        sets, pairs, options, memory_budget, order, backend, progress: see :func:`match_pairs`.
        rows: "tokens", a row for each source token of each pair (about 70 bytes each), see
            :func:`token_columns`; or "pairs", a row for each pair, see :func:`pair_columns`.

    A row group holds one chunk. The settings (layers, timestep, seeds, compare) are JSON under the
    key ``flashmaps`` of the schema's metadata. Needs pyarrow. Raises as :func:`match_pairs` does.
    """
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r}; wanted 'tokens' or 'pairs'")
    pyarrow, parquet = need_pyarrow()
    options = map_options(options, given)
    chunks = match_pairs(
        sets, pairs, options, memory_budget=memory_budget, order=order, backend=backend,
        progress=progress,
    )  # fmt: skip
    columns = token_columns if rows == "tokens" else pair_columns
    writer = None
    with whole_file(path) as new:
        try:
            for chunk in chunks:
                table = pyarrow.table({k: v.numpy() for k, v in columns(chunk).items()})
                if writer is None:
                    first = _features(sets[int(chunk.pairs[0, 0])])
                    settings = json.dumps(_settings(first, options.compare, rows))
                    schema = table.schema.with_metadata({"flashmaps": settings})
                    writer = parquet.ParquetWriter(new, schema)
                writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
        finally:
            if writer is not None:
                writer.close()
    return Path(path)


def _settings(first: Features, compare: str, rows: str) -> dict[str, Any]:
    return {
        "rows": rows,
        "compare": compare,
        "layers": list(first.layers),
        "timestep": first.timestep,
        "seeds": list(first.seeds),
        "prompt": first.prompt,
    }
