"""Which kernels of backend "cuda" a request takes: its passes over the map, one after the other."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashmaps.maps.backends.cuda_call import Call, Operand, is_aligned, pitch
from flashmaps.maps.gpu import (
    COLUMN_STATISTICS,
    FINISHED,
    LOG2_E,
    PARTS,
    ROW_STATISTICS,
    part_bytes,
    part_dtype,
    part_shape,
)
from flashmaps.maps.problem import Problem, Request, empty_outputs

OPERAND_WIDTH = 32  # columns of an operand that a block takes at once; kOperandWidth in C++
_CELL_COLUMNS = 32  # cells that are summed at once

_ROWS = (*ROW_STATISTICS, "dense")
_FINISHED = FINISHED | {"dense": "dense"}
# These have one place each in the map, and so come from one split.
_WHOLE = ("diagonal", "dense")


def _mark(start: int, ones: Tensor, cells: Tensor) -> None:
    """ones[0, j, c] = 1 where key j is in cell start + c, else 0."""
    cell = torch.arange(start, start + ones.shape[2], device=cells.device)
    ones.copy_(cells[:, None] == cell)


class Run(Call):
    """A call with the passes that it is made of."""

    def reduce(self, problem: Problem, request: Request) -> dict[str, Tensor]:
        """All passes; the outputs that they fill."""
        made = empty_outputs(problem, request)
        for out in made.values():
            self.recorder.make(out)
        problem = self.ready(problem)
        partner = request.partner if "return_probability" in made else None
        if partner is not None:
            partner = self.ready(partner)
        right = None if request.right is None else self.operand(request.right)
        left = None if request.left is None else self.operand(request.left)
        each = problem.heads * pitch(problem.num_queries) * 4
        if partner is not None:
            each += partner.heads * pitch(partner.num_queries) * 4
        step = max(1, min(problem.batch, self.fits(each)))
        for start in range(0, problem.batch, step):
            some = slice(start, min(start + step, problem.batch))
            self.reduce_maps(
                problem.some_maps(some),
                replace(
                    request,
                    partner=None if partner is None else partner.some_maps(some),
                    right=None,
                    left=None,
                ),
                None if right is None else right._replace(tensor=right.tensor[some]),
                None if left is None else left._replace(tensor=left.tensor[some]),
                {name: out[some] for name, out in made.items()},
            )
        return made

    def ready(self, problem: Problem) -> Problem:
        """Tokens aligned, weights and pairs contiguous, the bias in log2 units and pitched."""
        bias, weights, pairs = problem.bias, problem.head_weights, problem.pairs
        if weights is not None and not weights.is_contiguous():
            weights = self.copy(weights)
        if pairs is not None and not pairs.is_contiguous():
            pairs = self.copy(pairs)
        if bias is not None:
            before = self.held
            bias = self.prepare(bias, LOG2_E)
            self._copied += self.held - before
        return problem._replace(
            query=self.aligned(problem.query),
            key=self.aligned(problem.key),
            bias=bias,
            head_weights=weights,
            pairs=pairs,
        )

    def reduce_maps(
        self,
        problem: Problem,
        request: Request,
        right: Operand | None,
        left: Operand | None,
        outputs: dict[str, Tensor],
    ) -> None:
        if set(outputs) == {"lse"}:
            self.log_sum_exp(problem, outputs["lse"], None)
            return
        shift = self.shift(problem, outputs.get("lse"))
        rows = {name: outputs[name] for name in _ROWS if name in outputs}
        if rows:
            self.statistics(problem, shift, rows)
        columns = {name: outputs[name] for name in COLUMN_STATISTICS if name in outputs}
        if columns:
            self.statistics(problem, shift, columns, keys_kept=True)
        if "product" in outputs:
            assert right is not None
            self.product(problem, shift, right, outputs["product"])
        if "transposed_product" in outputs:
            assert left is not None
            self.product(problem, shift, left, outputs["transposed_product"], keys_kept=True)
        if "pooled_keys" in outputs:
            self.pooled(problem, shift, request, outputs["pooled_keys"])
        if "return_probability" in outputs:
            assert request.partner is not None
            self.return_probability(problem, shift, request.partner, outputs["return_probability"])
        self.release(shift)

    def shift(self, problem: Problem, lse_out: Tensor | None) -> Tensor:
        """Minus the log-sum-exp in log2 units, [P, H, pitch]; and the log-sum-exp if asked for."""
        if problem.lse is None:
            shift = self.empty(problem.batch, problem.heads, pitch(problem.num_queries))
            self.log_sum_exp(problem, lse_out, shift)
            return shift
        if lse_out is not None:
            self.log_sum_exp(problem, lse_out, None)
        return self.prepare(problem.lse, -LOG2_E)

    def log_sum_exp(self, problem: Problem, lse: Tensor | None, shift: Tensor | None) -> None:
        arguments = self.native.LogSumExp()
        arguments.map = self.map(problem, shift)
        count = problem.batch * problem.heads * problem.num_queries
        splits = self.arrange("lse", arguments, 4 * count, programs=problem.heads)
        parts = None
        if splits > 1:
            parts = self.empty(splits, count)
            arguments.parts = self.address(parts)
        else:
            arguments.lse = 0 if lse is None else self.address(lse)
            arguments.shift = 0 if shift is None else self.address(shift)
        of = arguments.map
        of.shift = 0  # a term of scores elsewhere, an output here
        self.launch_pass("lse", arguments, problem)
        if parts is not None:
            together = self.native.CombineLse()
            together.parts, together.splits = self.address(parts), splits
            together.rows = problem.batch * problem.heads
            together.count, together.pitch = problem.num_queries, pitch(problem.num_queries)
            together.lse = 0 if lse is None else self.address(lse)
            together.shift = 0 if shift is None else self.address(shift)
            self.launch(self.native.combine_lse, together)
            self.release(parts)

    def statistics(
        self,
        problem: Problem,
        shift: Tensor,
        fields: dict[str, Tensor],
        *,
        keys_kept: bool = False,
    ) -> None:
        """The statistics of one side in one launch (and one that combines splits)."""
        arguments = self.native.Statistics()
        arguments.map = self.map(problem, shift, keys_kept=keys_kept)
        arguments.grid_width = max(1, problem.grid_width)
        arguments.grid_height = max(1, problem.grid_height)
        finished = {_FINISHED[name]: out for name, out in fields.items()}
        wanted = {part for name in fields if name not in _WHOLE for part in PARTS[name]}
        count = problem.batch * (problem.num_keys if keys_kept else problem.num_queries)
        each = count * part_bytes(wanted)
        splits = self.arrange("statistics", arguments, each)
        parts: dict[str, Tensor] = {}
        if splits > 1:
            for part in sorted(wanted):
                shape = (splits, count, *part_shape(part))
                parts[part] = self.empty(*shape, dtype=part_dtype(part))
            whole = {name: out for name, out in finished.items() if name in _WHOLE}
            arguments.out = self.outputs({**parts, **whole})
        else:
            arguments.out = self.outputs(finished)
        self.launch_pass("statistics", arguments, problem)
        if parts:
            together = self.native.Combine()
            together.parts, together.out = self.outputs(parts), self.outputs(finished)
            together.count, together.splits = count, splits
            together.of_columns = keys_kept
            self.launch(self.native.combine, together)
            self.release(*parts.values())

    def outputs(self, tensors: dict[str, Tensor]) -> Any:
        out = self.native.StatisticsOutputs()
        for name, tensor in tensors.items():
            setattr(out, name, self.address(tensor))
        return out

    def product(
        self,
        problem: Problem,
        shift: Tensor,
        operand: Operand,
        out: Tensor,
        *,
        keys_kept: bool = False,
        split: bool = True,
    ) -> None:
        """``out[..., :columns]`` of rows ``out.stride(1)`` apart."""
        arguments = self.native.Product()
        arguments.map = self.map(problem, shift, keys_kept=keys_kept)
        columns = operand.columns
        width = min(OPERAND_WIDTH, -(-columns // 8) * 8)
        programs = -(-columns // width)
        arguments.operand = self.address(operand.tensor)
        arguments.operand_stride, arguments.operand_pitch = operand.stride, operand.pitch
        arguments.columns, arguments.width = columns, width
        arguments.aligned = (
            operand.pitch % 4 == 0 and operand.stride % 4 == 0 and is_aligned(operand.tensor)
        )
        kept = problem.num_keys if keys_kept else problem.num_queries
        each = 4 * problem.batch * kept * columns
        splits = self.arrange("product", arguments, each, programs)
        if not split:
            arguments.splits = splits = 1
        parts = None
        if splits > 1:
            parts = self.empty(splits, problem.batch, kept, columns)
        target = out if parts is None else parts
        arguments.out, arguments.out_pitch = self.address(target), target.stride(-2)
        self.launch_pass("product", arguments, problem, programs)
        self.add_up(parts, out)

    def add_up(self, parts: Tensor | None, out: Tensor) -> None:
        """Parts of splits, in their order."""
        if parts is None:
            return
        self.recorder.compute(lambda parts, out: torch.sum(parts, 0, out=out), parts, out)
        self.release(parts)

    def pooled(self, problem: Problem, shift: Tensor, request: Request, out: Tensor) -> None:
        """Sums over the keys of each cell: a product with ones where a key is in a cell."""
        assert request.cells is not None
        for start in range(0, request.num_cells, _CELL_COLUMNS):
            columns = min(_CELL_COLUMNS, request.num_cells - start)
            ones = self.empty(1, problem.num_keys, columns)
            self.hold(problem.num_keys * columns + 8 * columns)  # comparing makes bools
            self.recorder.compute(functools.partial(_mark, start), ones, request.cells)
            self.hold(-problem.num_keys * columns - 8 * columns)
            operand = Operand(ones, 0, columns)
            self.product(problem, shift, operand, out[..., start:], split=False)
            self.release(ones)

    def return_probability(
        self, problem: Problem, shift: Tensor, partner: Problem, out: Tensor
    ) -> None:
        back_shift = self.shift(partner, None)
        arguments = self.native.Return()
        arguments.map = self.map(problem, shift)
        arguments.back = self.map(partner, back_shift, keys_kept=True)
        splits = self.arrange("round_trip", arguments, 4 * out.numel())
        parts = self.empty(splits, *out.shape) if splits > 1 else None
        arguments.out = self.address(out if parts is None else parts)
        self.scores += partner.scores
        self.launch_pass("round_trip", arguments, problem)
        self.add_up(parts, out)
        self.release(back_shift)
