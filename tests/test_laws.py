"""What holds for every map, whatever its numbers, by Hypothesis."""

from __future__ import annotations

import math

import flashmaps as fm
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

law = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the backend does not change
)


class Drawn:
    """A map, and the seed that made it so that an example can be told from its text."""

    def __init__(self, text: str, query: Tensor, key: Tensor, options: dict) -> None:
        self.text, self.query, self.key, self.options = text, query, key, options

    def __repr__(self) -> str:
        return self.text

    def on(self, backend: str, **changes) -> fm.AttentionMap:
        return fm.AttentionMap(self.query, self.key, **{**self.options, **changes}, backend=backend)

    @property
    def dtype(self) -> torch.dtype:
        return oracle.compute_dtype(self.query.dtype)

    def tolerance(self, terms: int = 1) -> float:
        """How far apart two ways to the same number may come out, relative to its magnitude."""
        options = {k: v for k, v in self.options.items() if k != "normalize"}
        of, _ = oracle.attention(self.query, self.key, dtype=torch.float64, **options)
        of.roundings += math.sqrt(terms)
        return 2 * oracle.band(of, self.query.dtype)


@st.composite
def maps(draw: st.DrawFn, square: bool = False, normalized: bool = True) -> Drawn:
    batch = draw(st.integers(1, 2))
    heads = draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    keys = height * width
    queries = keys if square else draw(st.integers(1, 40))
    dim = draw(st.sampled_from([8, 13, 32, 64]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    seed = draw(st.integers(0, 2**16))
    spread = draw(st.sampled_from([0.1, 1.0, 3.0]))
    masked = draw(st.booleans())
    normalize = draw(st.sampled_from([None, "rows", "columns"])) if normalized else None
    g = torch.Generator().manual_seed(seed)
    query = (spread * torch.randn(batch, heads, queries, dim, generator=g)).to(dtype)
    key = torch.randn(batch, heads, keys, dim, generator=g).to(dtype)
    options: dict = {"key_grid": (height, width), "normalize": normalize}
    if masked:
        mask = torch.rand(batch, keys, generator=g) > 0.3
        mask[:, draw(st.integers(0, keys - 1))] = True
        options["key_mask"] = mask
    text = (
        f"{batch}x{heads}x{queries}x{height}*{width}x{dim} {dtype} spread {spread} "
        f"normalize {normalize} masked {masked} seed {seed}"
    )
    return Drawn(text, query, key, options)


@law
@given(case=maps())
def test_rows_sum_to_one_or_to_their_lines(case: Drawn, backend: str) -> None:
    A = case.on(backend)
    keys = case.options.get("key_mask", torch.ones(1, A.shape[2], dtype=torch.bool))
    height, width = A.key_grid
    block = keys.unflatten(1, (height, width))
    seen = {None: keys.any(1), "rows": block.any(2).sum(1), "columns": block.any(1).sum(1)}
    lines = seen[case.options["normalize"]].to(A.dtype)[:, None]  # a hidden line is no line
    ones = torch.ones(A.shape[2], 1, dtype=A.dtype)
    for total in (A.to_dense().sum(2), (A @ ones)[..., 0], A.topk(A.shape[2])[0].sum(2)):
        assert ((total - lines).abs() <= case.tolerance() * lines).all()


@law
@given(case=maps(), columns=st.integers(1, 20))
def test_the_transposed_product_is_the_adjoint(case: Drawn, columns: int, backend: str) -> None:
    A = case.on(backend)
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(A.shape[0], A.shape[2], columns, generator=g, dtype=A.dtype)
    y = torch.randn(A.shape[0], A.shape[1], columns, generator=g, dtype=A.dtype)
    there, back = (y * (A @ x)).double().sum(), ((A.mT @ y) * x).double().sum()
    size = (y.abs() * (A @ x.abs())).double().sum()
    assert (there - back).abs() <= case.tolerance() * size


@law
@given(case=maps())
def test_column_sums_are_the_transposed_product_with_ones(case: Drawn, backend: str) -> None:
    A = case.on(backend)
    ones = torch.ones(A.shape[1], 1, dtype=A.dtype)
    sums = A.column_sum()
    torch.testing.assert_close(
        sums, (A.mT @ ones)[..., 0], rtol=case.tolerance(), atol=torch.finfo(A.dtype).tiny
    )


@law
@given(case=maps(square=True))
def test_diagonal_rows_and_topk_agree_with_dense(case: Drawn, backend: str) -> None:
    A = case.on(backend)
    dense = A.to_dense()
    close = {"rtol": case.tolerance(), "atol": torch.finfo(A.dtype).tiny}
    torch.testing.assert_close(A.diagonal(), dense.diagonal(dim1=1, dim2=2), **close)
    torch.testing.assert_close(A.rows(slice(None, None, 2)), dense[:, ::2], **close)
    k = (A.shape[2] + 1) // 2
    values, indices = A.topk(k)
    torch.testing.assert_close(values, dense.topk(k).values, **close)
    torch.testing.assert_close(dense.gather(2, indices), values, **close)
    torch.testing.assert_close(A.max(), values[..., 0], **close)
    torch.testing.assert_close(dense.gather(2, A.argmax()[..., None])[..., 0], A.max(), **close)


@law
@given(case=maps(normalized=False), seed=st.integers(0, 2**16))
def test_permuting_keys_permutes_columns(case: Drawn, seed: int, backend: str) -> None:
    order = torch.randperm(case.key.shape[2], generator=torch.Generator().manual_seed(seed))
    options = dict(case.options)
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"][:, order]
    A = case.on(backend)
    B = fm.AttentionMap(case.query, case.key[:, :, order], **options, backend=backend)
    close = {"rtol": case.tolerance(), "atol": case.tolerance() * torch.finfo(A.dtype).tiny}
    torch.testing.assert_close(B.to_dense(), A.to_dense()[:, :, order], **close)
    torch.testing.assert_close(B.column_sum(), A.column_sum()[:, order], **close)
    torch.testing.assert_close(B.max(), A.max(), **close)
    entropies = {"rtol": 0, "atol": case.tolerance() * (1 + math.log(A.shape[2]))}
    torch.testing.assert_close(B.entropy(), A.entropy(), **entropies)


@law
@given(case=maps(), seed=st.integers(0, 2**16))
def test_permuting_queries_permutes_rows(case: Drawn, seed: int, backend: str) -> None:
    order = torch.randperm(case.query.shape[2], generator=torch.Generator().manual_seed(seed))
    A = case.on(backend)
    B = fm.AttentionMap(case.query[:, :, order], case.key, **case.options, backend=backend)
    close = {"rtol": case.tolerance(), "atol": torch.finfo(A.dtype).tiny}
    torch.testing.assert_close(B.to_dense(), A.to_dense()[:, order], **close)
    torch.testing.assert_close(B.column_sum(), A.column_sum(), **close)


@law
@given(case=maps())
def test_entropy_lies_between_zero_and_log_of_the_keys(case: Drawn, backend: str) -> None:
    A = case.on(backend)
    entropy = A.entropy()
    slack = case.tolerance() * (1 + math.log(A.shape[2]))
    assert (entropy >= -slack).all()
    assert (entropy <= math.log(A.shape[2]) + slack).all()
    # Jensen: -log max p <= H.
    top = A.max() / A.problem.lines
    assert (entropy >= -top.log() * (A.to_dense().sum(2) / A.problem.lines) - slack).all()


@law
@given(case=maps())
def test_adding_a_constant_to_every_score_changes_nothing(case: Drawn, backend: str) -> None:
    """Softmax does not see a shift; the log-sum-exp moves by it."""
    options = {k: v for k, v in case.options.items() if k != "key_mask"}
    mask = torch.full((case.key.shape[2],), 2.5, dtype=case.dtype)
    A = fm.AttentionMap(case.query, case.key, **options, backend=backend)
    B = fm.AttentionMap(case.query, case.key, **options, key_mask=mask, backend=backend)
    close = {"rtol": case.tolerance(), "atol": torch.finfo(A.dtype).tiny}
    torch.testing.assert_close(B.to_dense(), A.to_dense(), **close)
    torch.testing.assert_close(B.lse, A.lse + 2.5, rtol=0, atol=case.tolerance())


@law
@given(case=maps(), to=st.tuples(st.integers(1, 7), st.integers(1, 9)))
def test_pool_conserves_mass(case: Drawn, to: tuple[int, int], backend: str) -> None:
    A = case.on(backend)
    cells = min(to[0], A.key_grid[0]), min(to[1], A.key_grid[1])
    pooled = A.pool(key_to=cells)
    assert pooled.shape == (A.shape[0], A.shape[1], cells[0] * cells[1])
    close = {"rtol": case.tolerance(), "atol": torch.finfo(A.dtype).tiny}
    torch.testing.assert_close(pooled.sum(2), A.to_dense().sum(2), **close)
    queries = math.isqrt(A.shape[1])
    if queries**2 == A.shape[1]:  # uneven cells of queries: means, weighted by their sizes
        side = min(2, queries)
        both = A.pool(query_to=(side, side), key_to=cells)
        sizes = oracle.cells((queries, queries), (side, side)).sum(0).to(A.dtype)
        total = (sizes[:, None] * both).sum((1, 2))
        torch.testing.assert_close(total, A.to_dense().sum((1, 2)), **close)


@law
@given(case=maps(), ends=st.integers(1, 30), columns=st.integers(1, 5), seed=st.integers(0, 999))
def test_composition_is_associative(
    case: Drawn, ends: int, columns: int, seed: int, backend: str
) -> None:
    """(A A') x = A (A' x), and the rows of A A' are those of the dense product."""
    A = case.on(backend)
    g = torch.Generator().manual_seed(seed)
    batch, heads, _, dim = case.query.shape
    shapes = ((batch, heads, A.shape[2], dim), (batch, heads, ends, dim))
    other = [torch.randn(shape, generator=g).to(case.query.dtype) for shape in shapes]
    B = fm.AttentionMap(*other, backend=backend)
    x = torch.rand(batch, ends, columns, generator=g, dtype=A.dtype)
    R = A @ B
    close = {"rtol": 4 * case.tolerance(terms=ends), "atol": torch.finfo(A.dtype).tiny}
    torch.testing.assert_close(R @ x, A @ (B @ x), **close)
    torch.testing.assert_close(R.to_dense(), A.to_dense() @ B.to_dense(), **close)
    torch.testing.assert_close(R @ x, R.to_dense() @ x, **close)
    torch.testing.assert_close(R.rows([-1]), R.to_dense()[:, -1:], **close)
    y = torch.rand(batch, A.shape[1], columns, generator=g, dtype=A.dtype)
    torch.testing.assert_close(R.transposed_product(y), R.to_dense().mT @ y, **close)
    ones = torch.ones(ends, 1, dtype=A.dtype)
    torch.testing.assert_close(R @ ones, A @ torch.ones_like(B @ ones), **close)


@law
@given(case=maps(normalized=False))
def test_a_known_log_sum_exp_changes_nothing(case: Drawn, backend: str) -> None:
    A = case.on(backend)
    B = case.on(backend, lse=A.lse)
    assert torch.equal(B.lse, A.lse)
    close = {"rtol": 2 * case.tolerance(), "atol": torch.finfo(A.dtype).tiny}
    torch.testing.assert_close(B.to_dense(), A.to_dense(), **close)
    torch.testing.assert_close(B.column_sum(), A.column_sum(), **close)


@law
@given(case=maps())
def test_bayes_reads_the_columns(case: Drawn, backend: str) -> None:
    """The Bayes reading of IME is the entropy of each column divided by its sum."""
    A = case.on(backend)
    dense = A.to_dense().double()
    mass = dense.sum(1, keepdim=True)
    p = torch.where(mass > 0, dense / mass.clamp_min(1e-300), 0.0)
    got = fm.inverse_mapping_entropy(A, kind="bayes").double()
    unit = 1 + mass[:, 0].clamp_min(torch.finfo(A.dtype).tiny).log().abs() + math.log(A.shape[1])
    assert ((got + torch.special.xlogy(p, p).sum(1)).abs() <= case.tolerance() * 2 * unit).all()
