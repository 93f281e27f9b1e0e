"""Compositions R = A A': how they are cut, and their launches.

Rows of A and columns of A' are made in memory, as large as the budget allows; their product is a
tile of R, which goes to the reducers and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from flashmaps.kernels.kernel_reduce import reduce_kernel
from flashmaps.kernels.launch_lse import with_lse
from flashmaps.kernels.launch_reduce import OPTIONAL, empty_parts, launch_combine, launch_reduce
from flashmaps.kernels.run import Launch, Run, count_splits, run_to_compose
from flashmaps.kernels.settings import Settings, Tiling
from flashmaps.kernels.views import View
from flashmaps.maps.gpu import PARTS, ROW_STATISTICS, on_meta, part_bytes
from flashmaps.maps.problem import Problem, Request
from flashmaps.maps.tape import Recorder, Tape, without_memory
from torch import Tensor

# Bytes of the numbers between A and A' that are multiplied at once.
_INNER_BYTES = 128


@dataclass(frozen=True)
class Strips:
    """How a composition is cut: rows of A and columns of A' that are in memory at a time."""

    rows: int
    columns: int
    splits: int  # programs that share the columns of a block
    blocks: int
    workspace: int  # bytes

    @classmethod
    def of(cls, first: Problem, second: Problem, names: tuple[str, ...], run: Run) -> Strips:
        """The fewest strips of rows whose blocks of columns keep a card busy within the budget.

        A is computed once and A' once for each strip. What does not fit is cut to one row and one
        column, which is the least there is.
        """
        rows, inner, ends = first.num_queries, first.num_keys, second.num_keys
        tiling = _composed_tiling(run)
        parts = {part for name in names for part in PARTS[name]}
        each = part_bytes(parts)
        # Copies of what is sliced: a strip's log-sum-exp, a block's bias.
        size = strip_dtype(run).itemsize
        bias = 0 if second.bias is None else 4 * second.bias.shape[0]

        def cut(strip: int, block: int) -> Strips:
            blocks, tiles = -(-ends // block), -(-block // tiling.columns)
            splits = count_splits(run, -(-strip // tiling.rows), tiles, 0)
            held = size * inner * (strip + block) + blocks * splits * strip * each
            return cls(strip, block, splits, blocks, held + 4 * first.heads * strip + bias * block)

        def fits(strip: int, block: int) -> bool:
            return cut(strip, block).workspace <= run.roomy

        for least in (8 * tiling.columns, tiling.columns, 16, 1):
            least = min(ends, least)
            strips = 1
            while True:
                strip = -(-rows // strips)
                if strip > tiling.rows:
                    strip = min(rows, -(-strip // tiling.rows) * tiling.rows)
                if fits(strip, least):
                    widths = [
                        ends,
                        *range(ends // tiling.columns * tiling.columns, least, -tiling.columns),
                    ]
                    block = next((width for width in widths if fits(strip, width)), least)
                    return cut(strip, block)
                if strip == 1:
                    break
                strips = min(rows, strips + max(1, strips // 4))
        return cut(1, 1)


def strip_dtype(run: Run) -> torch.dtype:
    """What strips are kept in: bfloat16 where their numbers are rounded to that anyway."""
    short = run.settings.composition_precision() == "bf16"
    return torch.bfloat16 if short else torch.float32


def _composed_tiling(run: Run) -> Tiling:
    return run.settings.tiling("composed", strip_dtype(run), 64)


def composes(first: Problem, second: Problem, names: tuple[str, ...]) -> bool:
    """Whether `compose` does this."""
    plain = first.normalize == "block" and second.normalize == "block"
    return plain and set(names) <= set(ROW_STATISTICS)


def strips_for(
    first: Problem, second: Problem, request: Request, settings: Settings
) -> tuple[Strips, int]:
    """How one map of a composition is cut, and the bytes that it takes in all."""
    run = run_to_compose(request, settings)
    run.launch = lambda launch: None
    one = slice(0, 1)
    first, second = (on_meta(each.some_maps(one)) for each in (first, second))
    made: list[Tensor] = []
    first, second = (with_lse(each, None, run, made, needed=True) for each in (first, second))
    run.roomy -= run.held
    strips = Strips.of(first, second, request.names, run)
    return strips, max(run.workspace, run.held + strips.workspace)


def record(first: Problem, second: Problem, request: Request, settings: Settings) -> Tape:
    """All that a composition takes; it is recorded as a request whose partner is the second map."""
    recorder = Recorder()
    run = run_to_compose(request, settings, recorder)
    one, asked, inputs = without_memory(first, replace(request, partner=second), recorder)
    assert asked.partner is not None
    outputs = compose(one, asked.partner, replace(asked, partner=None), run)
    return recorder.tape(inputs, outputs, run.workspace, run.scores)


def compose(first: Problem, second: Problem, request: Request, run: Run) -> dict[str, Tensor]:
    """Statistics of the rows of R, one map and one strip at a time."""
    outputs = run.outputs(first, request)
    room = run.roomy
    for index in range(first.batch):
        of_map = slice(index, index + 1)
        made: list[Tensor] = []
        one, other = (
            with_lse(each.some_maps(of_map), None, run, made, needed=True)
            for each in (first, second)
        )
        run.roomy = room - run.held
        _compose_map(one, other, {name: out[index] for name, out in outputs.items()}, run)
        run.release(*made)
    run.roomy = room
    return outputs


def _compose_map(first: Problem, second: Problem, outputs: dict[str, Tensor], run: Run) -> None:
    strips = Strips.of(first, second, tuple(outputs), run)
    rows, inner, ends = first.num_queries, first.num_keys, second.num_keys
    like = first.query
    strip, block = (
        run.empty(n * inner, dtype=strip_dtype(run), like=like)
        for n in (strips.rows, strips.columns)
    )
    names = sorted({part for name in outputs for part in PARTS[name]})
    parts = empty_parts(names, (strips.blocks * strips.splits, 1, strips.rows), like, run)
    for start in range(0, rows, strips.rows):
        stop = min(start + strips.rows, rows)
        of_strip = first.query_rows(start, stop)
        assert of_strip.lse is not None
        known = run.contiguous(of_strip.lse)
        copied = 0 if known is of_strip.lse else 4 * known.numel()
        run.hold(copied)
        a = strip[: (stop - start) * inner].view(1, stop - start, inner)
        launch_reduce(View(of_strip._replace(lse=known), None), {"dense": a}, "dense", run)
        left = 0
        for low in range(0, ends, strips.columns):
            high = min(low + strips.columns, ends)
            b = block[: inner * (high - low)].view(1, inner, high - low)
            if start == 0 or strips.blocks > 1:
                bias = None if second.bias is None else run.contiguous(second.bias[:, low:high])
                keys = second._replace(key=second.key[:, :, low:high], bias=bias)
                launch_reduce(View(keys, None), {"dense": b}, "dense", run)
            left += _launch_composed(a, b, (start, low), second, parts, left, strips.splits, run)
        run.hold(-copied)
        fields = {name: out[start:stop] for name, out in outputs.items()}
        launch_combine(parts, fields, stop - start, left, run)
    run.release(strip, block, *parts.values())


def _launch_composed(
    a: Tensor, b: Tensor, first: tuple[int, int], second: Problem, parts: dict[str, Tensor],
    left: int, most: int, run: Run,
) -> int:  # fmt: skip
    """The reducers on ``a @ b``, from split number ``left`` of the parts on; how many it takes."""
    tiling = _composed_tiling(run)
    rows, inner, columns = a.shape[1], a.shape[2], b.shape[2]
    tiles = -(-columns // tiling.columns)
    splits = min(most, tiles)
    splits = -(-tiles // -(-tiles // splits))
    between = _INNER_BYTES // a.element_size()
    whole = (rows % tiling.rows, columns % tiling.columns, inner % between)
    arguments: dict[str, Any] = dict.fromkeys(
        (*OPTIONAL, "bias", "pairs", "weights", "lse", "line_mass", "operand")
    )
    arguments |= dict.fromkeys(
        ("kept_maps", "streamed_maps", "kept_batch", "kept_head", "kept_dim", "streamed_batch",
         "streamed_head", "columns", "k", "operand_map", "operand_token", "operand_column"), 0,
    )  # fmt: skip
    arguments |= {
        "kept": a,
        "kept_token": inner,
        "num_kept": rows,
        "streamed": b,
        "streamed_token": 1,
        "streamed_dim": columns,
        "num_streamed": columns,
        "grid_width": max(1, second.grid_width),
        "grid_height": max(1, second.grid_height),
        "inner": inner,
        "kept_first": first[0],
        "streamed_first": first[1],
        # Parts of a shorter strip lie closer together.
        **{
            name: part.flatten()[left * part[0, 0, :rows].numel() :] for name, part in parts.items()
        },
        **dict.fromkeys(("lines", "maps", "heads", "parts"), 1),
        "splits": splits,
        "scale": 1.0,
        **dict.fromkeys(("KEYS_KEPT", "WHOLE", "WIDE", "FLATTEN"), False),
        "HEADS": 0,
        "AHEAD": False,
        **dict.fromkeys(("X", "D", "DIM", "CHUNK"), 16),
        "LINES": "",
        "K": 1,
        "D_REST": 0,
        "UNIT": 1,
        "PRECISION": "ieee",
        "COMPOSED": True,
        "INNER": between,
        "R": tiling.rows,
        "C": tiling.columns,
        "EVEN": not any(whole),
        "OPERAND_PRECISION": run.settings.composition_precision(),
        "FAST_LOG": run.settings.fast_log,
    }
    programs = -(-rows // tiling.rows) * splits
    run.launch(Launch(reduce_kernel, programs, arguments, tiling, "composed"))
    return splits
