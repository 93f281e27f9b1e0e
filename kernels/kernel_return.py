"""The kernel of the diagonal of A_st A_ts, from a tile of each map. `launch_return` runs it."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from flashmaps.kernels.tile import mean_tile, normalized, of_pair, up_to


@triton.jit
def return_kernel(
    # A_st: queries are sources, keys are targets.
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
    lse,  # [P, H, N]
    line_mass,
    grid_width,
    lines,
    heads,
    scale,
    # A_ts: queries are targets, keys are sources.
    back_query,
    back_query_maps,
    back_query_batch,
    back_query_head,
    back_query_token,
    back_query_dim,
    back_key,
    back_key_maps,
    back_key_batch,
    back_key_head,
    back_key_token,
    back_key_dim,
    back_bias,
    back_pairs,
    back_weights,
    back_lse,  # [P, H', M]
    back_line_mass,
    back_grid_width,
    back_lines,
    back_heads,
    back_scale,
    out,  # [splits, P, N]
    maps,
    num_sources,
    num_targets,
    splits,
    LINES: tl.constexpr,
    BACK_LINES: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    D_REST: tl.constexpr,
    DIM: tl.constexpr,
    BACK_D: tl.constexpr,
    BACK_D_REST: tl.constexpr,
    BACK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(A_st A_ts)_ii = sum_j A_st[i, j] A_ts[j, i], from a tile of each map.

    The program keeps source tokens: as queries of the one map, and as keys of the other, whose
    tiles so come out transposed.
    """
    query_batch, query_head, query_token = query_batch * UNIT, query_head * UNIT, query_token * UNIT
    key_batch, key_head, key_token = key_batch * UNIT, key_head * UNIT, key_token * UNIT
    back_query_batch, back_query_head = back_query_batch * UNIT, back_query_head * UNIT
    back_key_batch, back_key_head = back_key_batch * UNIT, back_key_head * UNIT
    back_query_token, back_key_token = back_query_token * UNIT, back_key_token * UNIT
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_sources, R)
    block = pid % blocks
    split = pid // blocks % splits
    map = pid // blocks // splits
    of_map = tl.cast(map, tl.int64)
    of_query, of_key, of_back_query, of_back_key = of_map, of_map, of_map, of_map
    if pairs is not None:
        of_query = of_pair(pairs, map, 0, query_maps)
        of_key = of_pair(pairs, map, 1, key_maps)
    if back_pairs is not None:
        of_back_query = of_pair(back_pairs, map, 0, back_query_maps)
        of_back_key = of_pair(back_pairs, map, 1, back_key_maps)
    first = block * R
    row = tl.arange(0, R)
    rows_there = first + row < num_sources
    rows = up_to(first + row, num_sources, EVEN)
    query += of_query * query_batch + tl.cast(first, tl.int64) * query_token
    back_key += of_back_key * back_key_batch + tl.cast(first, tl.int64) * back_key_token
    key += of_key * key_batch
    back_query += of_back_query * back_query_batch
    lse += of_map * heads * num_sources
    back_lse += of_map * back_heads * num_targets
    if bias is not None:
        bias += of_key * num_targets
    if back_bias is not None:
        back_bias += of_back_key * num_sources
    if line_mass is not None:
        line_mass += of_map * num_sources * lines
    if back_line_mass is not None:
        back_line_mass += of_map * num_targets * back_lines
    column = tl.arange(0, C)
    tiles = tl.cdiv(tl.cdiv(num_targets, C), splits)
    low = split * tiles * C
    high = tl.minimum(num_targets, low + tiles * C)

    total = tl.zeros((R,), tl.float32)
    for start in range(low, high, C):
        there = start + column < num_targets
        index = up_to(start + column, num_targets, EVEN)
        skipped = tl.cast(start, tl.int64)
        tile = mean_tile(
            query, query_head, query_token, query_dim, rows - first, rows, rows_there,
            key + skipped * key_token, key_head, key_token, key_dim, index - start, index, there,
            bias, weights, lse, heads, num_sources, scale,
            False, False, D, D_REST, DIM, CHUNK, EVEN, WIDE, PRECISION, False,
        )  # fmt: skip
        if line_mass is not None:
            tile = normalized(
                tile, line_mass, rows, index, grid_width, lines, LINES, False, WIDE
            )  # fmt: skip
        back = mean_tile(
            back_key, back_key_head, back_key_token, back_key_dim, rows - first, rows, rows_there,
            back_query + skipped * back_query_token, back_query_head, back_query_token,
            back_query_dim, index - start, index, there,
            back_bias, back_weights, back_lse, back_heads, num_targets, back_scale,
            True, False, BACK_D, BACK_D_REST, BACK_DIM, CHUNK, EVEN, WIDE,
            PRECISION, False,
        )  # fmt: skip
        if back_line_mass is not None:
            back = normalized(
                back, back_line_mass, rows, index, back_grid_width, back_lines,
                BACK_LINES, True, WIDE,
            )  # fmt: skip
        total += tl.sum(tile * back, 1)
    total = total / (lines * back_lines)
    at = (tl.cast(split, tl.int64) * maps + map) * num_sources + rows
    tl.store(out + at, total, mask=rows_there)
