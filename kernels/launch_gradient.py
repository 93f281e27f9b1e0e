"""The way back through one map: how it is cut into strips of queries, and their launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from flashmaps.kernels.kernel_gradient import (
    inner_kernel,
    key_kernel,
    lines_kernel,
    query_kernel,
    slope_kernel,
)
from flashmaps.kernels.launch_lse import with_lse
from flashmaps.kernels.launch_reduce import launch_reduce, line_mass
from flashmaps.kernels.run import Launch, Run
from flashmaps.kernels.settings import Settings, Tiling
from flashmaps.kernels.views import (
    View,
    normalized_lines,
    power_of_two,
    stride_unit,
    strides,
    tile_constants,
    wide,
)
from flashmaps.maps.gpu import LOG2_E, WORKSPACE
from flashmaps.maps.problem import Gradient, Problem, empty_gradients
from flashmaps.maps.tape import Recorder, Tape, gradient_without_memory
from torch import Tensor

# Of g and what it is made from, unless there is a budget: 2048 queries by 4096 keys.
STRIP_BYTES = 32 * 2**20

# What is per row and column of G is elementwise.
_SLOPE = Tiling(32, 64, warps=4, stages=1)
_LINES = Tiling(16, 16, warps=4, stages=1)

# The terms of a `Gradient` that `slope_kernel` takes.
_TERMS = (
    "row_add", "row_log", "row_back", "column_add", "column_log", "column_back", "left", "right",
    "row_index", "row_values", "column_index", "column_values", "dense", "cells", "pooled",
)  # fmt: skip


@dataclass
class _Pass:
    """One way back: the map, where gradients go, and what is there for all strips."""

    problem: Problem
    gradient: Gradient
    partner: Problem | None  # the map back, not normalised
    back_mass: Tensor | None  # [P, M, lines] of the map back, where it is
    into: dict[str, Tensor]
    run: Run
    room: int  # bytes beside what is held for all strips

    @property
    def needs_map(self) -> bool:
        """Whether G is made from A."""
        return self.gradient.has_logs or self.problem.normalize != "block"

    @property
    def needs_keys(self) -> bool:
        return bool({"key", "bias"} & set(self.into))

    def bytes(self, maps: int, rows: int) -> int:
        """What a strip takes, without splits."""
        p = self.problem
        squares = 1 + (p.normalize != "block") + (self.partner is not None)
        each = 4 * (p.num_keys * squares + 3 * p.heads + normalized_lines(p))
        sorting = 0 if p.normalize == "block" else (2 * 8 + 4 * 8) * p.num_keys
        # The keys of a strip of the map back have a bias of their own.
        back = self.partner.bias.shape[0] if self.partner and self.partner.bias is not None else 0
        bias = 4 * maps * p.heads * p.num_keys if "bias" in self.into else 0
        return maps * rows * each + 4 * back * rows + max(sorting, 2 * bias)

    def cut(self) -> tuple[int, int]:
        """(maps, rows) of a strip: as many rows, then as many maps, as there is room for."""
        p = self.problem
        rows = _most(lambda n: self.bytes(1, n) <= self.room, p.num_queries)
        if rows < p.num_queries:
            tile = _tiling(p, self.run).rows
            return 1, rows // tile * tile or rows
        if p.pairs is not None:  # other maps may be of the same queries and keys
            return 1, rows
        return _most(lambda n: self.bytes(n, rows) <= self.room, p.batch), rows

    def strips(self) -> Iterator[tuple[slice, slice]]:
        maps, rows = self.cut()
        for first in range(0, self.problem.batch, maps):
            for start in range(0, self.problem.num_queries, rows):
                yield (
                    slice(first, min(first + maps, self.problem.batch)),
                    slice(start, min(start + rows, self.problem.num_queries)),
                )


def _most(fits: Any, limit: int) -> int:
    """The largest number up to ``limit`` that fits; 1 if none does."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _tiling(problem: Problem, run: Run) -> Tiling:
    return run.settings.tiling("gradient", problem.query.dtype, problem.query.shape[3])


def record(problem: Problem, gradient: Gradient, settings: Settings) -> Tape:
    """All that a way back takes: nothing runs, and tensors may be on "meta"."""
    recorder = Recorder()
    run, room = Run(settings, recorder=recorder), STRIP_BYTES + WORKSPACE
    run.launch = run.record
    if gradient.memory_budget is not None:
        room = gradient.memory_budget
        run.limit = min(WORKSPACE, room)
    there, asked, inputs = gradient_without_memory(problem, gradient, recorder)
    into = backward(there, asked, run, room)
    return recorder.tape(inputs, into, run.workspace, run.scores)


def dry_run(problem: Problem, gradient: Gradient, settings: Settings) -> tuple[list[Launch], int]:
    """(launches, workspace in bytes) of a way back."""
    tape = record(problem, gradient, settings)
    return tape.launches, tape.workspace


def backward(problem: Problem, gradient: Gradient, run: Run, room: int) -> dict[str, Tensor]:
    """Every gradient that is wanted; see `reference_backward.backward` for what each one is."""
    into = empty_gradients(problem, gradient)
    for out in into.values():
        if run.recorder is not None:
            run.recorder.make(out)
        run.compute(torch.zero_, out)
    made: list[Tensor] = []
    problem = with_lse(problem, None, run, made, needed=True)
    gradient = _contiguous(gradient, run)
    partner, mass = gradient.partner, None
    if partner is not None:
        partner = with_lse(partner, None, run, made, needed=True)
        mass = line_mass(partner, run, made)
        partner = partner._replace(normalize="block")
    of = _Pass(problem, gradient, partner, mass, into, run, max(1, room - run.held))
    for maps, rows in of.strips():
        _strip(of, maps, rows)
    return into


def _contiguous(gradient: Gradient, run: Run) -> Gradient:
    """The terms as kernels read them. Copies are counted, until the end."""
    copies = {}
    for name, tensor in gradient.tensors().items():
        if not tensor.is_contiguous():
            copies[name] = run.contiguous(tensor)
            run.hold(tensor.numel() * tensor.element_size())
    return replace(gradient, **copies)


def _strip(of: _Pass, maps: slice, rows: slice) -> None:
    """What some queries of some maps add to each gradient."""
    run, p = of.run, of.problem.some_maps(maps).query_rows(rows.start, rows.stop)
    assert p.lse is not None
    lse = run.empty(*p.lse.shape, like=p.query)
    run.compute(Tensor.copy_, lse, p.lse)
    p = p._replace(lse=lse)
    g = _slope(of, p, maps, rows)
    inner = run.empty(*lse.shape, like=lse)
    slope = run.empty(*lse.shape, like=lse)
    arguments = _map_arguments(p, run) | {"g": g, "slope": slope}
    at = {"strip": p.num_queries, "first": rows.start, "num_queries": of.problem.num_queries}
    blocks = -(-p.num_queries // arguments["R"])
    tiling, kind = _tiling(p, run), "gradient"
    d_lse, out_lse = of.gradient.lse, of.into.get("lse")
    more = {
        "inner": inner if "head_weights" in of.into else None,
        "d_lse": None if d_lse is None else d_lse[maps],
        "out_lse": None if out_lse is None else out_lse[maps],
    }
    programs = p.batch * p.heads * blocks
    run.launch(Launch(inner_kernel, programs, arguments | at | more, tiling, kind, scores=p.scores))
    if "head_weights" in of.into:
        run.compute(lambda into, part: into.add_(part.sum((0, 2))), of.into["head_weights"], inner)
    parts, products = _products(p, run)
    if "query" in of.into:
        out = of.into["query"] if p.pairs is not None else of.into["query"][maps]
        more = {"out": out, "parts": parts, **products}
        made = arguments | at | more
        scores = p.scores * parts
        run.launch(Launch(query_kernel, programs * parts, made, tiling, kind, scores=scores))
    if of.needs_keys:
        used = of.bytes(p.batch, p.num_queries)
        _keys(of, p, arguments, maps, parts, products, of.room - used)
    run.release(lse, g, inner, slope)


def _map_arguments(p: Problem, run: Run) -> dict[str, Any]:
    """What the kernels that multiply take of a strip of a map."""
    tiling, unit = _tiling(p, run), stride_unit(p.query, p.key)
    arguments: dict[str, Any] = {"query": p.query, "key": p.key, "UNIT": unit}
    arguments |= strides("query", p.query, unit) | strides("key", p.key, unit)
    return arguments | {
        "bias": p.bias,
        "pairs": p.pairs,
        "weights": p.head_weights,
        "lse": p.lse,
        "heads": p.heads,
        "num_keys": p.num_keys,
        "scale": p.scale * LOG2_E,
        "WIDE": wide(tiling, p),
        **tile_constants(tiling, p.query, p.num_queries, p.num_keys, run),
    }


def _products(p: Problem, run: Run) -> tuple[int, dict[str, Any]]:
    """How many programs share the numbers of a head, and how dS is multiplied."""
    dim, dtype = p.query.shape[3], p.query.dtype
    width = min(64 if dtype == torch.float32 else 128, max(16, power_of_two(dim)))
    return -(-dim // width), {
        "X": width,
        "out_scale": p.scale,
        "OPERAND_PRECISION": run.settings.operand_precision(dtype),
    }


def _keys(
    of: _Pass, p: Problem, arguments: dict[str, Any], maps: slice, parts: int,
    products: dict[str, Any], room: int,
) -> None:  # fmt: skip
    """dK and the gradient of the bias. Where keys are few, queries are split among programs."""
    run, tiling = of.run, _tiling(p, of.run)
    dim, whole = p.query.shape[3], p.batch * p.heads * p.num_keys
    programs = p.batch * p.heads * -(-p.num_keys // tiling.rows) * parts
    each = 4 * whole * ((dim if "key" in of.into else 0) + ("bias" in of.into))
    tiles = -(-p.num_queries // tiling.columns)
    splits = min(run.settings.programs // programs, tiles, max(0, room) // each - 2)
    splits = max(1, splits)
    splits = -(-tiles // -(-tiles // splits))  # no empty ones
    out = bias = None
    if "key" in of.into:
        out = of.into["key"] if p.pairs is not None else of.into["key"][maps]
        if splits > 1:
            out = run.empty(splits, p.batch, p.heads, p.num_keys, dim, like=p.lse)
    if "bias" in of.into:
        bias = run.empty(splits, p.batch, p.heads, p.num_keys, like=p.lse)
    # Queries are streamed here, keys kept.
    constants = tile_constants(tiling, p.query, p.num_keys, p.num_queries, run)
    made = arguments | products | constants
    made |= {
        "out": out, "out_bias": bias, "maps": p.batch, "strip": p.num_queries, "parts": parts,
        "splits": splits, "SPLIT": splits > 1,
    }  # fmt: skip
    scores = p.scores * parts
    run.launch(Launch(key_kernel, programs * splits, made, tiling, "gradient", scores=scores))
    if out is not None and splits > 1:
        run.hold(4 * out[0].numel())
        _add(of.into["key"], out, (0,), p, maps, run)
        run.hold(-4 * out[0].numel())
        run.release(out)
    if bias is not None:
        run.hold(4 * bias[0, :, 0].numel())
        _add(of.into["bias"], bias, (0, 2), p, maps, run)
        run.hold(-4 * bias[0, :, 0].numel())
        run.release(bias)


def _add(
    into: Tensor, parts: Tensor, over: tuple[int, ...], p: Problem, maps: slice, run: Run
) -> None:
    """Of a strip's keys: sums of ``parts`` ``over`` some dimensions, [maps, ...]."""
    if p.pairs is None:
        run.compute(lambda into, parts: into.add_(parts.sum(over)), into[maps], parts)
    else:
        run.compute(
            lambda into, parts, keys: into.index_add_(0, keys, parts.sum(over)),
            into, parts, p.pairs[:, 1],
        )  # fmt: skip


def _slope(of: _Pass, p: Problem, maps: slice, rows: slice) -> Tensor:
    """dL / d sum_h w_h P_h on a strip: [maps, strip, M]."""
    run, shape = of.run, (p.batch, p.num_queries, p.num_keys)
    g, made, printed, mass = run.empty(*shape, like=p.query), [], None, None
    made_lines: list[Tensor] = []
    if of.needs_map:
        mass = line_mass(p, run, made_lines)
        launch_reduce(View(p, mass), {"dense": g}, "dense", run)
    if mass is not None:
        printed = run.empty(*shape, like=p.query)
        run.compute(Tensor.copy_, printed, g)
        made.append(printed)
    back, partner = None, of.partner
    if partner is not None:
        partner = partner.some_maps(maps)
        back = run.empty(*shape, like=p.query)
        bias = None if partner.bias is None else run.contiguous(partner.bias[:, rows])
        run.hold(0 if bias is None else 4 * bias.numel())
        some = partner._replace(key=partner.key[:, :, rows], bias=bias)
        launch_reduce(View(some, None, keys_kept=True), {"dense": back}, "dense", run)
        run.hold(0 if bias is None else -4 * bias.numel())
        made.append(back)
    _launch_slope(of, g, back, maps, rows)
    if mass is not None:
        _launch_lines(p, g, printed, mass, run)
    run.release(*made, *made_lines)
    return g


def _launch_slope(of: _Pass, g: Tensor, back: Tensor | None, maps: slice, rows: slice) -> None:
    t, run = of.gradient, of.run
    given = {name: getattr(t, name) for name in _TERMS}
    arguments: dict[str, Any] = {
        name: x if x is None or name == "cells" else x[maps] for name, x in given.items()
    }
    sizes = {"columns": t.left, "entries": t.row_index, "num_cells": t.pooled}
    arguments |= {name: 0 if x is None else x.shape[2] for name, x in sizes.items()}
    partner = of.partner
    normalize = "" if t.partner is None or of.back_mass is None else t.partner.normalize
    arguments |= {
        "g": g,
        "back": back,
        "back_mass": None if of.back_mass is None else of.back_mass[maps],
        "back_grid_width": 1 if partner is None else max(1, partner.grid_width),
        "back_lines": 1 if t.partner is None else t.partner.lines,
        "BACK_LINES": normalize,
        "strip": g.shape[1],
        "first": rows.start,
        "num_queries": of.problem.num_queries,
        "num_keys": of.problem.num_keys,
        "R": _SLOPE.rows,
        "C": _SLOPE.columns,
        "X": 16 if t.left is None else min(32, max(16, power_of_two(t.left.shape[2]))),
        "FAST_LOG": run.settings.fast_log,
        "PRECISION": run.settings.operand_precision(of.problem.query.dtype),
    }
    tiles = -(-g.shape[1] // _SLOPE.rows) * -(-g.shape[2] // _SLOPE.columns)
    run.launch(Launch(slope_kernel, g.shape[0] * tiles, arguments, _SLOPE))


def _launch_lines(p: Problem, g: Tensor, printed: Tensor | None, mass: Tensor, run: Run) -> None:
    rows = p.batch * p.num_queries
    arguments = {
        "g": g,
        "printed": printed,
        "mass": mass,
        "rows": rows,
        "num_keys": p.num_keys,
        "grid_width": p.grid_width,
        "lines": p.lines,
        "length": p.num_keys // p.lines,
        "LINES": p.normalize,
        "R": _LINES.rows,
        "C": _LINES.columns,
    }
    programs = -(-rows // _LINES.rows) * -(-p.lines // _LINES.columns)
    run.launch(Launch(lines_kernel, programs, arguments, _LINES))
