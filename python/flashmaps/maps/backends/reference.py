"""Backend "reference": the definition of every operation, in plain torch, a few rows at a time.

Keeps float64; float16 and bfloat16 are computed in float32. Runs on any device. A chunk of rows
takes about `CHUNK_BYTES` (or what one row takes, if that is more) unless a budget says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flashmaps.maps.backends.reducers import Reduction, key_centres, state_bytes, tile_bytes
from flashmaps.maps.problem import Cost, Problem, Request, cost_of, empty_outputs
from flashmaps.maps.validation import check_finite

CHUNK_BYTES = 64 * 2**20

# Tensors of one number, such as those that torch makes of Python's.
_SCALARS = 64


def supports(problem: Problem) -> str | None:
    """None: the reference takes every valid problem."""
    return None


def _picked(problem: Problem, maps: slice) -> tuple[slice | Tensor, slice | Tensor]:
    """Which queries and which keys of the batch make up these maps."""
    if problem.pairs is None:
        return maps, maps
    of_query, of_key = problem.pairs[maps].unbind(1)
    return of_query, of_key


def _of(tokens: Tensor, batch: slice | Tensor) -> Tensor:
    """Some of the batch. What is gathered is contiguous, whatever it was gathered from."""
    # (Indexing would keep the order of the strides, and `_plain` then copy the copy.)
    return tokens[batch] if isinstance(batch, slice) else tokens.index_select(0, batch)


def _plain(tokens: Tensor, problem: Problem) -> Tensor:
    """In the compute dtype and contiguous, so that a product makes no copies of its own."""
    return tokens.to(problem.compute_dtype, memory_format=torch.contiguous_format).contiguous()


def head_scores(problem: Problem, maps: slice, rows: slice) -> Tensor:
    """scale * Q_h K_h^T + bias: [p, H, r, M]."""
    of_query, of_key = _picked(problem, maps)
    query = _plain(_of(problem.query[:, :, rows], of_query), problem)
    key = _plain(_of(problem.key, of_key), problem)
    if problem.key_group > 1:
        key = key.repeat_interleave(problem.key_group, 1)
    scores = (query @ key.mT).mul_(problem.scale)
    if problem.bias is not None and problem.masks_queries:
        scores.masked_fill_(~_of(problem.bias, of_key)[:, None, rows], -torch.inf)
    elif problem.bias is not None:
        scores += problem.bias[of_key][:, None, None, :]
    return scores


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


def head_probabilities(problem: Problem, maps: slice, rows: slice) -> Tensor:
    """softmax(scale * Q_h K_h^T + bias): [p, H, r, M]."""
    probabilities = head_scores(problem, maps, rows)
    if problem.lse is None:
        probabilities = probabilities.softmax(-1)
    else:
        probabilities -= problem.lse[maps, :, rows, None]
        probabilities.exp_()
    # A row whose keys are all hidden is zero, not 0 / 0.
    if problem.bias is not None and problem.masks_queries:
        hidden = ~_of(problem.bias, _picked(problem, maps)[1])[:, rows].any(-1)
        probabilities.masked_fill_(hidden[:, None, :, None], 0.0)
    elif problem.bias is not None:
        hidden = (problem.bias == -torch.inf).all(1)[_picked(problem, maps)[1]]
        probabilities.masked_fill_(hidden[:, None, None, None], 0.0)
    return probabilities


def mean_of_heads(problem: Problem, probabilities: Tensor) -> Tensor:
    """sum_h w_h P_h: [p, H, r, M] -> [p, r, M]."""
    if problem.head_weights is None:
        return probabilities.mean(1)
    return torch.einsum("h,phnm->pnm", problem.head_weights, probabilities)


def mean_map(problem: Problem, maps: slice = slice(None), rows: slice = slice(None)) -> Tensor:
    """normalise(sum_h w_h softmax(scale * Q_h K_h^T + bias)): [p, r, M]. Note eq. 2.1 to 2.3."""
    probabilities = head_probabilities(problem, maps, rows)
    values = mean_of_heads(problem, probabilities)
    del probabilities
    return normalize_lines(values, problem)


def return_probability(
    problem: Problem, request: Request, values: Tensor, maps: slice, rows: slice, step: int
) -> Tensor:
    """R_ii = sum_j A_st[i, j] A_ts[j, i] for a tile of rows of A_st, ``step`` j at once: [p, r]."""
    partner = request.partner
    assert partner is not None
    out = torch.zeros_like(values[:, :, 0])
    if _columns_alone(partner):
        bias = None if partner.bias is None else partner.bias[..., rows]
        partner = partner._replace(key=partner.key[:, :, rows], bias=bias)
        rows = slice(0, rows.stop - rows.start)
    for start in range(0, partner.num_queries, step):
        targets = slice(start, min(start + step, partner.num_queries))
        back = mean_map(partner, maps, targets)[:, :, rows]
        out += torch.einsum("pij,pji->pi", values[:, :, targets], back)
        del back  # before the next one is made
    return out / (problem.lines * partner.lines)


def _columns_alone(partner: Problem) -> bool:
    """Whether some columns of the map back need no others: its log-sum-exp is known."""
    return partner.lse is not None and partner.normalize == "block"


def reduce(problem: Problem, request: Request) -> dict[str, Tensor]:
    """Every requested field, chunk by chunk."""
    check_finite("query", problem.query)
    check_finite("key", problem.key)
    outputs = empty_outputs(problem, request)
    reduction = Reduction(outputs, request)
    at = key_centres(problem) if "expectation" in outputs else None
    chunk = _chunk(problem, request)
    for maps, rows in _chunks(problem, chunk):
        if "lse" in outputs:
            outputs["lse"][maps, :, rows] = head_scores(problem, maps, rows).logsumexp(-1)
        if len(outputs) == ("lse" in outputs):
            continue
        values = mean_map(problem, maps, rows)
        reduction.update(values, rows.start, maps=maps, lines=problem.lines, key_centres=at)
        if "return_probability" in outputs:
            outputs["return_probability"][maps, rows] = return_probability(
                problem, request, values, maps, rows, _targets(request, chunk[1])
            )
        del values  # before the next chunk's scores are made
    return reduction.finish()


# What a chunk takes, and how large a chunk the budget allows.

Chunk = tuple[int, int]  # maps, rows


def _chunks(problem: Problem, chunk: Chunk) -> Iterator[tuple[slice, slice]]:
    """(maps, rows) slices, rows in order within each map."""
    maps, rows = chunk
    for first in range(0, problem.batch, maps):
        for start in range(0, problem.num_queries, rows):
            yield (
                slice(first, min(first + maps, problem.batch)),
                slice(start, min(start + rows, problem.num_queries)),
            )


def _targets(request: Request, rows: int) -> int:
    """Rows of the map back that are made at once beside so many rows of the map."""
    partner = request.partner
    assert partner is not None
    return partner.num_queries if _columns_alone(partner) else min(partner.num_queries, rows)


def _tokens_bytes(tokens: Tensor, count: int, problem: Problem, *, sliced: bool) -> int:
    """Copies that `head_scores` makes of ``count`` tokens [d] of every head."""
    numbers = count * tokens.shape[1] * tokens.shape[3]
    gathered = numbers * tokens.element_size() if problem.pairs is not None else 0
    in_place = tokens.dtype == problem.compute_dtype and tokens.is_contiguous() and not sliced
    if in_place or (gathered and tokens.dtype == problem.compute_dtype):
        return gathered
    return gathered + numbers * problem.itemsize


def _map_bytes(problem: Problem, maps: int, rows: int, *, sliced_keys: bool = False) -> int:
    """The most that `mean_map` or a log-sum-exp takes for a chunk, its result included."""
    keys = problem.num_keys
    tile = maps * rows * keys * problem.itemsize
    scores = problem.heads * tile
    part = rows < problem.num_queries
    copies = _tokens_bytes(problem.query, maps * rows, problem, sliced=part)
    copies += _tokens_bytes(problem.key, maps * keys, problem, sliced=sliced_keys)
    masks = 0
    if (
        problem.bias is not None and problem.masks_queries
    ):  # gathered, a part of it, and its inverse
        gathered = maps * problem.num_queries * keys if problem.pairs is not None else 0
        masks = gathered + 2 * maps * rows * (keys + 1)
    elif problem.bias is not None:
        masks = problem.bias.numel() + 2 * maps * keys * problem.itemsize
    per_row = maps * rows * problem.heads * problem.itemsize
    weighted = scores if problem.head_weights is not None and maps > 1 else 0
    return (
        per_row
        + masks
        + max(
            copies + scores,
            0 if problem.lse is not None else 2 * scores,
            scores + weighted + tile,
            # Values, their quotients, the result, and masses of lines.
            0 if problem.normalize == "block" else 3 * tile + 2 * tile * problem.lines // keys,
        )
    )


def _bytes(problem: Problem, request: Request, maps: int, rows: int) -> int:
    """The workspace of `reduce` with chunks of so many maps and rows."""
    s, keys = problem.itemsize, problem.num_keys
    tile = maps * rows * keys * s
    most = _map_bytes(problem, maps, rows)
    if "lse" in request.names:
        most = max(most, maps * rows * problem.heads * (2 * keys + 2) * s)
    most = max(most, tile + tile_bytes(request, (maps, rows, keys), s, problem.lines))
    partner = request.partner
    if "return_probability" in request.names and partner is not None:
        targets = _targets(request, rows)
        alone = _columns_alone(partner)
        if alone:
            alone = rows < partner.num_keys
            partner = partner._replace(key=partner.key[:, :, :rows])
        back = maps * targets * partner.num_keys * s
        made = _map_bytes(partner, maps, targets, sliced_keys=alone)
        pieces = 2 * maps * rows * targets * s  # those that meet, side by side in memory
        most = max(most, tile + max(made, back + pieces) + 4 * maps * rows * s)
    state, finishing = state_bytes(request, problem.batch * keys, s)
    if "expectation" in request.names:  # the centres of the keys, and what they are made from
        state += 2 * keys * s
        most = max(most, keys * (2 * s + 8))
    return state + max(most, finishing) + _SCALARS


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, given that 1 has to do."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def chunk_within(
    problem: Problem, budget: int | None, bytes_of: Callable[[int, int], int]
) -> Chunk:
    """As many rows, then as many maps, as fit the budget; at least one row of one map.

    ``bytes_of(maps, rows)`` grows with both, but for this: a part of the rows may have to be
    copied, and all of them not. So a small map may take less at once than row by row.
    """
    least, whole = bytes_of(1, 1), bytes_of(1, problem.num_queries)
    if budget is None:
        budget = least + CHUNK_BYTES
    if whole > max(budget, least):
        return 1, _largest(lambda rows: bytes_of(1, rows) <= budget, problem.num_queries - 1)
    rows = problem.num_queries
    return _largest(lambda maps: bytes_of(maps, rows) <= budget, problem.batch), rows


def _chunk(problem: Problem, request: Request) -> Chunk:
    return chunk_within(
        problem, request.memory_budget, lambda maps, rows: _bytes(problem, request, maps, rows)
    )


def plan(problem: Problem, request: Request) -> Cost:
    """What `reduce` takes: chunks go through memory several times, and every head's scores too."""
    maps, rows = _chunk(problem, request)
    chunks = -(-problem.num_queries // rows)
    lse, others = "lse" in request.names, len(request.names) > ("lse" in request.names)
    alone = request.partner is not None and _columns_alone(request.partner)
    cost = cost_of(
        problem,
        request,
        passes=lse + others,
        back_passes=1 if alone else chunks,
        workspace=_bytes(problem, request, maps, rows),
    )
    scores = cost.passes * problem.batch * problem.heads * problem.num_queries * problem.num_keys
    # Written by the product, scaled, exponentiated, averaged.
    return replace(cost, traffic=cost.traffic + 6.0 * scores * problem.itemsize)
