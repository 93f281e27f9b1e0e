"""The k largest of each row, in slots of registers or by sorting rows."""

from __future__ import annotations

import math

import torch
from flashmaps.kernels.launch_reduce import count_blocks, launch_reduce
from flashmaps.kernels.run import Run, count_splits
from flashmaps.kernels.views import View
from torch import Tensor

# What sorting numbers beside their int64 places takes: the results, and as much again meanwhile.
_SORTED_BYTES = 2 * (4 + 8)

# Top-k up to here keeps its slots in registers; above, rows are written and sorted.
SLOTS = 64


def launch_topk(view: View, k: int, outputs: dict[str, Tensor], run: Run) -> None:
    """Into what there is of the outputs "topk_values" and "topk_indices", [P, N, k]."""
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
    programs, tiles = count_blocks(view, "topk", run)
    splits = count_splits(run, programs, tiles, math.prod(shape) * 12)
    if splits == 1:
        found = {"largest": values, "where_largest": indices}
        launch_reduce(view, found, "topk", run, splits=1, k=k)
    else:
        largest = run.empty(splits, *shape, like=view.kept)
        where = run.empty(splits, *shape, dtype=torch.int64, like=view.kept)
        found = {"largest": largest, "where_largest": where}
        launch_reduce(view, found, "topk", run, splits=splits, k=k)
        # Splits are in the keys' order and a stable sort keeps it, so ties go to the lowest index.
        # A split of fewer than k keys fills its places with -1: none is among the k largest.
        run.hold(_SORTED_BYTES * largest.numel())

        def put_together(largest: Tensor, where: Tensor, values: Tensor, indices: Tensor) -> None:
            every = largest.movedim(0, 2).flatten(2).sort(dim=2, descending=True, stable=True)
            values.copy_(every.values[..., :k])
            indices.copy_(where.movedim(0, 2).flatten(2).gather(2, every.indices[..., :k]))

        run.compute(put_together, largest, where, values, indices)
        run.hold(-_SORTED_BYTES * largest.numel())
        run.release(largest, where)
    run.release(*made)


def _topk_by_sorting(view: View, k: int, values: Tensor, indices: Tensor, run: Run) -> None:
    """Rows of the map, a few at a time, sorted by torch."""
    problem = view.problem

    def put_largest(dense: Tensor, values: Tensor, indices: Tensor) -> None:
        found = dense.sort(dim=2, descending=True, stable=True)
        values.copy_(found.values[..., :k])
        indices.copy_(found.indices[..., :k])

    for one in range(problem.batch):
        single = problem.some_maps(slice(one, one + 1))
        mass = None if view.mass is None else view.mass[one : one + 1]
        step = max(1, run.roomy // ((4 + _SORTED_BYTES) * view.num_streamed))
        for start in range(0, view.num_kept, step):
            rows = slice(start, min(start + step, view.num_kept))
            part = single.query_rows(rows.start, rows.stop)
            if part.lse is not None:
                part = part._replace(lse=run.contiguous(part.lse))
            of_rows = View(part, None if mass is None else run.contiguous(mass[:, rows]))
            dense = run.empty(1, rows.stop - rows.start, view.num_streamed, like=view.kept)
            launch_reduce(of_rows, {"dense": dense}, "dense", run)
            run.hold(_SORTED_BYTES * dense.numel())
            place = (slice(one, one + 1), rows)
            run.compute(put_largest, dense, values[place], indices[place])
            run.hold(-_SORTED_BYTES * dense.numel())
            run.release(dense)
