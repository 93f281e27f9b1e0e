"""A map read as a walk over tokens: its flows, its atoms, and the segments where it stays.

From token i the walk goes to j with probability A_ij, or against the arrow, one as likely as the
other: F = (A + A^T) / (2 N). All is asked of the lazy map, in memory O(N (d + segments)): nothing
holds N x N numbers. Flows between atoms are a matrix of their number squared, about (N / 4)^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.groups import group_flows, nearest_others, one_hot, symmetric_product
from flashmaps.segmentation.map_equation import codelength, compact, merge_to, plogp, shortest

_SWEEPS = 20  # of all tokens; each must shorten the code
_LEAST = 1e-9  # bits a sweep has to gain
_ATOMS = 2048  # more are joined along their strongest links first: their flows are a square matrix


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Tokens in segments, and what telling the walk by them costs.

    Attributes:
        tokens: [N] int64, 0 to count - 1.
        codelength: bits a step of the walk (the map equation).
        alone: bits a step if there were one segment: the entropy of where the walk is.
        share: [N, count] float32, of each token's flow, what goes to each segment; rows sum to 1.
    """

    tokens: np.ndarray
    codelength: float
    alone: float
    share: Tensor

    @property
    def count(self) -> int:
        """How many segments."""
        return int(self.tokens.max()) + 1


def nearest_tokens(A: AttentionMap) -> Tensor:
    """The nearest other token of each, by ``A``: [N] int64; of a single token, itself."""
    if A.shape[1] < 2:
        return torch.zeros(A.shape[1], dtype=torch.int64)
    return nearest_others(A)[1][0, :, 0].cpu()


def find_atoms(nearest: Tensor) -> np.ndarray:
    """Connected components of every token's nearest other token: [N] int64.

    Each holds at least two tokens. They are what segments are made of at first. ``nearest``: [N],
    by a map of like with like (keys on keys, features on features), which has no hubs.
    """
    return components(len(nearest), nearest.numpy())


def components(count: int, to: np.ndarray) -> np.ndarray:
    """Connected components of the links i - to[i]: [count] int64, named by first members."""
    root = np.arange(count)
    while True:  # pointers jump to the least name on the way, both ways, until nothing changes
        least = np.minimum(root, root[to])
        np.minimum.at(least, to, root)
        least = least[least]
        if np.array_equal(least, root):
            return compact(root)
        root = least


def symmetric(flow: Tensor) -> np.ndarray:
    """(F + F^T) / 2 in float64, scaled to sum to 1."""
    dense = flow.double().cpu().numpy()
    dense = dense + dense.T
    return dense / dense.sum()


def atom_flows(A: AttentionMap, labels: np.ndarray) -> np.ndarray:
    """Flows of the walk between groups of tokens: [k, k] float64, symmetric, sums to 1."""
    given = torch.from_numpy(labels)
    return symmetric(group_flows(A, given, given)[0])


def told_by(A: AttentionMap, tokens: np.ndarray) -> Segmentation:
    """The walk told by given segments: [N], 0 to count - 1. Two passes over the map."""
    labels = torch.from_numpy(tokens)
    x = one_hot(labels.to(A.device), int(tokens.max()) + 1, A.dtype)
    flow = symmetric_product(A, x)[0].cpu()  # of each token, to each segment
    between = torch.zeros(flow.shape[1], flow.shape[1], dtype=torch.float64)
    between.index_add_(0, labels, flow.double())
    pi = flow.double().sum(1)
    words = float(plogp((pi / pi.sum()).numpy()).sum())
    share = (flow / flow.sum(1, keepdim=True)).float()
    return Segmentation(tokens, codelength(symmetric(between), words), -words, share)


def walk_segments(
    A: AttentionMap,  # [1, N, N]
    atoms: np.ndarray,  # [N]
    *,
    count: int | None = None,
    seed: int = 0,
) -> Segmentation:
    """The segments whose code is shortest: moves of atoms, then of tokens.

    Token sweeps move every token to the segment it flows to most, and are kept while the code gets
    shorter. With ``count`` segments are joined, those first whose border costs most bits, or atoms
    are, where that is more than the code wants.
    """
    atoms = _joined(A, atoms)
    flow = atom_flows(A, atoms)
    groups = shortest(flow, np.random.default_rng(seed))
    if count is not None:
        start = groups if groups.max() + 1 >= count else np.arange(len(flow))
        groups = merge_to(flow, start, count)
    return sweep(A, compact(groups[atoms]), keep=count is not None)


def sweep(A: AttentionMap, tokens: np.ndarray, *, keep: bool = False) -> Segmentation:
    """Sweeps of single tokens to the segment they flow to most, while the code gets shorter.

    ``keep``: only sweeps that leave no segment empty.
    """
    best = told_by(A, tokens)
    for _ in range(_SWEEPS):
        new = best.share.argmax(1).numpy()
        if keep and len(np.unique(new)) < best.count:
            break
        found = told_by(A, compact(new))
        if found.codelength >= best.codelength - _LEAST:
            break
        best = found
    return best


def _joined(A: AttentionMap, atoms: np.ndarray) -> np.ndarray:
    """Atoms joined with the one they flow to most, again until there are at most ``_ATOMS``."""
    while (count := int(atoms.max()) + 1) > _ATOMS:
        flow = atom_flows(A, atoms)
        np.fill_diagonal(flow, -1.0)
        atoms = components(count, flow.argmax(1))[atoms]
    return atoms
