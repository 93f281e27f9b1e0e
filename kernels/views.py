"""A map as the kernels see it: from which side, in which tiles, by which strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from flashmaps.kernels.run import Run
from flashmaps.kernels.settings import Settings, Tiling
from flashmaps.maps.gpu import LOG2_E
from flashmaps.maps.problem import Problem
from torch import Tensor


@dataclass(frozen=True)
class View:
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
        if self.mass is not None or is_rare(self.problem):
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
        keys = max(16, power_of_two(self.problem.num_keys))
        rows, columns = (keys, found.rows) if self.keys_kept else (found.rows, keys)
        return found._replace(rows=rows, columns=columns)


def power_of_two(number: int) -> int:
    """The smallest one that is enough."""
    return 1 << max(0, number - 1).bit_length()


def head_parts(dim: int, *, one: bool = False) -> tuple[int, int]:
    """A head dimension as one power of two, or as two where that is smaller: 80 = 64 + 16.

    ``one``: as one in any case.
    """
    whole = max(16, power_of_two(dim))
    if one:
        return whole, 0
    first = whole // 2
    rest = max(16, power_of_two(dim - first)) if first >= 16 and dim > first else whole
    return (first, rest) if first + rest < whole else (whole, 0)


def stride_unit(*tensors: Tensor) -> int:
    """8 where all strides of Q and K are multiples of that, so that 16 bytes load at once; else 1.

    Of its arguments triton notes whether they are multiples of 16, which 40 and 72 are not.
    """
    strides = [s for tensor in tensors for s in tensor.stride()[:3]]
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def strides(name: str, tokens: Tensor, unit: int) -> dict[str, int]:
    """Of Q or K, as the kernels' arguments for it."""
    batch, head, token, dim = tokens.stride()
    return {
        f"{name}_maps": tokens.shape[0],
        f"{name}_batch": batch // unit,
        f"{name}_head": head // unit,
        f"{name}_token": token // unit,
        f"{name}_dim": dim,
    }


def is_rare(problem: Problem) -> bool:
    """Whether reading Q and K takes many registers: see `settings.KINDS`."""
    return any(
        tensor.stride(3) != 1 or tensor.stride(2) >= 2**23
        for tensor in (problem.query, problem.key)
        if tensor.shape[3] > 1
    )


def wide(tiling: Tiling, problem: Problem, operand: Tensor | None = None) -> bool:
    """Whether offsets within a tile, or into the lines of a map, need 64 bits."""
    tokens = max(tiling.rows, tiling.columns)
    furthest = max(
        tokens * tensor.stride(2) + tensor.shape[3] * tensor.stride(3)
        for tensor in (problem.query, problem.key)
    )
    furthest = max(
        furthest, tokens * problem.num_keys, problem.num_queries * normalized_lines(problem)
    )
    if operand is not None:
        furthest = max(furthest, tokens * operand.stride(1) + operand.shape[2] * operand.stride(2))
    return furthest >= 2**31


def normalized_lines(problem: Problem) -> int:
    """How many lines of a row are divided by their masses."""
    return 0 if problem.normalize == "block" else problem.lines


def map_arguments(view: View) -> dict[str, Any]:
    """What `reduce_kernel` takes of a map."""
    problem = view.problem
    unit = stride_unit(problem.query, problem.key)
    arguments: dict[str, Any] = {"kept": view.kept, "streamed": view.streamed, "UNIT": unit}
    arguments |= strides("kept", view.kept, unit) | strides("streamed", view.streamed, unit)
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
        "scale": problem.scale * LOG2_E,
        "LINES": "" if view.mass is None else problem.normalize,
    }


def one_part(tokens: Tensor, run: Run) -> bool:
    """Whether a head has to be multiplied in one product: see `Settings.one_product`.

    Products of float32 are none of the matrix unit's then.
    """
    return run.settings.one_product and tokens.dtype != torch.float32


def tile_constants(
    tiling: Tiling, tokens: Tensor, kept: int, streamed: int, run: Run
) -> dict[str, Any]:
    """What every kernel is compiled for: its tile, and how a head is multiplied."""
    width, rest = head_parts(tokens.shape[3], one=one_part(tokens, run))
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
