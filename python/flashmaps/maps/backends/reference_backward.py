"""Backend "reference", backwards: the definition of every gradient, a few rows at a time.

With P_h the probabilities of a head, A = normalise(sum_h w_h P_h) and G = dL/dA, which `Gradient`
gives in closed form (docs/gradients.md):

    g      = G through the normalisation, dL / d sum_h w_h P_h
    D_h,i  = sum_j P_h,ij g_ij
    dS_h   = w_h P_h * (g - D_h) + dL/dlse_h * P_h
    dQ_h   = scale dS_h K_h        dK_h = scale dS_h^T Q_h
    dbias  = sum_h,i dS_h          dw_h = sum_i D_h,i
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flashmaps.maps.backends import reference
from flashmaps.maps.problem import (
    Cost,
    Gradient,
    Problem,
    backward_cost,
    empty_gradients,
)


def backward(problem: Problem, gradient: Gradient) -> dict[str, Tensor]:
    """Every gradient that is wanted, by name, in the compute dtype."""
    into = {name: out.zero_() for name, out in empty_gradients(problem, gradient).items()}
    chunk = _chunk(problem, gradient)
    for maps, rows in reference._chunks(problem, chunk):
        _add_tile(problem, gradient, maps, rows, chunk[1], into)
    return into


def _add_tile(
    problem: Problem,
    gradient: Gradient,
    maps: slice,
    rows: slice,
    step: int,
    into: dict[str, Tensor],
) -> None:
    """What the queries ``rows`` of some maps add to each gradient; ``step`` rows of A' at once."""
    probabilities = reference.head_probabilities(problem, maps, rows)  # [p, H, r, M]
    plain = reference.mean_of_heads(problem, probabilities)
    values = reference.normalize_lines(plain, problem)
    g = of_map(problem, gradient, values, maps, rows, step)
    g = through_lines(problem, g, plain, values)
    del plain, values
    free = "lse" in gradient.wanted
    inner = torch.einsum("phrm,prm->phr", probabilities, g)
    weights = problem.head_weights
    if weights is None:
        weights = torch.full_like(inner[0, :, 0], 1.0 / problem.heads)
    if "head_weights" in into:
        into["head_weights"] += inner.sum((0, 2))
    inner *= weights[:, None]
    if "lse" in into:
        into["lse"][maps, :, rows] = -inner
    # w (g - D) + dlse, in place of P
    slope = gradient.lse[maps, :, rows] if gradient.lse is not None else torch.zeros_like(inner)
    if not free:
        slope = slope - inner
    for head in range(problem.heads):
        factor = torch.addcmul(slope[:, head, :, None], g, weights[head])
        probabilities[:, head] *= factor
    scores = probabilities  # dS
    del g, probabilities
    of_query, of_key = reference._picked(problem, maps)
    if "bias" in into:
        _add(into["bias"], of_key, scores.sum((1, 2)))
    if "query" in into:
        key = reference._plain(problem.key[of_key], problem)
        part = (scores @ key).mul_(problem.scale)
        _add(into["query"][:, :, rows], of_query, part)
        del key, part
    if "key" in into:
        query = reference._plain(problem.query[:, :, rows][of_query], problem)
        part = (scores.mT @ query).mul_(problem.scale)
        _add(into["key"], of_key, part)


def _add(into: Tensor, which: slice | Tensor, part: Tensor) -> None:
    if isinstance(which, slice):
        into[which] += part
    else:
        into.index_add_(0, which, part)


def of_map(
    problem: Problem, gradient: Gradient, values: Tensor, maps: slice, rows: slice, step: int
) -> Tensor:
    """G on a tile of the printed map, term by term as `Gradient` lists them: [p, r, M]."""
    t = gradient
    g = torch.zeros_like(values)
    if t.left is not None and t.right is not None:
        torch.matmul(t.left[maps, rows], t.right[maps].mT, out=g)
    if t.dense is not None:
        g += t.dense[maps, rows]
    if t.pooled is not None and t.cells is not None:
        g += t.pooled[maps, rows][:, :, t.cells]
    log = None
    for vector, axis in ((t.row_log, 2), (t.column_log, 1)):
        if vector is None:
            continue
        if log is None:
            some = values > 0
            log = values.where(some, torch.ones_like(values)).log_()
            del some
        part = vector[maps, rows, None] if axis == 2 else vector[maps, None]
        g.addcmul_(log, part, value=-1)
    del log
    if t.row_add is not None:
        g += t.row_add[maps, rows, None]
    if t.column_add is not None:
        g += t.column_add[maps, None]
    if t.row_index is not None and t.row_values is not None:
        g.scatter_add_(2, t.row_index[maps, rows], t.row_values[maps, rows])
    if t.column_index is not None and t.column_values is not None:
        _add_column_entries(g, t.column_index[maps], t.column_values[maps], rows)
    if t.partner is not None:
        _add_back(g, t, maps, rows, step)
    return g


def _add_column_entries(g: Tensor, index: Tensor, values: Tensor, rows: slice) -> None:
    """One entry of each column, where it lies in these rows."""
    inside = (index >= rows.start) & (index < rows.stop)
    at = (index - rows.start).clamp_(0, g.shape[1] - 1)
    g.scatter_add_(1, at[:, None], values.where(inside, torch.zeros_like(values))[:, None])


def _add_back(g: Tensor, gradient: Gradient, maps: slice, rows: slice, step: int) -> None:
    """(row_back_i + column_back_j) A'_ji, ``step`` rows j of A' at once."""
    partner = gradient.partner
    assert partner is not None
    if reference._columns_alone(partner):
        bias = None if partner.bias is None else partner.bias[..., rows]
        partner = partner._replace(key=partner.key[:, :, rows], bias=bias)
        step, rows_of_back = partner.num_queries, slice(0, rows.stop - rows.start)
    else:
        rows_of_back = rows
    for start in range(0, partner.num_queries, step):
        keys = slice(start, min(start + step, partner.num_queries))
        back = reference.mean_map(partner, maps, keys)[:, :, rows_of_back].mT
        if gradient.row_back is not None:
            g[:, :, keys].addcmul_(back, gradient.row_back[maps, rows, None])
        if gradient.column_back is not None:
            g[:, :, keys].addcmul_(back, gradient.column_back[maps, None, keys])
        del back


def through_lines(problem: Problem, g: Tensor, plain: Tensor, values: Tensor) -> Tensor:
    """dL / d plain, where A = plain / mass of its line: (G - sum over the line of G A) / mass.

    A line whose mass underflowed gives zeros.
    """
    if problem.normalize == "block":
        return g
    shape = (problem.grid_height, problem.grid_width)
    dim = -1 if problem.normalize == "rows" else -2
    block = g.unflatten(-1, shape)
    mean = (block * values.unflatten(-1, shape)).sum(dim, keepdim=True)
    mass = plain.unflatten(-1, shape).sum(dim, keepdim=True)
    some = mass >= torch.finfo(torch.float32).tiny
    mass = mass.where(some, torch.ones_like(mass))
    return ((block - mean) * (some / mass)).flatten(-2)


# What a chunk takes, and how large a chunk the budget allows.


def _bytes(problem: Problem, gradient: Gradient, maps: int, rows: int) -> int:
    """The workspace of `backward` with chunks of so many maps and rows."""
    s, keys, heads = problem.itemsize, problem.num_keys, problem.heads
    tile = maps * rows * keys * s
    scores = heads * tile
    lines = problem.normalize != "block"
    partner = gradient.partner
    making = reference._map_bytes(problem, maps, rows)
    held = scores + tile * (3 if lines else 2) + 3 * maps * rows * heads * s + heads * s
    logs = 2 * tile + maps * rows * keys if gradient.has_logs else 0
    pooled = tile if gradient.pooled is not None else 0
    entries = 3 * 8 * maps * keys if gradient.column_index is not None else 0
    back = 0
    if partner is not None:
        alone = reference._columns_alone(partner)
        step = partner.num_queries if alone else rows
        one = partner._replace(key=partner.key[:, :, :rows]) if alone else partner
        made = reference._map_bytes(one, maps, step, sliced_keys=alone)
        back = made + maps * step * one.num_keys * s
    through = 3 * tile + 2 * maps * rows * s * problem.lines * 3 if lines else 0
    part = rows < problem.num_queries
    queries = reference._tokens_bytes(problem.query, maps * rows, problem, sliced=part)
    key_copies = reference._tokens_bytes(problem.key, maps * keys, problem, sliced=False)
    width = problem.query.shape[3]
    of_query = key_copies + 2 * maps * heads * rows * width * s
    of_key = queries + 2 * maps * heads * keys * width * s
    of_bias = 2 * maps * keys * s
    ending = scores + max(of_query, of_key, of_bias)
    weighted = scores + 2 * tile
    return (
        max(making, held + max(logs, pooled, entries, back, through), weighted + scores, ending)
        + reference._SCALARS
    )


def _chunk(problem: Problem, gradient: Gradient) -> reference.Chunk:
    return reference.chunk_within(
        problem, gradient.memory_budget, lambda maps, rows: _bytes(problem, gradient, maps, rows)
    )


def plan_backward(problem: Problem, gradient: Gradient) -> Cost:
    """What `backward` takes: the scores once, and a product for each of dQ and dK."""
    maps, rows = _chunk(problem, gradient)
    cost = backward_cost(
        problem, gradient, passes=1, workspace=_bytes(problem, gradient, maps, rows)
    )
    scores = problem.batch * problem.heads * problem.num_queries * problem.num_keys
    return replace(cost, traffic=cost.traffic + 10.0 * scores * problem.itemsize)
