"""The diagonal of A_st A_ts, from a tile of each map."""

from __future__ import annotations

from typing import Any

from flashmaps.kernels.kernel_return import return_kernel
from flashmaps.kernels.launch_lse import with_lse
from flashmaps.kernels.launch_reduce import line_mass
from flashmaps.kernels.run import Launch, Run, add_up, count_splits
from flashmaps.kernels.views import (
    head_parts,
    is_rare,
    one_part,
    stride_unit,
    strides,
    tile_constants,
    wide,
)
from flashmaps.maps.gpu import LOG2_E
from flashmaps.maps.problem import Problem
from torch import Tensor


def launch_return(
    problem: Problem, mass: Tensor | None, partner: Problem, out: Tensor, run: Run
) -> None:
    """Into ``out``, [P, N]; ``mass`` is that of the first map's lines, if they are normalised."""
    made: list[Tensor] = []
    problem = with_lse(problem, None, run, made, needed=True)
    partner = with_lse(partner, None, run, made, needed=True)
    back_mass = line_mass(partner, run, made)
    query = problem.query
    dim = max(query.shape[3], partner.query.shape[3])
    plain = mass is None and back_mass is None and not is_rare(problem) and not is_rare(partner)
    kind = "return" if plain else "rare"
    tiling = run.settings.tiling(kind, query.dtype, dim)
    sources, targets = problem.num_queries, problem.num_keys
    programs = problem.batch * -(-sources // tiling.rows)
    splits = count_splits(run, programs, -(-targets // tiling.columns), 4 * out.numel())
    target = out if splits == 1 else run.empty(splits, *out.shape, like=query)
    unit = stride_unit(problem.query, problem.key, partner.query, partner.key)
    arguments: dict[str, Any] = {"UNIT": unit}
    for prefix, of, of_mass in (("", problem, mass), ("back_", partner, back_mass)):
        for name, tokens in (("query", of.query), ("key", of.key)):
            arguments[prefix + name] = tokens
            arguments |= strides(prefix + name, tokens, unit)
        arguments |= {
            f"{prefix}bias": of.bias,
            f"{prefix}pairs": of.pairs,
            f"{prefix}weights": of.head_weights,
            f"{prefix}lse": of.lse,
            f"{prefix}line_mass": of_mass,
            f"{prefix}grid_width": max(1, of.grid_width),
            f"{prefix}lines": of.lines,
            f"{prefix}heads": of.heads,
            f"{prefix}scale": of.scale * LOG2_E,
        }
    width, rest = head_parts(partner.query.shape[3], one=one_part(query, run))
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
        "WIDE": wide(tiling, problem) or wide(tiling, partner),
        **tile_constants(tiling, query, sources, targets, run),
    }
    scores = problem.scores + partner.scores
    run.launch(Launch(return_kernel, programs * splits, arguments, tiling, kind, scores=scores))
    if splits > 1:
        add_up(target, out, run)
        run.release(target)
    run.release(*made)
