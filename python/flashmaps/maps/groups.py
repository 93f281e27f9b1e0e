"""What a walk over tokens asks of maps: flows between groups, and each token's nearest others.

Free functions of any lazy map. None builds a map: memory grows with tokens and groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.lazy import check_square
from flashmaps.maps.validation import check_k


def group_flows(
    A: AttentionMap,  # [batch, N, M]
    query_labels: Tensor,  # [N] whole numbers from 0
    key_labels: Tensor,  # [M]
    *,
    memory_budget: int | None = None,
) -> Tensor:
    """sum of A_ij over the queries i of each group and the keys j of each group, in one pass.

    Returns [batch, groups of queries, groups of keys]; a group is as large as the largest label
    says, and one without tokens has zeros.
    """
    mean = A.pool(query_labels, key_labels, memory_budget=memory_budget)
    size = torch.bincount(query_labels.to(A.device), minlength=mean.shape[1]).to(mean.dtype)
    return mean.nan_to_num_(0.0).mul_(size[None, :, None])


def nearest_others(
    A: AttentionMap, k: int = 1, *, memory_budget: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of a square map but the diagonal: values, indices.

    Both [batch, N, k], largest first; as `AttentionMap.topk`, without each token itself.
    """
    check_square("nearest_others", A.shape)
    k = check_k(k, A.shape[2] - 1)
    values, indices = A.topk(k + 1, memory_budget=memory_budget)
    own = indices == torch.arange(A.shape[1], device=A.device)[None, :, None]
    # Where a token is not among its own nearest, the last of them goes instead.
    own[..., -1] |= ~own.any(-1)
    keep = ~own
    shape = (*A.shape[:2], k)
    return values[keep].reshape(shape), indices[keep].reshape(shape)


def symmetric_product(A: AttentionMap, x: Tensor) -> Tensor:
    """(A + A^T)/2 @ x for a square map: [batch, N, C] to [batch, N, C]."""
    check_square("symmetric_product", A.shape)
    return ((A @ x) + (A.mT @ x)).mul_(0.5)


def group_mass(A: AttentionMap, labels: Tensor) -> Tensor:
    """How much of each row stays within the token's own group: sum_j A_ij [c_j = c_i], [batch, N].

    ``labels``: [N], whole numbers from 0; a square map.
    """
    check_square("group_mass", A.shape)
    labels = labels.to(A.device, torch.int64)
    out = torch.empty(A.shape[:2], dtype=A.dtype, device=A.device)
    groups = int(labels.max()) + 1
    for start in range(0, groups, _COLUMNS):
        stop = min(start + _COLUMNS, groups)
        some = (labels >= start) & (labels < stop)
        x = one_hot(labels - start, stop - start, A.dtype)
        mass = A @ x.expand(A.shape[0], -1, -1)
        column = (labels[some] - start)[None, :, None].expand(A.shape[0], -1, 1)
        out[:, some] = mass[:, some].gather(2, column)[..., 0]
    return out


def collection_product(
    maps: Sequence[Sequence[AttentionMap | None]],
    x: Sequence[Tensor],  # for each image t, [1, N_t, C]
    weights: Tensor | None = None,  # [n, n], default 1 / n
) -> list[Tensor]:
    """y_s = sum_t w_st A_st x_t over a collection of images, each x_t held once.

    ``maps[s][t]`` is A_st, lazy, [1, N_s, N_t], or None where there is none. Returns one
    [1, N_s, C] for each image: O(n N C) numbers, where `pairs` would hold x once for every pair.
    """
    count = len(x)
    if len(maps) != count or any(len(row) != count for row in maps):
        raise ValueError(
            f"maps must be a table of {count} x {count} maps, one row and column for each of x"
        )
    if weights is None:
        weights = torch.full((count, count), 1.0 / count)
    out = []
    for s, row in enumerate(maps):
        total: Tensor | None = None
        for t, A in enumerate(row):
            if A is not None:
                part = (A @ x[t]).mul_(float(weights[s, t]))
                total = part if total is None else total.add_(part)
        if total is None:
            raise ValueError(f"maps[{s}] holds no map at all")
        out.append(total)
    return out


def one_hot(labels: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[1, N, groups], rows of zeros for labels that are not 0 to groups - 1."""
    return (labels[:, None] == torch.arange(groups, device=labels.device)).to(dtype)[None]


_COLUMNS = 64  # groups that are asked for at a time
