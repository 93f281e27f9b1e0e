"""Masks that differ by query, and keys shared by groups of query heads."""

from __future__ import annotations

import flashmaps as fm
import pytest
import torch

pytestmark = pytest.mark.usefixtures("poison", "one_thread")


def causal(queries, keys):
    return torch.ones(1, queries, keys, dtype=torch.bool).tril()


def windowed(queries, keys, width=3):
    far = (torch.arange(queries)[:, None] - torch.arange(keys)).abs()
    return (far <= width)[None]


def padded(queries, keys):
    """Each query of each image sees so many keys; one sees none."""
    lengths = torch.arange(2 * queries).view(2, queries) * 7 % (keys + 1)
    return torch.arange(keys) < lengths[..., None]


MASKS = {"causal": causal, "windowed": windowed, "padded": padded}


def dense(query, key, mask, pairs=None):
    """The mean map in float64; rows without a key are zero."""
    q, k = query.double(), key.double()
    mask = mask.expand(len(k), -1, -1)
    if pairs is not None:
        of_query, of_key = torch.tensor(pairs).unbind(1)
        q, k, mask = q[of_query], k[of_key], mask[of_key]
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0).mean(1)


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(2, 3, 25, 8), torch.randn(2, 3, 25, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("pairs", [None, [[0, 1], [1, 1], [1, 0]]], ids=["batch", "pairs"])
def test_masks_that_differ_by_query_are_exact(tokens, name, pairs, dtype):
    query, key = (x.to(dtype) for x in tokens)
    mask = MASKS[name](25, 25)
    A = fm.AttentionMap(query, key, key_mask=mask, pairs=pairs)
    assert A.backend == "reference"  # "auto" says what it chose
    wanted = dense(query, key, mask, pairs)
    band = 64 * torch.finfo(A.dtype).eps  # sums of 8 products, exp, sums of 25, a mean of 3
    got = A.to_dense()
    torch.testing.assert_close(got.double(), wanted, atol=band, rtol=band)
    hidden = ~mask.expand(2, -1, -1)
    hidden = hidden if pairs is None else hidden[[b for _, b in pairs]]
    assert (got[hidden] == 0).all()
    plogp = torch.where(wanted > 0, wanted * wanted.clamp_min(1e-300).log(), 0.0)
    found = A.reduce("entropy", "max", "column_sum", "column_max", "expectation")
    near = {"atol": 16 * band, "rtol": 16 * band}
    torch.testing.assert_close(found.entropy.double(), -plogp.sum(-1), **near)
    torch.testing.assert_close(found.max.double(), wanted.amax(-1), **near)
    torch.testing.assert_close(found.column_sum.double(), wanted.sum(-2), **near)
    torch.testing.assert_close(found.column_max.double(), wanted.amax(-2), **near)
    x = torch.randn(wanted.shape[0], 25, 2, dtype=A.dtype)
    torch.testing.assert_close((A @ x).double(), wanted @ x.double(), **near)
    torch.testing.assert_close((A.mT @ x).double(), wanted.mT @ x.double(), **near)
    torch.testing.assert_close(A.rows([3, 20]).double(), wanted[:, [3, 20]], **near)
    heads = A.reduce("entropy", per_head=True).entropy
    one = fm.AttentionMap(query[:, 1:2], key[:, 1:2], key_mask=mask, pairs=pairs).entropy()
    torch.testing.assert_close(heads[:, 1], one, atol=float(band), rtol=float(band))


def test_budgets_and_products_hold_with_them(tokens):
    query, key = tokens
    there = fm.AttentionMap(query, key, key_mask=causal(25, 25))
    back = fm.AttentionMap(key, query, key_mask=windowed(25, 25))
    wanted = dense(query, key, causal(25, 25)) @ dense(key, query, windowed(25, 25))
    torch.testing.assert_close((there @ back).to_dense().double(), wanted, atol=1e-5, rtol=1e-5)
    trip = fm.round_trip(there, back)
    diagonal = wanted.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(trip.return_probability.double(), diagonal, atol=1e-5, rtol=1e-5)
    smallest = there.plan("entropy", memory_budget=10**9).workspace
    with fm.memory_budget(smallest):
        torch.testing.assert_close(there.entropy(), there.reduce("entropy").entropy)


def test_a_backend_that_cannot_says_so(tokens, backend):
    query, key = tokens
    if backend == "reference":
        fm.AttentionMap(query, key, key_mask=causal(25, 25), backend=backend)
        return
    with pytest.raises(RuntimeError, match=r"differs between queries.*needs backend='reference'"):
        fm.AttentionMap(query, key, key_mask=causal(25, 25), backend=backend)


def test_bad_masks_are_named(tokens):
    query, key = tokens
    with pytest.raises(ValueError, match=r"key_mask has shape \[1, 24, 25\].*\[2, 25, 25\]"):
        fm.AttentionMap(query, key, key_mask=causal(24, 25))
    with pytest.raises(TypeError, match=r"of \[B', N, M\] must be bool.*got torch.float32"):
        fm.AttentionMap(query, key, key_mask=causal(25, 25).float())
    with pytest.raises(ValueError, match=r"there are no gradients"):
        fm.AttentionMap(query.requires_grad_(), key, key_mask=causal(25, 25))


# -- fewer key heads -------------------------------------------------------------------------------


NAMES = ("entropy", "max", "argmax", "expectation", "diagonal", "column_sum", "column_entropy")


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["contiguous", "tokens first"])
def test_shared_key_heads_are_those_repeated(backend, heads, dtype, place):
    torch.manual_seed(1)
    query, key = torch.randn(2, 6, 36, 16).to(dtype), torch.randn(2, heads, 36, 16).to(dtype)
    if place == "tokens first":
        query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    mask = torch.rand(2, 36) < 0.8
    options = {"key_mask": mask, "backend": backend, "pairs": [[0, 1], [1, 0], [1, 1]]}
    shared = fm.AttentionMap(query, key, **options)
    whole = fm.AttentionMap(query, key.repeat_interleave(6 // heads, 1), **options)
    for per_head in (False, True):
        got, wanted = (
            shared.reduce(*NAMES, per_head=per_head),
            whole.reduce(*NAMES, per_head=per_head),
        )
        for name in NAMES:
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    assert torch.equal(shared.to_dense(), whole.to_dense())
    assert torch.equal(shared.topk(3)[1], whole.topk(3)[1])
    x = torch.randn(36, 2, dtype=shared.dtype)
    assert torch.equal(shared @ x, whole @ x) and torch.equal(shared.mT @ x, whole.mT @ x)
    trips = fm.round_trip(shared, shared), fm.round_trip(whole, whole)
    assert torch.equal(trips[0].return_probability, trips[1].return_probability)


def test_shared_keys_are_not_copied_on_the_cpu():
    query, key = torch.randn(1, 6, 36, 16), torch.randn(1, 2, 36, 16)
    A = fm.AttentionMap(query, key)
    if A.backend != "cpu":
        pytest.skip("the C++ extension is not built")
    assert A.problem.key.data_ptr() == key.data_ptr() and A.problem.key.shape[1] == 2
    one = fm.AttentionMap(query, key[:, :1])
    assert one.problem.key.data_ptr() == key.data_ptr()


def test_shared_keys_have_gradients_and_averages(backend):
    torch.manual_seed(2)
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    whole = key.repeat_interleave(2, 1)
    one, other = key.clone().requires_grad_(), whole.clone().requires_grad_()
    fm.AttentionMap(query, one, backend=backend).entropy().sum().backward()
    fm.AttentionMap(query, other, backend=backend).entropy().sum().backward()
    summed = other.grad.unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(one.grad, summed, atol=1e-6, rtol=1e-5)
    pair = [
        fm.AttentionMap(query, key, backend=backend),
        fm.AttentionMap(query, whole, backend=backend),
    ]
    torch.testing.assert_close(
        fm.AttentionMap.average(pair).entropy(), pair[1].entropy(), atol=1e-6, rtol=1e-5
    )
    x = torch.randn(9, 2, requires_grad=True)
    (pair[0] @ x).sum().backward()
    torch.testing.assert_close(x.grad, (pair[1].mT @ torch.ones(9, 2))[0], atol=1e-5, rtol=1e-5)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"H = 6 heads but key has 4: wanted as many, or fewer"):
        fm.AttentionMap(torch.randn(1, 6, 9, 8), torch.randn(1, 4, 9, 8))
