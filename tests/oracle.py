"""The formulas of the note on dense maps, in plain torch and one dtype, without flashmaps.

In float64 this is the truth. In the compute dtype it is the plain implementation whose error the
error budget allows twice of.

Every answer is a `Value`: what it is, and its magnitude, how far it moves (to first order) when
each entry of the map moves by its own size. Errors are measured in that unit, entry by entry, so
that one number says how good an output is: a column whose entries are all 1e-9 is held to the same
relative precision as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Rounding errors of sums behave like random walks: n of them make sqrt(n) units with a spread that
# stays below four of its standard deviations over the entries of one output (Higham and Mary, A new
# approach to probabilistic rounding error analysis, 2019).
FOUR_SIGMA = 4.0


class Value(NamedTuple):
    value: Tensor
    magnitude: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def centres(grid: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """(x, y) of each cell's centre, row by row: [h * w, 2]."""
    height, width = grid
    return torch.tensor(
        [[(x + 0.5) / width, (y + 0.5) / height] for y in range(height) for x in range(width)],
        dtype=dtype,
    )


def cells(grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """One-hot of the coarse cell that each token falls in: [h * w, h' * w']."""
    (height, width), (rows, columns) = grid, to
    index = [
        (y * rows // height) * columns + x * columns // width
        for y in range(height)
        for x in range(width)
    ]
    return torch.nn.functional.one_hot(torch.tensor(index), rows * columns).double()


def xlogx(p: Tensor) -> Tensor:
    return torch.where(p > 0, p * p.clamp_min(torch.finfo(p.dtype).tiny).log(), 0.0)


def entropy(p: Tensor, dim: int) -> Value:
    """-sum p log p; an entry's share moves by p (1 + |log p|)."""
    return Value(-xlogx(p).sum(dim), (p - xlogx(p)).sum(dim))


def positive(value: Tensor) -> Value:
    """A sum of positive terms moves by its own size."""
    return Value(value, value)


@dataclass
class Map:
    """A dense map and the size of one rounding of the computation that led to it."""

    values: Tensor  # [batch, N, M]
    lines: int  # what its rows sum to
    roundings: float  # how many units in the last place an entry may be off, relatively
    key_centres: Tensor | None = None  # [M, 2]
    faintest: float = 1.0  # the least mass that entries, and what they lost, were divided by
    heads: int = 1  # an entry is a sum of so many, each of which underflows by itself

    @property
    def distribution(self) -> Tensor:
        return self.values / self.lines

    def entropy(self) -> Value:
        return entropy(self.distribution, 2)

    def max(self) -> Value:
        return positive(self.values.amax(2))

    def expectation(self) -> Value:
        return positive(self.distribution @ self.key_centres)

    def diagonal(self) -> Value:
        return positive(self.values.diagonal(dim1=1, dim2=2))

    def column_sum(self) -> Value:
        return positive(self.values.sum(1))

    def column_max(self) -> Value:
        return positive(self.values.amax(1))

    def column_entropy(self) -> Value:
        """Streamed as log c - sum a log a / c, whose two terms are what rounding acts on."""
        mass = self.values.sum(1)
        some = mass > 0
        safe = mass.where(some, torch.ones_like(mass))
        plogp = xlogx(self.values).sum(1) / safe
        value = entropy(self.values / safe[:, None], 1).value
        return Value(value, torch.where(some, 1 + safe.log().abs() + plogp.abs(), 0.0))

    def product(self, x: Tensor) -> Value:
        x = x.to(self.values.dtype)
        return Value(self.values @ x, self.values @ x.abs())

    def transposed_product(self, y: Tensor) -> Value:
        y = y.to(self.values.dtype)
        return Value(self.values.mT @ y, self.values.mT @ y.abs())

    def pool(self, query_cells: Tensor | None, key_cells: Tensor | None) -> Value:
        """Means over the queries and sums over the keys of a cell, from one-hot [tokens, cells]."""
        values = self.values
        if query_cells is not None:
            values = (query_cells / query_cells.sum(0)).to(values.dtype).mT @ values
        if key_cells is not None:
            values = values @ key_cells.to(values.dtype)
        return positive(values)

    def __matmul__(self, other: Map) -> Map:
        return Map(
            self.values @ other.values,
            self.lines * other.lines,
            self.roundings + other.roundings + math.sqrt(self.values.shape[2]),
            other.key_centres,
            min(self.faintest, other.faintest),
            max(self.heads, other.heads),
        )


def attention(
    query: Tensor,  # [B, H, N, d]
    key: Tensor,  # [B', H, M, d]
    *,
    dtype: torch.dtype,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    head_weights: Tensor | list[float] | None = None,
    pairs: Tensor | list[list[int]] | None = None,
    normalize: str | None = None,
    query_grid: tuple[int, int] | None = None,
    key_grid: tuple[int, int] | None = None,
    lse: Tensor | None = None,  # known to be right, so not needed here
) -> tuple[Map, Value]:
    """normalise(sum_h w_h softmax(scale * Q_h K_h^T + mask)), and the log-sum-exp of each head."""
    query, key = query.to(dtype), key.to(dtype)
    batch = max(query.shape[0], key.shape[0])
    bias = torch.zeros(key.shape[0], key.shape[2], dtype=dtype)
    if key_mask is not None and key_mask.dtype == torch.bool:
        bias = bias.masked_fill(~key_mask, -math.inf)
    elif key_mask is not None:
        bias = bias + key_mask.to(dtype)
    if pairs is None:
        query, key, bias = (t.expand(batch, *t.shape[1:]) for t in (query, key, bias))
    else:
        pairs = torch.as_tensor(pairs)
        query, key, bias = query[pairs[:, 0]], key[pairs[:, 1]], bias[pairs[:, 1]]
    heads, keys, width = key.shape[1:]
    scale = width**-0.5 if scale is None else scale
    bias = bias[:, None, None]
    scores = scale * torch.einsum("bhnd,bhmd->bhnm", query, key) + bias
    lse = scores.logsumexp(-1)
    weights = torch.full((heads,), 1 / heads) if head_weights is None else head_weights
    weights = torch.as_tensor(weights, dtype=dtype)
    if head_weights is None:
        values = scores.softmax(-1).mean(1)
    else:
        values = torch.einsum("h,bhnm->bnm", weights, scores.softmax(-1))
    lines = 1
    if normalize in ("rows", "columns"):
        height, width = key_grid or (math.isqrt(keys),) * 2
        block = values.unflatten(2, (height, width))
        lines, axis = (height, 3) if normalize == "rows" else (width, 2)
        mass = block.sum(axis, keepdim=True)
        values = torch.where(mass > 0, block / mass.clamp_min(1e-300), 0.0).flatten(2)
    # One entry: a score of size S is off by S units, so its exponential by S units of itself; the
    # exponential, the division and the weight round a few times; the sums over keys (or queries,
    # for columns) and heads, each like a random walk.
    size = scale * torch.einsum("bhnd,bhmd->bhnm", query.abs(), key.abs()).abs()
    size = torch.where(bias > -math.inf, size.abs() + bias.abs(), 0.0).amax().item()
    roundings = abs(size) + math.sqrt(max(values.shape[1:])) + math.sqrt(heads) + 4
    if key_grid is None and math.isqrt(keys) ** 2 == keys:
        key_grid = (math.isqrt(keys),) * 2
    at = None if key_grid is None else centres(key_grid, dtype)
    return Map(values, lines, roundings, at, heads=heads), Value(lse, torch.ones_like(lse))


def band(of: Map, dtype: torch.dtype) -> float:
    """The part of the budget that does not depend on how well torch happened to do."""
    unit = torch.finfo(compute_dtype(dtype)).eps / 2
    return FOUR_SIGMA * unit * of.roundings


def vanishing(of: Map, dtype: torch.dtype) -> float:
    """What a sum over one row or column of the map may lose to entries that underflow."""
    terms = of.heads * max(of.values.shape[1:])
    return torch.finfo(compute_dtype(dtype)).tiny * terms / of.faintest


def error(got: Tensor, truth: Value, floor: float | Tensor) -> Tensor:
    """|got - truth| beyond what may vanish, in units of the magnitude, entry by entry."""
    off = ((got.double() - truth.value).abs() - floor).clamp_min(0)
    return torch.where(off > 0, off / truth.magnitude, 0.0)


def torch_error(plain: Value, truth: Value, of: Map, dtype: torch.dtype) -> float:
    """The largest error of plain torch. In float64 it is the truth: its own band stands for it."""
    if dtype == torch.float64:
        return band(of, dtype)
    return error(plain.value, truth, vanishing(of, dtype)).max().item()


def assert_within_budget(
    what: str, got: Tensor, truth: Value, plain: Value, of: Map, dtype: torch.dtype
) -> None:
    """Error at most twice that of plain torch in the compute dtype, plus the `band`."""
    assert got.dtype == compute_dtype(dtype), f"{what} is {got.dtype}"
    assert got.shape == truth.value.shape, f"{what} is {got.shape}, not {truth.value.shape}"
    assert torch.isfinite(got).all(), f"{what} has {int((~got.isfinite()).sum())} NaN or inf"
    floor = vanishing(of, dtype)
    errors = error(got, truth, floor)
    theirs = torch_error(plain, truth, of, dtype)
    budget = 2 * theirs + band(of, dtype)
    worst = errors.argmax().item()
    assert errors.max().item() <= budget, (
        f"{what} is off by {errors.max().item():.3g} of its magnitude at flat index {worst}: "
        f"got {got.flatten()[worst].item():.9g}, true {truth.value.flatten()[worst].item():.9g}; "
        f"the budget is 2 x {theirs:.3g} (plain torch) + {band(of, dtype):.3g} (band)"
    )


def assert_column_entropy(
    what: str, got: Tensor, truth: Map, plain: Map, dtype: torch.dtype
) -> None:
    """Within budget where a column is not mostly underflow; elsewhere between 0 and log N."""
    tiny = torch.finfo(compute_dtype(dtype)).tiny
    slack = 2 * band(truth, dtype) * (1 - math.log(tiny))  # both terms of the emptiest column
    assert (got >= -slack).all(), f"{what} is negative: {got.min().item():.3g}"
    most = math.log(truth.values.shape[1]) + slack
    assert (got <= most).all(), f"{what} is {got.max().item():.6g}, more than log N = {most:.6g}"
    some = truth.values.sum(1) > vanishing(truth, dtype) / band(truth, dtype)
    true, rival = (Value(*(part[some] for part in m.column_entropy())) for m in (truth, plain))
    if some.any():
        assert_within_budget(what, got[some], true, rival, truth, dtype)


def assert_picks_maximum(
    what: str, index: Tensor, truth: Tensor, plain: Tensor, of: Map, dtype: torch.dtype, dim: int
) -> None:
    """``index`` along ``dim`` picks an entry as large as the maximum, up to the entries' budget."""
    assert index.dtype == torch.int64
    size = truth.shape[dim]
    assert ((index >= 0) & (index < size)).all(), f"{what} has an index outside 0 .. {size - 1}"
    picked = truth.gather(dim, index.unsqueeze(dim)).squeeze(dim)
    largest = truth.amax(dim)
    floor = vanishing(of, dtype)
    entries = torch_error(positive(plain), positive(truth), of, dtype)
    allowed = 2 * (2 * entries + band(of, dtype))  # both entries may be off
    short = error(picked, positive(largest), floor)
    assert short.max() <= allowed, (
        f"{what} picks an entry {short.max().item():.3g} below the maximum, relatively; "
        f"the budget is {allowed:.3g}"
    )
