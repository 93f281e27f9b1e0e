"""Cases that failed once, each as the attack printed it. The default tests run them all."""

from __future__ import annotations

from attack.core import Case

FOUND = (
    # Rows in portions: the next ones were copied while the last were still there.
    Case(backend='reference', dtype='float32', shape=(2, 1, 13, 13, 128), seed=861119366, query_layout='unaligned', key_layout='one_head', values='equal', weights='zeros', key_grid=(1, 13), threads=2, what='budgets'),
)  # fmt: skip
