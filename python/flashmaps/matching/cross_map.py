"""The lazy map from one image's tokens, or from points between them, to another image's tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from flashmaps.diffusion.features import Features
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import centres
from flashmaps.matching.consensus import offsets, votes
from flashmaps.matching.options import (
    COMPARE,
    MapKeywords,
    MatchKeywords,
    MatchOptions,
    map_options,
)
from flashmaps.matching.points import corners
from flashmaps.matching.readout import read, read_map

TEMPERATURE = 0.005  # of the softmax over cosines; chosen on known warps of other photographs
_QUERIES = 2**15  # points that are asked for at a time
_ENTRIES = 2**23  # of the rows of points' neighbours that are held at a time


def cross_map(
    of: Features,
    to: Features,
    options: MatchOptions | None = None,
    *,
    pairs: Tensor | None = None,
    backend: str = "auto",
    **given: Unpack[MapKeywords],
) -> AttentionMap:
    """The map from one image's tokens to the other's, lazy [1, N, M].

    compare="qk": cross-self-attention, softmax(scale Q K^T / temperature), the note's eq. 2.4;
        ``temperature`` is 1 unless given.
    compare="kk", "qq", "features": softmax(cosine / temperature) of keys with keys, queries with
        queries, or the outputs of the layers' blocks, as one head each (``outputs=True`` of
        :func:`flashmaps.diffusion.features.features`); ``temperature`` is 0.005 unless given.
        Vectors of each head are scaled to length 1, since a long one would otherwise win
        everywhere.
    normalize: "block", "rows" or "columns", see :class:`flashmaps.AttentionMap`.
    options: these three, and those that say how the map is read, which nothing here depends on.
    pairs: [P, 2], where both hold the queries and keys of several images (see pairs.py).
    """
    options = map_options(options, given)
    ours, theirs = (
        _compared(f, name, options)
        for f, name in zip((of, to), COMPARE[options.compare], strict=True)
    )
    return _map(ours, theirs, of, to, options, pairs, backend)


def cross_maps(
    of: Features,
    to: Features,
    options: MatchOptions,
    *,
    pairs: Tensor | None = None,
    backend: str = "auto",
) -> tuple[AttentionMap, AttentionMap]:
    """:func:`cross_map` there and, with ``pairs`` turned around, back.

    The vectors of both are scaled once.
    """
    query, key = COMPARE[options.compare]
    if query == key:
        here = _compared(of, key, options)
        there = here if to is of else _compared(to, key, options)
        sides = (here, there), (there, here)
    else:
        sides = (
            (_compared(of, query, options), _compared(to, key, options)),
            (_compared(to, query, options), _compared(of, key, options)),
        )
    turned = None if pairs is None else pairs.flip(1)
    return (
        _map(*sides[0], of, to, options, pairs, backend),
        _map(*sides[1], to, of, options, turned, backend),
    )


def _compared(of: Features, name: str, options: MatchOptions) -> Tensor:
    """The vectors of one image that are compared, [B, H, N, d]."""
    x: Tensor | None = getattr(of, name)
    if x is None:
        raise ValueError(
            "compare='features' needs the outputs of the layers' blocks; take the features with "
            "outputs=True"
        )
    if options.compare == "qk":
        return x
    # bfloat16 rounds a cosine by 0.002, which is much beside the temperature.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.normalize(x, dim=-1)


def _map(
    ours: Tensor,
    theirs: Tensor,
    of: Features,
    to: Features,
    options: MatchOptions,
    pairs: Tensor | None,
    backend: str,
) -> AttentionMap:
    temperature = options.temperature
    weights: Tensor | None = of.head_weights
    if options.compare == "qk":
        scale = of.scale / (1.0 if temperature is None else temperature)
    else:
        scale = 1 / (TEMPERATURE if temperature is None else temperature)
    if options.compare == "features":
        weights = None  # blocks count alike, however many heads their layers have
    whole = ours.shape[2] == of.grid[0] * of.grid[1]  # else: points between tokens
    return AttentionMap(
        ours,
        theirs,
        scale=scale,
        head_weights=weights,
        pairs=pairs,
        normalize=options.normalize,
        query_grid=of.grid if whole else None,
        key_grid=to.grid,
        backend=backend,
    )


def place_points(
    of: Features,
    to: Features,
    points: Tensor,
    options: MatchOptions | None = None,
    *,
    backend: str = "auto",
    **given: Unpack[MatchKeywords],
) -> Tensor:
    """Where points of one image lie in the other, in unit squares, from the rows they need alone.

    Args:
        of, to: features of B images each; usually B is 1.
        points: [B, n, 2], (x, y).
        options: how the map is made and read; its fields may be given as keywords.

    Returns [B, n, 2] float32.
    """
    options = replace(options or MatchOptions(), **given)
    readout, window, between = options.readout, options.window, options.carried_by
    if not points.shape[1]:
        return points.float().cpu()
    if readout == "consensus":
        if between == "query":
            return _agreed(of, to, points, options, backend)
        index, weight = corners(points, of.grid, smooth=between == "bilinear")
        here = centres(of.grid)[index]  # [B, n, 4 or 1, 2]
        there = _agreed(of, to, here.flatten(1, 2), options, backend).reshape(here.shape)
        return points + (weight[..., None] * (there - here)).sum(-2)
    if between == "query":
        parts = [
            read_map(cross_map(at_points(of, part), to, options, backend=backend), readout, window)
            for part in points.split(_QUERIES, dim=1)
        ]
        return torch.cat(parts, dim=1).float().cpu()
    index, weight = corners(points, of.grid, smooth=between == "bilinear")
    A = cross_map(at_tokens(of, index.flatten(1)), to, options, backend=backend)
    there = read_map(A, readout, window).float().cpu().reshape(*index.shape, 2)
    return points + (weight[..., None] * (there - centres(of.grid)[index])).sum(-2)


def _agreed(
    of: Features, to: Features, points: Tensor, options: MatchOptions, backend: str
) -> Tensor:  # [B, n, 2] float32
    """Where the rows of the points' neighbours agree that [B, n, 2] points lie."""
    height, width = of.grid
    away = torch.tensor(offsets(of.grid)) / torch.tensor([width, height])  # [K, 2]
    around = points[:, None] + away.to(points)[:, None]  # [B, K, n, 2]
    inside = ((around >= 0) & (around <= 1)).all(-1)
    row = len(points) * len(away) * to.grid[0] * to.grid[1]  # entries, for one point of each image
    places = []
    for part, within in zip(
        *(x.split(max(1, _ENTRIES // row), dim=2) for x in (around, inside)), strict=True
    ):
        A = cross_map(at_points(of, part.flatten(1, 2)), to, options, backend=backend)
        rows = A.to_dense().unflatten(1, part.shape[1:3]) * within[..., None].to(A.device)
        agreed = votes(rows.unbind(1), of.grid, to.grid)
        places.append(read(agreed, to.grid, "window", options.window))
    return torch.cat(places, dim=1).float().cpu()


def at_tokens(of: Features, index: Tensor) -> Features:
    """The features of some tokens, [B, n] row-major, in place of all."""

    def picked(x: Tensor) -> Tensor:  # [B, H, N, d] to [B, H, n, d]
        if not x.shape[2]:  # left out, since it is not compared
            return x
        where = index.to(x.device)[:, None, :, None]
        return x.gather(2, where.expand(-1, x.shape[1], -1, x.shape[3]))

    output = None if of.output is None else picked(of.output)
    return replace(of, query=picked(of.query), key=picked(of.key), output=output)


def at_points(of: Features, points: Tensor) -> Features:
    """The features at points of the image, [B, n, 2] in the unit square, in place of its tokens.

    Vectors are interpolated bilinearly between token centres, and are those of the nearest token
    beyond the outermost centres.
    """
    index, weight = corners(points, of.grid, smooth=True)
    around = at_tokens(of, index.flatten(1))

    def mixed(x: Tensor) -> Tensor:  # [B, H, 4 n, d] to [B, H, n, d]
        if not x.shape[2]:
            return x
        shares = weight.to(x)[:, None, :, :, None]
        return (x.unflatten(2, index.shape[1:]) * shares).sum(3)

    output = None if around.output is None else mixed(around.output)
    return replace(of, query=mixed(around.query), key=mixed(around.key), output=output)
