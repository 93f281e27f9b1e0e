"""One contract: every operation, backend and dtype, on every problem, against float64."""

from __future__ import annotations

import oracle
import pytest
import torch
from contract import Subject, subject_of
from problems import CASE_NAMES, CASES, Problem, grids, plain, truth

pytestmark = pytest.mark.usefixtures("poison", "one_thread")


@pytest.fixture(params=CASES, ids=CASE_NAMES)
def case(request: pytest.FixtureRequest) -> tuple[Problem, torch.dtype]:
    return request.param


@pytest.fixture
def subject(case: tuple[Problem, torch.dtype], backend: str) -> Subject:
    return subject_of(case, backend)


def test_is_lazy_and_says_what_it_is(subject: Subject, backend: str) -> None:
    assert subject.lazy.shape == tuple(subject.truth.values.shape)
    assert subject.lazy.mT.shape == tuple(subject.truth.values.mT.shape)
    assert subject.lazy.dtype == oracle.compute_dtype(subject.dtype)
    assert subject.lazy.backend == backend


def test_lse(subject: Subject, case: tuple[Problem, torch.dtype]) -> None:
    answers = truth(*case)[1], plain(*case)[1]
    oracle.assert_within_budget("lse", subject.lazy.lse, *answers, subject.truth, subject.dtype)


def test_to_dense(subject: Subject) -> None:
    dense = subject.lazy.to_dense()
    subject.check_entries("to_dense", dense, lambda values: values)
    assert (dense >= 0).all()
    assert (dense[subject.truth.values == 0] == 0).all()  # hidden keys are zero, not tiny
    assert torch.equal(subject.lazy.mT.to_dense(), dense.mT)


def test_reductions_fused(subject: Subject) -> None:
    subject.check_reductions()


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
        subject.check_rows(index)


def test_topk(subject: Subject) -> None:
    keys = subject.truth.values.shape[2]
    for k in sorted({1, min(5, keys), min(32, keys), keys}):
        subject.check_topk(k)


def test_products(subject: Subject) -> None:
    batch, queries, keys = subject.lazy.shape
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 3, 16, 17, 200) if keys < 10_000 else (3, 17):
        x = torch.randn(batch, keys, columns, generator=generator, dtype=subject.lazy.dtype)
        y = torch.randn(batch, queries, columns, generator=generator, dtype=subject.lazy.dtype)
        subject.check("product", subject.lazy @ x, x)
        subject.check("transposed_product", subject.lazy.mT @ y, y)


def test_pool(subject: Subject, case: tuple[Problem, torch.dtype]) -> None:
    query_to, key_to, query_cells, key_cells = None, None, None, None
    query_grid, key_grid = grids(*case)
    if query_grid is not None:
        query_to = _coarser(query_grid)
        query_cells = oracle.cells(query_grid, query_to)
    if key_grid is not None:
        key_to = _coarser(key_grid)
        key_cells = oracle.cells(key_grid, key_to)
    subject.check("pool", subject.lazy.pool(query_to=query_to), query_cells, None)
    subject.check("pool", subject.lazy.pool(key_to=key_to), None, key_cells)
    subject.check("pool", subject.lazy.pool(query_to, key_to), query_cells, key_cells)


def _coarser(grid: tuple[int, int]) -> tuple[int, int]:
    """About half the rows and two thirds of the columns: uneven cells where they do not divide."""
    height, width = grid
    return max(1, height // 2), max(1, 2 * width // 3)
