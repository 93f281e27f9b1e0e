"""Other ways to segment an image, small, on the same features; each with its grid of settings.

- diffseg: DiffSeg (Tian et al., CVPR 2024): attention maps at a grid of anchors, those within a KL
  threshold averaged, three times; each token goes to the map that is largest there.
- diffcut: DiffCut (Couairon et al., NeurIPS 2024): recursive normalised cuts of the cosines of
  features, to the power 10, while a cut costs less than tau.
- ncut: the same recursion on (A + A^T) / 2 of queries on keys.
- spectral: k leading vectors of the normalised affinity of (A + A^T) / 2, k at the largest gap of
  eigenvalues, then k-means.
- kmeans: of features, with the true number of segments, and with twice it.
- slic, felzenszwalb: of colours (scikit-image).
- single: one segment.

They build N x N matrices, which is what they do. Whoever reports them takes the best setting of
each on the very scenes that are scored: an oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from flashmaps.diffusion.features import Features
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import cell_index
from flashmaps.segmentation.map_equation import compact

DIFFSEG_ANCHORS = 16  # a side
DIFFSEG_THRESHOLDS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
DIFFSEG_ROUNDS = 3
TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DIFFCUT_POWER = 10
_SMALLEST = 4  # tokens that are still cut
_DEEPEST = 7  # cuts on the way to a segment
SLIC_COUNTS = (2, 4, 6, 10, 16, 25, 40)
FELZENSZWALB_SCALES = (50.0, 100.0, 200.0, 400.0, 800.0)
_MOST_EIGEN = 24


def diffseg(A: np.ndarray, grid: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Labels of tokens for each threshold. ``A``: [N, N], rows sum to 1."""
    anchors = (min(DIFFSEG_ANCHORS, grid[0]), min(DIFFSEG_ANCHORS, grid[1]))
    cells = cell_index(grid, anchors).numpy()
    middle = [
        np.flatnonzero(cells == c)[(cells == c).sum() // 2] for c in range(int(cells.max()) + 1)
    ]
    safe = np.maximum(A, 1e-12)
    # What anchors are compared with, all maps in the first round, does not depend on the threshold.
    first = _divergence(safe[middle], safe)
    for threshold in DIFFSEG_THRESHOLDS:
        near = (first < threshold).astype(safe.dtype)
        near[np.arange(len(middle)), middle] = 1
        maps = near @ safe / near.sum(1, keepdims=True)
        for _ in range(DIFFSEG_ROUNDS - 1):
            distance, left, merged = _divergence(maps, maps), np.ones(len(maps), bool), []
            for i in range(len(maps)):
                if left[i]:
                    group = left & (distance[i] < threshold)
                    group[i] = True
                    merged.append(maps[group].mean(0))
                    left &= ~group
            maps = np.stack(merged)
        yield f"KL {threshold}", compact(maps.argmax(0))


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(KL(p | q) + KL(q | p)) / 2 of all rows: [n, m]."""
    log_p, log_q = np.log(p), np.log(q)
    own_p, own_q = (p * log_p).sum(1), (q * log_q).sum(1)
    return (own_p[:, None] - p @ log_q.T + own_q - log_p @ q.T) / 2


def recursive_cuts(W: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Labels of tokens for each tau, from one tree of normalised cuts (Shi and Malik, 2000)."""
    tree = _cut_tree(W, np.arange(len(W)), max(TAUS), _DEEPEST)
    for tau in TAUS:
        labels = np.zeros(len(W), dtype=np.int64)
        for number, members in enumerate(_leaves(tree, tau)):
            labels[members] = number
        yield f"tau {tau}", compact(labels)


Tree = tuple[np.ndarray, float, Any, Any]  # members, what its cut costs, both sides


def _cut_tree(W: np.ndarray, members: np.ndarray, most: float, deep: int) -> Tree:
    if len(members) < _SMALLEST or deep == 0:
        return members, np.inf, None, None
    own = W[np.ix_(members, members)]
    degree = own.sum(1)
    root = np.sqrt(np.maximum(degree, 1e-12))
    vector = _leading(own / (root[:, None] * root), 2)[1][:, 1] / root
    order = np.argsort(vector, kind="stable")
    # Every cut along the vector at once: what goes from the first tokens to the others is their
    # degree less what stays among them, the leading squares' sums.
    ordered = own[np.ix_(order, order)]
    volume = np.cumsum(degree[order])[:-1]
    within = np.cumsum(2 * np.tril(ordered).sum(1) - np.diagonal(ordered))[:-1]
    across = volume - within
    costs = across / np.maximum(volume, 1e-12) + across / np.maximum(degree.sum() - volume, 1e-12)
    at = int(costs.argmin())
    best, where = costs[at], np.zeros(len(members), dtype=bool)
    where[order[: at + 1]] = True
    if best > most:
        return members, np.inf, None, None
    return (
        members,
        float(best),
        _cut_tree(W, members[where], most, deep - 1),
        _cut_tree(W, members[~where], most, deep - 1),
    )


def _leaves(tree: Tree, tau: float) -> Iterator[np.ndarray]:
    members, cost, left, right = tree
    if cost > tau:
        yield members
    else:
        yield from _leaves(left, tau)
        yield from _leaves(right, tau)


def _leading(S: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenvalues and their vectors, largest first."""
    from scipy.sparse.linalg import eigsh

    k = min(k, len(S))
    if len(S) <= 2 * k + 8:
        values, vectors = np.linalg.eigh(S)
    else:
        start = np.random.default_rng(0).standard_normal(len(S))
        values, vectors = eigsh(S, k=k, which="LA", v0=start, tol=1e-3, maxiter=3000)
    order = np.argsort(-values)[:k]
    return values[order], vectors[:, order]


def spectral(W: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """k-means of the leading vectors, as many as stand before the largest gap of eigenvalues."""
    root = np.sqrt(W.sum(1))
    values, vectors = _leading(W / (root[:, None] * root), _MOST_EIGEN)
    gaps = values[1:-1] - values[2:]
    k = int(gaps.argmax()) + 2
    rows = vectors[:, :k] / np.maximum(np.linalg.norm(vectors[:, :k], axis=1, keepdims=True), 1e-12)
    yield "eigengap", kmeans_rows(rows, k)


def spectral_rows(x: np.ndarray, k: int) -> np.ndarray:
    """Spectral clustering of rows of length 1 by cosines to the power 10, with a given k."""
    W = np.maximum(x @ x.T, 0) ** DIFFCUT_POWER
    root = np.sqrt(W.sum(1))
    _, vectors = _leading(W / (root[:, None] * root), k)
    rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return kmeans_rows(rows, k)


def kmeans(found: Features, k: int) -> np.ndarray:
    """Labels of tokens by k-means of their features."""
    return kmeans_rows(unit_features(found), k)


def kmeans_rows(x: np.ndarray, k: int) -> np.ndarray:
    """Labels of rows of x by scikit-learn's k-means, two starts."""
    from sklearn.cluster import KMeans

    k = max(1, min(k, len(x)))
    return compact(KMeans(k, n_init=2, random_state=0).fit_predict(x))


def unit_features(found: Features) -> np.ndarray:
    """[N, c], of length 1: outputs of the blocks, or keys."""
    x = found.key if found.output is None else found.output
    return _unit(x[0].permute(1, 0, 2).flatten(1)).float().cpu().numpy()


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def token_rivals(
    found: Features, attention: Mapping[str, AttentionMap]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(method, setting, labels of tokens) of every rival on tokens that asks for no count.

    ``attention``: maps that they may read, by what their settings are called after; each of those
    that read attention has its settings with every map.
    """
    x = unit_features(found)
    alike = np.maximum(x @ x.T, 0) ** DIFFCUT_POWER
    for setting, labels in recursive_cuts(alike):
        yield "DiffCut", setting, labels
    for called, each in attention.items():
        A = each.to_dense()[0].float().cpu().numpy()
        W = (A + A.T) / 2
        for name, made in (
            ("DiffSeg", diffseg(A, found.grid)),
            ("NCut on attention", recursive_cuts(W)),
            ("spectral, eigengap", spectral(W)),
        ):
            for setting, labels in made:
                yield name, setting + called, labels


def pixel_rivals(image: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """(method, setting, labels of pixels) of every rival that sees colours alone."""
    from skimage.segmentation import felzenszwalb, slic

    for count in SLIC_COUNTS:
        yield "SLIC", f"n {count}", slic(image, count, compactness=10, start_label=0)
    for scale in FELZENSZWALB_SCALES:
        yield "Felzenszwalb", f"scale {scale:g}", felzenszwalb(image, scale=scale, sigma=0.8)
    yield "single segment", "-", np.zeros(image.shape[:2], dtype=np.int64)
