"""Maps whose every statistic is known in closed form."""

from __future__ import annotations

import math

import flashmaps as fm
import oracle
import pytest
import torch
from problems import DTYPES
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

SHARP = 1000.0  # exp(-1000) is 0 in float64 too, so a row with such a gap is exactly one-hot


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def one_hot_map(to: Tensor, keys: int, dtype: torch.dtype, backend: str, **options):
    """The map whose row i is one at to[i]: the query is that key's own direction."""
    directions = torch.eye(keys, dtype=dtype)[None, None]
    return fm.AttentionMap(
        directions[:, :, to], directions, scale=SHARP, backend=backend, **options
    )


def uniform_map(queries: int, keys: int, dtype: torch.dtype, backend: str, **options):
    """Every entry 1 / keys: queries of zero like all keys the same."""
    query = torch.zeros(1, 2, queries, 8, dtype=dtype)
    key = torch.randn(1, 2, keys, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return fm.AttentionMap(query, key, backend=backend, **options)


def halves_map(side: int, dtype: torch.dtype, backend: str, back: bool = False, **options):
    """Tokens of the upper half of a square look at all of the upper half alike; so the lower."""
    sign = torch.where(torch.arange(side * side) < side * side // 2, 1.0, -1.0)
    tokens = sign.to(dtype)[None, None, :, None].expand(1, 2, -1, 8)
    return fm.AttentionMap(tokens, tokens, scale=SHARP / 8, backend=backend, **options)


def close(got: Tensor, want, units: float = 32) -> None:
    """Equal up to ``units`` roundings at the size of 1."""
    want = torch.as_tensor(want, dtype=got.dtype).expand(got.shape)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want, rtol=units * eps, atol=units * eps)


def test_a_permutation_and_its_inverse(dtype: torch.dtype, backend: str) -> None:
    tokens = 64
    there = torch.randperm(tokens, generator=torch.Generator().manual_seed(3))
    A = one_hot_map(there, tokens, dtype, backend)
    B = one_hot_map(there.argsort(), tokens, dtype, backend)
    rt = fm.round_trip(A, B)
    assert torch.equal(rt.forward[0], there)
    assert torch.equal(rt.backward[0], there.argsort())
    for zero in (rt.hard_distance, rt.soft_distance, rt.hard_ims, rt.soft_ims, rt.inverse_entropy):
        assert (zero == 0).all()
    # The root of E |x|^2 - 2 x E x + |x|^2, whose four terms of at most 1 cancel.
    assert rt.spread.max() <= math.sqrt(4 * torch.finfo(A.dtype).eps)
    assert (rt.return_probability == 1).all()
    assert (rt.density == 1).all() and (rt.soft_density == 1).all()
    assert not rt.nims_valid.any() and rt.nims.isnan().all()
    assert (rt.nims_log1p == 0).all()
    R = A @ B
    assert torch.equal(R.to_dense(), torch.eye(tokens, dtype=R.dtype)[None])
    fields = R.reduce("entropy", "argmax", "max", "diagonal", "column_sum")
    assert torch.equal(fields.argmax[0], torch.arange(tokens))
    assert (fields.entropy == 0).all()
    for one in (fields.max, fields.diagonal, fields.column_sum):
        assert (one == 1).all()


def test_a_shift_on_a_torus(dtype: torch.dtype, backend: str) -> None:
    """Going twice instead of there and back ends two shifts away, around the edges."""
    height, width = 6, 8
    tokens = torch.arange(height * width)
    y, x = tokens // width, tokens % width
    to = (y + 2) % height * width + (x + 3) % width
    A = one_hot_map(to, height * width, dtype, backend,
                    query_grid=(height, width), key_grid=(height, width))  # fmt: skip
    back = one_hot_map(to.argsort(), height * width, dtype, backend,
                       query_grid=(height, width), key_grid=(height, width))  # fmt: skip
    assert (fm.round_trip(A, back).hard_distance == 0).all()
    twice = fm.round_trip(A, A)
    moved = torch.stack([(x + 6) % width - x, (y + 4) % height - y], -1)
    distance = (moved / torch.tensor([width, height], dtype=torch.float64)).norm(dim=-1)
    close(twice.hard_distance, distance.to(A.dtype)[None])
    close(twice.soft_distance, distance.to(A.dtype)[None])
    close(twice.spread, distance.to(A.dtype)[None])
    assert (twice.return_probability == 0).all()
    close(A.expectation(), oracle.centres((height, width))[to][None])


def test_everything_collapses_on_one_target(dtype: torch.dtype, backend: str) -> None:
    A = one_hot_map(torch.full((16,), 5), 16, dtype, backend)
    B = uniform_map(16, 16, dtype, backend)
    rt = fm.round_trip(A, B)
    assert rt.density[0].tolist() == [16 * (j == 5) for j in range(16)]
    assert rt.nims_valid[0].tolist() == [j == 5 for j in range(16)]
    close(rt.nims[0, 5], 1.0)  # log 16 / log 16
    close(rt.nims_log1p[0, 5], math.log(16) / math.log(17))
    assert rt.nims_log1p[0, :5].isnan().all()
    assert torch.equal(A.column_argmax()[0], torch.zeros(16, dtype=torch.int64))
    assert (A.column_entropy()[0, torch.arange(16) != 5] == 0).all()  # columns of nothing
    close(A.column_entropy()[0, 5], math.log(16))


def test_uniform(dtype: torch.dtype, backend: str) -> None:
    A = uniform_map(9, 100, dtype, backend)
    got = A.reduce("entropy", "max", "argmax", "expectation", "column_sum", "column_entropy",
                   "column_max", "column_argmax")  # fmt: skip
    close(got.entropy, math.log(100))
    close(got.max, 0.01)
    assert (got.argmax == 0).all()  # of equals, the first
    assert (got.column_argmax == 0).all()
    close(got.expectation, 0.5)
    close(got.column_sum, 0.09)
    close(got.column_entropy, math.log(9))
    close(got.column_max, 0.01)
    close(A.lse, math.log(100))
    values, indices = A.topk(7)
    close(values, 0.01)
    assert torch.equal(indices[0], torch.arange(7).expand(9, 7))
    close(A.pool(key_to=(2, 5)), 0.1)


@pytest.mark.skipif(not fm.backends()["cpu"], reason="the C++ kernels are not built")
def test_a_sum_of_many_equal_numbers_keeps_its_digits() -> None:
    """Their roundings have one sign; so sums run over blocks of 64 keys, then over blocks."""
    keys = 9216
    query, key = torch.randn(1, 2, 5, 16), torch.zeros(1, 2, keys, 16)
    A = fm.AttentionMap(query, key, key_grid=(96, 96), backend="cpu")
    most = torch.finfo(torch.float32).eps / 2 * (64 + keys / 64)  # half a unit for each addition
    for side in (1, 3):
        wanted = torch.full((1, 5, side**2), 1 / side**2, dtype=torch.float64)
        found = A.pool(key_to=(side, side)).double()
        torch.testing.assert_close(found, wanted, rtol=most, atol=0)
    torch.testing.assert_close(
        A.entropy().double(), torch.full((1, 5), math.log(keys)).double(), rtol=most, atol=0
    )


def test_uniform_round_trip(dtype: torch.dtype, backend: str) -> None:
    """Soft IMS is the mean distance from the centre: (sqrt 2 + log(1 + sqrt 2)) / 6 = .3826."""
    side = 24
    A = uniform_map(side**2, side**2, dtype, backend)
    at = oracle.centres((side, side))
    from_centre = (at - 0.5).norm(dim=-1)
    rt = fm.round_trip(A, A)
    close(rt.soft_distance, from_centre[None], units=128)
    close(rt.soft_ims, from_centre.mean(), units=128)
    limit = (math.sqrt(2) + math.log1p(math.sqrt(2))) / 6
    assert limit == pytest.approx(0.3826, abs=1e-4)
    assert rt.soft_ims.item() == pytest.approx(limit, abs=1 / side**2)
    variance = 2 * (1 - 1 / side**2) / 12  # of a uniform cell centre, both coordinates
    close(rt.spread, (variance + from_centre**2).sqrt()[None], units=128)
    close(rt.return_probability, 1 / side**2)
    close(rt.hard_distance, (at - at[0]).norm(dim=-1)[None])  # every argmax is the first token
    close(rt.inverse_entropy, math.log(side**2))
    close(rt.soft_density, 1.0, units=128)
    # One target has all the sources, and exactly as much uncertainty as sources.
    close(rt.nims[0, 0], 1.0)
    assert rt.nims_valid.sum() == 1


@pytest.mark.parametrize("normalize", ["rows", "columns"])
def test_uniform_with_normalized_lines(normalize: str, dtype: torch.dtype, backend: str) -> None:
    A = uniform_map(4, 45, dtype, backend, normalize=normalize, key_grid=(5, 9))
    number, length = (5, 9) if normalize == "rows" else (9, 5)
    close(A.to_dense(), 1 / length)
    close(A.max(), 1 / length)
    close(A.to_dense().sum(2), float(number))
    close(A.entropy(), math.log(45))  # of the distribution
    close(A.expectation(), 0.5)
    close(A.column_sum(), 4 / length)
    close(A @ torch.ones(45, 1, dtype=A.dtype), float(number))


def test_two_blocks(dtype: torch.dtype, backend: str) -> None:
    side = 12
    tokens, half = side * side, side * side // 2
    A = halves_map(side, dtype, backend)
    upper = torch.arange(tokens) < half
    got = A.reduce("entropy", "max", "argmax", "expectation", "diagonal", "column_sum",
                   "column_entropy", "column_argmax")  # fmt: skip
    close(got.entropy, math.log(half))
    close(got.max, 1 / half)
    close(got.diagonal, 1 / half)
    assert torch.equal(got.argmax[0], torch.where(upper, 0, half))
    assert torch.equal(got.column_argmax[0], torch.where(upper, 0, half))
    centre = torch.where(upper[:, None], torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.75]))
    close(got.expectation, centre[None])
    close(got.column_sum, 1.0, units=128)
    close(got.column_entropy, math.log(half))
    pooled = A.pool(query_to=(2, 1), key_to=(2, 1))
    close(pooled, torch.eye(2)[None])
    rt = fm.round_trip(A, A)
    variance = (1 - 1 / side**2) / 12 + (0.25 - 1 / side**2) / 12  # of x, and of y in half
    at = oracle.centres((side, side))
    spread = (variance + (at - centre).square().sum(-1)).sqrt()
    close(rt.spread, spread[None], units=128)
    close(rt.soft_distance, (at - centre).norm(dim=-1)[None], units=128)
    close(rt.return_probability, 1 / half)
    R = (A @ A).reduce("entropy", "argmax", "column_sum")
    close(R.entropy, math.log(half), units=128)
    close(R.column_sum, 1.0, units=128)


@pytest.mark.parametrize("keys", [3, 64, 517])
def test_among_equal_keys_the_first_wins(keys: int, dtype: torch.dtype, backend: str) -> None:
    """Wherever in a tile or in its rest the equal ones stand."""
    first, later = keys // 3, torch.arange(keys // 3, keys, 2)
    key = torch.zeros(1, 1, keys, 16, dtype=dtype)
    key[:, :, later] = 1  # every second key from `first` on, all alike
    query = torch.ones(1, 1, 21, 16, dtype=dtype)
    A = fm.AttentionMap(query, key, scale=0.25, backend=backend)
    assert (A.argmax() == first).all()
    values, indices = A.topk(1)
    assert (indices == first).all()
    k = min(5, len(later))
    assert torch.equal(A.topk(k)[1][0], later[:k].expand(21, k))
    assert torch.equal(values[..., 0], A.max())
    assert (A.column_argmax() == 0).all()  # and all queries are alike
    R = A @ fm.AttentionMap(torch.zeros(1, 1, keys, 16, dtype=dtype), query, backend=backend)
    fields = R.reduce("argmax", "column_argmax")
    assert (fields.argmax == 0).all() and (fields.column_argmax == 0).all()


def test_a_head_without_weight_does_not_count(dtype: torch.dtype, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 3, n, 16, generator=g).to(dtype) for n in (20, 30))
    A = fm.AttentionMap(query, key, head_weights=[0.0, 1.0, 0.0], backend=backend)
    B = fm.AttentionMap(query[:, 1:2], key[:, 1:2], backend=backend)
    close(A.to_dense(), B.to_dense())
    assert A.lse.shape == (1, 3, 20)
    close(A.lse[:, 1:2], B.lse)


def test_pairs_are_the_maps_of_those_images(dtype: torch.dtype, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, 2, 12, 16, generator=g).to(dtype) for n in (2, 3))
    pairs = [[1, 0], [0, 2], [1, 0], [1, 1]]
    A = fm.AttentionMap(query, key, pairs=pairs, backend=backend)
    assert A.shape == (4, 12, 12)
    for got, (q, k) in zip(A.to_dense(), pairs, strict=True):
        alone = fm.AttentionMap(query[q : q + 1], key[k : k + 1], backend=backend)
        close(got[None], alone.to_dense())


def test_a_hidden_key_is_no_key(dtype: torch.dtype, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, n, 16, generator=g).to(dtype) for n in (20, 31))
    mask = torch.rand(31, generator=g) > 0.5
    A = fm.AttentionMap(query, key, key_mask=mask, backend=backend)
    B = fm.AttentionMap(query, key[:, :, mask], backend=backend)
    close(A.to_dense()[:, :, mask], B.to_dense())
    assert (A.to_dense()[:, :, ~mask] == 0).all()
    close(A.entropy(), B.entropy())
    close(A.lse, B.lse)
    assert mask[A.argmax()].all()
    assert (A.column_entropy()[:, ~mask] == 0).all()
    assert (A.column_sum()[:, ~mask] == 0).all()


def test_a_line_without_mass_is_zero(dtype: torch.dtype, backend: str) -> None:
    """Note eq. 2.3 on lines whose mass underflows: zeros, never NaN, and the others unharmed."""
    query = torch.ones(1, 1, 5, 8, dtype=dtype)
    key = torch.zeros(1, 1, 12, 8, dtype=dtype)
    key[:, :, 4:8] = -1000  # the second of three rows: exp(-2828)
    A = fm.AttentionMap(query, key, normalize="rows", key_grid=(3, 4), backend=backend)
    want = torch.tensor([0.25, 0.0, 0.25], dtype=A.dtype).repeat_interleave(4)
    close(A.to_dense(), want.expand(1, 5, 12))
    assert (A.to_dense()[:, :, 4:8] == 0).all()
    fields = A.reduce("entropy", "expectation", "column_sum", "column_entropy", "max", "argmax")
    close(fields.entropy, 2 / 3 * math.log(12))  # 8 entries of 1/12
    close(fields.expectation, 1 / 3)
    assert (fields.column_entropy[:, 4:8] == 0).all()
    assert (fields.argmax == 0).all()
    rt = fm.round_trip(
        A, fm.AttentionMap(key, query, query_grid=(3, 4), key_grid=(1, 5), backend=backend)
    )
    assert rt.soft_distance.isfinite().all() and rt.spread.isfinite().all()


def test_scores_too_large_for_exp(dtype: torch.dtype, backend: str) -> None:
    """exp(3000) overflows every dtype; a softmax of it does not."""
    ramp = torch.arange(100, dtype=torch.float64).flip(0)
    key = ramp[:, None].expand(1, 1, 100, 8).to(dtype)
    query = torch.ones(1, 1, 3, 8, dtype=dtype)
    A = fm.AttentionMap(query, key, scale=4.0, backend=backend)  # scores 3168, 3136, ..., 0
    tail = math.exp(-32) if A.dtype == torch.float64 else 0.0
    close(A.lse, 32 * 99 + tail, units=4)
    assert (A.argmax() == 0).all()
    close(A.max(), 1.0)
    last = fm.AttentionMap(query, key.flip(2), scale=4.0, backend=backend)
    assert (last.argmax() == 99).all()
    close(last.to_dense().flip(2), A.to_dense())


def test_subnormal_halves_count(backend: str) -> None:
    """float16 goes down to 6e-8: what is subnormal there is an ordinary float32."""
    query, key = torch.zeros(2, 1, 1, 1, 8, dtype=torch.float16).unbind(0)
    query[..., 0], key[..., 0] = 2.0**-20, 1024.0
    A = fm.AttentionMap(query, key, scale=1024.0, backend=backend)
    assert A.lse.item() == 1.0
    B = fm.AttentionMap(key, query, scale=1024.0, backend=backend)
    assert B.lse.item() == 1.0
