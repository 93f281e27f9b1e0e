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
_CELLS = 2**17  # nodes times segments that are looked at together: a few MB


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


def gathered(flow: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows summed within the groups that ``labels`` [m], 0 to k - 1, name: [m, n] to [k, n]."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(int(labels.max()) + 1))
    return np.add.reduceat(flow[order], starts, axis=0)


def merged(flow: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Flows between the groups of nodes that ``labels`` [m], 0 to k - 1, name: [k, k]."""
    return gathered(gathered(flow, labels).T, labels).T


def compact(labels: np.ndarray) -> np.ndarray:
    """The same groups named 0 to k - 1, in the order of their first members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


class _Books:
    """What the code's terms are made of while nodes move: the shares, exits and flows of segments.

    There is one segment more than ``labels`` name, an empty one, where a node may be by itself.
    """

    def __init__(self, flow: np.ndarray, labels: np.ndarray) -> None:
        count, k = len(labels), int(labels.max()) + 2
        self.flow, self.labels = flow, labels
        self.p = flow.sum(1)
        self.own = np.diagonal(flow).copy()
        self.leaves = self.p - self.own  # what leaves each node, to others
        self.to = np.zeros((count, k))  # flow from each node to each segment
        self.to[:, :-1] = gathered(flow, labels).T
        self.p_of = np.bincount(labels, self.p, k)
        self.q_of = self.p_of - np.bincount(labels, self.to[np.arange(count), labels], k)
        self.terms = plogp(self.q_of + self.p_of) - 2 * plogp(self.q_of)
        self.total = float(self.q_of.sum())

    def changes(self, nodes: slice) -> np.ndarray:
        """What the code changes by if each of ``nodes`` alone went to each segment: [nodes, k]."""
        here = self.labels[nodes]
        leaves, own, p = self.leaves[nodes], self.own[nodes], self.p[nodes]
        to = self.to[nodes]
        rows = np.arange(len(here))
        q_old = self.q_of[here] - leaves + 2 * (to[rows, here] - own)
        without = plogp(q_old + self.p_of[here] - p) - 2 * plogp(q_old) - self.terms[here]
        without -= plogp(self.total)
        q_new = leaves[:, None] - 2 * to
        q_new += self.q_of
        change = plogp(q_new + self.p_of + p[:, None])
        change -= 2 * plogp(q_new)
        change -= self.terms
        q_new -= self.q_of
        q_new += (self.total + q_old - self.q_of[here])[:, None]
        change += plogp(q_new)
        change += without[:, None]
        change[rows, here] = 0.0  # staying
        return change

    def wishes(self) -> np.ndarray:
        """Nodes that would shorten the code if they alone moved."""
        step = max(1, _CELLS // self.to.shape[1])
        least = [
            self.changes(slice(start, start + step)).min(1)
            for start in range(0, len(self.labels), step)
        ]
        return np.flatnonzero(np.concatenate(least) < -_LEAST)

    def move(self, i: int, b: int) -> None:
        """Node i goes to segment b."""
        a = self.labels[i]
        out = 2 * (self.to[i, a] - self.own[i]) - self.leaves[i]
        into = self.leaves[i] - 2 * self.to[i, b]
        self.labels[i] = b
        self.total += out + into
        for segment, q, p in ((a, out, -self.p[i]), (b, into, self.p[i])):
            self.q_of[segment] += q
            self.p_of[segment] += p
            q, p = self.q_of[segment], self.p_of[segment]
            self.terms[segment] = plogp(q + p) - 2 * plogp(q)
        self.to[:, a] -= self.flow[:, i]
        self.to[:, b] += self.flow[:, i]


def move_nodes(
    flow: np.ndarray,  # [m, m], symmetric, sums to 1
    labels: np.ndarray,  # [m], 0 to k - 1, where each node is to begin with
    rng: np.random.Generator,
) -> np.ndarray:
    """Nodes move one by one to the segment that shortens the code most, until none does: [m].

    Every sweep asks all nodes at once whether they would move, and then, one by one, those that
    would, since others have moved in between.
    """
    for sweep in range(_SWEEPS):
        labels = compact(labels)  # segments that moves have emptied are left out
        books = _Books(flow, labels)
        some = books.wishes() if sweep else np.arange(len(labels))  # at first, nearly all
        if not len(some):
            break
        for i in rng.permutation(some):
            change = books.changes(slice(i, i + 1))[0]
            b = int(change.argmin())
            if change[b] < -_LEAST:
                books.move(i, b)
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
    return _merge(flow, labels, count, np.inf)


def merge_below(flow: np.ndarray, labels: np.ndarray, bits: float) -> np.ndarray:
    """Join two segments at a time while that costs less than ``bits`` a step: [m]."""
    return _merge(flow, labels, 1, bits)


def _merge(flow: np.ndarray, labels: np.ndarray, count: int, bits: float) -> np.ndarray:
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
        cost -= alone[:, None] + alone + plogp(q.sum())
        np.fill_diagonal(cost, np.inf)
        a, b = sorted(divmod(int(cost.argmin()), len(cost)))
        if cost[a, b] >= bits:
            break
        groups = np.arange(len(between))
        groups[b] = a
        groups = compact(groups)
        labels = groups[labels]
        between = merged(between, groups)
    return compact(labels)
