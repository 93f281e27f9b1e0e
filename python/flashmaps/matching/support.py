"""Neighbours' support: how far the way back of a match's neighbours agrees with the match.

Source token i lies, somebody says, at target token t. The neighbours t + d of t, d on a grid of
9 x 9 with ``spacing`` tokens between them, have matches in the source, g(t + d) = argmax_k
A_ts[t + d, k]. Where i and t show the same thing, these lie around i as the neighbours lie around
t, turned, scaled or mirrored, and neighbours that can be told at all come back to themselves:

    support(i, t) = max_S sum_d w_d c_{t+d} exp(-|x_{g(t+d)} - x_i - S d|^2 / r_d^2) / sum_d w_d
    c_j = exp(-|x_{f(g(j))} - x_j|^2 / r^2),  r = 2/3 of the spacing,  r_d = r + 0.15 |d|

over the similarities S and with the weights w of :mod:`flashmaps.matching.consensus`, distances in
tokens, d = 0 left out and neighbours outside of the target saying nothing. It is between 0 and 1,
and 1 in the midst of what a similarity maps to the other image and back. c comes of the hard cycle
error of the note's inverse mapping (eq. 2.7), of the neighbours and from the target's side. That
wrong matches have no neighbours that move alike is what Bian et al., "GMS: Grid-based Motion
Statistics", 2017, tell them by.

r, 0.15 and the rings were chosen on 48 pairs of the world's validation split.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashmaps.maps.grids import Grid
from flashmaps.matching.consensus import SCALES, offsets, similarities, spacing, weights

RINGS = 4  # of neighbours, square
_CLOSE = 2 / 3  # r, in spacings
_NOTHING = 4.0  # r_d's away: exp(-16)
_BENT = 0.15  # what r_d grows by, with the neighbour's distance


def support(
    forward: Tensor,
    backward: Tensor,
    source_grid: Grid,
    target_grid: Grid,
    tokens: Tensor | None = None,
    placed: Tensor | None = None,
) -> Tensor:
    """support(i, t), [B, n] float32 in 0 to 1.

    Args:
        forward: f, [B, N_s] int64, and ``backward``: g, [B, N_t] int64; see ``RoundTrip``.
        source_grid, target_grid: (height, width) of the tokens.
        tokens: i, [B, n] int64; default every source token.
        placed: t, [B, n] int64, the target tokens that they are said to lie at; default f(i).
    """
    source, target = _places(source_grid, forward), _places(target_grid, forward)  # [N, 2]
    height, width = target_grid
    close = _CLOSE * spacing(target_grid)
    again = target[forward.gather(1, backward)]  # where f(g(j)) lies
    told = (-(again - target).square().sum(-1) / close**2).exp()  # c, [B, N_t]
    if tokens is None:
        tokens = torch.arange(forward.shape[1], device=forward.device).expand_as(forward)
    at = target[forward.gather(1, tokens) if placed is None else placed]  # [B, n, 2]
    ratio = max(source_grid) / max(target_grid)  # source tokens as long as a target token
    turns = ratio * torch.tensor(similarities(), device=at.device, dtype=at.dtype)  # [S, 2, 2]
    each = torch.arange(len(forward), device=at.device)[:, None]
    total = at.new_zeros(len(turns), at[..., 0].numel())  # [S, B n]
    whole = 0.0
    shares = weights(target_grid, RINGS)
    for d, share in zip(offsets(target_grid, RINGS), shares, strict=True):
        if d == (0, 0):
            continue
        whole += share
        away = torch.tensor(d, device=at.device, dtype=at.dtype)
        x, y = (at + away).long().unbind(-1)  # [B, n]
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        moved = source[backward[each, index]] - source[tokens]
        reach = ratio * (close + _BENT * math.hypot(*d))
        weight = share * told[each, index] * inside
        # What is left out would add less than a millionth.
        far = max(SCALES) * ratio * math.hypot(*d) + _NOTHING * reach
        some = ((weight > 1e-7) & (moved.square().sum(-1) < far**2)).flatten().nonzero()[:, 0]
        off = (moved.flatten(0, 1)[some] - (turns @ away)[:, None]).square().sum(-1)  # [S, k]
        total.index_add_(1, some, weight.flatten()[some] * (-off / reach**2).exp())
    return total.amax(0).view(at.shape[:2]) / whole


def _places(grid: Grid, like: Tensor) -> Tensor:
    """(x, y) of every token in tokens, [N, 2] float32."""
    y, x = torch.meshgrid(*(torch.arange(size, device=like.device) for size in grid), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1).float()
