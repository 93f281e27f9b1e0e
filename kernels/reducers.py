"""The reducers: what a tile of the map adds to each statistic. A new statistic is one more.

A tile is [R, C]: a program's own tokens in the rows, some of those that it streams in the columns;
states are [R] or [R, something], and see the streamed tokens in ascending order. Elements of tokens
that are not there are 0.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from flashmaps.kernels.tile import NO_INDEX, TINY, xlog2x


@triton.jit
def add_xlogx(plogp, tile, FAST_LOG: tl.constexpr, FLOORED: tl.constexpr):
    """sum_j p_j log2 p_j, from which the entropy of a row or a column is made."""
    return plogp + tl.sum(xlog2x(tile, FAST_LOG, FLOORED), 1)


@triton.jit
def best_of(tile, index, there, EVEN: tl.constexpr):
    """Maximum of each row of a tile and the lowest index where it stands: [R], [R]."""
    if EVEN:
        candidates = tile
    else:
        candidates = tl.where(there[None, :], tile, -1.0)
    best = tl.max(candidates, 1)
    where = tl.where(candidates == best[:, None], index[None, :], NO_INDEX)
    return best, tl.min(where, 1)


@triton.jit
def better(top, argtop, best, where):
    """The maximum so far beside a later one: only a larger one counts, so ties go to the lowest."""
    return tl.maximum(top, best), tl.where(best > top, where, argtop)


@triton.jit
def positions(first, grid_width, grid_height, C: tl.constexpr):
    """Cell centres (x, y) of C keys of a grid from ``first`` on: [C], [C].

    Divisions are slow: one of whole numbers for the first key, and from there floats, which count
    exactly, times a reciprocal.
    """
    row = first // grid_width
    along = (first - row * grid_width + tl.arange(0, C)).to(tl.float32)
    width = tl.cast(grid_width, tl.float32)
    per_column = 1.0 / width
    down = tl.floor((along + 0.5) * per_column)
    x = (along - down * width + 0.5) * per_column
    y = (tl.cast(row, tl.float32) + down + 0.5) * (1.0 / tl.cast(grid_height, tl.float32))
    return x, y


@triton.jit
def pick_diagonal(diagonal, tile, kept_index, streamed_index):
    """A_ii: of each row at most one element of all tiles."""
    same = kept_index[:, None] == streamed_index[None, :]
    return diagonal + tl.sum(tl.where(same, tile, 0.0), 1)


@triton.jit
def add_product(product, tile, operand, PRECISION: tl.constexpr):
    """sum_j p_j x_j, [R, X], with the operand's tile [C, X]."""
    return tl.dot(tile, operand, product, input_precision=PRECISION)


@triton.jit
def add_pooled(sums, tile, belongs, PRECISION: tl.constexpr):
    """sum of p_j over the keys of each cell, [R, X]; ``belongs`` [C, X] says which key is in which.

    With "bf16" a product with ones: three parts of bfloat16 hold all digits of a float32.
    """
    if PRECISION == "bf16":
        ones = belongs.to(tl.bfloat16)
        high = tile.to(tl.bfloat16)
        rest = tile - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, ones, tl.dot(middle, ones, tl.dot(low, ones, sums)))
    else:
        return tl.dot(tile, belongs.to(tl.float32), sums, input_precision=PRECISION)


@triton.jit
def empty_slots(k, R: tl.constexpr, K: tl.constexpr):
    """The k largest of each row, before any: values [R, K], indices [R, K].

    Slots beyond k hold infinity, so that nothing replaces them.
    """
    slot = tl.arange(0, K)[None, :] + tl.zeros((R, 1), tl.int32)
    return tl.where(slot < k, -1.0, float("inf")), NO_INDEX - 1 - slot


@triton.jit
def insert_largest(values, indices, tile, index, there):
    """Put into the slots what of a tile belongs there, one element of each row at a time.

    A row's largest element replaces its smallest slot while it is larger; of slots that are equal
    the one with the highest index goes. After the first tiles few elements qualify.
    """
    left = tl.where(there[None, :], tile, -2.0)
    best = tl.max(left, 1)
    worst = tl.min(values, 1)
    while tl.max((best > worst).to(tl.int32), 0) > 0:
        where = tl.min(tl.where(left == best[:, None], index[None, :], NO_INDEX), 1)
        out = tl.max(tl.where(values == worst[:, None], indices, -1), 1)
        slot = (values == worst[:, None]) & (indices == out[:, None]) & (best > worst)[:, None]
        values = tl.where(slot, best[:, None], values)
        indices = tl.where(slot, where[:, None], indices)
        left = tl.where(index[None, :] == where[:, None], -2.0, left)
        best = tl.max(left, 1)
        worst = tl.min(values, 1)
    return values, indices


@triton.jit
def take_largest(values, indices):
    """The largest of the slots, among equals that of the lowest index; and the slots without it."""
    filled = values < float("inf")
    best = tl.max(tl.where(filled, values, -2.0), 1)
    same = filled & (values == best[:, None])
    where = tl.min(tl.where(same, indices, NO_INDEX), 1)
    return best, where, tl.where(same & (indices == where[:, None]), -2.0, values)


@triton.jit
def entropy_of(plogp, total):
    """log c - sum a log a / c in nats, of a column with mass c; 0 for one that has underflowed."""
    some = total >= TINY
    total = tl.where(some, total, 1.0)
    return tl.where(some, tl.log(total) - plogp / total, 0.0)
