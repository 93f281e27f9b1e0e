"""What walks ask of maps, against the dense map in float64."""

from __future__ import annotations

import flashmaps as fm
import pytest
import torch

N, M, HEADS, WIDTH = 37, 23, 3, 8


def make(queries: int = N, keys: int = M, *, batch: int = 1, **given):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(batch, HEADS, queries, WIDTH, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, HEADS, keys, WIDTH, generator=generator, dtype=torch.float64)
    return fm.AttentionMap(q, k, **given)


def hot(labels: torch.Tensor, groups: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, groups).double()


def test_group_flows_are_sums_of_the_dense_map():
    A = make(batch=2)
    rows, columns = torch.arange(N) * 7 % 5, torch.arange(M) % 4
    want = hot(rows, 5).T @ A.to_dense() @ hot(columns, 4)
    torch.testing.assert_close(fm.group_flows(A, rows, columns), want)


def test_group_flows_are_zero_for_a_group_without_tokens_and_keep_their_sum():
    A = make()
    rows, columns = torch.arange(N) % 3 * 2, torch.zeros(M, dtype=torch.int64)
    flow = fm.group_flows(A, rows, columns)
    assert flow.shape == (1, 5, 1)
    assert torch.equal(flow[0, [1, 3], 0], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(flow.sum(), torch.tensor(float(N), dtype=torch.float64))


def test_pool_takes_labels_on_either_side():
    A = make(query_grid=(37, 1))
    labels = torch.arange(M) % 3
    want = A.to_dense() @ hot(labels, 3)
    torch.testing.assert_close(A.pool(None, labels), want)
    with pytest.raises(ValueError, match="key_to holds the label -1"):
        A.pool(None, labels - 1)
    with pytest.raises(TypeError, match="key_to has dtype"):
        A.pool(None, labels.double())


@pytest.mark.parametrize("k", [1, 4, N - 1])
def test_nearest_others_are_the_top_of_the_dense_map_without_its_diagonal(k):
    A = make(N, N)
    dense = A.to_dense()
    dense.diagonal(dim1=1, dim2=2).fill_(-1)
    values, indices = fm.nearest_others(A, k)
    want, where = dense.topk(k, dim=-1)
    torch.testing.assert_close(values, want)
    assert torch.equal(indices, where)


def test_nearest_others_needs_a_square_map_and_somebody_else():
    with pytest.raises(ValueError, match="square"):
        fm.nearest_others(make())
    with pytest.raises(ValueError, match="k"):
        fm.nearest_others(make(N, N), N)


def test_symmetric_product_and_group_mass():
    A = make(N, N, batch=2)
    dense = A.to_dense()
    x = torch.randn(2, N, 5, dtype=torch.float64)
    torch.testing.assert_close(fm.symmetric_product(A, x), (dense + dense.mT) / 2 @ x)
    labels = torch.arange(N) * 5 % 7
    same = (labels[:, None] == labels).double()
    torch.testing.assert_close(fm.group_mass(A, labels), (dense * same).sum(-1))


def test_group_mass_with_more_groups_than_columns_at_a_time():
    A = make(150, 150)
    labels = torch.arange(150) % 130
    same = (labels[:, None] == labels).double()
    torch.testing.assert_close(fm.group_mass(A, labels), (A.to_dense() * same).sum(-1))


def test_collection_product_is_the_block_matrix_times_the_stacked_x():
    sizes = (5, 7, 4)
    tokens = [torch.randn(1, HEADS, n, WIDTH, dtype=torch.float64) for n in sizes]
    maps = [[fm.AttentionMap(a, b) for b in tokens] for a in tokens]
    x = [torch.randn(1, n, 3, dtype=torch.float64) for n in sizes]
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    weights = weights.double()
    rows = [
        torch.cat([float(weights[s, t]) * maps[s][t].to_dense() for t in range(3)], 2)
        for s in range(3)
    ]
    want = torch.cat(rows, 1) @ torch.cat(x, 1)
    got = fm.collection_product(maps, x, weights)
    torch.testing.assert_close(torch.cat(got, 1), want)
    maps[1] = [None, None, None]
    with pytest.raises(ValueError, match=r"maps\[1\] holds no map"):
        fm.collection_product(maps, x)
