"""A log-sum-exp that a map keeps, or was given, is that of Q and K as they are now, or unused."""

from __future__ import annotations

from collections.abc import Callable

import flashmaps as fm
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, 16, 8, generator=generator), torch.randn(
        1, 2, 16, 8, generator=generator
    )


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda x: x.mul_(3),
    "copy_": lambda x: x.copy_(x.flip(2)),
    "item": lambda x: x[0, 0].fill_(2),
    "view": lambda x: x.view(-1)[3:9].zero_(),
    "out=": lambda x: torch.add(x, 1, out=x),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_change_in_place_is_noticed(which: int, change: str, backend: str) -> None:
    both = tokens()
    query, key = both
    A, B = (fm.AttentionMap(*pair, backend=backend) for pair in ((query, key), (key, query)))
    R = B @ A  # its diagonal wants A's log-sum-exp
    for _ in range(2):
        fresh = fm.AttentionMap(query.clone(), key.clone(), backend=backend)
        back = fm.AttentionMap(key.clone(), query.clone(), backend=backend)
        assert torch.equal(A.lse, fresh.lse)
        assert torch.equal(R.diagonal(), (back @ fresh).diagonal())
        trip, want = fm.round_trip(B, A), fm.round_trip(back, fresh)
        assert torch.equal(trip.return_probability, want.return_probability)
        assert (trip.return_probability <= 1 + 1e-6).all()
        CHANGES[change](both[which])


@pytest.mark.parametrize("which", [0, 1])
def test_a_given_one_is_refused_after_a_change(which: int, backend: str) -> None:
    both = tokens()
    lse = fm.AttentionMap(*both, backend=backend).lse
    A = fm.AttentionMap(*both, lse=lse, backend=backend)
    A.entropy()
    both[which].mul_(3)
    calls: list[Callable[[], object]] = [
        A.entropy, lambda: A.lse, lambda: A.rows(0), lambda: A.plan("entropy"),
        lambda: A @ torch.ones(16, 1), lambda: A.mT @ torch.ones(16, 1), lambda: A.pool((2, 2)),
        lambda: (A @ A).diagonal(), lambda: fm.round_trip(A, A),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="changed in place after the map was made with lse="):
            call()


def test_masks_weights_and_pairs_are_as_they_were_when_the_map_was_made(backend: str) -> None:
    query, key = tokens()
    mask, weights = torch.linspace(-2, 2, 16), torch.tensor([0.25, 0.75])
    hidden = torch.arange(16) % 3 > 0
    pairs = torch.tensor([[0, 0], [0, 0]])
    maps = [
        fm.AttentionMap(query, key, key_mask=mask, head_weights=weights, pairs=pairs,
                        backend=backend),
        fm.AttentionMap(query, key, key_mask=hidden, head_weights=weights, backend=backend),
    ]  # fmt: skip
    before = [(A.to_dense(), A.lse) for A in maps]
    mask.zero_(), weights.fill_(0.5), hidden.fill_(True), pairs.fill_(7)
    for A, (dense, lse) in zip(maps, before, strict=True):
        assert torch.equal(A.to_dense(), dense) and torch.equal(A.lse, lse)


def test_in_inference_mode_nothing_is_kept_that_could_be_stale(backend: str) -> None:
    with torch.inference_mode():
        query, key = (x * 1 for x in tokens())
        A = fm.AttentionMap(query, key, backend=backend)
        before = A.lse
        query.mul_(2)
        fresh = fm.AttentionMap(query, key, backend=backend)
        assert torch.equal(A.lse, fresh.lse) and not torch.equal(A.lse, before)
