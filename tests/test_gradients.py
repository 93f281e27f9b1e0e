"""There are no gradients yet: forward works on tensors that want them, backward says so."""

from __future__ import annotations

from collections.abc import Callable

import flashmaps as fm
import pytest
import torch
from torch import Tensor


def maps(backend: str, wanted: bool = True) -> tuple[fm.AttentionMap, fm.AttentionMap]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 16, 8, generator=generator) for _ in range(2))
    query.requires_grad_(wanted)
    return (
        fm.AttentionMap(query, key, backend=backend),
        fm.AttentionMap(key, query, backend=backend),
    )


DIFFERENTIABLE: dict[str, Callable[[fm.AttentionMap, fm.AttentionMap], Tensor]] = {
    "entropy": lambda A, B: A.entropy(),
    "lse": lambda A, B: A.lse,
    "dense": lambda A, B: A.to_dense(),
    "rows": lambda A, B: A.rows([0, 3]),
    "product": lambda A, B: A @ torch.ones(16, 2),
    "transposed": lambda A, B: A.mT @ torch.ones(16, 2),
    "column_sum": lambda A, B: A.column_sum(),
    "topk": lambda A, B: A.topk(3)[0],
    "pool": lambda A, B: A.pool((2, 2), (2, 2)),
    "composed": lambda A, B: (A @ B).reduce("entropy").entropy,
    "composed-diagonal": lambda A, B: (A @ B).diagonal(),
    "soft-ims": lambda A, B: fm.round_trip(A, B).soft_ims,
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_says_that_there_is_none(name: str, backend: str) -> None:
    got = DIFFERENTIABLE[name](*maps(backend))
    want = DIFFERENTIABLE[name](*maps(backend, wanted=False))
    assert torch.equal(got.detach(), want)
    assert got.requires_grad  # silently detached would be a wrong gradient of zero
    with pytest.raises(RuntimeError, match=r"flashmaps\.\w+.*no autograd formula"):
        got.sum().backward()


def test_an_operand_that_wants_a_gradient(backend: str) -> None:
    A, _ = maps(backend, wanted=False)
    x = torch.ones(16, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (A @ x).sum().backward()


def test_indices_have_no_gradient(backend: str) -> None:
    A, B = maps(backend)
    rt = fm.round_trip(A, B)
    for index in (A.argmax(), A.topk(2)[1], A.column_argmax(), rt.forward, rt.density):
        assert not index.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable, backend: str) -> None:
    with mode():
        A, B = maps(backend)
        got = A.entropy(), (A @ B).reduce("max").max, fm.round_trip(A, B).soft_ims
    assert not any(t.requires_grad for t in got)
