"""Whole numbers are not cut, True is no number, "no" is not true: for all that users may call."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.arguments import as_whole, number, sides, switch, whole
from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.features import features
from flashmaps.diffusion.recorder import Recorder
from flashmaps.diffusion.selection import resolutions, whole_numbers
from flashmaps.matching.pairs import all_pairs, match_pairs
from flashmaps.matching.readout import read

# What nobody means where a whole number is wanted, beside numbers out of range.
NOT_WHOLE = (True, False, np.True_, torch.tensor(True), 2.0, 2.9, "2", b"2", None, [2], 2j,
             math.nan, math.inf, Fraction(2), np.float32(2), torch.tensor(2.0),
             torch.tensor([2]), np.array([2]))  # fmt: skip
WHOLE = (2, np.int8(2), np.uint64(2), torch.tensor(2), np.array(2))
NOT_A_NUMBER = (True, np.False_, torch.tensor(True), "2", None, [2.0], 2j, math.nan, math.inf,
                -math.inf, 10**400, torch.tensor([2.0]), torch.tensor(math.nan))  # fmt: skip
NOT_A_SWITCH = (0, 1, "no", "False", "", None, [], 1.0, torch.tensor(True), np.array([True]))


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number(value: object) -> None:
    assert as_whole(value) is None
    with pytest.raises(ValueError, match=r"^count must be a whole number from 1 to 9, got "):
        whole("count", value, 1, 9)
    with pytest.raises(TypeError, match=r"^count must be a whole number, got "):
        whole("count", value, kind=TypeError)


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers_of_every_type(value: object) -> None:
    assert whole("count", value, 2, 2) == 2
    assert type(whole("count", value)) is int
    for least, most in ((3, None), (None, 1)):
        with pytest.raises(ValueError, match="count must be a whole number"):
            whole("count", value, least, most)


@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=lambda value: repr(value)[:20])
def test_what_is_no_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"^share must be a finite number from 0 to 9, got "):
        number("share", value, least=0, most=9)


def test_numbers_and_their_limits() -> None:
    for value in (2, 2.5, np.float16(2), np.int64(2), torch.tensor(2.0), Fraction(5, 2)):
        assert number("share", value, above=0) == float(value)
    for limits in ({"least": 3}, {"most": 1}, {"above": 2}, {"above": 1, "most": 1.5}):
        with pytest.raises(ValueError, match="share must be a finite number"):
            number("share", 2, **limits)


def test_switches() -> None:
    assert switch("keep", True) is True and switch("keep", np.False_) is False
    for value in NOT_A_SWITCH:
        with pytest.raises(TypeError, match="keep must be True or False, got "):
            switch("keep", value)


def test_sides() -> None:
    assert sides((3, 4)) == (3, 4) == sides(torch.tensor([3, 4])) == sides(np.array([3, 4]))
    for value in (3, (3,), (3, 4, 5), (3.0, 4), (True, 4), "34", "3", None, (None, 2)):
        assert sides(value) is None


# All that is public and takes such a number.

Q = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(0))
A = fm.AttentionMap(Q, Q)
R = A @ A
ENTRY = Entry(
    layer="attn1", kind="self", step=0, query=Q, key=Q, scale=0.3, grid=(4, 4),
    queries={"image": slice(0, 16)}, keys={"image": slice(0, 16)},
)  # fmt: skip

Take = Callable[[object], object]
TAKES_WHOLE: dict[str, Take] = {
    "topk": A.topk,
    "topk of a composition": R.topk,
    "plan, k": lambda n: A.plan("topk", k=n),
    "plan, columns": lambda n: A.plan("product", columns=n),
    "plan, count": lambda n: A.plan("rows", count=n),
    "plan of a composition, k": lambda n: R.plan("topk", k=n),
    "query_grid": lambda n: fm.AttentionMap(Q, Q, query_grid=(8, n)),
    "key_grid": lambda n: fm.AttentionMap(Q, Q, key_grid=(n, 8)),
    "pool, query_to": lambda n: A.pool((2, n)),
    "pool, key_to": lambda n: A.pool(None, (n, 2)),
    "pairs": lambda n: fm.AttentionMap(Q, Q, pairs=[[0, n]]),
    "all pairs": all_pairs,
    "pairs of images": lambda n: match_pairs([None] * 4, [(0, n)]),  # type: ignore[list-item]
    "window": lambda n: read(torch.ones(1, 16), (4, 4), "window", n),  # type: ignore[arg-type]
    "steps": lambda n: whole_numbers("steps", [n]),
    "resolution": lambda n: resolutions((8, n)),
    "pool_to": lambda n: Recorder(reduce="pool", pool_to=(8, n)),  # type: ignore[arg-type]
    "grid of a processor": lambda n: fm.MapAttnProcessor(grid=(8, n)),  # type: ignore[arg-type]
    "frame": ENTRY.frame,
}
TAKES_A_NUMBER: dict[str, Take] = {
    "scale": lambda x: fm.AttentionMap(Q, Q, scale=x),
    "head_weights": lambda x: fm.AttentionMap(Q, Q, head_weights=[x, 1.0]),
    "weights of an average": lambda x: fm.AttentionMap.average([A, A], [x, 1.0]),
    "seconds": lambda x: fm.Ceilings.measure(seconds=x),
    "temperature": lambda x: match_pairs([None] * 4, temperature=x),  # type: ignore[list-item]
}
TAKES_A_SWITCH: dict[str, Take] = {
    "checks": fm.checks,
    "both_ways": lambda x: all_pairs(3, both_ways=x),
    "progress": lambda x: match_pairs([None] * 4, progress=x),  # type: ignore[list-item]
    "renormalize": lambda x: ENTRY.map(renormalize=x),
    "same_noise": lambda x: features(None, [], same_noise=x),
    "outputs": lambda x: features(None, [], outputs=x),
    "same_noise of a match": lambda x: fm.match("a", "b", model=None, same_noise=x),
    "progress of a match": lambda x: fm.match("a", "b", model=None, progress=x),
}
ERRORS = (TypeError, ValueError)


@pytest.mark.parametrize("name", TAKES_WHOLE)
def test_all_that_takes_a_whole_number(name: str) -> None:
    for value in NOT_WHOLE:
        if name == "all pairs" or not (value is None and "weights" in name):
            with pytest.raises(ERRORS, match=r"wanted|must|whole|numbers|integers") as error:
                TAKES_WHOLE[name](value)
            assert "object cannot be interpreted" not in str(error.value), (name, value)
    TAKES_WHOLE[name](0 if name == "frame" else 1 if name == "pairs" else 2)


@pytest.mark.parametrize("name", TAKES_A_NUMBER)
def test_all_that_takes_a_number(name: str) -> None:
    for value in NOT_A_NUMBER:
        if value is None and name in ("scale", "temperature"):
            continue  # the default
        with pytest.raises(ERRORS, match=r"must|wanted|sum to"):
            TAKES_A_NUMBER[name](value)


@pytest.mark.parametrize("name", TAKES_A_SWITCH)
def test_all_that_takes_a_switch(name: str) -> None:
    for value in NOT_A_SWITCH:
        if value is None and name == "same_noise of a match":
            continue  # the model's own
        with pytest.raises(TypeError, match=r"must be True or False, got"):
            TAKES_A_SWITCH[name](value)


@pytest.mark.parametrize("value", [True, 2.0, "64MB", math.nan, [64]])
def test_memory_budgets_are_whole_numbers(value: object) -> None:
    def within() -> None:
        with fm.memory_budget(value):  # type: ignore[arg-type]
            pass

    calls: list[Callable[[], object]] = [
        within,
        lambda: A.reduce("entropy", memory_budget=value),  # type: ignore[arg-type]
        lambda: A.topk(2, memory_budget=value),  # type: ignore[arg-type]
        lambda: A.plan("entropy", memory_budget=value),  # type: ignore[arg-type]
        lambda: fm.compose(A, A, memory_budget=value),  # type: ignore[arg-type]
        lambda: fm.round_trip(A, A, memory_budget=value),  # type: ignore[arg-type]
        lambda: match_pairs([None] * 4, memory_budget=value),  # type: ignore
    ]
    for call in calls:
        with pytest.raises(TypeError, match="memory_budget must be a whole number of bytes"):
            call()


def test_a_budget_beyond_all_memory_is_no_budget() -> None:
    with fm.memory_budget(10**30):
        assert torch.equal(A.entropy(), fm.AttentionMap(Q, Q).entropy())
    assert A.plan("entropy", memory_budget=10**30).workspace == A.plan("entropy").workspace


@pytest.mark.parametrize(
    ("lse", "error", "words"),
    [
        (torch.zeros(2, 2, 16, dtype=torch.int64), TypeError, "lse has dtype torch.int64; wanted"),
        (torch.zeros(2, 2, 16, dtype=torch.bool), TypeError, "lse has dtype torch.bool; wanted"),
        (torch.full((2, 2, 16), math.nan), ValueError, "lse has NaN or inf"),
        (torch.full((2, 2, 16), math.inf), ValueError, "lse has NaN or inf"),
        (torch.full((2, 2, 16), -math.inf), ValueError, "lse has NaN or inf"),
    ],
)
def test_a_log_sum_exp_is_finite(lse: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fm.AttentionMap(Q, Q, lse=lse)


@pytest.mark.parametrize("scale", [1e30, -1e30, 1e300])
def test_a_scale_that_overflows_is_named(scale: float) -> None:
    with pytest.raises(
        ValueError, match=r"scale = .* is too large for torch.float32: scores would"
    ):
        fm.AttentionMap(Q, Q, scale=scale)
    if abs(scale) < 1e200:
        fm.AttentionMap(Q.double(), Q.double(), scale=scale)
    tiny = fm.AttentionMap(Q, Q, scale=1 / scale).entropy()
    torch.testing.assert_close(tiny, torch.full_like(tiny, math.log(16)))
