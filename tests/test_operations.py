"""One contract: every operation, backend and dtype, on every problem, against the float64 oracle."""

from __future__ import annotations

from typing import NamedTuple

import flashmaps as fm
import oracle
import pytest
import torch
from flashmaps.attention_map import REDUCTIONS
from problems import CASE_NAMES, CASES, Problem, grids, inputs, plain, truth
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poison", "one_thread")


class Subject(NamedTuple):
    """A lazy map, the truth about it, and what plain torch makes of it."""

    lazy: fm.AttentionMap
    truth: oracle.Map
    plain: oracle.Map
    truth_lse: oracle.Value
    plain_lse: oracle.Value
    problem: Problem
    dtype: torch.dtype

    def check(self, what: str, got: Tensor, **operands: Tensor) -> None:
        """``got`` within the budget of the oracle's operation of that name."""
        answers = [getattr(m, what)(*operands.values()) for m in (self.truth, self.plain)]
        oracle.assert_within_budget(what, got, *answers, self.truth, self.dtype)

    def check_values(self, what: str, got: Tensor, pick) -> None:
        """``got`` within the budget of entries of the map; ``pick`` takes them from the dense map."""
        answers = [oracle.positive(pick(m.values)) for m in (self.truth, self.plain)]
        oracle.assert_within_budget(what, got, *answers, self.truth, self.dtype)

    def check_argmax(self, what: str, got: Tensor, dim: int) -> None:
        oracle.assert_picks_maximum(
            what, got, self.truth.values, self.plain.values, self.truth, self.dtype, dim
        )

    def check_reduction(self, name: str, got: Tensor) -> None:
        if name == "argmax":
            self.check_argmax(name, got, 2)
        elif name == "column_argmax":
            self.check_argmax(name, got, 1)
        elif name == "column_entropy":
            oracle.assert_column_entropy(name, got, self.truth, self.plain, self.dtype)
        else:
            self.check(name, got)

    @property
    def reductions(self) -> list[str]:
        """The names that this problem allows."""
        *_, queries, keys = self.truth.values.shape
        grid = grids(self.problem, self.dtype)[1]
        return [
            name
            for name in REDUCTIONS
            if (name != "diagonal" or queries == keys) and (name != "expectation" or grid)
        ]


@pytest.fixture(params=CASES, ids=CASE_NAMES)
def subject(request: pytest.FixtureRequest, backend: str) -> Subject:
    problem, dtype = request.param
    query, key, options = inputs(problem, dtype)
    lazy = fm.AttentionMap(query, key, **options, backend=backend)
    (true_map, true_lse), (plain_map, plain_lse) = truth(problem, dtype), plain(problem, dtype)
    return Subject(lazy, true_map, plain_map, true_lse, plain_lse, problem, dtype)


def test_is_lazy_and_says_what_it_is(subject: Subject, backend: str) -> None:
    assert subject.lazy.shape == tuple(subject.truth.values.shape)
    assert subject.lazy.mT.shape == tuple(subject.truth.values.mT.shape)
    assert subject.lazy.dtype == oracle.compute_dtype(subject.dtype)
    assert subject.lazy.backend == backend


def test_lse(subject: Subject) -> None:
    oracle.assert_within_budget(
        "lse", subject.lazy.lse, subject.truth_lse, subject.plain_lse, subject.truth, subject.dtype
    )


def test_to_dense(subject: Subject) -> None:
    dense = subject.lazy.to_dense()
    subject.check_values("to_dense", dense, lambda values: values)
    assert (dense >= 0).all()
    assert (dense[subject.truth.values == 0] == 0).all()  # hidden keys are zero, not tiny
    assert torch.equal(subject.lazy.mT.to_dense(), dense.mT)


def test_reductions_fused(subject: Subject) -> None:
    fields = subject.lazy.reduce(*subject.reductions)
    for name in subject.reductions:
        subject.check_reduction(name, getattr(fields, name))


def test_reductions_alone_have_the_bits_of_fused(subject: Subject) -> None:
    fields = subject.lazy.reduce(*reversed(subject.reductions))
    for name in subject.reductions:
        assert torch.equal(getattr(subject.lazy, name)(), getattr(fields, name)), name


def test_rows(subject: Subject) -> None:
    queries = subject.truth.values.shape[1]
    last = queries - 1
    for index in (
        0,
        -1,
        slice(None, None, 3),
        [last, 0, last],
        torch.tensor([-queries, last // 2]),
    ):
        picked = torch.arange(queries)[index].reshape(-1)
        got = subject.lazy.rows(index)
        subject.check_values(f"rows({index})", got, lambda values, i=picked: values[:, i])


def test_topk(subject: Subject) -> None:
    keys = subject.truth.values.shape[2]
    for k in sorted({1, min(5, keys), min(32, keys), keys}):
        values, indices = subject.lazy.topk(k)
        subject.check_values(
            f"topk({k}) values", values, lambda dense, k=k: dense.topk(k, sorted=True).values
        )
        assert (values.diff(dim=-1) <= 0).all()
        assert ((indices >= 0) & (indices < keys)).all()
        assert (indices.sort(-1).values.diff(dim=-1) > 0).all(), "an index comes twice"
        subject.check_values(
            f"topk({k}) at its indices", values, lambda dense, i=indices: dense.gather(2, i)
        )


def test_products(subject: Subject) -> None:
    batch, queries, keys = subject.lazy.shape
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 3, 16, 17, 200):
        x = torch.randn(batch, keys, columns, generator=generator, dtype=subject.lazy.dtype)
        y = torch.randn(batch, queries, columns, generator=generator, dtype=subject.lazy.dtype)
        subject.check("product", subject.lazy @ x, x=x)
        subject.check("transposed_product", subject.lazy.mT @ y, y=y)


def test_pool(subject: Subject) -> None:
    query_grid, key_grid = grids(subject.problem, subject.dtype)
    _, queries, keys = subject.lazy.shape
    query_cells, key_cells = torch.eye(queries).double(), torch.eye(keys).double()
    subject.check("pool", subject.lazy.pool(), query_cells=query_cells, key_cells=key_cells)
    if query_grid is not None:
        to = _coarser(query_grid)
        query_cells = oracle.cells(query_grid, to)
        got = subject.lazy.pool(query_to=to)
        subject.check("pool", got, query_cells=query_cells, key_cells=key_cells)
    if key_grid is not None:
        to = _coarser(key_grid)
        got = subject.lazy.pool(key_to=to)
        key_cells = oracle.cells(key_grid, to)
        subject.check("pool", got, query_cells=torch.eye(queries).double(), key_cells=key_cells)
    if query_grid is not None and key_grid is not None:
        got = subject.lazy.pool(query_to=_coarser(query_grid), key_to=_coarser(key_grid))
        subject.check("pool", got, query_cells=query_cells, key_cells=key_cells)


def _coarser(grid: tuple[int, int]) -> tuple[int, int]:
    """About half the rows and two thirds of the columns: uneven cells where they do not divide."""
    height, width = grid
    return max(1, height // 2), max(1, 2 * width // 3)
