"""A map on a finer grid, so that maps of several levels of a model can be averaged.

A coarse token's row goes to every fine token in its cell, and what it gives a coarse key is shared
out among the fine tokens of that key's cell: A'_ij = A_{c(i) c(j)} / |cell of j|. Rows still sum to
what they summed to, and `pool` to the coarse grid gives the coarse map back. This is what DiffSeg
does with dense maps (Tian et al., CVPR 2024), here in O(N d): queries and keys are repeated, and
one more dimension of the head takes the logarithm of the cell's size where cells differ in size.
"""

from __future__ import annotations

import torch

from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import Grid, cell_index
from flashmaps.maps.validation import need_grid


def refined(A: AttentionMap, query_grid: Grid, key_grid: Grid | None = None) -> AttentionMap:
    """``A`` on finer grids, lazy: A'_ij = A_{c(i) c(j)} / |cell of j|.

        wide = fm.AttentionMap.average([fm.refined(A16, (32, 32)), A32])

    Args:
        A: a map with ``query_grid`` and ``key_grid``, normalize="block", without a given lse.
        query_grid, key_grid: (height, width), no side smaller than the map's; ``key_grid`` is
            ``query_grid`` where left out. Cells are those of `AttentionMap.pool`.

    Time is that of a map of the fine grids; memory its queries and keys. Raises ValueError.
    """
    key_grid = query_grid if key_grid is None else key_grid
    problem = A.problem
    if problem.normalize != "block":
        raise ValueError(f"refined() wants normalize='block', not {problem.normalize!r}")
    if problem.lse is not None:
        raise ValueError("refined() of a map with a given lse: make it without")
    if problem.masks_queries:
        raise ValueError("refined() takes a mask over keys, not one that differs between queries")
    own = (
        need_grid("query_grid", A.query_grid, A.shape[1], "refined"),
        need_grid("key_grid", A.key_grid, A.shape[2], "refined"),
    )
    for name, grid, coarse in zip(
        ("query_grid", "key_grid"), (query_grid, key_grid), own, strict=True
    ):
        if len(grid) != 2 or grid[0] < coarse[0] or grid[1] < coarse[1]:
            raise ValueError(f"{name}={tuple(grid)} is not finer than the map's, {coarse}")
    device = problem.query.device
    rows = cell_index(query_grid, own[0], device=device)
    columns = cell_index(key_grid, own[1], device=device)
    query, key = problem.query[:, :, rows], problem.key[:, :, columns]
    scale = problem.scale
    size = torch.bincount(columns, minlength=A.shape[2])
    if int(size.min()) != int(size.max()):
        # In half precision the logarithm would be rounded by a percent.
        query, key = query.to(A.dtype) * scale, key.to(A.dtype)
        scale = 1.0
        log_size = size.to(A.dtype).log()[columns]
        query = torch.cat([query, torch.ones_like(query[..., :1])], -1)
        key = torch.cat([key, (-log_size)[None, None, :, None].expand(*key.shape[:3], 1)], -1)
    bias = None if problem.bias is None else problem.bias[:, columns]
    made = AttentionMap(
        query,
        key,
        scale=scale,
        key_mask=bias,
        head_weights=problem.head_weights,
        pairs=problem.pairs,
        query_grid=query_grid,
        key_grid=key_grid,
        backend=A.backend,
    )
    made._lse_offset = A._lse_offset
    return made
