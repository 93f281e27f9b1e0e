"""Statistics of each head by itself: its own map P_h, not the mean over heads.

A pass over maps of one head each: the heads are moved into the batch by their strides, without a
copy of Q or K, so every backend runs the kernel that it has. Key heads shared by groups of query
heads are picked as pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashmaps.maps import operators as ops
from flashmaps.maps.lazy import REDUCTIONS, LazyMap, Reductions, check_reductions
from flashmaps.maps.problem import Problem, Request

# Beyond the reductions of mean maps: what only a single head has.
OF_HEADS = ("max_logit", "lse")


def reduce_heads(
    A: LazyMap, names: Sequence[str], *, memory_budget: int | None = None
) -> Reductions:
    """`AttentionMap.reduce` with ``per_head=True``: [batch, H, ...] of each head's own map."""
    asked = tuple(dict.fromkeys(names))
    plain = [name for name in asked if name not in OF_HEADS]
    if not asked or plain:
        try:
            check_reductions(plain, A.shape, A.key_grid)
        except ValueError as error:
            unknown = next((name for name in plain if name not in REDUCTIONS), None)
            if unknown is None and asked:
                raise
            raise ValueError(f"{error}; with per_head=True also {', '.join(OF_HEADS)}") from None
    problem = A.problem
    logits = "max_logit" in asked
    if logits and problem.normalize != "block":
        raise ValueError(
            f"max_logit is of scores, which normalize={problem.normalize!r} leaves as they are: "
            "leave it out, or make the map without normalize="
        )
    wanted = dict.fromkeys([*plain, *(["max"] if logits else [])])
    if problem.lse is None and {"max_logit", "lse"} & set(asked):
        wanted["lse"] = None
    parts = [
        ops.reduce(one, Request(tuple(wanted), memory_budget=memory_budget), A.backend)
        for one in one_head_each(problem)
    ] if wanted else []  # fmt: skip
    shape = (problem.batch, problem.heads)
    found = {
        name: torch.cat([part[name] for part in parts]).unflatten(0, shape).squeeze(2)
        if name == "lse"
        else torch.cat([part[name] for part in parts]).unflatten(0, shape)
        for name in wanted
    }
    lse = problem.lse if problem.lse is not None else found.get("lse")
    if lse is not None:  # max_j s_j = lse + log max_j p_j, with p_j = exp(s_j - lse)
        lse = lse if A._lse_offset is None else lse + A._lse_offset
        found["lse"] = lse
        if logits:
            found["max_logit"] = lse + found["max"].log()
    return Reductions({name: found[name] for name in asked})


def one_head_each(problem: Problem) -> list[Problem]:
    """The same heads as maps of one head each, [P * H] of them in order; views of Q and K.

    One problem where batch and heads can be seen as one dimension, else one for each map.
    """
    query, key = _merged(problem.query), _merged(problem.key)
    if query is not None and key is not None:
        return [_alone(problem, query, key, None)]
    return [
        _alone(problem, query, key, index)
        for index in range(problem.batch)
        for query, key in [_of_map(problem, index)]
    ]


def _merged(tokens: Tensor) -> Tensor | None:
    """[B, H, N, d] as [B * H, 1, N, d], if that takes no copy."""
    batch, heads = tokens.shape[:2]
    if batch == 1 or heads == 1 or tokens.stride(0) == heads * tokens.stride(1):
        return tokens.flatten(0, 1)[:, None]
    return None


def _of_map(problem: Problem, index: int) -> tuple[Tensor, Tensor]:
    """The heads of one map's queries and keys: [H, 1, N, d], views."""
    of_query = of_key = index
    if problem.pairs is not None:
        of_query, of_key = problem.pairs[index].tolist()
    return problem.query[of_query][:, None], problem.key[of_key][:, None]


def _alone(problem: Problem, query: Tensor, key: Tensor, only: int | None) -> Problem:
    """Maps of one head each; ``query`` and ``key`` are those of the map ``only``, or of all."""
    heads, shared = problem.heads, problem.heads // problem.key.shape[1]
    device = query.device
    index = torch.arange(problem.batch, device=device)
    if only is not None:
        index = index[only : only + 1]
    of_query = of_key = index
    if problem.pairs is not None:
        of_query, of_key = problem.pairs[index].unbind(1)
    bias = problem.bias
    if only is not None:
        bias = None if bias is None else bias[of_key]
        of_query = of_key = torch.zeros_like(index)
    head = torch.arange(heads, device=device)
    pairs = None
    if problem.pairs is not None or shared > 1:
        pairs = torch.stack(
            (
                (of_query[:, None] * heads + head).flatten(),
                (of_key[:, None] * (heads // shared) + head // shared).flatten(),
            ),
            dim=1,
        )
    if bias is not None:
        bias = bias.repeat_interleave(heads // shared, 0)
    lse = None if problem.lse is None else problem.lse[index].flatten(0, 1)[:, None].contiguous()
    return problem._replace(
        query=query, key=key, bias=bias, head_weights=None, pairs=pairs, lse=lse
    )
