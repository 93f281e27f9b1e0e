"""Backend "reference": the definition of every operation, in plain torch, a few rows at a time.

Keeps float64; float16 and bfloat16 are computed in float32. Runs on any device. Never holds more
than `CHUNK_BYTES` of the map (or one row of it, if that is more) unless a dense map is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashmaps._problem import Problem, Request, empty_outputs
from flashmaps._validation import check_finite
from flashmaps.reducers import Reduction, key_centres

CHUNK_BYTES = 64 * 2**20


def supports(problem: Problem) -> str | None:
    """None: the reference takes every valid problem."""
    return None


def head_scores(problem: Problem, maps: slice, rows: slice) -> Tensor:
    """scale * Q_h K_h^T + bias: [p, H, r, M]."""
    query = problem.query[:, :, rows].to(problem.compute_dtype)
    key = problem.key.to(problem.compute_dtype)
    bias = problem.bias
    if problem.pairs is None:
        query, key = query[maps], key[maps]
        bias = None if bias is None else bias[maps]
    else:
        of_query, of_key = problem.pairs[maps].unbind(1)
        query, key = query[of_query], key[of_key]
        bias = None if bias is None else bias[of_key]
    scores = problem.scale * (query @ key.mT)
    return scores if bias is None else scores + bias[:, None, None, :]


def normalize_lines(values: Tensor, problem: Problem) -> Tensor:
    """Note eq. 2.3 on each row of the map seen as a g_h x g_w block: [..., M] -> [..., M].

    "columns": A(k, l) / sum_k' A(k', l), the formula as printed; "rows": A(k, l) / sum_l' A(k, l').
    A line whose mass underflows float32 gives zeros.
    """
    if problem.normalize == "block":
        return values
    block = values.unflatten(-1, (problem.grid_height, problem.grid_width))
    mass = block.sum(dim=-1 if problem.normalize == "rows" else -2, keepdim=True)
    some = mass >= torch.finfo(torch.float32).tiny
    block = torch.where(some, block / mass.where(some, torch.ones_like(mass)), 0.0)
    return block.flatten(-2)


def mean_map(problem: Problem, maps: slice = slice(None), rows: slice = slice(None)) -> Tensor:
    """normalise(sum_h w_h softmax(scale * Q_h K_h^T + bias)): [p, r, M]. Note eq. 2.1 to 2.3."""
    scores = head_scores(problem, maps, rows)
    if problem.lse is None:
        probabilities = scores.softmax(-1)
    else:
        probabilities = (scores - problem.lse[maps, :, rows, None]).exp()
    if problem.bias is not None:  # a row whose keys are all hidden is zero, not 0 / 0
        seen = (problem.bias > -torch.inf).any(1)
        seen = seen[maps] if problem.pairs is None else seen[problem.pairs[maps, 1]]
        probabilities = probabilities.where(seen[:, None, None, None], 0.0)
    if problem.head_weights is None:
        values = probabilities.mean(1)
    else:
        values = torch.einsum("h,phnm->pnm", problem.head_weights, probabilities)
    return normalize_lines(values, problem)


def chunks(problem: Problem, budget: int = CHUNK_BYTES) -> Iterator[tuple[slice, slice]]:
    """(maps, rows) slices whose per-head scores fit the budget, rows in order within each map."""
    itemsize = torch.finfo(problem.compute_dtype).bits // 8
    row = 3 * problem.heads * problem.num_keys * itemsize  # scores, probabilities, a temporary
    rows = max(1, min(problem.num_queries, budget // row))
    maps = max(1, min(problem.batch, budget // (row * rows)))
    for first in range(0, problem.batch, maps):
        for start in range(0, problem.num_queries, rows):
            yield (
                slice(first, min(first + maps, problem.batch)),
                slice(start, min(start + rows, problem.num_queries)),
            )


def return_probability(
    problem: Problem, request: Request, values: Tensor, maps: slice, rows: slice
) -> Tensor:
    """R_ii = sum_j A_st[i, j] A_ts[j, i] for a tile of rows of A_st: [p, r]."""
    partner = request.partner
    assert partner is not None
    out = torch.zeros_like(values[:, :, 0])
    if partner.lse is not None and partner.normalize == "block":
        # With the LSE known, the columns of A_ts that this tile returns to need no others.
        bias = None if partner.bias is None else partner.bias[:, rows]
        partner = partner._replace(key=partner.key[:, :, rows], bias=bias)
        rows = slice(0, rows.stop - rows.start)
    for _, targets in chunks(partner._replace(query=partner.query[:1], pairs=None)):
        back = mean_map(partner, maps, targets)[:, :, rows]
        out += torch.einsum("pij,pji->pi", values[:, :, targets], back)
    return out / (problem.lines * partner.lines)


def reduce(problem: Problem, request: Request) -> dict[str, Tensor]:
    """Every requested field, chunk by chunk."""
    check_finite("query", problem.query)
    check_finite("key", problem.key)
    outputs = empty_outputs(problem, request)
    reduction = Reduction(outputs, request)
    at = key_centres(problem)
    for maps, rows in chunks(problem):
        if "lse" in outputs:
            outputs["lse"][maps, :, rows] = head_scores(problem, maps, rows).logsumexp(-1)
        if len(outputs) == ("lse" in outputs):
            continue
        values = mean_map(problem, maps, rows)
        reduction.update(values, rows.start, maps=maps, lines=problem.lines, key_centres=at)
        if "return_probability" in outputs:
            outputs["return_probability"][maps, rows] = return_probability(
                problem, request, values, maps, rows
            )
    return reduction.finish()
