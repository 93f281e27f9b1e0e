"""The kernels of the way back. `launch_gradient` runs them, on a strip of queries at a time.

    G        dL/dA of the printed map, from its closed form: `slope_kernel`
    g        through the normalisation of lines: `lines_kernel`
    D_h      sum_j P_h g: `inner_kernel`, which keeps queries
    dS_h     P_h (w_h g + slope_h), slope_h = dL/dlse_h - w_h D_h
    dQ_h     scale dS_h K_h: `query_kernel`, which keeps queries
    dK_h     scale dS_h^T Q_h: `key_kernel`, which keeps keys

g lies in memory for the strip, so that a head's program needs no other head. Of each gradient one
program has a part for itself, and strips come one after the other: no atomics, the same bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from flashmaps.kernels.tile import (
    LN_2,
    LOG2_E,
    TINY,
    add_bias,
    dot_products,
    log2,
    normalized,
    of_pair,
    up_to,
)


@triton.jit
def slope_kernel(
    g,  # [maps, strip, M]: A on the way in where its logarithm is wanted, G on the way out
    back,  # [maps, strip, M], A' transposed and not normalised, or None
    back_mass,  # [maps, M, back_lines] or None
    back_grid_width,
    back_lines,
    # The terms of `Gradient` in python/flashmaps/maps/problem.py, each or None.
    row_add,  # [maps, N]
    row_log,
    row_back,
    column_add,  # [maps, M]
    column_log,
    column_back,
    left,  # [maps, N, columns]
    right,  # [maps, M, columns]
    columns,
    row_index,  # [maps, N, entries] int64
    row_values,
    entries,
    column_index,  # [maps, M] int64
    column_values,
    dense,  # [maps, N, M]
    cells,  # [M] int64
    pooled,  # [maps, N, num_cells]
    num_cells,
    strip,  # how many queries it has, of num_queries, from `first` on
    first,
    num_queries,
    num_keys,
    BACK_LINES: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    X: tl.constexpr,  # columns of `left` and `right` at once
    FAST_LOG: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G on a tile of a strip."""
    pid = tl.program_id(0)
    across = tl.cdiv(num_keys, C)
    down = tl.cdiv(strip, R)
    map = tl.cast(pid // across // down, tl.int64)
    row = (pid // across % down) * R + tl.arange(0, R)
    key = (pid % across) * C + tl.arange(0, C)
    there = (row < strip)[:, None] & (key < num_keys)[None, :]
    row = tl.minimum(row, strip - 1)
    key = tl.minimum(key, num_keys - 1)
    query = map * num_queries + first + row
    token = map * num_keys + key
    at = (map * strip + row)[:, None] * num_keys + key[None, :]
    slope = tl.zeros((R, C), tl.float32)
    if left is not None:
        for start in range(0, columns, X):
            x = start + tl.arange(0, X)
            x_there = (x < columns)[None, :]
            of_row = tl.load(left + query[:, None] * columns + x[None, :], mask=x_there, other=0.0)
            of_key = tl.load(right + token[:, None] * columns + x[None, :], mask=x_there, other=0.0)
            slope = tl.dot(of_row, tl.trans(of_key), slope, input_precision=PRECISION)
    if row_log is not None or column_log is not None:
        a = tl.load(g + at)
        logarithm = tl.where(a > 0, log2(tl.maximum(a, TINY), FAST_LOG) * LN_2, 0.0)
        if row_log is not None:
            slope -= tl.load(row_log + query)[:, None] * logarithm
        if column_log is not None:
            slope -= tl.load(column_log + token)[None, :] * logarithm
    if row_add is not None:
        slope += tl.load(row_add + query)[:, None]
    if column_add is not None:
        slope += tl.load(column_add + token)[None, :]
    if back is not None:
        other = tl.load(back + at)
        if back_mass is not None:
            other = normalized(
                other, back_mass + map * num_keys * back_lines, first + row, key,
                back_grid_width, back_lines, BACK_LINES, True, True,
            )  # fmt: skip
        if row_back is not None:
            slope += tl.load(row_back + query)[:, None] * other
        if column_back is not None:
            slope += tl.load(column_back + token)[None, :] * other
    if dense is not None:
        slope += tl.load(dense + query[:, None] * num_keys + key[None, :])
    if pooled is not None:
        # Cells that Python could not check (under torch.compile) are held inside.
        cell = tl.minimum(tl.maximum(tl.load(cells + key), 0), num_cells - 1)
        slope += tl.load(pooled + query[:, None] * num_cells + cell[None, :])
    if row_index is not None:
        for entry in range(entries):
            of_row = tl.load(row_index + query * entries + entry)
            value = tl.load(row_values + query * entries + entry)
            slope += tl.where(key[None, :] == of_row[:, None], value[:, None], 0.0)
    if column_index is not None:
        of_key = tl.load(column_index + token)
        value = tl.load(column_values + token)
        slope += tl.where((first + row)[:, None] == of_key[None, :], value[None, :], 0.0)
    tl.store(g + at, slope, mask=there)


@triton.jit
def lines_kernel(
    g,  # [rows, M]: G on the way in, g on the way out
    printed,  # [rows, M], A
    mass,  # [rows, lines], of each line before it is normalised
    rows,  # of all maps
    num_keys,
    grid_width,
    lines,
    length,  # keys of a line
    LINES: tl.constexpr,  # "rows" or "columns"
    R: tl.constexpr,
    C: tl.constexpr,
):
    """g = (G - sum over the line of G A) / mass; 0 on a line whose mass has underflowed."""
    pid = tl.program_id(0)
    across = tl.cdiv(lines, C)
    row = (pid // across) * R + tl.arange(0, R)
    line = (pid % across) * C + tl.arange(0, C)
    there = (row < rows)[:, None] & (line < lines)[None, :]
    row = tl.cast(tl.minimum(row, rows - 1), tl.int64)
    line = tl.minimum(line, lines - 1)
    corner = row[:, None] * num_keys + (line * grid_width if LINES == "rows" else line)[None, :]
    step = 1 if LINES == "rows" else grid_width
    inner = tl.zeros((R, C), tl.float32)
    for place in range(length):
        at = corner + place * step
        inner += tl.load(g + at) * tl.load(printed + at)
    of_line = tl.load(mass + row[:, None] * lines + line[None, :])
    some = of_line >= TINY
    inverse = tl.where(some, 1.0 / tl.where(some, of_line, 1.0), 0.0)
    for place in range(length):
        at = corner + place * step
        tl.store(g + at, (tl.load(g + at) - inner) * inverse, mask=there)


@triton.jit
def probabilities(
    kept, kept_offset, kept_index, kept_token, kept_dim,
    streamed, streamed_offset, streamed_index, streamed_token, streamed_dim,
    bias, lse, scale, KEYS_KEPT: tl.constexpr,
    D: tl.constexpr, D_REST: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """exp(scale q k + bias - lse) of one head, [R, C]; its pointers and ``lse`` [N] are of it."""
    scores = dot_products(
        kept, kept_offset, kept_token, kept_dim,
        streamed, streamed_offset, streamed_token, streamed_dim,
        D, D_REST, DIM, CHUNK, WIDE, PRECISION,
    )  # fmt: skip
    scores *= scale
    if bias is not None:
        scores = add_bias(scores, bias, kept_index, streamed_index, KEYS_KEPT)
    of_query = tl.load(lse + (streamed_index if KEYS_KEPT else kept_index))
    # A query without keys has lse -inf: +inf makes zeros of it.
    of_query = tl.where(of_query == float("-inf"), float("inf"), of_query) * LOG2_E
    if KEYS_KEPT:
        return tl.exp2(scores - of_query[None, :])
    else:
        return tl.exp2(scores - of_query[:, None])


@triton.jit
def slope_tile(g, query, key, num_keys, KEYS_KEPT: tl.constexpr, WIDE: tl.constexpr):
    """g of some queries and keys, from a strip of one map: queries or keys in the rows."""
    if WIDE:
        query = query.to(tl.int64)
    if KEYS_KEPT:
        return tl.load(g + (query * num_keys)[None, :] + key[:, None])
    else:
        return tl.load(g + (query * num_keys)[:, None] + key[None, :])


@triton.jit
def head_columns(
    tokens, offset, token_stride, dim_stride, start, X: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Numbers ``start`` to ``start`` + X of some tokens of a head, [B, X] in float32."""
    x = start + tl.arange(0, X)
    if WIDE:
        at = offset[:, None].to(tl.int64) * token_stride + x[None, :].to(tl.int64) * dim_stride
    else:
        at = offset[:, None] * token_stride + x[None, :] * dim_stride
    return tl.load(tokens + at, mask=(x < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def inner_kernel(
    query,
    query_maps,
    query_batch,
    query_head,
    query_token,
    query_dim,
    key,
    key_maps,
    key_batch,
    key_head,
    key_token,
    key_dim,
    bias,  # [B', M] or None
    pairs,  # [maps, 2] or None
    weights,  # [H] or None
    lse,  # [maps, H, strip]
    g,  # [maps, strip, M]
    d_lse,  # dL/dlse, [maps, H, N], or None
    inner,  # D, [maps, H, strip], or None
    slope,  # [maps, H, strip]
    out_lse,  # [maps, H, N]: where the log-sum-exp is an input of its own, its gradient; or None
    heads,
    strip,
    first,
    num_queries,
    num_keys,
    scale,  # times log2 e
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    D_REST: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """D_h = sum_j P_h g, and what of dS / P is the same for a whole row of a head."""
    query_batch, query_head, query_token = query_batch * UNIT, query_head * UNIT, query_token * UNIT
    key_batch, key_head, key_token = key_batch * UNIT, key_head * UNIT, key_token * UNIT
    pid = tl.program_id(0)
    blocks = tl.cdiv(strip, R)
    block = pid % blocks
    head = pid // blocks % heads
    map = tl.cast(pid // blocks // heads, tl.int64)
    of_query, of_key = map, map
    if pairs is not None:
        of_query = of_pair(pairs, map, 0, query_maps)
        of_key = of_pair(pairs, map, 1, key_maps)
    query += of_query * query_batch + tl.cast(head, tl.int64) * query_head
    query += tl.cast(block * R, tl.int64) * query_token
    key += of_key * key_batch + tl.cast(head, tl.int64) * key_head
    if bias is not None:
        bias += of_key * num_keys
    lse += (map * heads + head) * strip
    g += map * strip * num_keys
    row = block * R + tl.arange(0, R)
    rows_there = row < strip
    row = up_to(row, strip, EVEN)
    column = tl.arange(0, C)
    total = tl.zeros((R,), tl.float32)
    for start in range(0, num_keys, C):
        index = up_to(start + column, num_keys, EVEN)
        tile = probabilities(
            query, row - block * R, row, query_token, query_dim,
            key + tl.cast(start, tl.int64) * key_token, index - start, index, key_token, key_dim,
            bias, lse, scale, False, D, D_REST, DIM, CHUNK, WIDE, PRECISION,
        )  # fmt: skip
        tile *= slope_tile(g, row, index, num_keys, False, WIDE)
        if not EVEN:
            tile = tl.where((start + column < num_keys)[None, :], tile, 0.0)
        total += tl.sum(tile, 1)
    if weights is not None:
        weight = tl.load(weights + head)
    else:
        weight = 1.0 / heads
    at = (map * heads + head) * strip + row
    if inner is not None:
        tl.store(inner + at, total, mask=rows_there)
    of_row = -weight * total
    if out_lse is not None:
        tl.store(
            out_lse + (map * heads + head) * num_queries + first + row, of_row, mask=rows_there
        )
        of_row = tl.zeros((R,), tl.float32)
    if d_lse is not None:
        of_row += tl.load(d_lse + (map * heads + head) * num_queries + first + row)
    tl.store(slope + at, of_row, mask=rows_there)


@triton.jit
def query_kernel(
    query,
    query_maps,
    query_batch,
    query_head,
    query_token,
    query_dim,
    key,
    key_maps,
    key_batch,
    key_head,
    key_token,
    key_dim,
    bias,
    pairs,
    weights,
    lse,
    g,
    slope,  # [maps, H, strip]
    out,  # dQ, [B, H, N, DIM] float32, added to
    heads,
    strip,
    first,
    num_queries,
    num_keys,
    parts,  # blocks of X numbers of a head
    scale,  # times log2 e
    out_scale,
    R: tl.constexpr,
    C: tl.constexpr,
    X: tl.constexpr,
    D: tl.constexpr,
    D_REST: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND_PRECISION: tl.constexpr,
):
    """dQ_h += scale dS_h K_h: a program keeps queries of one head and streams all keys."""
    query_batch, query_head, query_token = query_batch * UNIT, query_head * UNIT, query_token * UNIT
    key_batch, key_head, key_token = key_batch * UNIT, key_head * UNIT, key_token * UNIT
    pid = tl.program_id(0)
    blocks = tl.cdiv(strip, R)
    part = pid % parts
    block = pid // parts % blocks
    head = pid // parts // blocks % heads
    map = tl.cast(pid // parts // blocks // heads, tl.int64)
    of_query, of_key = map, map
    if pairs is not None:
        of_query = of_pair(pairs, map, 0, query_maps)
        of_key = of_pair(pairs, map, 1, key_maps)
    query += of_query * query_batch + tl.cast(head, tl.int64) * query_head
    query += tl.cast(block * R, tl.int64) * query_token
    key += of_key * key_batch + tl.cast(head, tl.int64) * key_head
    if bias is not None:
        bias += of_key * num_keys
    lse += (map * heads + head) * strip
    g += map * strip * num_keys
    row = block * R + tl.arange(0, R)
    rows_there = row < strip
    row = up_to(row, strip, EVEN)
    of_row = tl.load(slope + (map * heads + head) * strip + row)
    if weights is not None:
        weight = tl.load(weights + head)
    else:
        weight = 1.0 / heads
    column = tl.arange(0, C)
    total = tl.zeros((R, X), tl.float32)
    for start in range(0, num_keys, C):
        index = up_to(start + column, num_keys, EVEN)
        from_key = key + tl.cast(start, tl.int64) * key_token
        tile = probabilities(
            query, row - block * R, row, query_token, query_dim,
            from_key, index - start, index, key_token, key_dim,
            bias, lse, scale, False, D, D_REST, DIM, CHUNK, WIDE, PRECISION,
        )  # fmt: skip
        tile *= weight * slope_tile(g, row, index, num_keys, False, WIDE) + of_row[:, None]
        if not EVEN:
            tile = tl.where((start + column < num_keys)[None, :], tile, 0.0)
        of_keys = head_columns(
            from_key, index - start, key_token, key_dim, part * X, X, DIM, WIDE
        )  # fmt: skip
        total = tl.dot(tile, of_keys, total, input_precision=OPERAND_PRECISION)
    x = part * X + tl.arange(0, X)
    at = ((of_query * heads + head) * num_queries + first + row)[:, None] * DIM + x[None, :]
    there = rows_there[:, None] & (x < DIM)[None, :]
    before = tl.load(out + at, mask=there, other=0.0)
    tl.store(out + at, before + out_scale * total, mask=there)


@triton.jit
def key_kernel(
    query,
    query_maps,
    query_batch,
    query_head,
    query_token,
    query_dim,
    key,
    key_maps,
    key_batch,
    key_head,
    key_token,
    key_dim,
    bias,
    pairs,
    weights,
    lse,
    g,
    slope,
    out,  # dK: [B', H, M, DIM], added to; with splits [splits, maps, H, M, DIM], written; or None
    out_bias,  # sum over the queries of dS, [splits, maps, H, M], or None
    maps,
    heads,
    strip,
    num_keys,
    parts,
    splits,  # of the strip's queries
    scale,
    out_scale,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    X: tl.constexpr,
    D: tl.constexpr,
    D_REST: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND_PRECISION: tl.constexpr,
):
    """dK_h += scale dS_h^T Q_h: a program keeps keys of one head and streams its queries."""
    query_batch, query_head, query_token = query_batch * UNIT, query_head * UNIT, query_token * UNIT
    key_batch, key_head, key_token = key_batch * UNIT, key_head * UNIT, key_token * UNIT
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_keys, R)
    part = pid % parts
    block = pid // parts % blocks
    head = pid // parts // blocks % heads
    split = pid // parts // blocks // heads % splits
    map = tl.cast(pid // parts // blocks // heads // splits, tl.int64)
    of_query, of_key = map, map
    if pairs is not None:
        of_query = of_pair(pairs, map, 0, query_maps)
        of_key = of_pair(pairs, map, 1, key_maps)
    query += of_query * query_batch + tl.cast(head, tl.int64) * query_head
    key += of_key * key_batch + tl.cast(head, tl.int64) * key_head
    key += tl.cast(block * R, tl.int64) * key_token
    if bias is not None:
        bias += of_key * num_keys
    lse += (map * heads + head) * strip
    slope += (map * heads + head) * strip
    g += map * strip * num_keys
    row = block * R + tl.arange(0, R)
    rows_there = row < num_keys
    row = up_to(row, num_keys, EVEN)
    if weights is not None:
        weight = tl.load(weights + head)
    else:
        weight = 1.0 / heads
    column = tl.arange(0, C)
    tiles = tl.cdiv(tl.cdiv(strip, C), splits)
    low = split * tiles * C
    high = tl.minimum(strip, low + tiles * C)
    total = tl.zeros((R, X), tl.float32)
    of_bias = tl.zeros((R,), tl.float32)
    for start in range(low, high, C):
        index = up_to(start + column, strip, EVEN)
        from_query = query + tl.cast(start, tl.int64) * query_token
        tile = probabilities(
            key, row - block * R, row, key_token, key_dim,
            from_query, index - start, index, query_token, query_dim,
            bias, lse, scale, True, D, D_REST, DIM, CHUNK, WIDE, PRECISION,
        )  # fmt: skip
        of_row = tl.load(slope + index)
        tile *= weight * slope_tile(g, index, row, num_keys, True, WIDE) + of_row[None, :]
        if not EVEN:
            tile = tl.where((start + column < high)[None, :], tile, 0.0)
        if out_bias is not None:
            of_bias += tl.sum(tile, 1)
        if out is not None:
            of_queries = head_columns(
                from_query, index - start, query_token, query_dim, part * X, X, DIM, WIDE
            )  # fmt: skip
            total = tl.dot(tile, of_queries, total, input_precision=OPERAND_PRECISION)
    which = (tl.cast(split, tl.int64) * maps + map) * heads + head
    if out_bias is not None:
        # Each part of a head has the same sums.
        tl.store(out_bias + which * num_keys + row, of_bias, mask=rows_there & (part == 0))
    if out is not None:
        x = part * X + tl.arange(0, X)
        there = rows_there[:, None] & (x < DIM)[None, :]
        if SPLIT:
            at = (which * num_keys + row)[:, None] * DIM + x[None, :]
            tl.store(out + at, out_scale * total, mask=there)
        else:
            at = ((of_key * heads + head) * num_keys + row)[:, None] * DIM + x[None, :]
            before = tl.load(out + at, mask=there, other=0.0)
            tl.store(out + at, before + out_scale * total, mask=there)
