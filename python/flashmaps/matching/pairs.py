"""Many pairs of images at once: matched in chunks under a byte budget, and written to Parquet.

    sets = features("builtin", images)                   # one forward pass an image
    for chunk in match_pairs(sets):                      # all pairs i < j
        chunk.pairs, chunk.trip.hard_ims                 # [P, 2], [P]
    write_pairs("matches.parquet", sets)                 # a row for each source token of each pair

All pairs of n images need the queries and keys of n images, and those of a chunk are all that is
held besides what the caller holds: ``sets`` may be any sequence that loads an image's features when
it is indexed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from flashmaps.arguments import sides, switch, whole
from flashmaps.diffusion.features import Features
from flashmaps.files import whole_file
from flashmaps.maps.budget import check_budget
from flashmaps.maps.grids import Grid, centres
from flashmaps.maps.statistics import RoundTrip, round_trip
from flashmaps.matching.confidence import SCORES, score
from flashmaps.matching.cross_map import cross_map
from flashmaps.matching.options import COMPARE, MapKeywords, MatchOptions, map_options

DEFAULT_MEMORY_BUDGET = 256 * 2**20

# Bytes of results and temporaries that a round trip takes for one token: its fields (about 70), the
# operands and products of both passes (4 floats each), and what is gathered from them.
_TOKEN_BYTES = 160
# Copies of a chunk's keys: stacked, and scaled to length 1 on both sides of both maps.
_COPIES = {"qk": 1, "kk": 5, "qq": 5, "features": 5}


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Matches of P pairs of images whose token grids are alike.

    Attributes:
        pairs: [P, 2] int64, (source, target) indices into the feature sets.
        source_grid, target_grid: (height, width) of the tokens.
        trip: every statistic of the note, [P, N_s], [P, N_t] or [P]; see ``RoundTrip``.
        expected_target: [P, N_s, 2], mean of each row of A_st, (x, y) in the unit square.
        max_probability: [P, N_s], max_j A_st[i, j].
        entropy: [P, N_s], of the rows of A_st, nats.
    """

    pairs: Tensor
    source_grid: Grid
    target_grid: Grid
    trip: RoundTrip
    expected_target: Tensor
    max_probability: Tensor
    entropy: Tensor

    @property
    def mutual(self) -> Tensor:  # [P, N_s] bool
        """Whether g(f(i)) = i."""
        forward = self.trip.forward
        here = torch.arange(forward.shape[1], device=forward.device)
        return self.trip.backward.gather(1, forward) == here

    def score(self, name: str) -> Tensor:
        """One of SCORES at every source token, [P, N_s] float; target scores read at f(i).

        NaN where a score is undefined (``nims`` where fewer than two sources chose the target).
        """
        return score(name, self.trip, self.max_probability, self.entropy)


def all_pairs(count: int, *, both_ways: bool = False) -> list[tuple[int, int]]:
    """Every (i, j) of ``count`` images with i < j; ``both_ways``: and (j, i) right after it."""
    pairs: Iterable[tuple[int, int]] = combinations(range(whole("count", count, 0)), 2)
    if not switch("both_ways", both_ways):
        return list(pairs)
    return [each for i, j in pairs for each in ((i, j), (j, i))]


def match_pairs(
    sets: Sequence[Features],
    pairs: Tensor | Sequence[Sequence[int]] | None = None,
    options: MatchOptions | None = None,
    *,
    memory_budget: int | None = None,
    backend: str = "auto",
    progress: bool = False,
    **given: Unpack[MapKeywords],
) -> Iterator[PairBatch]:
    """Match many pairs of images, in chunks that fit ``memory_budget``, in the order given.

    Args:
        sets: features of n images, from one model with the same layers and seeds. Grids may differ:
            consecutive pairs of equal grids go through the kernels together.
        pairs: [P, 2] integers (source, target); default ``all_pairs(len(sets))``.
        options: how the maps are made; or compare, temperature and normalize as keywords, see
            :func:`flashmaps.matching.cross_map.cross_map`.
        memory_budget: bytes for a chunk's stacked queries and keys and its results; default
            256 MiB. Estimated from above; the kernels' own workspace of a few MB comes on top.
        backend: what computes the maps; see :func:`flashmaps.maps.backends.choice`.
        progress: show a bar over the pairs.

    Raises ValueError: at once, for pairs out of range or an unknown ``compare``; at the chunk that
    shows it, for features that do not go together, and for a budget below what one pair takes (the
    message says how much that is).
    """
    chosen = _check_pairs(pairs, len(sets))
    options = map_options(options, given)
    switch("progress", progress)
    asked = check_budget(memory_budget)
    budget = DEFAULT_MEMORY_BUDGET if asked is None else asked
    # The checks above run when the function is called, not at the first next().
    return _match_chunks(sets, chosen, budget, options, backend, progress)


def _match_chunks(
    sets: Sequence[Features],
    pairs: list[tuple[int, int]],
    budget: int,
    options: MatchOptions,
    backend: str,
    progress: bool,
) -> Iterator[PairBatch]:
    from tqdm.auto import tqdm

    with tqdm(total=len(pairs), desc="pairs", disable=not progress) as bar:
        for chunk, loaded in _chunks(sets, pairs, options.compare, budget):
            yield _match_chunk(chunk, loaded, options, backend)
            bar.update(len(chunk))


def _chunks(
    sets: Sequence[Features], pairs: list[tuple[int, int]], compare: str, budget: int
) -> Iterator[tuple[list[tuple[int, int]], dict[int, Features]]]:
    """Runs of consecutive pairs with the same grids that fit the budget, and their features."""
    chunk: list[tuple[int, int]] = []
    loaded: dict[int, Features] = {}
    held = 0
    for pair in pairs:
        fresh = {i: sets[i] for i in pair if i not in loaded}
        each = {i: fresh.get(i) or loaded[i] for i in pair}
        tokens = sum(each[i].key.shape[2] for i in pair)
        cost = _TOKEN_BYTES * tokens + sum(_image_bytes(f, compare) for f in fresh.values())
        if chunk and (held + cost > budget or _grids(each, pair) != _grids(loaded, chunk[0])):
            yield chunk, loaded
            chunk, loaded, held = [], {}, 0
            fresh = each
            cost = _TOKEN_BYTES * tokens + sum(_image_bytes(f, compare) for f in fresh.values())
        if cost > budget:
            raise ValueError(
                f"memory_budget = {budget} bytes is too small: pair {tuple(pair)} alone takes "
                f"{cost}"
            )
        chunk.append(pair)
        loaded.update(fresh)
        held += cost
    if chunk:
        yield chunk, loaded


def _grids(loaded: dict[int, Features], pair: tuple[int, int]) -> tuple[Grid, Grid]:
    return loaded[pair[0]].grid, loaded[pair[1]].grid


def _image_bytes(features: Features, compare: str) -> int:
    names = set(COMPARE[compare])
    tensors = [each for name in names if (each := getattr(features, name)) is not None]
    return _COPIES[compare] * sum(t.numel() * t.element_size() for t in tensors)


def _match_chunk(
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
    forward = cross_map(of, to, options, pairs=local, backend=backend)
    backward = cross_map(to, of, options, pairs=local.flip(1), backend=backend)
    rows = forward.reduce("expectation", "max", "entropy")
    return PairBatch(
        pairs=torch.tensor(chunk),
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


def _check_pairs(pairs: Any, count: int) -> list[tuple[int, int]]:
    if pairs is None:
        if count < 2:
            raise ValueError(f"sets has {count} images; wanted at least 2, or pairs")
        return all_pairs(count)
    if isinstance(pairs, Tensor):
        pairs = pairs.tolist()
    chosen = []
    for position, pair in enumerate(pairs):
        found = sides(pair)
        if found is None:
            raise ValueError(f"pairs[{position}] = {pair!r}; wanted two integers (source, target)")
        source, target = found
        for index in (source, target):
            if not 0 <= index < count:
                raise ValueError(
                    f"pairs[{position}] picks image {index}, but there are {count}: indices go "
                    f"from 0 to {count - 1}"
                )
        chosen.append((source, target))
    if not chosen:
        raise ValueError("pairs is empty: give at least one (source, target)")
    return chosen


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
    backend: str = "auto",
    progress: bool = False,
    **given: Unpack[MapKeywords],
) -> Path:
    """Match many pairs and write one Parquet file, whole or not at all.

    Args:
        path: file to write; one that is there is replaced at the end.
        sets, pairs, options, memory_budget, backend, progress: see :func:`match_pairs`.
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
        sets, pairs, options, memory_budget=memory_budget, backend=backend, progress=progress
    )
    columns = token_columns if rows == "tokens" else pair_columns
    done, writer = 0, None
    with whole_file(path) as new:
        try:
            for chunk in chunks:
                table = pyarrow.table({k: v.numpy() for k, v in columns(chunk, done).items()})
                if writer is None:
                    first = sets[int(chunk.pairs[0, 0])]
                    settings = json.dumps(_settings(first, options.compare, rows))
                    schema = table.schema.with_metadata({"flashmaps": settings})
                    writer = parquet.ParquetWriter(new, schema)
                writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
                done += len(chunk.pairs)
        finally:
            if writer is not None:
                writer.close()
    return Path(path)


def token_columns(chunk: PairBatch, first_pair: int = 0) -> dict[str, Tensor]:
    """One row for each source token of each pair of a chunk, [P N_s] each.

    pair (numbered from ``first_pair``), source, target (images), token, x, y (its centre in the
    unit square), target_token, target_x, target_y (hard match), soft_x, soft_y (soft match),
    mutual, and SCORES.
    """
    count, tokens = chunk.trip.forward.shape
    here = centres(chunk.source_grid).repeat(count, 1)
    forward = chunk.trip.forward.cpu()
    there = centres(chunk.target_grid)[forward.flatten()]
    soft = chunk.expected_target.float().cpu().flatten(0, 1)
    number = first_pair + torch.arange(count)

    def for_all_tokens(values: Tensor) -> Tensor:  # [P] to [P N_s]
        return values.to(torch.int32).repeat_interleave(tokens)

    return {
        "pair": for_all_tokens(number),
        "source": for_all_tokens(chunk.pairs[:, 0]),
        "target": for_all_tokens(chunk.pairs[:, 1]),
        "token": torch.arange(tokens, dtype=torch.int32).repeat(count),
        "x": here[:, 0].contiguous(),
        "y": here[:, 1].contiguous(),
        "target_token": forward.flatten().to(torch.int32),
        "target_x": there[:, 0].contiguous(),
        "target_y": there[:, 1].contiguous(),
        "soft_x": soft[:, 0].contiguous(),
        "soft_y": soft[:, 1].contiguous(),
        "mutual": chunk.mutual.cpu().flatten(),
        **{name: chunk.score(name).float().cpu().flatten() for name in SCORES},
    }


def pair_columns(chunk: PairBatch, first_pair: int = 0) -> dict[str, Tensor]:
    """One row for each pair of a chunk, [P] each.

    pair, source, target, tokens, hard_ims, soft_ims, mutual_share, targets_hit_share (of target
    tokens that some source token chose), density_max, and means of return_probability,
    max_probability, spread, entropy (of A_st's rows) and inverse_entropy.
    """
    trip = chunk.trip
    count, tokens = trip.forward.shape
    columns = {
        "pair": (first_pair + torch.arange(count)).to(torch.int32),
        "source": chunk.pairs[:, 0].to(torch.int32),
        "target": chunk.pairs[:, 1].to(torch.int32),
        "tokens": torch.full((count,), tokens, dtype=torch.int32),
        "hard_ims": trip.hard_ims,
        "soft_ims": trip.soft_ims,
        "mutual_share": chunk.mutual.float().mean(1),
        "targets_hit_share": (trip.density > 0).float().mean(1),
        "density_max": trip.density.amax(1).to(torch.int32),
        "mean_return_probability": trip.return_probability.mean(1),
        "mean_max_probability": chunk.max_probability.mean(1),
        "mean_spread": trip.spread.mean(1),
        "mean_entropy": chunk.entropy.mean(1),
        "mean_inverse_entropy": trip.inverse_entropy.mean(1),
    }
    return {name: values.cpu().contiguous() for name, values in columns.items()}


def need_pyarrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet), or an ImportError that says how to get them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f"Parquet files need the package pyarrow ({error}); "
            "install it with: pip install pyarrow"
        ) from error
    return pyarrow, parquet


def _settings(first: Features, compare: str, rows: str) -> dict[str, Any]:
    return {
        "rows": rows,
        "compare": compare,
        "layers": list(first.layers),
        "timestep": first.timestep,
        "seeds": list(first.seeds),
        "prompt": first.prompt,
    }
