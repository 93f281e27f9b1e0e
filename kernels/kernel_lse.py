"""The kernels of pass one: the log-sum-exp of every head. `launch_lse` runs them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from flashmaps.kernels.tile import LN_2, LOG2_E, add_bias, dot_products, of_pair, up_to


@triton.jit
def scores_of_tile(
    query, of_rows, first, query_token, query_dim, key, key_token, key_dim, bias,
    start, num_keys, scale,
    C: tl.constexpr, D: tl.constexpr, D_REST: tl.constexpr, DIM: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale q k + bias, in units of log2, [R, C]; -inf for keys that are not there."""
    column = tl.arange(0, C)
    columns = up_to(start + column, num_keys, EVEN)
    scores = dot_products(
        query, of_rows - first, query_token, query_dim,
        key + tl.cast(start, tl.int64) * key_token, columns - start, key_token, key_dim,
        D, D_REST, DIM, CHUNK, WIDE, PRECISION,
    )  # fmt: skip
    scores *= scale
    if bias is not None:
        scores = add_bias(scores, bias, of_rows, columns, False)
    if not EVEN:
        scores = tl.where((start + column < num_keys)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def running_sums(
    query, of_rows, first, query_token, query_dim, key, key_token, key_dim, bias,
    low, high, num_keys, scale,
    C: tl.constexpr, D: tl.constexpr, D_REST: tl.constexpr, DIM: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(top, total) of each row, total = sum_j 2^(score - top), top the largest score so far."""
    R: tl.constexpr = of_rows.shape[0]
    top = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    for start in range(low, high, C):
        scores = scores_of_tile(
            query, of_rows, first, query_token, query_dim, key, key_token, key_dim, bias,
            start, num_keys, scale, C, D, D_REST, DIM, CHUNK, EVEN, WIDE, PRECISION,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        against = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - against) + tl.sum(tl.exp2(scores - against[:, None]), 1)
        top = new_top
    return top, total


@triton.jit
def anchored_sums(
    query, of_rows, first, query_token, query_dim, key, key_token, key_dim, bias,
    low, high, num_keys, scale,
    C: tl.constexpr, D: tl.constexpr, D_REST: tl.constexpr, DIM: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """`running_sums`, but top is the largest score of the first tile alone; 0 where it has none.

    So an element is one multiply-add, one exp2 and one addition, and exponentials wait for no
    maximum. The first tile makes total at least 1; later scores may be larger by 127 before a total
    overflows, which is for the caller to see. AHEAD: the product of a tile comes before the
    exponentials of the tile before it, which so hide it.
    """
    scores = scores_of_tile(
        query, of_rows, first, query_token, query_dim, key, key_token, key_dim, bias,
        low, num_keys, scale, C, D, D_REST, DIM, CHUNK, EVEN, WIDE, PRECISION,
    )  # fmt: skip
    top = tl.max(scores, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    against = top[:, None]
    total = tl.zeros((of_rows.shape[0],), tl.float32)
    if not AHEAD:
        total += tl.sum(tl.exp2(scores - against), 1)
    for start in range(low + C, high, C):
        next_scores = scores_of_tile(
            query, of_rows, first, query_token, query_dim, key, key_token, key_dim, bias,
            start, num_keys, scale, C, D, D_REST, DIM, CHUNK, EVEN, WIDE, PRECISION,
        )  # fmt: skip
        if AHEAD:
            total += tl.sum(tl.exp2(scores - against), 1)
            scores = next_scores
        else:
            total += tl.sum(tl.exp2(next_scores - against), 1)
    if AHEAD:
        total += tl.sum(tl.exp2(scores - against), 1)
    return top, total


@triton.jit
def lse_kernel(
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
    pairs,  # [P, 2] or None
    out,  # [splits, P, H, N]
    maps,
    heads,
    num_queries,
    num_keys,
    splits,
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
    ANCHORED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """log sum_j exp(scale q_i k_j + bias_j) of each head, pass one of two.

    A program keeps a block of one head's queries and streams the keys of its split. By the running
    softmax; or, if ANCHORED, against the maxima of the first tile as long as nothing overflows.
    """
    query_batch, query_head, query_token = query_batch * UNIT, query_head * UNIT, query_token * UNIT
    key_batch, key_head, key_token = key_batch * UNIT, key_head * UNIT, key_token * UNIT
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_queries, R)
    block = pid % blocks
    head = pid // blocks % heads
    split = pid // blocks // heads % splits
    map = pid // blocks // heads // splits
    of_query, of_key = map, map
    if pairs is not None:
        of_query = of_pair(pairs, map, 0, query_maps)
        of_key = of_pair(pairs, map, 1, key_maps)
    of_query, of_key = tl.cast(of_query, tl.int64), tl.cast(of_key, tl.int64)
    query += of_query * query_batch + tl.cast(head, tl.int64) * query_head
    key += of_key * key_batch + tl.cast(head, tl.int64) * key_head
    if bias is not None:
        bias += of_key * num_keys

    first = block * R
    row = tl.arange(0, R)
    query += tl.cast(first, tl.int64) * query_token
    rows_there = first + row < num_queries
    of_rows = up_to(first + row, num_queries, EVEN)
    tiles = tl.cdiv(tl.cdiv(num_keys, C), splits)
    low = split * tiles * C
    high = tl.minimum(num_keys, low + tiles * C)

    if ANCHORED:
        top, total = anchored_sums(
            query, of_rows, first, query_token, query_dim, key, key_token, key_dim, bias,
            low, high, num_keys, scale, C, D, D_REST, DIM, CHUNK, EVEN, WIDE, PRECISION, AHEAD,
        )  # fmt: skip
        # A row whose first tile has no key in sight, or one whose sum overflows, tells of itself.
        again = tl.max(((total >= 1.0) & (total < float("inf"))).to(tl.int32) ^ 1, 0) > 0
        if again:
            top, total = running_sums(
                query, of_rows, first, query_token, query_dim, key, key_token, key_dim, bias,
                low, high, num_keys, scale, C, D, D_REST, DIM, CHUNK, EVEN, WIDE, PRECISION,
            )  # fmt: skip
    else:
        top, total = running_sums(
            query, of_rows, first, query_token, query_dim, key, key_token, key_dim, bias,
            low, high, num_keys, scale, C, D, D_REST, DIM, CHUNK, EVEN, WIDE, PRECISION,
        )  # fmt: skip
    # With no key in sight: log2(0) is -inf.
    found = (tl.where(total > 0, top, 0.0) + tl.log2(total)) * LN_2
    at = ((tl.cast(split, tl.int64) * maps + map) * heads + head) * num_queries
    tl.store(out + at + of_rows, found, mask=rows_there)


@triton.jit
def add_lse_kernel(partial, out, count, splits, BLOCK: tl.constexpr):
    """out = log sum_s exp(partial_s): the splits of `lse_kernel` together, in order."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for split in range(splits):
        each = tl.load(partial + tl.cast(split, tl.int64) * count + at, mask=there, other=0.0)
        top = tl.maximum(top, each)
    against = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        each = tl.load(partial + tl.cast(split, tl.int64) * count + at, mask=there, other=0.0)
        total += tl.exp2((each - against) * LOG2_E)
    tl.store(out + at, against + tl.log2(total) * LN_2, mask=there)
