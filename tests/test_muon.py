"""Muon against the singular value decomposition, and a training that goes on with it."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from flashmaps.models.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (32, 4)])
def test_updates_have_the_directions_of_the_svd_and_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonal(matrices) @ vh.mT  # diagonal, but for what bfloat16 rounds
    diagonal = torch.diagonal(found, dim1=-2, dim2=-1)
    assert (found - torch.diag_embed(diagonal)).abs().max() < 0.1
    # The quintic brings values from 0.01 on to within 0.7 and 1.2 in five rounds.
    assert diagonal.max() < 1.3 and diagonal.median() > 0.6


def test_every_weight_is_moved_once_and_the_state_comes_back():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "conv_in": torch.nn.Conv2d(2, 4, 3),
            "hidden": torch.nn.Conv2d(4, 8, 3),
            "norm": torch.nn.GroupNorm(2, 8),
            "linear": torch.nn.Linear(8, 8, bias=False),
        }
    )
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.0}

    def descend(optimizer: Muon, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
        assert all(weight.grad is None for weight in model.parameters())

    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    first = Muon(model.named_parameters(), **options)
    descend(first, 1)
    moved = {n: (w - before[n]).square().mean().sqrt() / 1e-2 for n, w in model.named_parameters()}
    # AdamW's first step is the gradient's sign; Muon's is 0.2 sqrt(max(m, n)) U V^T, whose
    # root mean square is 0.2 where all singular values are 1; here they are about 0.7 to 1.2.
    assert all(abs(moved[name] - 1) < 1e-3 for name in moved if name[:4] in ("conv", "norm"))
    for name in ("hidden.weight", "linear.weight"):
        assert 0.2 * 0.7 < moved[name] < 0.2 * 1.2, name
    state, weights = first.state_dict(), {n: w.clone() for n, w in model.state_dict().items()}
    state = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state
    )
    descend(first, 2)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)
    second = Muon(model.named_parameters(), **options)
    second.load_state_dict(state)
    descend(second, 2)
    assert all(torch.equal(expected[name], weight) for name, weight in model.state_dict().items())


def test_steps_made_for_replay_are_the_same_ones():
    torch.manual_seed(0)
    one = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4))
    other = copy.deepcopy(one)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 1e-2}
    plain, replayable = (Muon(x.named_parameters(), **options) for x in (one, other))
    replayable.make_replayable()
    for step in range(3):
        plain.param_groups[0]["lr"] = 1e-2 * step
        replayable.param_groups[0]["lr"].fill_(1e-2 * step)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        plain.step()
        replayable.step()
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
