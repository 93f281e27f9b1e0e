"""The tile: what one head, and the mean over heads, have at a block of queries and keys.

Every kernel asks for the map here and nowhere else, be it a mean over heads or a product of two
maps. A program keeps one side's tokens (`kept`, the rows of its tiles) and streams the other's
(`streamed`, the columns): queries are kept for what is reduced over keys, keys for what is reduced
over queries. Where a tile reaches beyond the last token, that one stands in for those that are not
there, so that loads need no masks.

No atomics in any kernel: one program writes an output, or a part of one where the streamed tokens
are split among programs, and parts are added up in order. The same call gives the same bits.
Offsets that can exceed 2^31 are in 64 bits; those within a tile are where they need to be (WIDE).
Strides of Q and K are counted in UNITs, which tells the compiler how well they are aligned.

Names: ``R`` rows, ``C`` columns, ``D`` (and ``D_REST``) numbers of a head, all powers of two.
"""

# Triton's functions have no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from triton.language.extra import libdevice

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
NO_INDEX: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def log2(x, FAST_LOG: tl.constexpr):
    """log2 of positive numbers. NVIDIA's unit for it is not what tl.log2 compiles to."""
    if FAST_LOG:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def xlog2x(x, FAST_LOG: tl.constexpr, FLOORED: tl.constexpr = False):
    """x log2 x with 0 log 0 = 0. Below the smallest normal number x weighs nothing.

    FLOORED: there is none below it.
    """
    if FLOORED:
        return x * log2(x, FAST_LOG)
    else:
        return x * log2(tl.maximum(x, TINY), FAST_LOG)


@triton.jit
def of_pair(pairs, map, SIDE: tl.constexpr, count):
    """Which query (SIDE 0) or key (1) a map is of, held among the ``count`` that there are.

    Under torch.compile nobody has looked at pairs before.
    """
    found = tl.load(pairs + 2 * map + SIDE)
    return tl.minimum(tl.maximum(found, 0), count - 1)


@triton.jit
def up_to(index, count, EVEN: tl.constexpr):
    """Token numbers, those beyond the last replaced by it; EVEN: there are none."""
    if EVEN:
        return index
    else:
        return tl.minimum(index, count - 1)


@triton.jit
def load_tokens(
    tokens,  # pointer to the first number of a head
    offset,  # [B], of each token, counted in tokens
    token_stride,
    dim_stride,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Numbers START to START + WIDTH of some tokens of a head, [B, WIDTH]; 0 beyond DIM."""
    dims = START + tl.arange(0, WIDTH)
    if WIDE:
        at = offset[:, None].to(tl.int64) * token_stride + dims[None, :].to(tl.int64) * dim_stride
    else:
        at = offset[:, None] * token_stride + dims[None, :] * dim_stride
    if START + WIDTH > DIM:
        return tl.load(tokens + at, mask=dims[None, :] < DIM, other=0.0)
    else:
        return tl.load(tokens + at)


@triton.jit
def dot_products(
    kept,
    kept_offset,
    kept_token,
    kept_dim,
    streamed,
    streamed_offset,
    streamed_token,
    streamed_dim,
    D: tl.constexpr,
    D_REST: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inner products of a head's tokens, [R, C] in float32.

    A head dimension that is no power of two comes in two parts, 80 = 64 + 16: one padded to 128
    would cost 60 % more. Parts come CHUNK numbers at a time.
    """
    product = tl.zeros((kept_offset.shape[0], streamed_offset.shape[0]), tl.float32)
    FIRST: tl.constexpr = min(CHUNK, D)
    for chunk in tl.static_range(D // FIRST):
        rows = load_tokens(
            kept, kept_offset, kept_token, kept_dim,
            chunk * FIRST, FIRST, DIM, WIDE,
        )  # fmt: skip
        columns = load_tokens(
            streamed, streamed_offset, streamed_token, streamed_dim,
            chunk * FIRST, FIRST, DIM, WIDE,
        )  # fmt: skip
        product = tl.dot(rows, tl.trans(columns), product, input_precision=PRECISION)
    REST: tl.constexpr = min(CHUNK, D_REST)
    if REST > 0:
        for chunk in tl.static_range(D_REST // REST):
            rows = load_tokens(
                kept, kept_offset, kept_token, kept_dim,
                D + chunk * REST, REST, DIM, WIDE,
            )  # fmt: skip
            columns = load_tokens(
                streamed, streamed_offset, streamed_token, streamed_dim,
                D + chunk * REST, REST, DIM, WIDE,
            )  # fmt: skip
            product = tl.dot(rows, tl.trans(columns), product, input_precision=PRECISION)
    return product


@triton.jit
def add_bias(scores, bias, kept_index, streamed_index, KEYS_KEPT: tl.constexpr):
    """Scores in units of log2, plus the keys' bias; -inf hides a key."""
    if KEYS_KEPT:
        of_key = tl.load(bias + kept_index)
        return scores + (of_key * LOG2_E)[:, None]
    else:
        of_key = tl.load(bias + streamed_index)
        return scores + (of_key * LOG2_E)[None, :]


@triton.jit
def softmax_of_tile(
    scores, kept_there, streamed_there, KEYS_KEPT: tl.constexpr, EVEN: tl.constexpr
):
    """Softmax over keys of a tile that holds all of them; zeros where every key is hidden."""
    if not EVEN:
        if KEYS_KEPT:
            scores = tl.where(kept_there[:, None], scores, float("-inf"))
        else:
            scores = tl.where(streamed_there[None, :], scores, float("-inf"))
    if KEYS_KEPT:
        top = tl.max(scores, 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - top[None, :])
        total = tl.sum(weights, 0)
        return weights * (1.0 / tl.where(total > 0, total, 1.0))[None, :]
    else:
        top = tl.max(scores, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - top[:, None])
        total = tl.sum(weights, 1)
        return weights * (1.0 / tl.where(total > 0, total, 1.0))[:, None]


@triton.jit
def share_of_head(
    products,  # of a head's tokens, [R, C]
    kept_index, kept_there, streamed_index, streamed_there,
    bias, weights, lse, head, heads, num_queries, scale,
    KEYS_KEPT: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """w_h softmax_h of a tile."""
    scores = products * scale
    if bias is not None:
        scores = add_bias(scores, bias, kept_index, streamed_index, KEYS_KEPT)
    if weights is not None:
        weight = tl.load(weights + head)
    else:
        weight = 1.0 / heads
    if WHOLE:
        return weight * softmax_of_tile(scores, kept_there, streamed_there, KEYS_KEPT, EVEN)
    else:
        # A query without keys has lse -inf: +inf makes zeros of it.
        known = lse + tl.cast(head, tl.int64) * num_queries
        if KEYS_KEPT:
            of_query = tl.load(known + streamed_index)
            of_query = tl.where(of_query == float("-inf"), float("inf"), of_query)
            return weight * tl.exp2(scores - (of_query * LOG2_E)[None, :])
        else:
            of_query = tl.load(known + kept_index)
            of_query = tl.where(of_query == float("-inf"), float("inf"), of_query)
            return weight * tl.exp2(scores - (of_query * LOG2_E)[:, None])


@triton.jit
def mean_tile(
    kept,  # pointer to the token of the kept side that `kept_offset` counts from, head 0
    kept_head,
    kept_token,
    kept_dim,
    kept_offset,  # [R]
    kept_index,  # [R], the tokens' numbers
    kept_there,  # [R], whether there is such a token; where not, another stands in for it
    streamed,  # the same of the streamed side, [C]
    streamed_head,
    streamed_token,
    streamed_dim,
    streamed_offset,
    streamed_index,
    streamed_there,
    bias,  # of this map's keys, [M], or None
    weights,  # [H], or None for 1 / H
    lse,  # of this map, [H, N], natural log
    heads,
    num_queries,
    scale,  # times log2 e
    KEYS_KEPT: tl.constexpr,
    WHOLE: tl.constexpr,  # the tile holds all keys: no log-sum-exp is needed
    D: tl.constexpr,
    D_REST: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,  # a head's product comes before the exponentials of the head before it
):
    """sum_h w_h softmax_h, [R, C] in float32; 0 for streamed tokens that are not there.

    Of a head, exp2(scale log2(e) q k + bias log2(e) - lse log2(e)): with the factor in the scale,
    an element is one fused multiply-add, one exp2 and one more multiply-add.
    """
    tile = tl.zeros((kept_offset.shape[0], streamed_offset.shape[0]), tl.float32)
    if AHEAD:
        products = dot_products(
            kept, kept_offset, kept_token, kept_dim,
            streamed, streamed_offset, streamed_token, streamed_dim,
            D, D_REST, DIM, CHUNK, WIDE, PRECISION,
        )  # fmt: skip
        for head in range(1, heads):
            at = tl.cast(head, tl.int64)
            next_products = dot_products(
                kept + at * kept_head, kept_offset, kept_token, kept_dim,
                streamed + at * streamed_head, streamed_offset, streamed_token, streamed_dim,
                D, D_REST, DIM, CHUNK, WIDE, PRECISION,
            )  # fmt: skip
            tile += share_of_head(
                products, kept_index, kept_there, streamed_index, streamed_there,
                bias, weights, lse, head - 1, heads, num_queries, scale, KEYS_KEPT, WHOLE, EVEN,
            )  # fmt: skip
            products = next_products
        tile += share_of_head(
            products, kept_index, kept_there, streamed_index, streamed_there,
            bias, weights, lse, heads - 1, heads, num_queries, scale, KEYS_KEPT, WHOLE, EVEN,
        )  # fmt: skip
    else:
        for head in range(heads):
            at = tl.cast(head, tl.int64)
            products = dot_products(
                kept + at * kept_head, kept_offset, kept_token, kept_dim,
                streamed + at * streamed_head, streamed_offset, streamed_token, streamed_dim,
                D, D_REST, DIM, CHUNK, WIDE, PRECISION,
            )  # fmt: skip
            tile += share_of_head(
                products, kept_index, kept_there, streamed_index, streamed_there,
                bias, weights, lse, head, heads, num_queries, scale, KEYS_KEPT, WHOLE, EVEN,
            )  # fmt: skip
    if EVEN:
        return tile
    else:
        return tl.where(streamed_there[None, :], tile, 0.0)


@triton.jit
def resident_tokens(
    kept, kept_head, kept_offset, kept_token, kept_dim,
    HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The kept tokens of all heads, one [R, D] each, to be loaded once instead of for each tile."""
    held = ()
    for head in tl.static_range(HEADS):
        from_head = kept + head * kept_head
        one = load_tokens(from_head, kept_offset, kept_token, kept_dim, 0, D, DIM, WIDE)
        held = held + (one,)  # type: ignore[assignment] # noqa: RUF005
    return held


@triton.jit
def resident_tile(
    held,  # of `resident_tokens`
    kept_index,
    streamed,
    streamed_head,
    streamed_token,
    streamed_dim,
    streamed_offset,
    streamed_index,
    weights,
    lse,
    num_queries,
    scale,
    HEADS: tl.constexpr,
    KEYS_KEPT: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """`mean_tile` of whole tiles without a bias, the log-sum-exp known, kept tokens at hand.

    Without weights a head's 1 / H is in its exponent, exp2(scale log2(e) q k - (lse log2(e) + log2
    H)), and no element is below TINY, where the sum begins.
    """
    R: tl.constexpr = kept_index.shape[0]
    C: tl.constexpr = streamed_index.shape[0]
    if weights is not None:
        tile = tl.zeros((R, C), tl.float32)
    else:
        tile = tl.full((R, C), TINY, tl.float32)
    if AHEAD:
        scores = resident_scores(
            held, streamed, streamed_head, streamed_offset, streamed_token, streamed_dim,
            0, D, DIM, WIDE, PRECISION,
        )  # fmt: skip
    for head in tl.static_range(HEADS):
        if not AHEAD:
            scores = resident_scores(
                held, streamed, streamed_head, streamed_offset, streamed_token, streamed_dim,
                head, D, DIM, WIDE, PRECISION,
            )  # fmt: skip
        elif head + 1 < HEADS:
            next_scores = resident_scores(
                held, streamed, streamed_head, streamed_offset, streamed_token, streamed_dim,
                head + 1, D, DIM, WIDE, PRECISION,
            )  # fmt: skip
        known = lse + head * num_queries
        if KEYS_KEPT:
            of_query = tl.load(known + streamed_index)
        else:
            of_query = tl.load(known + kept_index)
        of_query = tl.where(of_query == float("-inf"), float("inf"), of_query) * LOG2_E
        if weights is None:
            of_query += tl.log2(tl.cast(HEADS, tl.float32))
        if KEYS_KEPT:
            part = tl.exp2(scores * scale - of_query[None, :])
        else:
            part = tl.exp2(scores * scale - of_query[:, None])
        if weights is not None:
            tile += tl.load(weights + head) * part
        else:
            tile += part
        if AHEAD and head + 1 < HEADS:
            scores = next_scores
    return tile


@triton.jit
def resident_scores(
    held, streamed, streamed_head, streamed_offset, streamed_token, streamed_dim,
    head: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products of a head's resident tokens with some that are streamed, [R, C]."""
    columns = load_tokens(
        streamed + head * streamed_head, streamed_offset, streamed_token, streamed_dim,
        0, D, DIM, WIDE,
    )  # fmt: skip
    return tl.dot(held[head], tl.trans(columns), input_precision=PRECISION)


@triton.jit
def composed_tile(
    kept,  # pointer to the first kept row of A, float32
    kept_row,
    kept_offset,  # [R]
    streamed,  # pointer to the first streamed column of A', float32
    streamed_row,
    streamed_offset,  # [C]
    streamed_there,
    inner,  # what lies between: columns of A, rows of A'
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A A', [R, C] in float32, of pieces that lie in memory; 0 for columns that are not there.

    PRECISION is one of `tl.dot`'s, or "bf16": both rounded to bfloat16.
    """
    tile = tl.zeros((kept_offset.shape[0], streamed_offset.shape[0]), tl.float32)
    between = tl.arange(0, INNER)
    rows = kept_offset[:, None] * kept_row + between[None, :]
    columns = between[:, None] * streamed_row + streamed_offset[None, :]
    for start in range(0, inner, INNER):
        if EVEN:
            of_rows = tl.load(kept + rows)
            of_columns = tl.load(streamed + columns)
        else:
            there = start + between < inner
            of_rows = tl.load(kept + rows, mask=there[None, :], other=0.0)
            of_columns = tl.load(streamed + columns, mask=there[:, None], other=0.0)
        if PRECISION == "bf16":
            tile = tl.dot(of_rows.to(tl.bfloat16), of_columns.to(tl.bfloat16), tile)
        else:
            tile = tl.dot(of_rows, of_columns, tile, input_precision=PRECISION)
        kept += INNER
        streamed += tl.cast(INNER, tl.int64) * streamed_row
    if EVEN:
        return tile
    else:
        return tl.where(streamed_there[None, :], tile, 0.0)


@triton.jit
def normalized(
    tile, mass, kept_index, streamed_index, grid_width, lines,
    LINES: tl.constexpr, KEYS_KEPT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Note eq. 2.3: each element divided by the mass of its line; 0 where that has underflowed.

    ``mass`` is [N, lines] of this map; LINES is "rows" or "columns" of the keys' grid.
    """
    if KEYS_KEPT:
        query = streamed_index[None, :]
        key = kept_index[:, None]
    else:
        query = kept_index[:, None]
        key = streamed_index[None, :]
    if WIDE:
        query = query.to(tl.int64)
    line = key // grid_width if LINES == "rows" else key % grid_width
    of_line = tl.load(mass + (query * lines + line))
    some = of_line >= TINY
    return tl.where(some, tile / tl.where(some, of_line, 1.0), 0.0)
