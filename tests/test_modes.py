"""Torch's modes around a map: autocast changes no bit, forward mode is refused, never zero."""

from __future__ import annotations

from collections.abc import Callable

import flashmaps as fm
import pytest
import torch
from every_operation import digests, outputs
from flashmaps.matching.readout import read_map
from torch import Tensor
from torch.autograd import forward_ad

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


QUERY, KEY, MASK = draw(1, 2, 16, 8), draw(1, 2, 16, 8, seed=1), draw(16, seed=2)
WEIGHTS, X = torch.tensor([0.25, 0.75]), draw(1, 16, 3, seed=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(dtype: torch.dtype, backend: str) -> None:
    want = digests(outputs(backend, torch.float32))
    with torch.autocast("cpu", dtype=dtype):
        got = digests(outputs(backend, torch.float32))
    assert [name for name in want if got[name] != want[name]] == []


def test_nor_of_a_readout() -> None:
    A = fm.AttentionMap(QUERY, KEY)
    want = read_map(A, "window")
    rows = A.to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(read_map(A, "window"), want)
        from flashmaps.matching.readout import read

        assert read(rows, (4, 4), "soft").dtype == torch.float32


Result = Callable[..., Tensor]
RESULTS: dict[str, Result] = {
    "entropy": lambda A, B: A.entropy(),
    "lse": lambda A, B: A.lse,
    "product": lambda A, B: A @ X,
    "topk": lambda A, B: A.topk(3)[0],
    "rows": lambda A, B: A.rows([0, 3]),
    "composed": lambda A, B: (A @ B).reduce("entropy").entropy,
    "trip": lambda A, B: fm.round_trip(A, B).soft_ims,
}
# What carries the tangent, as arguments of a map.
CARRIERS: dict[str, tuple[Tensor, Callable[[Tensor], dict]]] = {
    "query": (QUERY, lambda x: {"query": x}),
    "key": (KEY, lambda x: {"key": x}),
    "key_mask": (MASK, lambda x: {"key_mask": x}),
    "head_weights": (WEIGHTS, lambda x: {"head_weights": x}),
}


def function(result: str, carrier: str, backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    primal, given = CARRIERS[carrier]

    def run(x: Tensor) -> Tensor:
        options = {"query": QUERY, "key": KEY, "backend": backend, **given(x)}
        A = fm.AttentionMap(**options)
        return RESULTS[result](A, fm.AttentionMap(KEY, QUERY, backend=backend))

    return run, primal


def in_a_dual_level(run: Callable[[Tensor], Tensor], primal: Tensor) -> object:
    with forward_ad.dual_level():
        return run(forward_ad.make_dual(primal, torch.ones_like(primal)))


TRANSFORMS: dict[str, Callable] = {
    "dual": in_a_dual_level,
    "jvp": lambda run, primal: torch.func.jvp(run, (primal,), (torch.ones_like(primal),)),
    "jacobian": lambda run, primal: torch.autograd.functional.jacobian(
        run, primal, strategy="forward-mode", vectorize=True
    ),
}
SAYS = "forward-mode derivatives of maps .* are not implemented"


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("result", "carrier"),
    [
        *((result, "query") for result in RESULTS),
        *(("entropy", carrier) for carrier in CARRIERS if carrier != "query"),
    ],
)
def test_forward_mode_is_refused(result: str, carrier: str, transform: str, backend: str) -> None:
    with pytest.raises(NotImplementedError, match=SAYS):
        TRANSFORMS[transform](*function(result, carrier, backend))


def test_so_it_is_of_an_operand_and_of_a_given_log_sum_exp(backend: str) -> None:
    A = fm.AttentionMap(QUERY, KEY, backend=backend)
    with pytest.raises(NotImplementedError, match=SAYS):
        torch.func.jvp(lambda x: A @ x, (X,), (X,))
    lse = A.lse

    def known(lse: Tensor) -> Tensor:
        return fm.AttentionMap(QUERY, KEY, lse=lse, backend=backend).entropy()

    with pytest.raises(NotImplementedError, match=SAYS):
        in_a_dual_level(known, lse)


@pytest.mark.parametrize("transform", ["jacfwd", "hessian", "jvp-of-grad"])
def test_and_within_other_transforms(transform: str, backend: str) -> None:
    """What refuses may be a rule of torch's before ours; a zero it must not be."""
    run, primal = function("entropy", "query", backend)

    def total(x: Tensor) -> Tensor:
        return run(x).square().sum()

    calls: dict[str, Callable[[], object]] = {
        "jacfwd": lambda: torch.func.jacfwd(run)(primal),
        "hessian": lambda: torch.func.hessian(total)(primal),
        "jvp-of-grad": lambda: torch.func.jvp(torch.func.grad(total), (primal,), (primal,)),
    }
    with pytest.raises((NotImplementedError, RuntimeError)):
        calls[transform]()


def test_a_compiled_graph_refuses_too() -> None:
    run, primal = function("entropy", "query", "reference")
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    want = run(primal)
    assert torch.equal(compiled(primal), want)
    with pytest.raises(Exception, match=SAYS):
        in_a_dual_level(compiled, primal)
    assert torch.equal(compiled(primal), want)
    torch.compiler.reset()


def test_a_constant_map_within_forward_mode_is_none_of_its_business(backend: str) -> None:
    A = fm.AttentionMap(QUERY, KEY, backend=backend)
    want = A.entropy().sum()

    def scaled(x: Tensor) -> Tensor:
        return x * A.entropy().sum()

    value, tangent = torch.func.jvp(scaled, (torch.tensor(2.0),), (torch.tensor(1.0),))
    assert torch.equal(value, 2 * want) and torch.equal(tangent, want)
