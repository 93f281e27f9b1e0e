"""Eigenpairs of a map's walk and maps on finer grids, against the dense map in float64."""

from __future__ import annotations

import flashmaps as fm
import pytest
import torch


def make(grid=(6, 5), *, heads=2, batch=1, width=8, same=False, dtype=torch.float64, **given):
    generator = torch.Generator().manual_seed(5)
    shape = (batch, heads, grid[0] * grid[1], width)
    q = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    k = q if same else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return fm.AttentionMap(q, k, query_grid=grid, key_grid=grid, **given)


def dense_normalized(A: fm.AttentionMap) -> torch.Tensor:
    W = (A.to_dense() + A.to_dense().mT) / 2
    root = W.sum(2).sqrt()
    return W / root[:, :, None] / root[:, None, :]


def test_normalized_product_is_that_of_the_dense_matrix():
    A = make(batch=2)
    x = torch.randn(2, 30, 4, dtype=torch.float64)
    torch.testing.assert_close(fm.normalized_product(A, x), dense_normalized(A) @ x)
    lines = make(normalize="rows")
    torch.testing.assert_close(fm.normalized_product(lines, x[:1]), dense_normalized(lines) @ x[:1])


@pytest.mark.parametrize("k", [1, 3, 29])
def test_eigenpairs_are_those_of_the_dense_matrix(k):
    A = make(batch=2)
    dense = dense_normalized(A)
    values, vectors = fm.eigenpairs(A, k)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense).flip(1)[:, :k])
    torch.testing.assert_close(dense @ vectors, vectors * values[:, None], atol=1e-6, rtol=1e-6)
    eye = torch.eye(k, dtype=torch.float64).expand(2, k, k)
    torch.testing.assert_close(vectors.mT @ vectors, eye)
    again = fm.eigenpairs(A, k)
    assert torch.equal(values, again[0]) and torch.equal(vectors, again[1])


def test_the_first_pair_is_one_and_the_root_of_the_degrees():
    A = make()
    values, vectors = fm.eigenpairs(A, 1)
    root = ((1 + A.column_sum()) / 2).sqrt()
    torch.testing.assert_close(values, torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(vectors[..., 0], root / root.norm())


def test_a_reversible_map_has_the_eigenvalues_of_itself():
    A = make(heads=1, same=True)
    dense = A.to_dense()[0]
    values, vectors = fm.eigenpairs(A, 4, reversible=True)
    want = torch.linalg.eigvals(dense).real.sort(descending=True).values[:4]
    torch.testing.assert_close(values[0], want)
    root = torch.exp(A.lse[0, 0] / 2)
    own = vectors[0] / root[:, None]  # right vectors of A itself
    torch.testing.assert_close(dense @ own, own * values, atol=1e-7, rtol=1e-6)
    for other in (
        make(heads=2, same=True),
        make(heads=1),
        make(heads=1, same=True, normalize="rows"),
    ):
        with pytest.raises(ValueError, match="reversible"):
            fm.eigenpairs(other, 2, reversible=True)


def test_eigenpairs_in_single_precision_on_every_backend_here():
    want = torch.linalg.eigvalsh(dense_normalized(make())).flip(1)[0, :3]
    for name, state in fm.backends().items():
        if state.available and name in ("cpu", "reference"):
            values, _ = fm.eigenpairs(make(dtype=torch.float32, backend=name), 3)
            # Rounding of each of the 30 terms of a product, and Lanczos' own tolerance.
            torch.testing.assert_close(values[0].double(), want, atol=1e-5, rtol=0)


def test_what_has_no_eigenpairs_is_refused():
    q = torch.randn(1, 1, 6, 4)
    with pytest.raises(ValueError, match="square"):
        fm.eigenpairs(fm.AttentionMap(q, q[:, :, :5]), 1)
    for k in (0, 6):
        with pytest.raises(ValueError, match="k"):
            fm.eigenpairs(fm.AttentionMap(q, q), k)
    with pytest.raises(ValueError, match="x has"):
        fm.normalized_product(fm.AttentionMap(q, q), torch.randn(6, 2))


@pytest.mark.parametrize("fine", [(6, 6), (7, 8), (3, 3)])
def test_a_refined_map_repeats_rows_and_shares_out_columns(fine):
    from flashmaps.maps.grids import cell_index

    A = make((3, 3))
    B = fm.refined(A, fine)
    cells = cell_index(fine, (3, 3))
    size = torch.bincount(cells).double()
    want = A.to_dense()[0][cells][:, cells] / size[cells]
    torch.testing.assert_close(B.to_dense()[0], want)
    assert B.query_grid == B.key_grid == fine
    torch.testing.assert_close(B.pool((3, 3), (3, 3)), A.to_dense())


def test_maps_of_two_grids_average():
    coarse, fine = make((3, 2), heads=2), make((6, 4), heads=3, width=16)
    both = fm.AttentionMap.average([fm.refined(coarse, (6, 4)), fine], [0.25, 0.75])
    want = 0.25 * fm.refined(coarse, (6, 4)).to_dense() + 0.75 * fine.to_dense()
    torch.testing.assert_close(both.to_dense(), want)


def test_refined_keeps_masks_and_takes_two_grids():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, 4, 8, generator=generator)
    k = torch.randn(1, 2, 6, 8, generator=generator)
    mask = torch.tensor([[True, True, False, True, True, True]])
    A = fm.AttentionMap(q, k, key_mask=mask, query_grid=(2, 2), key_grid=(2, 3))
    B = fm.refined(A, (4, 2), (2, 7))
    assert B.shape == (1, 8, 14)
    torch.testing.assert_close(B.pool((2, 2), (2, 3)), A.to_dense())


def test_what_cannot_be_refined_is_refused():
    with pytest.raises(ValueError, match="not finer"):
        fm.refined(make((3, 3)), (2, 6))
    with pytest.raises(ValueError, match="normalize"):
        fm.refined(make((3, 3), normalize="rows"), (6, 6))
    q = torch.randn(1, 1, 6, 4)
    with pytest.raises(ValueError, match="query_grid"):
        fm.refined(fm.AttentionMap(q, q), (6, 6))
