"""From a `Problem` and a `Request` to launches of the kernels: which passes, one after the other.

Nothing here waits for the GPU or reads a value from it, so that calls can be captured in a CUDA
graph; and everything works on tensors without memory (device "meta"), which is how kernels are
compiled ahead of time and how `dry_run` says what a request takes.
"""

from __future__ import annotations

from dataclasses import replace

from flashmaps.kernels.launch_lse import launch_lse, with_lse
from flashmaps.kernels.launch_reduce import (
    launch_pooled,
    launch_reduce,
    launch_statistics,
    line_mass,
)
from flashmaps.kernels.launch_return import launch_return
from flashmaps.kernels.launch_topk import launch_topk
from flashmaps.kernels.run import Launch, Run, run_for
from flashmaps.kernels.settings import Settings
from flashmaps.kernels.views import View, normalized_lines
from flashmaps.maps.gpu import COLUMN_STATISTICS, ROW_STATISTICS
from flashmaps.maps.problem import Problem, Request
from flashmaps.maps.tape import Recorder, Tape, without_memory
from torch import Tensor

_PRODUCTS = ("product", "transposed_product", "pooled_keys", "return_probability")


def record(problem: Problem, request: Request, settings: Settings) -> Tape:
    """All that a request takes: nothing runs, and tensors may be on "meta"."""
    recorder = Recorder()
    run = run_for(request, settings, recorder)
    there, asked, inputs = without_memory(problem, request, recorder)
    outputs = reduce(there, asked, run)
    return recorder.tape(inputs, outputs, run.workspace, run.scores)


def dry_run(problem: Problem, request: Request, settings: Settings) -> tuple[list[Launch], int]:
    """(launches, workspace in bytes) of a request."""
    tape = record(problem, request, settings)
    return tape.launches, tape.workspace


def reduce(problem: Problem, request: Request, run: Run) -> dict[str, Tensor]:
    """Every field of ``request.names``; see `reference.reduce` for what each one is."""
    outputs = run.outputs(problem, request)
    per_map = problem.num_queries * 4 * (problem.heads + normalized_lines(problem))
    if request.partner is not None:
        partner = request.partner
        per_map += partner.num_queries * 4 * (partner.heads + normalized_lines(partner))
    step = max(1, run.limit // per_map)
    for start in range(0, problem.batch, step):
        some = slice(start, min(start + step, problem.batch))
        whole = some == slice(0, problem.batch)
        _reduce_maps(
            problem if whole else problem.some_maps(some),
            request if whole else _some_of_request(request, some),
            {name: out[some] for name, out in outputs.items()},
            run,
        )
    return outputs


def _some_of_request(request: Request, some: slice) -> Request:
    return replace(
        request,
        right=None if request.right is None else request.right[some],
        left=None if request.left is None else request.left[some],
        partner=None if request.partner is None else request.partner.some_maps(some),
    )


def _reduce_maps(problem: Problem, request: Request, outputs: dict[str, Tensor], run: Run) -> None:
    if "lse" in outputs:
        launch_lse(problem, outputs["lse"], run)
    if set(outputs) <= {"lse"}:
        return
    made: list[Tensor] = []
    # A product's left side is the tile, in parts: beside a whole row of it there is no room.
    needed = problem.normalize != "block" or any(name in outputs for name in _PRODUCTS)
    problem = with_lse(problem, outputs.get("lse"), run, made, needed=needed)
    mass = line_mass(problem, run, made)
    view = View(problem, mass)

    rows = {name: outputs[name] for name in ROW_STATISTICS if name in outputs}
    if rows or "product" in outputs:
        launch_statistics(view, rows, request.right, outputs.get("product"), run)
    columns = {name: outputs[name] for name in COLUMN_STATISTICS if name in outputs}
    if columns or "transposed_product" in outputs:
        flipped = View(problem, mass, keys_kept=True)
        launch_statistics(flipped, columns, request.left, outputs.get("transposed_product"), run)
    if "dense" in outputs:
        launch_reduce(view, {"dense": outputs["dense"]}, "dense", run)
    if "pooled_keys" in outputs:
        launch_pooled(view, request.cells, request.num_cells, outputs["pooled_keys"], run)
    if "topk_values" in outputs or "topk_indices" in outputs:
        launch_topk(view, request.k, outputs, run)
    if "return_probability" in outputs:
        assert request.partner is not None
        launch_return(problem, mass, request.partner, outputs["return_probability"], run)
    run.release(*made)
