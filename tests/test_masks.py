"""Float masks of any magnitude: as exact as torch's softmax, and finite masks give finite maps."""

from __future__ import annotations

import math
from collections.abc import Callable

import flashmaps as fm
import oracle
import pytest
import torch
from flashmaps.maps.backends import cpu
from torch import Tensor

BUILDS = cpu._C.instruction_sets() if fm.backends()["cpu"] else []
WAYS = ["reference", *BUILDS]

pytestmark = pytest.mark.usefixtures("poison", "one_thread")


class OneBuild:
    """The extension, with every call sent to one of its builds."""

    def __init__(self, name: str) -> None:
        self.name, self.of = name, cpu._C

    def __getattr__(self, attribute: str) -> object:
        return getattr(self.of, attribute)

    def reduce(self, *arguments: object) -> object:
        return self.of.reduce(*arguments, instruction_set=self.name)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of each build, with calls sent to that build."""
    if request.param == "reference":
        return "reference"
    monkeypatch.setattr(cpu, "_C", OneBuild(request.param))
    return "cpu"


def tokens(dtype: torch.dtype = torch.float32, keys: int = 257) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and a standard normal bias for each key."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 64, generator=generator).to(dtype) for n in (61, keys))
    return query, key, torch.randn(2, keys, generator=generator)


def torch_map(query: Tensor, key: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    scores = query.to(dtype) @ key.to(dtype).mT * query.shape[3] ** -0.5
    return (scores + bias.to(dtype)[:, None, None]).softmax(-1).mean(1)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "around-1e3": lambda noise: 1e3 + noise,
    "around-1e4": lambda noise: noise - 1e4,
    "around-1e6": lambda noise: 1e6 + noise,
    "as-large-as-1e3": lambda noise: 1e3 * noise,
    "as-large-as-1e5": lambda noise: 1e5 * noise,
    "third-at-1e3": lambda noise: torch.where(noise > 0.5, 1e3, 0.0),
    "third-at--1e4": lambda noise: torch.where(noise > 0.5, -1e4, 0.3 * noise),
    "slope": lambda noise: torch.arange(noise.shape[1]).expand(noise.shape) * -8.0 + 2000,
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_of_any_magnitude_is_as_exact_as_torch(mask: str, way: str) -> None:
    """At most twice torch's error and a rounding of each of the 64 products, and of the exponent.

    Whatever the mask: unlike the contract's budget (oracle.py), no term grows with it.
    """
    query, key, noise = tokens()
    bias = MASKS[mask](noise).float()
    truth, plain = (torch_map(query, key, bias, t) for t in (torch.float64, torch.float32))
    got = fm.AttentionMap(query, key, key_mask=bias, backend=way).to_dense()

    floor = torch.finfo(torch.float32).tiny * bias.shape[1]  # what underflows, as oracle.vanishing

    def error(of: Tensor) -> float:
        return oracle.error(of, oracle.positive(truth), floor).max().item()

    unit = torch.finfo(torch.float32).eps / 2
    largest = (query.double() @ key.double().mT * 64**-0.5).abs().max().item()
    roundings = math.sqrt(64) + 2 * largest + 4
    assert error(got) <= 2 * error(plain) + oracle.FOUR_SIGMA * unit * roundings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", ["lowest", "largest", "3e38", "-3e38", "both"])
def test_finite_masks_give_finite_maps(value: str, dtype: torch.dtype, way: str) -> None:
    query, key, noise = tokens(dtype, keys=49)
    limits = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    bias = torch.full((49,), 0.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    some = noise[0] > 0.3
    if value == "lowest":
        bias[:] = limits.min
    elif value == "largest":
        bias[some] = limits.max
    elif value == "both":
        bias[some], bias[~some] = limits.max, limits.min
    else:
        bias[some] = float(value)
    A = fm.AttentionMap(query, key, key_mask=bias, backend=way)
    dense = A.to_dense()
    assert torch.isfinite(dense).all() and torch.isfinite(A.lse).all()
    torch.testing.assert_close(dense.sum(-1), torch.ones_like(dense[..., 0]))
    if value == "-3e38":
        known = fm.AttentionMap(query, key, key_mask=bias, lse=A.lse, backend=way).to_dense()
        torch.testing.assert_close(known, dense, rtol=1e-4, atol=1e-7)
    else:
        with pytest.raises(ValueError, match=r"lse has no digits left beside a key_mask of [13]"):
            fm.AttentionMap(query, key, key_mask=bias, lse=A.lse, backend=way)
    back = fm.AttentionMap(key, query, backend=way)
    trip = fm.round_trip(back, A)
    composed = back.to_dense() @ dense
    torch.testing.assert_close(
        trip.return_probability, composed.diagonal(dim1=1, dim2=2), rtol=1e-3, atol=1e-6
    )
    if value in ("largest", "-3e38", "both", "3e38"):
        hidden = ~some if value in ("largest", "3e38", "both") else some
        assert (dense[..., hidden] == 0).all()


def test_the_log_sum_exp_has_the_mask_in_it(way: str) -> None:
    query, key, noise = tokens()
    bias = 1e3 + noise
    pairs = torch.tensor([[0, 1], [1, 1], [1, 0]])
    A = fm.AttentionMap(query, key, key_mask=bias, pairs=pairs, backend=way)
    scores = query.double()[pairs[:, 0]] @ key.double()[pairs[:, 1]].mT / 8
    want = (scores + bias.double()[pairs[:, 1], None, None]).logsumexp(-1)
    torch.testing.assert_close(A.lse.double(), want, rtol=2e-7, atol=0)
    given = fm.AttentionMap(query, key, key_mask=bias, pairs=pairs, lse=A.lse, backend=way)
    # A log-sum-exp near 1000 is rounded by 3e-5, and so is what is computed from it.
    torch.testing.assert_close(given.to_dense(), A.to_dense(), rtol=1e-4, atol=1e-7)
    assert torch.equal(given.lse, A.lse)
    both = fm.AttentionMap.average([A, given])
    torch.testing.assert_close(both.lse[:, :3], A.lse, rtol=1e-7, atol=0)
    torch.testing.assert_close(both.to_dense(), A.to_dense(), rtol=1e-4, atol=1e-7)


def test_masks_that_differ_by_a_constant_do_not_average() -> None:
    query, key, noise = tokens()
    maps = [fm.AttentionMap(query, key, key_mask=noise + shift) for shift in (0.0, 2.0)]
    with pytest.raises(ValueError, match=r"maps\[1\] has another key_mask than maps\[0\]"):
        fm.AttentionMap.average(maps)
