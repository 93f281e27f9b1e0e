"""The map equation: how many bits a step of a walk takes when it is told by segments.

A stationary, reversible walk over nodes i, flow F_ij from i to j in a step, F = F^T, sum F = 1.
With pi = F 1, and for each segment m its share p_m = sum of pi and what leaves it q_m = p_m - F_mm,
the two-level code takes

    L = plogp(sum q_m) - 2 sum plogp(q_m) - sum_i plogp(pi_i) + sum plogp(q_m + p_m)

bits a step, plogp(x) = x log2 x (Rosvall and Bergstrom, PNAS 2008). The partition with the smallest
L is the segmentation: many segments cost words for crossing between them, few cost long words
inside.

The graph is small (atoms, not tokens) and dense, so moves are numpy over all segments at once. The
published packages for it, infomap and igraph, are under the GPL, which a library under Apache 2.0
cannot ask of its users, and were written for large sparse graphs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_TINY = 1e-300  # log2 of it is finite, and times 0 it is 0
_LEAST = 1e-10  # bits; moves that gain less are rounding
_SWEEPS = 30  # over all nodes; in practice fewer than ten change anything


def plogp(x: Any) -> Any:
    """x log2 x, 0 where x <= 0 (flows that cancel round to tiny negatives)."""
    return x * np.log2(np.maximum(x, _TINY))


def codelength(
    flow: np.ndarray,  # [k, k], between segments, sums to 1
    words: float,  # sum_i plogp(pi_i) over the walk's nodes
) -> float:
    """L in bits a step."""
    p = flow.sum(1)
    q = p - np.diagonal(flow)
    return float(plogp(q.sum()) - 2 * plogp(q).sum() - words + plogp(q + p).sum())


def merged(flow: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Flows between the groups of nodes that ``labels`` [m], 0 to k - 1, name: [k, k]."""
    k = int(labels.max()) + 1
    rows = np.zeros((k, flow.shape[1]))
    np.add.at(rows, labels, flow)
    out = np.zeros((k, k))
    np.add.at(out, labels, rows.T)
    return out.T


def compact(labels: np.ndarray) -> np.ndarray:
    """The same groups named 0 to k - 1, in the order of their first members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def move_nodes(
    flow: np.ndarray,  # [m, m], symmetric, sums to 1
    labels: np.ndarray,  # [m], 0 to k - 1, where each node is to begin with
    rng: np.random.Generator,
) -> np.ndarray:
    """Nodes move one by one to the segment that shortens the code most, until none does: [m]."""
    labels = labels.copy()
    count, k = len(labels), int(labels.max()) + 1
    p = flow.sum(1)
    own = np.diagonal(flow).copy()
    leaves = p - own  # what leaves each node, to others
    to = np.zeros((count, k))  # flow from each node to each segment
    np.add.at(to.T, labels, flow.T)
    p_of = np.bincount(labels, p, k)
    q_of = p_of - np.bincount(labels, to[np.arange(count), labels], k)
    # The terms of L that segments have now, and what a move makes of them.
    terms = plogp(q_of + p_of) - 2 * plogp(q_of)
    for _ in range(_SWEEPS):
        moved = False
        for i in rng.permutation(count):
            a = labels[i]
            q_a = q_of[a] - leaves[i] + 2 * (to[i, a] - own[i])
            p_a = p_of[a] - p[i]
            term_a = plogp(q_a + p_a) - 2 * plogp(q_a)
            q_new = q_of + leaves[i] - 2 * to[i]
            total = q_of.sum()
            totals = total + (q_a - q_of[a]) + (q_new - q_of)
            term_new = plogp(q_new + p_of + p[i]) - 2 * plogp(q_new)
            change = plogp(totals) + (term_new - terms) + (term_a - terms[a] - plogp(total))
            change[a] = 0.0  # staying
            b = int(change.argmin())
            if change[b] < -_LEAST:
                labels[i] = b
                q_of[a], p_of[a], terms[a] = q_a, p_a, term_a
                q_of[b], p_of[b], terms[b] = q_new[b], p_of[b] + p[i], term_new[b]
                to[:, a] -= flow[:, i]
                to[:, b] += flow[:, i]
                moved = True
        if not moved:
            break
    return labels


def shortest(
    flow: np.ndarray,  # [m, m], symmetric, sums to 1
    rng: np.random.Generator,
    start: np.ndarray | None = None,  # [m]; default every node by itself
) -> np.ndarray:
    """Segments of the nodes whose code is short: moves of nodes, then of groups of them, in turn.

    As Louvain's method does for modularity, and then node by node once more, from the result.
    Returns [m] int64, 0 to k - 1.
    """
    labels = np.arange(len(flow)) if start is None else compact(start)
    for _ in range(_SWEEPS):
        before = labels
        labels = compact(move_nodes(flow, labels, rng))
        while True:
            between = merged(flow, labels)
            groups = compact(move_nodes(between, np.arange(len(between)), rng))
            if int(groups.max()) + 1 == len(between):
                break
            labels = compact(groups[labels])
        if np.array_equal(labels, before):
            break
    return labels


def merge_to(flow: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Join two segments at a time, those that cost least in code, until ``count`` are left: [m]."""
    labels = compact(labels)
    between = merged(flow, labels)
    while len(between) > count:
        p = between.sum(1)
        inside = np.diagonal(between)
        q = p - inside
        q_joint = q[:, None] + q - between - between.T
        p_joint = p[:, None] + p
        alone = plogp(q + p) - 2 * plogp(q)
        total = q.sum() + q_joint - q[:, None] - q
        cost = plogp(total) + plogp(q_joint + p_joint) - 2 * plogp(q_joint)
        cost -= alone[:, None] + alone
        np.fill_diagonal(cost, np.inf)
        a, b = sorted(divmod(int(cost.argmin()), len(cost)))
        groups = np.arange(len(between))
        groups[b] = a
        groups = compact(groups)
        labels = groups[labels]
        between = merged(between, groups)
    return compact(labels)
