"""A few eigenpairs of a square map's walk, by products with the lazy map alone.

The normalised affinity D^-1/2 W D^-1/2 of spectral clustering and normalised cuts (Shi and Malik,
2000), W = (A + A^T) / 2 and D = diag(W 1): it is symmetric, its eigenvalues lie in [-1, 1], the
largest is 1, and v / sqrt(D) are those of the walk D^-1 W. A map of one head whose logits are
symmetric (likeness: keys with the same keys) is such a walk as it is: with D = exp(lse)

    D^1/2 A D^-1/2 = exp(scale q_i . q_j - (lse_i + lse_j) / 2)

is symmetric, at one product instead of two, and has the eigenvalues of A itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashmaps.arguments import whole
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.groups import symmetric_product
from flashmaps.maps.lazy import check_square


def normalized_product(A: AttentionMap, x: Tensor, *, reversible: bool = False) -> Tensor:
    """D^-1/2 W D^-1/2 @ x with W = (A + A^T) / 2, D = diag(W 1): [batch, N, C] to [batch, N, C].

    ``reversible``: D^1/2 A D^-1/2 @ x with D = exp(lse) instead, which is symmetric where A has one
    head and queries that are its keys; ValueError for other maps.
    """
    check_square("normalized_product", A.shape)
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != A.shape[:2]:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x has {got}; wanted [{A.shape[0]}, {A.shape[1]}, columns]")
    return _product(A, x, _scaling(A, reversible), reversible)


def eigenpairs(
    A: AttentionMap, k: int, *, reversible: bool = False, tol: float = 1e-6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of `normalized_product`'s matrix and their vectors, largest first.

    Lanczos with restarts (scipy's ARPACK), begun from a seeded vector; each step is one product
    with the lazy map (two, if it is not ``reversible``), in O(N (d + k)) memory.

    Args:
        A: a square map.
        k: from 1 to N - 1.
        reversible: see `normalized_product`.
        tol: of an eigenvalue, relative; float32 products carry no more than about 1e-6.
        seed: of the first vector; the same gives the same.

    Returns values [batch, k] and vectors [batch, N, k] of length 1, in the map's dtype, each with
    its largest entry positive.

    Raises ValueError for a map that is not square, or not reversible where that is claimed, or for
    k out of range; RuntimeError where Lanczos does not converge.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    check_square("eigenpairs", A.shape)
    batch, tokens, _ = A.shape
    k = whole("k", k, 1)
    if k >= tokens:
        raise ValueError(f"k={k}: a map of {tokens} tokens gives at most {tokens - 1} eigenpairs")
    with torch.no_grad():
        root = _scaling(A, reversible)
        one = np.dtype(np.float64 if A.dtype == torch.float64 else np.float32)
        start = np.random.default_rng(seed).standard_normal(tokens).astype(one)
        values = torch.empty(batch, k, dtype=A.dtype, device=A.device)
        vectors = torch.empty(batch, tokens, k, dtype=A.dtype, device=A.device)
        for index in range(batch):

            def product(x: np.ndarray, index: int = index) -> np.ndarray:
                # The other maps of the batch get zeros: Lanczos goes map by map.
                full = torch.zeros(batch, tokens, 1, dtype=A.dtype, device=A.device)
                full[index, :, 0] = torch.from_numpy(np.ascontiguousarray(x.ravel())).to(full)
                return _product(A, full, root, reversible)[index, :, 0].cpu().numpy()

            operator = LinearOperator((tokens, tokens), matvec=product, dtype=one)
            try:
                found, v = eigsh(operator, k=k, which="LA", v0=start, tol=tol)
            except ArpackNoConvergence as error:
                raise RuntimeError(
                    f"Lanczos found {len(error.eigenvalues)} of {k} eigenpairs to tol={tol:g}: "
                    "ask for a larger tol or another k (equal eigenvalues converge slowly)"
                ) from None
            order = np.argsort(-found, kind="stable")
            v = v[:, order]
            v = v * np.sign(v[np.abs(v).argmax(0), np.arange(k)])
            values[index] = torch.from_numpy(found[order]).to(values)
            vectors[index] = torch.from_numpy(np.ascontiguousarray(v)).to(vectors)
    return values, vectors


def _scaling(A: AttentionMap, reversible: bool) -> Tensor:
    """D^1/2 up to a factor of each map: [batch, N, 1]."""
    if not reversible:
        degree = (1.0 + A.column_sum()) if A.problem.lines == 1 else _degree(A)
        return degree.sqrt()[..., None]
    problem = A.problem
    alike = problem.query.shape == problem.key.shape and torch.equal(problem.query, problem.key)
    if problem.heads != 1 or problem.pairs is not None or problem.bias is not None or not alike:
        raise ValueError(
            "reversible=True wants a map of one head, without pairs or masks, whose queries are "
            "its keys (compare='kk' of one head, 'features' of one block): this one is not"
        )
    if problem.normalize != "block":
        raise ValueError(f"reversible=True wants normalize='block', not {problem.normalize!r}")
    lse = A.lse[:, 0]
    return torch.exp((lse - lse.amax(1, keepdim=True)) / 2)[..., None]


def _degree(A: AttentionMap) -> Tensor:
    ones = torch.ones(A.shape[0], A.shape[2], 1, dtype=A.dtype, device=A.device)
    return (A @ ones)[..., 0] + A.column_sum()


def _product(A: AttentionMap, x: Tensor, root: Tensor, reversible: bool) -> Tensor:
    x = x.to(root)
    if reversible:
        return (A @ (x / root)) * root
    # W's rows sum to (row + column) / 2, and root^2 is twice that.
    return symmetric_product(A, x / root) * (2.0 / root)
