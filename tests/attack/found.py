"""Cases that failed once, each as the attack printed it. The default tests run them all."""

from __future__ import annotations

from attack.core import Case

FOUND = (
    # Rows in portions: the next ones were copied while the last were still there.
    Case(backend='reference', dtype='float32', shape=(2, 1, 13, 13, 128), seed=861119366, query_layout='unaligned', key_layout='one_head', values='equal', weights='zeros', key_grid=(1, 13), threads=2, what='budgets'),
    # Lines of next to no mass: what underflows is divided by it too.
    Case(backend='cpu-avx2', dtype='bfloat16', shape=(1, 1, 3, 100, 160), seed=1180204656, query_layout='one_token', key_layout='one_head', mask='float', weights='random', scale=4.0, normalize='rows', key_grid=(2, 50)),
    Case(backend='cpu', dtype='float16', shape=(3, 1, 240, 240, 72), seed=1133988244, key_batch=1, query_layout='page_rows', key_layout='page_rows', values='ramp-down', mask='float', pairs=4, normalize='columns', key_grid=(16, 15), threads=2),
    # Each head's share of an entry underflows, and their sum would not.
    Case(backend='cpu-avx2', dtype='float16', shape=(3, 5, 70, 63, 160), seed=862784307, query_layout='fused', key_layout='fused', values='ramp-up', mask='half-precision', key_grid=(7, 9), lse=True),
    # The matrix unit was used for some layouts only, and other sums have other bits.
    Case(backend='cpu', dtype='bfloat16', shape=(2, 1, 25, 6, 64), seed=1088546405, query_layout='unaligned', key_layout='width_first', mask='around-1e4', normalize='columns', key_grid=(2, 3), threads=2, what='bits'),
    Case(backend='cpu', dtype='float16', shape=(2, 1, 25, 23, 40), seed=5, query_layout='width_first', key_layout='width_first', threads=2, what='bits'),
    # A gradient of 1e-38, below the smallest normal number.
    Case(backend='cpu', dtype='bfloat16', shape=(3, 5, 12, 70, 72), seed=770454149, query_layout='wide_rows', key_layout='fused', values='ramp-up', mask='bool', weights='zeros', scale=0.05, lse=True, what='gradients'),
    # Of a row of NaN, nothing was among the largest, and that was the index.
    Case(backend='triton', dtype='float16', shape=(1, 2, 15, 4, 7), seed=915602221, key_batch=3, key_heads=1, query_layout='tokens_first', key_layout='one_token', values='nan-everywhere', mask='largest', weights='zeros', scale=20.0, what='wrong values'),
    # Gradients of 1e-306, made of what five heads lost.
    Case(backend='cpu', dtype='float64', shape=(2, 5, 2, 43, 128), seed=961678902, query_layout='page_rows', key_layout='width_first', values='ramp-up', scale=-0.3, what='gradients'),
    # A head's own line has next to no mass where that of their mean has.
    Case(backend='reference', dtype='float64', shape=(1, 3, 136, 136, 16), seed=1313402742, query_layout='fused', key_layout='page_rows', values='large', normalize='rows', key_grid=(2, 68)),
    # What underflows before its line is normalised is more after it.
    Case(backend='cpu-baseline', dtype='bfloat16', shape=(2, 1, 34, 70, 8), seed=262598337, key_batch=1, query_layout='one_batch', key_layout='width_first', values='ramp-up', pairs=5, normalize='columns', key_grid=(35, 2), lse=True, what='gradients'),
    # A part of the rows has to be copied and all of them not: row by row took more.
    Case(backend='reference', dtype='float32', shape=(1, 5, 2, 4, 8), seed=85048236, key_layout='tokens_first', values='zero', mask='float', scale=0.05, key_grid=(4, 1), what='budgets'),
    Case(backend='reference', dtype='float64', shape=(1, 1, 7, 16, 128), seed=62997513, query_layout='one_batch', key_layout='tokens_first', values='zero', mask='float', what='budgets'),
    # The rows' numbers, more than the columns' where there is one column.
    Case(backend='reference', dtype='float64', shape=(1, 1, 53, 1, 1), seed=2110356616, query_layout='one_batch', key_layout='one_batch', values='equal', mask='bool', lse=True, what='budgets'),
    # A sum of 33,063 equal numbers, one after the other.
    Case(backend='cpu-avx2', dtype='float64', shape=(1, 2, 5, 33063, 16), seed=1646705424, key_heads=1, query_layout='one_batch', key_layout='width_first', values='zero', scale=1e-30, normalize='rows', key_grid=(1, 33063), threads=2),
)  # fmt: skip
