"""Every statistic of the round trip against its formula on dense float64 maps."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flashmaps as fm
import oracle
import pytest
import torch
from contract import lazy_map
from problems import (
    DTYPES,
    Options,
    Problem,
    bool_mask,
    float_bias,
    inputs,
    lines,
    pairs,
    plain,
    scale,
    truth,
    weights,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poison", "one_thread")


def with_grids(query_grid: tuple[int, int], key_grid: tuple[int, int], options=None):
    def both(generator: torch.Generator, problem: Problem) -> Options:
        more = options(generator, problem) if options else {}
        return {**more, "query_grid": query_grid, "key_grid": key_grid}

    return both


# A_st, A_ts, and the source's grid. Squares where nothing else is said.
TRIPS = [
    (Problem((2, 3, 25, 36, 24)), Problem((2, 3, 36, 25, 24)), (5, 5)),
    (
        Problem((1, 2, 21, 45, 40), "grids", options=with_grids((3, 7), (5, 9))),
        Problem((1, 4, 45, 21, 16), "grids", options=with_grids((5, 9), (3, 7))),
        (3, 7),
    ),
    (Problem((1, 2, 1, 9, 8)), Problem((1, 2, 9, 1, 8)), (1, 1)),
    (
        Problem((2, 2, 25, 45, 24), "mask", options=bool_mask),
        Problem((2, 2, 45, 25, 24), "bias", options=float_bias),
        (5, 5),
    ),
    (
        Problem((2, 2, 16, 37, 24), "pairs", key_batch=3, options=pairs((1, 2), (0, 0), (1, 2))),
        Problem((3, 2, 37, 16, 24), "pairs", key_batch=2, options=pairs((2, 1), (0, 0), (2, 1))),
        (4, 4),
    ),
    (
        Problem((1, 3, 16, 37, 24), "weights", options=weights(0.5, 0.0, 0.5)),
        Problem((1, 3, 37, 16, 24), "lse", with_lse=True),
        (4, 4),
    ),
    (
        Problem((1, 2, 16, 45, 24), "rows", options=lines("rows", (5, 9))),
        Problem((1, 2, 45, 16, 24), "columns", options=lines("columns", (4, 4))),
        (4, 4),
    ),
    (
        Problem((1, 2, 16, 45, 24), "lse", options=with_grids((2, 8), (5, 9)), with_lse=True),
        Problem((1, 2, 45, 16, 24), "rows-lse", options=lines("rows", (2, 8)), with_lse=True),
        (2, 8),
    ),
    (
        Problem((1, 2, 36, 36, 24), "one-hot", options=scale(20.0)),
        Problem((1, 2, 36, 36, 24), "one-hot-back", options=scale(20.0)),
        (6, 6),
    ),
    (
        Problem((1, 2, 49, 49, 8), "flat", scores=0.01),
        Problem((1, 2, 49, 49, 8), "flat-back", scores=0.01),
        (7, 7),
    ),
]  # fmt: skip

CASES = [
    (*trip, dtype)
    for index, trip in enumerate(TRIPS)
    for dtype in (DTYPES if index < 2 else (torch.float32, DTYPES[(0, 2, 3)[index % 3]]))
]
CASE_NAMES = [f"{a}-{b}-{str(dtype).removeprefix('torch.')}" for a, b, _, dtype in CASES]


class Trip(NamedTuple):
    """Both lazy maps, their dense truth and plain torch's, and where the source's cells are."""

    A_st: fm.AttentionMap
    A_ts: fm.AttentionMap
    there: oracle.Map
    back: oracle.Map
    plain_there: oracle.Map
    plain_back: oracle.Map
    at: Tensor
    dtype: torch.dtype

    def check(self, what: str, got: Tensor, true: oracle.Value, rival: oracle.Value) -> None:
        of = self.there @ self.back
        oracle.assert_within_budget(what, got, true, rival, of, self.dtype)

    def both(self, formula) -> tuple[oracle.Value, oracle.Value]:
        """``formula(A_st, A_ts, x)`` on the truth and on plain torch's maps."""
        rival = (self.plain_there, self.plain_back, self.at.to(self.plain_there.values.dtype))
        return formula(self.there, self.back, self.at), formula(*rival)


@pytest.fixture(params=CASES, ids=CASE_NAMES)
def trip(request: pytest.FixtureRequest, backend: str) -> Trip:
    first, second, grid, dtype = request.param
    lazy = [lazy_map(problem, dtype, backend) for problem in (first, second)]
    dense = [m(p, dtype)[0] for m in (truth, plain) for p in (first, second)]
    return Trip(*lazy, *dense, oracle.centres(grid), dtype)


# The formulas, each as a function of the two maps and the source's cell centres.


def soft_distance(there: oracle.Map, back: oracle.Map, at: Tensor) -> oracle.Value:
    ends = there.distribution @ (back.distribution @ at)
    # Either coordinate is at most 1, so a relative error moves the point by up to sqrt 2 of it.
    return oracle.Value((at - ends).norm(dim=-1), torch.full_like(ends[..., 0], 2**0.5))


def squared_spread(there: oracle.Map, back: oracle.Map, at: Tensor) -> oracle.Value:
    """E |x_k - x_i|^2; streamed as E |x_k|^2 - 2 x_i E x_k + |x_i|^2, which is what rounds."""
    R = there.distribution @ back.distribution
    square = (at[:, None] - at[None]).square().sum(-1)
    norms = at.square().sum(-1)
    size = R @ norms + 2 * (at * (R @ at)).sum(-1) + norms
    return oracle.Value((R * square).sum(-1), size)


def return_probability(there: oracle.Map, back: oracle.Map, at: Tensor) -> oracle.Value:
    R = there.distribution @ back.distribution
    return oracle.positive(R.diagonal(dim1=1, dim2=2))


def inverse_entropy(there: oracle.Map, back: oracle.Map, at: Tensor) -> oracle.Value:
    return back.entropy()


def soft_density(there: oracle.Map, back: oracle.Map, at: Tensor) -> oracle.Value:
    return oracle.positive(there.distribution.sum(1))


def mean(value: oracle.Value) -> oracle.Value:
    return oracle.Value(value.value.mean(1), value.magnitude.mean(1))


def ratio(value: oracle.Value, by: Tensor, where: Tensor) -> oracle.Value:
    return oracle.Value(*((part / by.to(part.dtype))[where] for part in value))


def test_round_trip(trip: Trip) -> None:
    rt = fm.round_trip(trip.A_st, trip.A_ts)
    batch, sources, targets = trip.there.values.shape
    for name, index, dense, rival in (
        ("forward", rt.forward, trip.there, trip.plain_there),
        ("backward", rt.backward, trip.back, trip.plain_back),
    ):
        oracle.assert_picks_maximum(
            name, index, dense.values, rival.values, dense, trip.dtype, dim=2
        )
    # What follows from the argmaxes is exact, given them: they may differ where two entries tie.
    ends = rt.backward.gather(1, rt.forward)
    hard = (trip.at - trip.at[ends]).norm(dim=-1)
    hard = oracle.Value(hard, torch.ones_like(hard))
    trip.check("hard_distance", rt.hard_distance, hard, hard)
    trip.check("hard_ims", rt.hard_ims, mean(hard), mean(hard))
    density = torch.stack([torch.bincount(f, minlength=targets) for f in rt.forward])
    assert torch.equal(rt.density, density)
    assert torch.equal(rt.nims_valid, density >= 2)

    soft, plain_soft = trip.both(soft_distance)
    trip.check("soft_distance", rt.soft_distance, soft, plain_soft)
    trip.check("soft_ims", rt.soft_ims, mean(soft), mean(plain_soft))
    trip.check("spread squared", rt.spread.square(), *trip.both(squared_spread))
    trip.check("return_probability", rt.return_probability, *trip.both(return_probability))
    trip.check("inverse_entropy", rt.inverse_entropy, *trip.both(inverse_entropy))
    trip.check("soft_density", rt.soft_density, *trip.both(soft_density))

    assert torch.equal(rt.nims.isnan(), density < 2)
    assert torch.equal(rt.nims_log1p.isnan(), density < 1)
    entropies = trip.both(inverse_entropy)
    for got, where, by in (
        (rt.nims, density >= 2, density.double().log()),
        (rt.nims_log1p, density >= 1, density.double().log1p()),
    ):
        if where.any():
            trip.check("nims", got[where], *(ratio(e, by, where) for e in entropies))
    for field in dataclasses.fields(rt):
        size = {"hard_ims": (), "soft_ims": ()}.get(field.name)
        if size is None:
            size = (targets,) if field.name in PER_TARGET else (sources,)
        assert getattr(rt, field.name).shape == (batch, *size), field.name


PER_TARGET = {
    "backward", "inverse_entropy", "density", "soft_density", "nims", "nims_valid", "nims_log1p",
}  # fmt: skip


def test_free_statistics_agree_with_the_round_trip(trip: Trip) -> None:
    A, B = trip.A_st, trip.A_ts
    rt = fm.round_trip(A, B)
    hard = fm.inverse_mapping_score(A, B)
    torch.testing.assert_close(hard, rt.hard_ims)
    assert torch.equal(hard, fm.inverse_mapping_score(A, B, kind="hard"))
    trip.check("soft IMS", fm.inverse_mapping_score(A, B, kind="soft"),
               *(mean(v) for v in trip.both(soft_distance)))  # fmt: skip
    assert torch.equal(fm.mapping_density(A), rt.density)
    trip.check("soft MD", fm.mapping_density(A, kind="soft"), *trip.both(soft_density))
    trip.check("IME", fm.inverse_mapping_entropy(B), *trip.both(inverse_entropy))
    bayes = fm.inverse_mapping_entropy(A, kind="bayes")
    oracle.assert_column_entropy("IME bayes", bayes, trip.there, trip.plain_there, trip.dtype)
    ratios = fm.nims(rt.inverse_entropy, rt.density)
    for ours, field in zip(ratios, (rt.nims, rt.nims_valid, rt.nims_log1p), strict=True):
        assert torch.equal(ours.nan_to_num(-1), field.nan_to_num(-1))


def test_nims_by_hand() -> None:
    entropy = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    got = fm.nims(entropy, torch.tensor([0, 1, 2, 4]))
    nan, log = float("nan"), torch.tensor([2.0, 4.0, 5.0], dtype=torch.float64).log()
    torch.testing.assert_close(
        got.nims, torch.tensor([nan, nan, 1 / log[0], 2 / log[1]]).double(), equal_nan=True
    )
    assert got.valid.tolist() == [False, False, True, True]
    torch.testing.assert_close(
        got.log1p[1:],
        torch.stack([1 / log[0], 1 / torch.tensor(3.0).double().log(), 2 / log[2]]),
    )
    assert got.log1p[0].isnan()


# Averages over layers and timesteps.


def average_cases() -> list[tuple[str, list[Problem], list[float] | None]]:
    grid = (5, 9)
    return [
        ("heads-differ", [Problem((2, 3, 21, 45, 24)), Problem((2, 1, 21, 45, 24))], [0.25, 0.75]),
        ("widths-differ", [Problem((1, 2, 21, 45, 40)), Problem((1, 3, 21, 45, 16)),
                           Problem((1, 1, 21, 45, 13))], None),
        ("weights", [Problem((1, 3, 21, 45, 8), "weights", options=weights(0.5, 0.0, 0.5)),
                     Problem((1, 2, 21, 45, 8))], [0.5, 0.5]),
        ("scales", [Problem((1, 3, 21, 45, 8), "scaled", options=scale(0.7)),
                    Problem((1, 2, 21, 45, 8))], [0.9, 0.1]),
        ("normalized", [Problem((1, 3, 21, 45, 8), options=lines("rows", grid)),
                        Problem((1, 2, 21, 45, 8), "b", options=lines("rows", grid))], None),
        ("mask", [Problem((1, 3, 21, 45, 8), options=lambda g, p: {"key_mask": MASK}),
                  Problem((1, 2, 21, 45, 8), "b", options=lambda g, p: {"key_mask": MASK})], None),
    ]  # fmt: skip


MASK = torch.arange(45) % 3 > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("problems", "weighting"),
    [pytest.param(*case, id=name) for name, *case in average_cases()],
)
def test_average(problems, weighting, dtype: torch.dtype, backend: str) -> None:
    """The weighted mean of the maps before note eq. 2.3 is applied, then eq. 2.3."""
    maps, dense = [], {torch.float64: [], oracle.compute_dtype(dtype): []}
    normalized = None
    for problem in problems:
        query, key, options = inputs(problem, dtype)
        maps.append(lazy_map(problem, dtype, backend))
        normalized = options.get("normalize")
        options = {**options, "normalize": None}
        for compute, found in dense.items():
            found.append(oracle.attention(query, key, dtype=compute, **options)[0])
    share = weighting or [1 / len(maps)] * len(maps)
    answers = []
    for compute in (torch.float64, oracle.compute_dtype(dtype)):
        values = sum(w * m.values for w, m in zip(share, dense[compute], strict=True))
        if normalized:
            block = values.unflatten(2, (5, 9))
            values = (block / block.sum(3, keepdim=True)).flatten(2)
        answers.append(oracle.positive(values))
    of = max(dense[torch.float64], key=lambda m: m.roundings)
    average = fm.AttentionMap.average(maps, weighting)
    assert average.problem.heads == sum(p.shape[1] for p in problems)
    oracle.assert_within_budget("average", average.to_dense(), *answers, of, dtype)
