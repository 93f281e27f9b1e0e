"""The kernels of pass two: all that is reduced over one side of the map, and parts together.

`launch_reduce` runs them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from flashmaps.kernels.reducers import (
    add_pooled,
    add_product,
    add_xlogx,
    best_of,
    better,
    empty_slots,
    entropy_of,
    insert_largest,
    pick_diagonal,
    positions,
    take_largest,
)
from flashmaps.kernels.tile import (
    LN_2,
    composed_tile,
    mean_tile,
    normalized,
    of_pair,
    resident_tile,
    resident_tokens,
    up_to,
)


@triton.jit
def reduce_kernel(
    kept,  # the side whose tokens the programs share out, [B, H, N or M, d]
    kept_maps,
    kept_batch,
    kept_head,
    kept_token,
    kept_dim,
    num_kept,
    streamed,  # the side that is reduced over
    streamed_maps,
    streamed_batch,
    streamed_head,
    streamed_token,
    streamed_dim,
    num_streamed,
    bias,  # [B', M] or None
    pairs,  # [P, 2] or None
    weights,  # [H] or None
    lse,  # [P, H, N]; not read if WHOLE
    line_mass,  # [P, N, lines] or None
    grid_width,  # of the keys
    grid_height,
    lines,
    maps,
    heads,
    splits,
    scale,  # times log2 e
    # For strips of a composition, whose tile is a product: A's columns, and where the strip and
    # the block of columns begin in the whole.
    inner,
    kept_first,
    streamed_first,
    # For sums over the keys of a cell: the keys sorted by cell, each one's cell, and where each
    # block of X cells begins among them.
    order,  # [M] int64 or None
    cells,  # [M] int64 or None
    bounds,  # [parts + 1] int64 or None
    operand,  # [P, streamed, columns] or None
    operand_map,
    operand_token,
    operand_column,
    columns,
    parts,  # blocks of X columns, or of X cells
    k,
    # The outputs, [splits, P, kept, ...], or None where they are not wanted.
    total,  # sums
    plogp,  # sum p log p, nats
    entropy,  # of what is kept; only where there are no splits
    top,
    argtop,  # int64
    expectation,  # [..., 2]
    diagonal,
    product,  # [..., columns]
    dense,  # [P, kept, streamed]
    largest,  # [..., k]
    where_largest,  # [..., k] int64
    COMPOSED: tl.constexpr,  # kept: rows of A; streamed: columns of A'
    INNER: tl.constexpr,
    KEYS_KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
    LINES: tl.constexpr,  # "", "rows" or "columns"
    R: tl.constexpr,
    C: tl.constexpr,
    X: tl.constexpr,  # columns of the operand, or cells, that a program has
    K: tl.constexpr,  # slots for the k largest
    D: tl.constexpr,
    D_REST: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND_PRECISION: tl.constexpr,
    FAST_LOG: tl.constexpr,
    FLATTEN: tl.constexpr,
    HEADS: tl.constexpr,  # how many there are, where all heads' kept tokens stay on chip; else 0
    AHEAD: tl.constexpr,  # a head's product comes before the exponentials of the head before it
):
    """Everything that is reduced over one side of the map, or written of it: pass two of two.

    Which outputs there are decides what is compiled. A program makes the tiles of its R kept
    tokens beside the streamed tokens of its split, and hands each to the reducers.
    """
    kept_batch, kept_head, kept_token = kept_batch * UNIT, kept_head * UNIT, kept_token * UNIT
    streamed_batch, streamed_head = streamed_batch * UNIT, streamed_head * UNIT
    streamed_token *= UNIT
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_kept, R)
    part = pid % parts
    block = pid // parts % blocks
    split = pid // parts // blocks % splits
    map = pid // parts // blocks // splits
    of_kept, of_streamed = map, map
    if pairs is not None:
        of_kept = of_pair(pairs, map, 1 if KEYS_KEPT else 0, kept_maps)
        of_streamed = of_pair(pairs, map, 0 if KEYS_KEPT else 1, streamed_maps)
    of_kept, of_streamed = tl.cast(of_kept, tl.int64), tl.cast(of_streamed, tl.int64)
    of_map = tl.cast(map, tl.int64)
    if KEYS_KEPT:
        num_queries = num_streamed
    else:
        num_queries = num_kept
    if bias is not None:
        bias += (of_kept * num_kept) if KEYS_KEPT else (of_streamed * num_streamed)
    if lse is not None:
        lse += of_map * heads * num_queries
    if line_mass is not None:
        line_mass += of_map * num_queries * lines

    first = block * R
    row = tl.arange(0, R)
    rows_there = first + row < num_kept
    rows = up_to(first + row, num_kept, EVEN)
    kept += of_kept * kept_batch + tl.cast(first, tl.int64) * kept_token
    streamed += of_streamed * streamed_batch
    column = tl.arange(0, C)
    low, high = 0, num_streamed
    if bounds is not None:
        low = tl.load(bounds + part).to(tl.int32)
        high = tl.load(bounds + part + 1).to(tl.int32)
    tiles = tl.cdiv(tl.cdiv(high - low, C), splits)
    low += split * tiles * C
    high = tl.minimum(high, low + tiles * C)
    if operand is not None:
        operand += of_map * operand_map
        x = part * X + tl.arange(0, X)
        x_there = x < columns

    # The states of the reducers. Those without an output are never touched, and vanish.
    b_total = tl.zeros((R,), tl.float32)
    b_plogp = tl.zeros((R,), tl.float32)
    b_top = tl.full((R,), -1.0, tl.float32)
    b_argtop = tl.zeros((R,), tl.int32)
    b_x = tl.zeros((R,), tl.float32)
    b_y = tl.zeros((R,), tl.float32)
    b_diagonal = tl.zeros((R,), tl.float32)
    if product is not None:
        b_product = tl.zeros((R, X), tl.float32)
    if largest is not None:
        b_largest, b_where = empty_slots(k, R, K)
    if LINES != "" and not KEYS_KEPT:
        # What needs a distribution divides by the number of lines.
        share = 1.0 / lines
    else:
        share = 1.0

    if HEADS > 0:
        held = resident_tokens(
            kept, kept_head, rows - first, kept_token, kept_dim, HEADS, D, DIM, WIDE
        )

    for start in tl.range(low, high, C, flatten=FLATTEN):
        there = start + column < high
        place = up_to(start + column, high, EVEN)
        if order is not None:
            index = tl.load(order + place)
            offset = index
            from_token = streamed
        else:
            index = place
            offset = place - start
            from_token = streamed + tl.cast(start, tl.int64) * streamed_token
        if COMPOSED:
            tile = composed_tile(
                kept, kept_token, rows - first, from_token, streamed_dim, offset, there,
                inner, INNER, EVEN, OPERAND_PRECISION,
            )  # fmt: skip
            index += streamed_first
        elif HEADS > 0:
            tile = resident_tile(
                held, rows, from_token, streamed_head, streamed_token, streamed_dim, offset, index,
                weights, lse, num_queries, scale,
                HEADS, KEYS_KEPT, D, DIM, WIDE, PRECISION, AHEAD,
            )  # fmt: skip
        else:
            tile = mean_tile(
                kept, kept_head, kept_token, kept_dim, rows - first, rows, rows_there,
                from_token, streamed_head, streamed_token, streamed_dim, offset, index, there,
                bias, weights, lse, heads, num_queries, scale,
                KEYS_KEPT, WHOLE, D, D_REST, DIM, CHUNK, EVEN, WIDE, PRECISION, AHEAD,
            )  # fmt: skip
        if line_mass is not None:
            tile = normalized(
                tile, line_mass, rows, index, grid_width, lines,
                LINES, KEYS_KEPT, WIDE,
            )  # fmt: skip
        if total is not None or (entropy is not None and KEYS_KEPT):
            b_total += tl.sum(tile, 1)
        if plogp is not None or entropy is not None:
            FLOORED: tl.constexpr = HEADS > 0 and weights is None
            b_plogp = add_xlogx(b_plogp, tile * share, FAST_LOG, FLOORED)
        if top is not None or argtop is not None:
            best, where = best_of(tile, index, there, EVEN)
            b_top, b_argtop = better(b_top, b_argtop, best, where)
        if expectation is not None:
            at_x, at_y = positions(start + streamed_first, grid_width, grid_height, C)
            b_x += tl.sum(tile * at_x[None, :], 1)
            b_y += tl.sum(tile * at_y[None, :], 1)
        if diagonal is not None:
            b_diagonal = pick_diagonal(b_diagonal, tile, rows + kept_first, index)
        if product is not None:
            if cells is not None:
                cell = tl.load(cells + place)
                wanted = part * X + tl.arange(0, X)
                b_product = add_pooled(
                    b_product, tile, cell[:, None] == wanted[None, :], OPERAND_PRECISION
                )
            else:
                from_row = operand + tl.cast(start, tl.int64) * operand_token
                if WIDE:
                    at = (
                        column[:, None].to(tl.int64) * operand_token
                        + x[None, :].to(tl.int64) * operand_column
                    )
                else:
                    at = column[:, None] * operand_token + x[None, :] * operand_column
                b_operand = tl.load(
                    from_row + at, mask=there[:, None] & x_there[None, :], other=0.0
                )
                b_product = add_product(b_product, tile, b_operand, OPERAND_PRECISION)
        if largest is not None:
            b_largest, b_where = insert_largest(b_largest, b_where, tile, index, there)
        if dense is not None:
            corner = dense + (of_map * num_kept + first) * num_streamed + start
            if WIDE:
                at = row[:, None].to(tl.int64) * num_streamed + column[None, :]
            else:
                at = row[:, None] * num_streamed + column[None, :]
            if EVEN:
                tl.store(corner + at, tile)
            else:
                tl.store(corner + at, tile, mask=rows_there[:, None] & there[None, :])

    at = (tl.cast(split, tl.int64) * maps + map) * num_kept + rows
    if total is not None:
        tl.store(total + at, b_total, mask=rows_there)
    if plogp is not None:
        tl.store(plogp + at, b_plogp * LN_2, mask=rows_there)
    if entropy is not None:
        if KEYS_KEPT:
            tl.store(entropy + at, entropy_of(b_plogp * LN_2, b_total), mask=rows_there)
        else:
            tl.store(entropy + at, -(b_plogp * LN_2), mask=rows_there)
    if top is not None:
        tl.store(top + at, b_top, mask=rows_there)
    if argtop is not None:
        # NaN has no maximum; its index must still be one.
        b_argtop = tl.minimum(b_argtop, streamed_first + num_streamed - 1)
        tl.store(argtop + at, b_argtop.to(tl.int64), mask=rows_there)
    if expectation is not None:
        tl.store(expectation + 2 * at, b_x * share, mask=rows_there)
        tl.store(expectation + 2 * at + 1, b_y * share, mask=rows_there)
    if diagonal is not None:
        tl.store(diagonal + at, b_diagonal, mask=rows_there)
    if product is not None:
        wanted = part * X + tl.arange(0, X)
        tl.store(
            product + at[:, None] * columns + wanted[None, :],
            b_product,
            mask=rows_there[:, None] & (wanted < columns)[None, :],
        )
    if largest is not None:
        for slot in range(k):
            best, where, b_largest = take_largest(b_largest, b_where)
            tl.store(largest + at * k + slot, best, mask=rows_there)
            where = tl.minimum(where, streamed_first + num_streamed - 1)  # NaN is nowhere
            tl.store(where_largest + at * k + slot, where.to(tl.int64), mask=rows_there)


@triton.jit
def combine_kernel(
    # From each split, [splits, count], or None; see `reduce_kernel`.
    total,
    plogp,
    top,
    argtop,
    expectation,  # [splits, count, 2]
    diagonal,
    # All together, [count], or None.
    out_total,
    out_entropy,
    out_top,
    out_argtop,
    out_expectation,
    out_diagonal,
    count,
    splits,
    OF_COLUMNS: tl.constexpr,  # entropies of columns, which are not of distributions
    BLOCK: tl.constexpr,
):
    """What the splits of `reduce_kernel` found, together. Splits come in the tokens' order."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    b_total = tl.zeros((BLOCK,), tl.float32)
    b_plogp = tl.zeros((BLOCK,), tl.float32)
    b_top = tl.full((BLOCK,), -1.0, tl.float32)
    b_argtop = tl.zeros((BLOCK,), tl.int64)
    b_x = tl.zeros((BLOCK,), tl.float32)
    b_y = tl.zeros((BLOCK,), tl.float32)
    b_diagonal = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        here = tl.cast(split, tl.int64) * count + at
        if total is not None:
            b_total += tl.load(total + here, mask=there, other=0.0)
        if plogp is not None:
            b_plogp += tl.load(plogp + here, mask=there, other=0.0)
        if top is not None:
            best = tl.load(top + here, mask=there, other=0.0)
            if argtop is not None:
                where = tl.load(argtop + here, mask=there, other=0)
                b_top, b_argtop = better(b_top, b_argtop, best, where)
            else:
                b_top = tl.maximum(b_top, best)
        if expectation is not None:
            b_x += tl.load(expectation + 2 * here, mask=there, other=0.0)
            b_y += tl.load(expectation + 2 * here + 1, mask=there, other=0.0)
        if diagonal is not None:
            b_diagonal += tl.load(diagonal + here, mask=there, other=0.0)
    if out_total is not None:
        tl.store(out_total + at, b_total, mask=there)
    if out_entropy is not None:
        if OF_COLUMNS:
            tl.store(out_entropy + at, entropy_of(b_plogp, b_total), mask=there)
        else:
            tl.store(out_entropy + at, -b_plogp, mask=there)
    if out_top is not None:
        tl.store(out_top + at, b_top, mask=there)
    if out_argtop is not None:
        tl.store(out_argtop + at, b_argtop, mask=there)
    if out_expectation is not None:
        tl.store(out_expectation + 2 * at, b_x, mask=there)
        tl.store(out_expectation + 2 * at + 1, b_y, mask=there)
    if out_diagonal is not None:
        tl.store(out_diagonal + at, b_diagonal, mask=there)
