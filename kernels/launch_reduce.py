"""Pass two of two: statistics of one side, products, sums over cells, and the map written."""

from __future__ import annotations

from typing import Any

import torch
from flashmaps.kernels.kernel_reduce import combine_kernel, reduce_kernel
from flashmaps.kernels.run import (
    COMBINED,
    COMBINING,
    TOGETHER,
    Launch,
    Run,
    add_up,
    count_splits,
)
from flashmaps.kernels.views import (
    View,
    head_parts,
    map_arguments,
    one_part,
    power_of_two,
    tile_constants,
    wide,
)
from flashmaps.maps.gpu import FINISHED, PARTS, part_bytes, part_dtype, part_shape
from flashmaps.maps.problem import Problem
from torch import Tensor

# What `reduce_kernel` may be given, or None.
OPTIONAL = (
    "order", "cells", "bounds", "total", "plogp", "entropy", "top", "argtop", "expectation",
    "diagonal", "product", "dense", "largest", "where_largest",
)  # fmt: skip


def launch_statistics(
    view: View,
    fields: dict[str, Tensor],
    operand: Tensor | None,
    product: Tensor | None,
    run: Run,
) -> None:
    """The statistics of one side, and a product, in one launch (and one that combines splits)."""
    kind = "product" if product is not None else "columns" if view.keys_kept else "rows"
    maps, kept = view.problem.batch, view.num_kept
    names = sorted({part for name in fields for part in PARTS[name]})
    columns = 0 if product is None else product.shape[2]
    each = maps * kept * (part_bytes(names) + 4 * columns)
    splits = _operand_splits(view, kind, columns, each, run)
    outputs: dict[str, Tensor] = {}
    if splits == 1:
        for name, out in fields.items():
            outputs[FINISHED[name]] = out
        if product is not None:
            outputs["product"] = product
        launch_reduce(view, outputs, kind, run, operand=operand)
        return
    outputs |= empty_parts(names, (splits, maps, kept), view.kept, run)
    if product is not None:
        outputs["product"] = run.empty(splits, *product.shape, like=view.kept)
    launch_reduce(view, outputs, kind, run, operand=operand, splits=splits)
    if names:
        launch_combine(outputs, fields, maps * kept, splits, run, of_columns=view.keys_kept)
    if product is not None:
        add_up(outputs["product"], product, run)
    run.release(*outputs.values())


def empty_parts(
    names: list[str], shape: tuple[int, int, int], like: Tensor, run: Run
) -> dict[str, Tensor]:
    """Room for the parts that [splits, maps, kept] programs leave."""
    return {
        name: run.empty(*shape, *part_shape(name), dtype=part_dtype(name), like=like)
        for name in names
    }


def launch_combine(
    parts: dict[str, Tensor], fields: dict[str, Tensor], count: int, splits: int, run: Run,
    *, of_columns: bool = False,
) -> None:  # fmt: skip
    """Fields of ``count`` rows or columns from the parts of their splits, in order."""
    finished = {FINISHED[name]: out for name, out in fields.items()}
    arguments: dict[str, Any] = {
        name: parts.get(name)
        for name in ("total", "plogp", "top", "argtop", "expectation", "diagonal")
    }
    arguments |= {
        f"out_{name}": finished.get(name)
        for name in ("total", "entropy", "top", "argtop", "expectation", "diagonal")
    }
    arguments |= {"count": count, "splits": splits, "OF_COLUMNS": of_columns, "BLOCK": COMBINED}
    run.launch(Launch(combine_kernel, -(-count // COMBINED), arguments, COMBINING))


def count_blocks(view: View, kind: str, run: Run) -> tuple[int, int]:
    """(programs without splits or parts, tiles that each of them has)."""
    tiling = view.tiling(kind, run.settings)
    blocks = -(-view.num_kept // tiling.rows)
    return view.problem.batch * blocks, -(-view.num_streamed // tiling.columns)


def _operand_splits(view: View, kind: str, columns: int, bytes_each: int, run: Run) -> int:
    programs, tiles = count_blocks(view, kind, run)
    parts = -(-columns // _operand_width(columns, run)) if columns else 1
    # A multiprocessor has room for one program that keeps all heads.
    together = 1 if resident_heads(view, kind, run) else TOGETHER
    return count_splits(run, programs * parts, tiles, bytes_each, together)


def _operand_width(columns: int, run: Run) -> int:
    """How many columns of an operand a program takes at once."""
    return min(run.settings.operand_columns, max(16, power_of_two(columns)))


def launch_reduce(
    view: View,
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
    """One launch of `reduce_kernel`, into the outputs that are given by the kernel's names."""
    tiling = view.tiling(kind, run.settings)
    programs, tiles = count_blocks(view, kind, run)
    if splits is None:
        splits = 1
        if set(outputs) == {"dense"}:  # which has nothing to combine
            splits = count_splits(run, programs, tiles, 0)
    product = outputs.get("product")
    columns = 0 if product is None else product.shape[-1]
    width = _operand_width(columns, run) if columns else 16
    if parts is None:
        parts = -(-columns // width) if columns else 1
    tokens = view.problem.query
    constants = tile_constants(tiling, tokens, view.num_kept, view.num_streamed, run)
    more = more or {}
    heads = resident_heads(view, kind, run)
    ahead = run.settings.ahead and kind in ("rows", "columns") and not view.whole
    if kind == "rows" and heads and tiling.ahead and programs >= run.settings.multiprocessors:
        ahead = True
    if more.get("order") is not None:
        constants["EVEN"] = False
    arguments: dict[str, Any] = dict.fromkeys(OPTIONAL)
    strides = (0, 0, 0) if operand is None else operand.stride()
    arguments |= map_arguments(view)
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
        "K": power_of_two(k),
        "WIDE": wide(tiling, view.problem, operand),
        "OPERAND_PRECISION": run.settings.operand_precision(tokens.dtype)
        if more.get("cells") is None
        else run.settings.pooling_precision(),
        "FAST_LOG": run.settings.fast_log,
        # The compiler cannot flatten the loop within which the k largest are found.
        "FLATTEN": run.settings.flatten and "largest" not in outputs and heads == 0 and not ahead,
        "HEADS": heads,
        "AHEAD": ahead,
        **constants,
    }
    run.launch(
        Launch(
            reduce_kernel,
            programs * splits * parts,
            arguments,
            tiling,
            view.kind(kind, run.settings),
            scores=view.problem.scores * (1 if "order" in more else parts),
        )
    )


def resident_heads(view: View, kind: str, run: Run) -> int:
    """How many heads' kept tokens stay on chip while others stream past: all of them, or 0.

    Else a head's are loaded again for every tile, through the second-level cache, which cannot give
    both sides as fast as the exponentials are done.
    """
    heads, tokens = view.problem.heads, view.kept
    if (
        not run.settings.resident
        or kind not in ("rows", "columns")
        or view.kind(kind, run.settings) != "even"
    ):
        return 0
    width, rest = head_parts(tokens.shape[3], one=one_part(tokens, run))
    if rest > 0 or width > run.settings.chunk(tokens.dtype):
        return 0
    tiling = view.tiling(kind, run.settings)
    # Each stage of the pipeline has a tile of streamed tokens for every head.
    taken = heads * (tiling.rows + tiling.stages * tiling.columns) * width * tokens.element_size()
    return heads if taken <= run.settings.resident_bytes else 0


# What `reduce_kernel` takes for a composition only.
_NOT_COMPOSED = {
    "inner": 0,
    "kept_first": 0,
    "streamed_first": 0,
    "COMPOSED": False,
    "INNER": 16,
}


def launch_pooled(view: View, cells: Tensor | None, count: int, out: Tensor, run: Run) -> None:
    """Sums over the keys of each cell: keys are sorted by cell, and a block of cells has its own.

    So every element of the map is made once, however many cells there are.
    """
    assert cells is not None
    width = _operand_width(count, run)
    parts = -(-count // width)
    sorting = 4 * 8 * cells.numel()  # int64 cells and places, and as much again meanwhile
    run.hold(sorting)

    def arrange(cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sorted_cells, order = cells.sort(stable=True)
        firsts = torch.arange(parts + 1, device=cells.device) * width
        return sorted_cells, order, torch.searchsorted(sorted_cells, firsts)

    sorted_cells, order, bounds = run.compute(arrange, cells)
    launch_reduce(
        view,
        {"product": out},
        "product",
        run,
        splits=1,
        parts=parts,
        more={"order": order, "bounds": bounds, "cells": sorted_cells},
    )
    run.hold(-sorting)


def line_mass(problem: Problem, run: Run, made: list[Tensor]) -> Tensor | None:
    """Mass of each line of each row before it is normalised: [P, N, lines]."""
    if problem.normalize == "block":
        return None
    lines = problem.lines
    mass = run.empty(problem.batch, problem.num_queries, lines, like=problem.query)
    made.append(mass)
    run.hold(2 * 8 * problem.num_keys)
    count, width, rows = problem.num_keys, problem.grid_width, problem.normalize == "rows"

    def line_of_keys(like: Tensor) -> Tensor:
        key = torch.arange(count, device=like.device)
        return key // width if rows else key % width

    line = run.compute(line_of_keys, problem.query)
    plain = problem._replace(normalize="block")
    launch_pooled(View(plain, None), line, lines, mass, run)
    run.hold(-2 * 8 * problem.num_keys)
    return mass
