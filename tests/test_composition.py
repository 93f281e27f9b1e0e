"""R = A @ A', lazy: every operation against the float64 oracle, whatever memory it may take."""

from __future__ import annotations

import functools

import flashmaps as fm
import oracle
import pytest
import torch
from contract import Subject, lazy_map, smallest
from flashmaps.maps.backends import reducers
from flashmaps.maps.problem import Request
from problems import (
    DTYPES,
    Problem,
    bool_mask,
    float_bias,
    lines,
    pairs,
    plain,
    scale,
    truth,
    weights,
)

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

# A, [N, M], then A', [M, K]. Head counts and widths of the two need not agree.
CHAINS = [
    (Problem((2, 3, 21, 45, 24)), Problem((2, 2, 45, 33, 40))),
    (Problem((1, 2, 25, 36, 8)), Problem((1, 5, 36, 25, 16))),
    (Problem((2, 2, 1, 37, 13)), Problem((2, 1, 37, 1, 8))),
    (Problem((1, 2, 37, 1, 40)), Problem((1, 2, 1, 37, 40))),
    (Problem((1, 1, 9, 131, 16)), Problem((1, 2, 131, 9, 16))),
    (
        Problem((2, 3, 21, 45, 24), "mask", options=bool_mask),
        Problem((2, 3, 45, 21, 24), "bias", options=float_bias),
    ),
    (
        Problem((2, 2, 10, 45, 24), "pairs", key_batch=3, options=pairs((1, 2), (0, 0), (1, 2))),
        Problem((3, 2, 45, 10, 24), "pairs", key_batch=2, options=pairs((2, 1), (0, 0), (0, 1))),
    ),
    (
        Problem((1, 3, 16, 45, 24), "weights", options=weights(0.5, 0.0, 0.5)),
        Problem((1, 2, 45, 16, 24), "lse", with_lse=True),
    ),
    (
        Problem((1, 2, 20, 45, 24), "rows", options=lines("rows", (5, 9))),
        Problem((1, 2, 45, 20, 24), "columns", options=lines("columns", (4, 5))),
    ),
    (
        Problem((1, 2, 21, 45, 24), "one-hot", options=scale(20.0)),
        Problem((1, 2, 45, 21, 24), "one-hot", options=scale(20.0)),
    ),
]
CASES = [
    (*chain, dtype)
    for index, chain in enumerate(CHAINS)
    for dtype in (DTYPES if index < 2 else (torch.float32, DTYPES[(0, 2, 3)[index % 3]]))
]
CASE_NAMES = [f"{a}-{b}-{str(dtype).removeprefix('torch.')}" for a, b, dtype in CASES]

Case = tuple[Problem, Problem, torch.dtype]


@functools.cache
def dense(case: Case) -> tuple[oracle.Map, oracle.Map]:
    first, second, dtype = case
    return (
        truth(first, dtype)[0] @ truth(second, dtype)[0],
        plain(first, dtype)[0] @ plain(second, dtype)[0],
    )


def lazy_maps(case: Case, backend: str) -> tuple[fm.AttentionMap, fm.AttentionMap]:
    first, second, dtype = case
    return lazy_map(first, dtype, backend), lazy_map(second, dtype, backend)


def smallest_budget(A: fm.AttentionMap, B: fm.AttentionMap) -> int:
    return smallest(lambda: fm.compose(A, B, memory_budget=1))


@pytest.fixture(params=CASES, ids=CASE_NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# Room for all of the composition; in one dtype also for a few rows; twice, for one row (slow).
ROOMS = [(case, "ample") for case in CASES]
ROOMS += [(case, "few-rows") for case in CASES if case[2] == torch.float32]
ROOMS += [((*CHAINS[index], torch.float32), "one-row") for index in (4, 8)]
ROOM_NAMES = [f"{CASE_NAMES[CASES.index(case)]}-{room}" for case, room in ROOMS]


@pytest.fixture(params=ROOMS, ids=ROOM_NAMES)
def subject(request: pytest.FixtureRequest, backend: str) -> Subject:
    case, room = request.param
    A, B = lazy_maps(case, backend)
    smallest = smallest_budget(A, B)
    budget = {"ample": None, "few-rows": 7 * smallest, "one-row": smallest}[room]
    return Subject(fm.compose(A, B, memory_budget=budget), *dense(case), case[2])


def test_is_lazy_and_says_what_it_is(case: Case, backend: str) -> None:
    A, B = lazy_maps(case, backend)
    R = A @ B
    assert isinstance(R, fm.Composition)
    assert R.shape == tuple(dense(case)[0].values.shape)
    assert R.dtype == oracle.compute_dtype(case[2])
    assert R.lines == dense(case)[0].lines
    assert f"shape={R.shape}" in repr(R)


def test_reductions(subject: Subject) -> None:
    subject.check_reductions()


def test_streamed_reductions(subject: Subject) -> None:
    """Diagonal, column sums and expectations asked for alone take another path: no rows of R."""
    names = {"diagonal", "column_sum", "expectation"} & {*subject.reductions}
    fields = subject.lazy.reduce(*names)
    for name in names:
        subject.check_reduction(name, getattr(fields, name))
    if "diagonal" in names:
        assert torch.equal(subject.lazy.diagonal(), fields.diagonal)


def test_entries(subject: Subject) -> None:
    subject.check_entries("to_dense", subject.lazy.to_dense(), lambda values: values)
    last = subject.truth.values.shape[1] - 1
    for index in (-1, slice(None, None, 2), [last, 0, last]):
        subject.check_rows(index)


def test_topk(subject: Subject) -> None:
    ends = subject.truth.values.shape[2]
    subject.check_topk(min(4, ends))


def test_products(case: Case, backend: str) -> None:
    A, B = lazy_maps(case, backend)
    subject = Subject(A @ B, *dense(case), case[2])
    batch, queries, ends = subject.lazy.shape
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 3, 17):
        x = torch.randn(batch, ends, columns, generator=generator, dtype=A.dtype)
        y = torch.randn(batch, queries, columns, generator=generator, dtype=A.dtype)
        subject.check("product", subject.lazy @ x, x)
        subject.check("transposed_product", subject.lazy.transposed_product(y), y)


def test_a_budget_one_byte_below_the_smallest_is_refused(backend: str) -> None:
    A, B = lazy_maps((*CHAINS[0], torch.float32), backend)
    smallest = smallest_budget(A, B)
    fm.compose(A, B, memory_budget=smallest)
    with pytest.raises(ValueError, match=f"smallest that works is {smallest}"):
        fm.compose(A, B, memory_budget=smallest - 1)


def test_more_rows_than_fit_are_never_held(backend: str) -> None:
    """Of A, A' and R, any two are too many for the budget; the backend's own needs are in it."""
    chain = (Problem((1, 1, 120, 110, 8)), Problem((1, 1, 110, 130, 8)), torch.float32)
    A, B = lazy_maps(chain, backend)
    budget = max(60_000, smallest_budget(A, B))  # R is 62,400 bytes, A 52,800, A' 57,200
    plan = (A @ B).plan("entropy", "argmax", memory_budget=budget)
    assert plan.workspace <= budget
    assert plan.passes > 2  # all of A' at least twice


def test_a_budget_is_a_number_and_no_truth(backend: str) -> None:
    A, B = lazy_maps((*CHAINS[0], torch.float32), backend)
    for bad in (True, 1e6):
        with pytest.raises(TypeError, match="memory_budget must be a whole number of bytes"):
            fm.compose(A, B, memory_budget=bad)


@pytest.mark.parametrize("keys", [1, 63, 255, 256, 257, 300, 448])
def test_argmax_of_a_row_is_its_first_maximum(keys: int) -> None:
    """Searched piece by piece, with the maximum twice in a piece, in two, or in the last one."""
    values = torch.rand(1, 40, keys, generator=torch.Generator().manual_seed(keys))
    where = torch.randint(keys, (40, 3), generator=torch.Generator().manual_seed(1))
    values[0].scatter_(1, where, 2.0)
    values[0, 0] = 0.5
    found = reducers.ROW_REDUCERS["argmax"](
        reducers.Tile(values, 0, slice(None), 1, None, Request(("argmax",)))
    )
    expected = where.amin(1)
    expected[0] = 0
    assert torch.equal(found[0], expected)
    values[0, 3, keys // 2] = torch.nan  # an index all the same
    assert 0 <= int(reducers._row_argmax(values)[0, 3]) < keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_of_a_row_with_zeros_and_the_smallest_numbers(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    rows = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, tiny / 8, 0.0],
         [0.25, 0.25, 0.25, 0.25]], dtype=dtype,
    )  # fmt: skip
    expected = -torch.special.xlogy(rows.double(), rows.double()).sum(1)
    torch.testing.assert_close(
        reducers.row_entropy(rows).double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0
    )
    assert reducers.row_entropy(torch.tensor([[torch.nan, 0.5]], dtype=dtype)).isnan()
