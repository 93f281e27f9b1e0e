"""The log-sum-exp of every head: pass one of two."""

from __future__ import annotations

from flashmaps.kernels.kernel_lse import add_lse_kernel, lse_kernel
from flashmaps.kernels.run import COMBINED, COMBINING, Launch, Run, count_splits
from flashmaps.kernels.settings import Settings, Tiling
from flashmaps.kernels.views import is_rare, stride_unit, strides, tile_constants, wide
from flashmaps.maps.gpu import LOG2_E
from flashmaps.maps.problem import Problem
from torch import Tensor


def with_lse(
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
        launch_lse(problem, lse, run)
    return problem._replace(lse=run.contiguous(lse))


def tiling_of(problem: Problem, kind: str, settings: Settings) -> Tiling:
    """The tiles of a log-sum-exp.

    Anchored ones are for what a card has timed: no mask, whole tiles, heads of a power of two.
    """
    dim = problem.query.shape[3]
    found = settings.tiling(kind, problem.query.dtype, dim)
    even = problem.num_queries % found.rows == 0 and problem.num_keys % found.columns == 0
    if found.anchored and not (even and problem.bias is None and dim in (64, 128, 256)):
        return found._replace(anchored=0, registers=0)
    return found


def launch_lse(problem: Problem, out: Tensor, run: Run) -> None:
    """Into ``out``, [P, H, N], in one launch (and one that combines splits)."""
    query, key = problem.query, problem.key
    kind = "rare" if is_rare(problem) else "lse"
    tiling = tiling_of(problem, kind, run.settings)
    blocks = -(-problem.num_queries // tiling.rows)
    programs = problem.batch * problem.heads * blocks
    count = out.numel()
    splits = count_splits(run, programs, -(-problem.num_keys // tiling.columns), 4 * count)
    target = out if splits == 1 else run.empty(splits, count, like=query)
    unit = stride_unit(query, key)
    constants = tile_constants(tiling, query, problem.num_queries, problem.num_keys, run)
    run.launch(
        Launch(
            lse_kernel,
            programs * splits,
            {
                "query": query,
                "key": key,
                **strides("query", query, unit),
                **strides("key", key, unit),
                "UNIT": unit,
                "bias": problem.bias,
                "pairs": problem.pairs,
                "out": target,
                "maps": problem.batch,
                "heads": problem.heads,
                "num_queries": problem.num_queries,
                "num_keys": problem.num_keys,
                "splits": splits,
                "scale": problem.scale * LOG2_E,
                "WIDE": wide(tiling, problem),
                "ANCHORED": run.settings.anchored or bool(tiling.anchored),
                "AHEAD": run.settings.ahead,
                **constants,
            },
            tiling,
            kind,
            scores=problem.scores,
        )
    )
    if splits > 1:
        arguments = {"partial": target, "out": out, "count": count, "splits": splits}
        run.launch(
            Launch(
                add_lse_kernel,
                -(-count // COMBINED),
                {**arguments, "BLOCK": COMBINED},
                COMBINING,
            )
        )
        run.release(target)
