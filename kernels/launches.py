"""From a `Problem` and a `Request` to launches of the kernels: which passes, in which tiles.

Nothing here waits for the GPU or reads a value from it, so that calls can be captured in a CUDA
graph; and everything works on tensors without memory (device "meta"), which is how kernels are
compiled ahead of time and how `dry_run` says what a request takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flashmaps.kernels import passes
from flashmaps.kernels.settings import Settings, Tiling
from flashmaps.maps.problem import Problem, Request, empty_outputs
from torch import Tensor

# Bytes beyond inputs and outputs, unless the request's budget is less: maps are taken in chunks
# whose log-sum-exps (and masses of lines) fit, and tokens are not split among more programs than
# leave partial results of this size.
WORKSPACE = 4 * 2**20

# The same for rows of the map that are sorted, of which a few hundred at a time keep a GPU busy.
ROWS_TO_SORT = 64 * 2**20

# What sorting numbers beside their int64 places takes: the results, and as much again meanwhile.
_SORTED_BYTES = 2 * (4 + 8)

# Top-k up to here keeps its slots in registers; above, rows are written and sorted.
SLOTS = 64

_LOG2_E = math.log2(math.e)
_ROW_STATISTICS = ("entropy", "max", "argmax", "expectation", "diagonal")
_COLUMN_STATISTICS = ("column_sum", "column_entropy", "column_max", "column_argmax")
_PRODUCTS = ("product", "transposed_product", "pooled_keys", "return_probability")
_COMBINED = 256  # outputs that one program of the combining kernels has
_COMBINING = Tiling(_COMBINED, 1, warps=4, stages=1)


@dataclass(frozen=True)
class Launch:
    """One kernel, ready to go."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tiling: Tiling
    kind: str = ""  # which entry of the settings it took
    scores: int = 0  # how many q k it computes, of all heads

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.tiling.options)


@dataclass
class Run:
    """One call of the backend: how it launches, in which settings, and what it has allocated."""

    settings: Settings
    launch: Callable[[Launch], None] = Launch.run
    limit: int = WORKSPACE
    roomy: int = ROWS_TO_SORT  # the limit for what takes whole rows
    workspace: int = 0  # bytes beyond inputs and outputs, at most at once
    _held: int = field(default=0, repr=False)

    def hold(self, size: int) -> None:
        """Count what torch allocates for us; negative when it is free again."""
        self._held += size
        self.workspace = max(self.workspace, self._held)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, like: Tensor) -> Tensor:
        """Workspace, counted until `release`."""
        made = torch.empty(shape, dtype=dtype, device=like.device)
        self.hold(made.numel() * made.element_size())
        return made

    def release(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                self.hold(-tensor.numel() * tensor.element_size())


def run_for(request: Request, settings: Settings) -> Run:
    """A run within the budget of a request. It may take more where it cannot do with less."""
    budget = request.memory_budget
    if budget is None:
        return Run(settings)
    return Run(settings, limit=min(WORKSPACE, budget), roomy=min(ROWS_TO_SORT, budget))


def run_to_compose(request: Request, settings: Settings) -> Run:
    """The same for a composition, which makes use of all of a larger budget."""
    run = run_for(request, settings)
    if request.memory_budget is not None:
        run.roomy = request.memory_budget
    return run


def dry_run(problem: Problem, request: Request, settings: Settings) -> tuple[list[Launch], int]:
    """(launches, workspace in bytes) of a request: nothing runs, and tensors may be on "meta"."""
    found: list[Launch] = []

    def meta(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to("meta")

    request = replace(
        request,
        right=meta(request.right),
        left=meta(request.left),
        cells=meta(request.cells),
        partner=None if request.partner is None else _on_meta(request.partner),
    )
    run = run_for(request, settings)
    run.launch = found.append
    reduce(_on_meta(problem), request, run)
    return found, run.workspace


def _on_meta(of: Problem) -> Problem:
    """Without memory."""
    return Problem._make(x.to("meta") if isinstance(x, Tensor) else x for x in of)


def reduce(problem: Problem, request: Request, run: Run) -> dict[str, Tensor]:
    """Every field of ``request.names``; see `reference.reduce` for what each one is."""
    outputs = empty_outputs(problem, request)
    per_map = problem.num_queries * 4 * (problem.heads + _lines(problem))
    if request.partner is not None:
        partner = request.partner
        per_map += partner.num_queries * 4 * (partner.heads + _lines(partner))
    step = max(1, run.limit // per_map)
    for start in range(0, problem.batch, step):
        some = slice(start, min(start + step, problem.batch))
        whole = some == slice(0, problem.batch)
        _reduce_maps(
            problem if whole else some_maps(problem, some),
            request if whole else _some_of_request(request, some),
            {name: out[some] for name, out in outputs.items()},
            run,
        )
    return outputs


def some_maps(problem: Problem, some: slice) -> Problem:
    """A few of the maps of a batch (views)."""
    lse = None if problem.lse is None else problem.lse[some]
    if problem.pairs is not None:
        return problem._replace(pairs=problem.pairs[some], lse=lse)
    bias = None if problem.bias is None else problem.bias[some]
    return problem._replace(query=problem.query[some], key=problem.key[some], bias=bias, lse=lse)


def _some_of_request(request: Request, some: slice) -> Request:
    return replace(
        request,
        right=None if request.right is None else request.right[some],
        left=None if request.left is None else request.left[some],
        partner=None if request.partner is None else some_maps(request.partner, some),
    )


def _scores(problem: Problem) -> int:
    """q k of all heads of one map."""
    return problem.heads * problem.num_queries * problem.num_keys


def _lines(problem: Problem) -> int:
    return 0 if problem.normalize == "block" else problem.lines


def _reduce_maps(problem: Problem, request: Request, outputs: dict[str, Tensor], run: Run) -> None:
    if "lse" in outputs:
        _lse(problem, outputs["lse"], run)
    if set(outputs) <= {"lse"}:
        return
    made: list[Tensor] = []
    # A product's left side is the tile, in parts: beside a whole row of it there is no room.
    needed = problem.normalize != "block" or any(name in outputs for name in _PRODUCTS)
    problem = _with_lse(problem, outputs.get("lse"), run, made, needed=needed)
    mass = _line_mass(problem, run, made)
    view = _View(problem, mass)

    rows = {name: outputs[name] for name in _ROW_STATISTICS if name in outputs}
    if rows or "product" in outputs:
        _statistics(view, rows, request.right, outputs.get("product"), run)
    columns = {name: outputs[name] for name in _COLUMN_STATISTICS if name in outputs}
    if columns or "transposed_product" in outputs:
        flipped = _View(problem, mass, keys_kept=True)
        _statistics(flipped, columns, request.left, outputs.get("transposed_product"), run)
    if "dense" in outputs:
        _launch_reduce(view, {"dense": outputs["dense"]}, "dense", run)
    if "pooled_keys" in outputs:
        _pooled(view, request.cells, request.num_cells, outputs["pooled_keys"], run)
    if "topk_values" in outputs or "topk_indices" in outputs:
        _topk(view, request.k, outputs, run)
    if "return_probability" in outputs:
        assert request.partner is not None
        _return_probability(problem, mass, request.partner, outputs["return_probability"], run)
    run.release(*made)


@dataclass(frozen=True)
class _View:
    """A map seen from one side: queries kept and keys streamed, or the other way about."""

    problem: Problem
    mass: Tensor | None  # [P, N, lines], under "rows" and "columns"
    keys_kept: bool = False

    @property
    def kept(self) -> Tensor:
        return self.problem.key if self.keys_kept else self.problem.query

    @property
    def streamed(self) -> Tensor:
        return self.problem.query if self.keys_kept else self.problem.key

    @property
    def num_kept(self) -> int:
        return self.kept.shape[2]

    @property
    def num_streamed(self) -> int:
        return self.streamed.shape[2]

    @property
    def whole(self) -> bool:
        return self.problem.lse is None

    def kind(self, kind: str, settings: Settings) -> str:
        """The kind of the pass in the settings, which may be a special one of it."""
        if self.whole:
            return "whole"
        if self.mass is not None or _is_rare(self.problem):
            return "rare"
        if kind in ("rows", "columns") and self.problem.bias is None:
            rows, columns, *_ = settings.tiling("even", self.kept.dtype, self.kept.shape[3])
            if self.num_kept % rows == 0 and self.num_streamed % columns == 0:
                return "even"
        return kind

    def tiling(self, kind: str, settings: Settings) -> Tiling:
        """Rows and columns of a tile; all keys in it where no log-sum-exp is known."""
        dtype, dim = self.problem.query.dtype, self.problem.query.shape[3]
        found = settings.tiling(self.kind(kind, settings), dtype, dim)
        if not self.whole:
            return found
        keys = max(16, _power_of_two(self.problem.num_keys))
        rows, columns = (keys, found.rows) if self.keys_kept else (found.rows, keys)
        return found._replace(rows=rows, columns=columns)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def head_parts(dim: int) -> tuple[int, int]:
    """A head dimension as one power of two, or as two where that is smaller: 80 = 64 + 16."""
    whole = max(16, _power_of_two(dim))
    first = whole // 2
    rest = max(16, _power_of_two(dim - first)) if first >= 16 and dim > first else whole
    return (first, rest) if first + rest < whole else (whole, 0)


def _unit(*tensors: Tensor) -> int:
    """8 where all strides of Q and K are multiples of that, so that 16 bytes load at once; else 1.

    Of its arguments triton notes whether they are multiples of 16, which 40 and 72 are not.
    """
    strides = [s for tensor in tensors for s in tensor.stride()[:3]]
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def _strides(name: str, tokens: Tensor, unit: int) -> dict[str, int]:
    batch, head, token, dim = tokens.stride()
    return {
        f"{name}_batch": batch // unit,
        f"{name}_head": head // unit,
        f"{name}_token": token // unit,
        f"{name}_dim": dim,
    }


def _is_rare(problem: Problem) -> bool:
    """Whether reading Q and K takes many registers: see `settings.KINDS`."""
    return any(
        tensor.stride(3) != 1 or tensor.stride(2) >= 2**23
        for tensor in (problem.query, problem.key)
        if tensor.shape[3] > 1
    )


def _wide(tiling: Tiling, problem: Problem, operand: Tensor | None = None) -> bool:
    """Whether offsets within a tile, or into the lines of a map, need 64 bits."""
    tokens = max(tiling.rows, tiling.columns)
    furthest = max(
        tokens * tensor.stride(2) + tensor.shape[3] * tensor.stride(3)
        for tensor in (problem.query, problem.key)
    )
    furthest = max(furthest, tokens * problem.num_keys, problem.num_queries * _lines(problem))
    if operand is not None:
        furthest = max(furthest, tokens * operand.stride(1) + operand.shape[2] * operand.stride(2))
    return furthest >= 2**31


def _splits(run: Run, programs: int, tiles: int, bytes_each: int) -> int:
    """How many programs share the streamed tokens of one block, when there are few blocks.

    From shapes and settings alone, so that the same call adds up in the same order.
    """
    wanted = run.settings.programs // max(1, programs)
    fitting = run.limit // max(1, bytes_each)
    splits = max(1, min(wanted, tiles, fitting))
    # No empty ones: 10 tiles in 4 splits of 3 would do, 10 tiles in 6 of 2 leave one without.
    return -(-tiles // -(-tiles // splits))


def _map_arguments(view: _View) -> dict[str, Any]:
    problem = view.problem
    unit = _unit(problem.query, problem.key)
    arguments: dict[str, Any] = {"kept": view.kept, "streamed": view.streamed, "UNIT": unit}
    arguments |= _strides("kept", view.kept, unit) | _strides("streamed", view.streamed, unit)
    return arguments | {
        "num_kept": view.num_kept,
        "num_streamed": view.num_streamed,
        "bias": problem.bias,
        "pairs": problem.pairs,
        "weights": problem.head_weights,
        "lse": problem.lse,
        "line_mass": view.mass,
        "grid_width": max(1, problem.grid_width),
        "grid_height": max(1, problem.grid_height),
        "lines": problem.lines,
        "maps": problem.batch,
        "heads": problem.heads,
        "scale": problem.scale * _LOG2_E,
        "LINES": "" if view.mass is None else problem.normalize,
    }


def _tile_constants(
    tiling: Tiling, tokens: Tensor, kept: int, streamed: int, run: Run
) -> dict[str, Any]:
    width, rest = head_parts(tokens.shape[3])
    return {
        "R": tiling.rows,
        "C": tiling.columns,
        "D": width,
        "D_REST": rest,
        "DIM": tokens.shape[3],
        "CHUNK": run.settings.chunk(tokens.dtype),
        "EVEN": kept % tiling.rows == 0 and streamed % tiling.columns == 0,
        "PRECISION": run.settings.precision(tokens.dtype),
    }


def _with_lse(
    problem: Problem, known: Tensor | None, run: Run, made: list[Tensor], *, needed: bool
) -> Problem:
    """The problem with its log-sum-exp, contiguous; without one where rows are kept whole."""
    lse = problem.lse
    if lse is None:
        keeps = run.settings.keeps_rows(problem.num_keys, problem.query.shape[3])
        if keeps and not needed:
            return problem
        lse = known
    if lse is None:
        shape = (problem.batch, problem.heads, problem.num_queries)
        lse = run.empty(*shape, like=problem.query)
        made.append(lse)
        _lse(problem, lse, run)
    return problem._replace(lse=lse.contiguous())


def _lse(problem: Problem, out: Tensor, run: Run) -> None:
    query, key = problem.query, problem.key
    kind = "rare" if _is_rare(problem) else "lse"
    tiling = run.settings.tiling(kind, query.dtype, query.shape[3])
    blocks = -(-problem.num_queries // tiling.rows)
    programs = problem.batch * problem.heads * blocks
    count = out.numel()
    splits = _splits(run, programs, -(-problem.num_keys // tiling.columns), 4 * count)
    target = out if splits == 1 else run.empty(splits, count, like=query)
    unit = _unit(query, key)
    constants = _tile_constants(tiling, query, problem.num_queries, problem.num_keys, run)
    run.launch(
        Launch(
            passes.lse_kernel,
            programs * splits,
            {
                "query": query,
                "key": key,
                **_strides("query", query, unit),
                **_strides("key", key, unit),
                "UNIT": unit,
                "bias": problem.bias,
                "pairs": problem.pairs,
                "out": target,
                "maps": problem.batch,
                "heads": problem.heads,
                "num_queries": problem.num_queries,
                "num_keys": problem.num_keys,
                "splits": splits,
                "scale": problem.scale * _LOG2_E,
                "WIDE": _wide(tiling, problem),
                **constants,
            },
            tiling,
            kind,
            scores=problem.batch * _scores(problem),
        )
    )
    if splits > 1:
        arguments = {"partial": target, "out": out, "count": count, "splits": splits}
        run.launch(
            Launch(
                passes.add_lse_kernel,
                -(-count // _COMBINED),
                {**arguments, "BLOCK": _COMBINED},
                _COMBINING,
            )
        )
        run.release(target)


def _line_mass(problem: Problem, run: Run, made: list[Tensor]) -> Tensor | None:
    """Mass of each line of each row before it is normalised: [P, N, lines]."""
    if problem.normalize == "block":
        return None
    lines = problem.lines
    mass = run.empty(problem.batch, problem.num_queries, lines, like=problem.query)
    made.append(mass)
    run.hold(2 * 8 * problem.num_keys)
    key = torch.arange(problem.num_keys, device=problem.query.device)
    line = key // problem.grid_width if problem.normalize == "rows" else key % problem.grid_width
    plain = problem._replace(normalize="block")
    _pooled(_View(plain, None), line, lines, mass, run)
    run.hold(-2 * 8 * problem.num_keys)
    return mass


# Which outputs of `reduce_kernel` a field is made of: where the kernel finishes it alone, and where
# it leaves parts to be combined.
_FINISHED = {
    "entropy": ("entropy",),
    "max": ("top",),
    "argmax": ("argtop",),
    "expectation": ("expectation",),
    "diagonal": ("diagonal",),
    "column_sum": ("total",),
    "column_entropy": ("entropy",),
    "column_max": ("top",),
    "column_argmax": ("argtop",),
}
_PARTS = _FINISHED | {
    "entropy": ("plogp",),
    "argmax": ("top", "argtop"),
    "column_entropy": ("total", "plogp"),
    "column_argmax": ("top", "argtop"),
}
_SHAPES: dict[str, tuple[int, ...]] = {"expectation": (2,)}
# Bytes of such a part.
_PART_BYTES = {"argtop": 8, "expectation": 8}
_OPTIONAL = (
    "order", "cells", "bounds", "total", "plogp", "entropy", "top", "argtop", "expectation",
    "diagonal", "product", "dense", "largest", "where_largest",
)  # fmt: skip


def _statistics(
    view: _View,
    fields: dict[str, Tensor],
    operand: Tensor | None,
    product: Tensor | None,
    run: Run,
) -> None:
    """The statistics of one side, and a product, in one launch (and one that combines splits)."""
    kind = "product" if product is not None else "columns" if view.keys_kept else "rows"
    maps, kept = view.problem.batch, view.num_kept
    names = sorted({part for name in fields for part in _PARTS[name]})
    columns = 0 if product is None else product.shape[2]
    each = maps * kept * (sum(_PART_BYTES.get(name, 4) for name in names) + 4 * columns)
    splits = _count_splits(view, kind, columns, each, run)
    outputs: dict[str, Tensor] = {}
    if splits == 1:
        for name, out in fields.items():
            outputs[_FINISHED[name][0]] = out
        if product is not None:
            outputs["product"] = product
        _launch_reduce(view, outputs, kind, run, operand=operand)
        return
    outputs |= _empty_parts(names, (splits, maps, kept), view.kept, run)
    if product is not None:
        outputs["product"] = run.empty(splits, *product.shape, like=view.kept)
    _launch_reduce(view, outputs, kind, run, operand=operand, splits=splits)
    if names:
        _combine(outputs, fields, maps * kept, splits, run, of_columns=view.keys_kept)
    if product is not None:
        torch.sum(outputs["product"], 0, out=product)
    run.release(*outputs.values())


def _empty_parts(
    names: list[str], shape: tuple[int, int, int], like: Tensor, run: Run
) -> dict[str, Tensor]:
    """Room for the parts that [splits, maps, kept] programs leave."""
    return {
        name: run.empty(
            *shape,
            *_SHAPES.get(name, ()),
            dtype=torch.int64 if name == "argtop" else torch.float32,
            like=like,
        )
        for name in names
    }


def _combine(
    parts: dict[str, Tensor], fields: dict[str, Tensor], count: int, splits: int, run: Run,
    *, of_columns: bool = False,
) -> None:  # fmt: skip
    """Fields of ``count`` rows or columns from the parts of their splits, in order."""
    finished = {_FINISHED[name][0]: out for name, out in fields.items()}
    arguments: dict[str, Any] = {
        name: parts.get(name)
        for name in ("total", "plogp", "top", "argtop", "expectation", "diagonal")
    }
    arguments |= {
        f"out_{name}": finished.get(name)
        for name in ("total", "entropy", "top", "argtop", "expectation", "diagonal")
    }
    arguments |= {"count": count, "splits": splits, "OF_COLUMNS": of_columns, "BLOCK": _COMBINED}
    run.launch(Launch(passes.combine_kernel, -(-count // _COMBINED), arguments, _COMBINING))


def _blocks(view: _View, kind: str, run: Run) -> tuple[int, int]:
    """(programs without splits or parts, tiles that each of them has)."""
    tiling = view.tiling(kind, run.settings)
    blocks = -(-view.num_kept // tiling.rows)
    return view.problem.batch * blocks, -(-view.num_streamed // tiling.columns)


def _count_splits(view: _View, kind: str, columns: int, bytes_each: int, run: Run) -> int:
    programs, tiles = _blocks(view, kind, run)
    parts = -(-columns // _operand_width(columns, run)) if columns else 1
    return _splits(run, programs * parts, tiles, bytes_each)


def _operand_width(columns: int, run: Run) -> int:
    """How many columns of an operand a program takes at once."""
    return min(run.settings.operand_columns, max(16, _power_of_two(columns)))


def _launch_reduce(
    view: _View,
    outputs: dict[str, Tensor],
    kind: str,
    run: Run,
    *,
    operand: Tensor | None = None,
    splits: int | None = None,
    parts: int | None = None,
    k: int = 0,
    more: dict[str, Tensor | None] | None = None,
) -> None:
    tiling = view.tiling(kind, run.settings)
    programs, tiles = _blocks(view, kind, run)
    if splits is None:
        splits = 1
        if set(outputs) == {"dense"}:  # which has nothing to combine
            splits = _splits(run, programs, tiles, 0)
    product = outputs.get("product")
    columns = 0 if product is None else product.shape[-1]
    width = _operand_width(columns, run) if columns else 16
    if parts is None:
        parts = -(-columns // width) if columns else 1
    tokens = view.problem.query
    constants = _tile_constants(tiling, tokens, view.num_kept, view.num_streamed, run)
    more = more or {}
    if more.get("order") is not None:
        constants["EVEN"] = False
    arguments: dict[str, Any] = dict.fromkeys(_OPTIONAL)
    strides = (0, 0, 0) if operand is None else operand.stride()
    arguments |= _map_arguments(view)
    arguments |= {
        "splits": splits,
        "parts": parts,
        "operand": operand,
        **dict(zip(("operand_map", "operand_token", "operand_column"), strides, strict=True)),
        "columns": columns,
        "k": k,
        **_NOT_COMPOSED,
        **more,
        **outputs,
        "KEYS_KEPT": view.keys_kept,
        "WHOLE": view.whole,
        "X": width,
        "K": _power_of_two(k),
        "WIDE": _wide(tiling, view.problem, operand),
        "OPERAND_PRECISION": run.settings.operand_precision(tokens.dtype)
        if more.get("cells") is None
        else run.settings.pooling_precision(),
        "FAST_LOG": run.settings.fast_log,
        # The compiler cannot flatten the loop within which the k largest are found.
        "FLATTEN": run.settings.flatten and "largest" not in outputs,
        **constants,
    }
    run.launch(
        Launch(
            passes.reduce_kernel,
            programs * splits * parts,
            arguments,
            tiling,
            view.kind(kind, run.settings),
            scores=view.problem.batch * _scores(view.problem) * (1 if "order" in more else parts),
        )
    )


# What `reduce_kernel` takes for a composition only.
_NOT_COMPOSED = {
    "inner": 0,
    "kept_first": 0,
    "streamed_first": 0,
    "COMPOSED": False,
    "INNER": 16,
}


def _pooled(view: _View, cells: Tensor | None, count: int, out: Tensor, run: Run) -> None:
    """Sums over the keys of each cell: keys are sorted by cell, and a block of cells has its own.

    So every element of the map is made once, however many cells there are.
    """
    assert cells is not None
    width = _operand_width(count, run)
    parts = -(-count // width)
    sorting = 4 * 8 * cells.numel()  # int64 cells and places, and as much again meanwhile
    run.hold(sorting)
    sorted_cells, order = cells.sort(stable=True)
    firsts = torch.arange(parts + 1, device=cells.device) * width
    bounds = torch.searchsorted(sorted_cells, firsts)
    _launch_reduce(
        view,
        {"product": out},
        "product",
        run,
        splits=1,
        parts=parts,
        more={"order": order, "bounds": bounds, "cells": sorted_cells},
    )
    run.hold(-sorting)


def _topk(view: _View, k: int, outputs: dict[str, Tensor], run: Run) -> None:
    values, indices = outputs.get("topk_values"), outputs.get("topk_indices")
    made: list[Tensor] = []
    shape = (view.problem.batch, view.num_kept, k)
    if values is None:
        values = run.empty(*shape, like=view.kept)
        made.append(values)
    if indices is None:
        indices = run.empty(*shape, dtype=torch.int64, like=view.kept)
        made.append(indices)
    if k > SLOTS:
        _topk_by_sorting(view, k, values, indices, run)
        run.release(*made)
        return
    programs, tiles = _blocks(view, "topk", run)
    splits = _splits(run, programs, tiles, math.prod(shape) * 12)
    if splits == 1:
        found = {"largest": values, "where_largest": indices}
        _launch_reduce(view, found, "topk", run, splits=1, k=k)
    else:
        largest = run.empty(splits, *shape, like=view.kept)
        where = run.empty(splits, *shape, dtype=torch.int64, like=view.kept)
        found = {"largest": largest, "where_largest": where}
        _launch_reduce(view, found, "topk", run, splits=splits, k=k)
        # Splits are in the keys' order and a stable sort keeps it, so ties go to the lowest index.
        # A split of fewer than k keys fills its places with -1: none is among the k largest.
        run.hold(_SORTED_BYTES * largest.numel())
        every = largest.movedim(0, 2).flatten(2).sort(dim=2, descending=True, stable=True)
        values.copy_(every.values[..., :k])
        indices.copy_(where.movedim(0, 2).flatten(2).gather(2, every.indices[..., :k]))
        run.hold(-_SORTED_BYTES * largest.numel())
        run.release(largest, where)
    run.release(*made)


def _topk_by_sorting(view: _View, k: int, values: Tensor, indices: Tensor, run: Run) -> None:
    """Rows of the map, a few at a time, sorted by torch."""
    problem = view.problem
    for one in range(problem.batch):
        single = some_maps(problem, slice(one, one + 1))
        mass = None if view.mass is None else view.mass[one : one + 1]
        step = max(1, run.roomy // ((4 + _SORTED_BYTES) * view.num_streamed))
        for start in range(0, view.num_kept, step):
            rows = slice(start, min(start + step, view.num_kept))
            part = single.query_rows(rows.start, rows.stop)
            if part.lse is not None:
                part = part._replace(lse=part.lse.contiguous())
            of_rows = _View(part, None if mass is None else mass[:, rows].contiguous())
            dense = run.empty(1, rows.stop - rows.start, view.num_streamed, like=view.kept)
            _launch_reduce(of_rows, {"dense": dense}, "dense", run)
            run.hold(_SORTED_BYTES * dense.numel())
            found = dense.sort(dim=2, descending=True, stable=True)
            values[one : one + 1, rows] = found.values[..., :k]
            indices[one : one + 1, rows] = found.indices[..., :k]
            run.hold(-_SORTED_BYTES * dense.numel())
            run.release(dense)


def _return_probability(
    problem: Problem, mass: Tensor | None, partner: Problem, out: Tensor, run: Run
) -> None:
    made: list[Tensor] = []
    problem = _with_lse(problem, None, run, made, needed=True)
    partner = _with_lse(partner, None, run, made, needed=True)
    back_mass = _line_mass(partner, run, made)
    query = problem.query
    dim = max(query.shape[3], partner.query.shape[3])
    plain = mass is None and back_mass is None and not _is_rare(problem) and not _is_rare(partner)
    kind = "return" if plain else "rare"
    tiling = run.settings.tiling(kind, query.dtype, dim)
    sources, targets = problem.num_queries, problem.num_keys
    programs = problem.batch * -(-sources // tiling.rows)
    splits = _splits(run, programs, -(-targets // tiling.columns), 4 * out.numel())
    target = out if splits == 1 else run.empty(splits, *out.shape, like=query)
    unit = _unit(problem.query, problem.key, partner.query, partner.key)
    arguments: dict[str, Any] = {"UNIT": unit}
    for prefix, of, of_mass in (("", problem, mass), ("back_", partner, back_mass)):
        for name, tokens in (("query", of.query), ("key", of.key)):
            arguments[prefix + name] = tokens
            arguments |= _strides(prefix + name, tokens, unit)
        arguments |= {
            f"{prefix}bias": of.bias,
            f"{prefix}pairs": of.pairs,
            f"{prefix}weights": of.head_weights,
            f"{prefix}lse": of.lse,
            f"{prefix}line_mass": of_mass,
            f"{prefix}grid_width": max(1, of.grid_width),
            f"{prefix}lines": of.lines,
            f"{prefix}heads": of.heads,
            f"{prefix}scale": of.scale * _LOG2_E,
        }
    width, rest = head_parts(partner.query.shape[3])
    arguments |= {
        "out": target,
        "maps": problem.batch,
        "num_sources": sources,
        "num_targets": targets,
        "splits": splits,
        "LINES": "" if mass is None else problem.normalize,
        "BACK_LINES": "" if back_mass is None else partner.normalize,
        "BACK_D": width,
        "BACK_D_REST": rest,
        "BACK_DIM": partner.query.shape[3],
        "WIDE": _wide(tiling, problem) or _wide(tiling, partner),
        **_tile_constants(tiling, query, sources, targets, run),
    }
    scores = problem.batch * (_scores(problem) + _scores(partner))
    run.launch(
        Launch(passes.return_kernel, programs * splits, arguments, tiling, kind, scores=scores)
    )
    if splits > 1:
        torch.sum(target, 0, out=out)
        run.release(target)
    run.release(*made)
