"""torch.compile takes a function that uses a map in one graph, and gives the eager answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import flashmaps as fm
import pytest
import torch
from flashmaps.maps import operators as ops
from flashmaps.maps.problem import Request
from torch import Tensor

Function = Callable[[str, Tensor, Tensor], "tuple[Tensor, ...] | Tensor"]


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SOURCE = tensor(2, 3, 16, 8)
TARGET = tensor(2, 3, 25, 8, seed=1)


pytestmark = pytest.mark.usefixtures("fresh")


def reductions(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    A = fm.AttentionMap(q, k, backend=backend)
    found = A.reduce("entropy", "max", "argmax", "expectation", "column_sum", "column_entropy")
    return (*found._asdict().values(), A.lse)


def options(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    mask = torch.arange(k.shape[2]) % 3 > 0
    pairs = torch.tensor([[1, 0], [0, 1], [1, 1]])
    weights = torch.tensor([0.5, 0.0, 0.5])
    A = fm.AttentionMap(q, k, key_mask=mask, pairs=pairs, head_weights=weights, normalize="rows",
                        scale=0.2, backend=backend)  # fmt: skip
    return A.entropy(), A.to_dense()


def products(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    A = fm.AttentionMap(q * 2, k, backend=backend)
    x = torch.ones(A.shape[2], 3).cumsum(0)
    return A @ x, A.mT @ (A @ x), A.rows([0, -1]), A.pool((2, 2), (2, 2))


def topk(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return fm.AttentionMap(q, k, backend=backend).topk(4)


def composition(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    R = fm.compose(fm.AttentionMap(q, k, backend=backend), fm.AttentionMap(k, q, backend=backend))
    found = R.reduce("entropy", "argmax")
    return R @ torch.ones(q.shape[2], 2), R.diagonal(), found.entropy, found.argmax, R.rows(3)


def round_trip(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    A = fm.AttentionMap(q, k, backend=backend)
    B = fm.AttentionMap(k, q, backend=backend)
    rt = fm.round_trip(A, B)
    return tuple(getattr(rt, field.name) for field in fields(rt))


def scores(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    A = fm.AttentionMap(q, k, backend=backend)
    B = fm.AttentionMap(k, q, backend=backend)
    return fm.inverse_mapping_score(A, B), fm.inverse_mapping_score(A, B, kind="soft")


def in_the_middle(backend: str, q: Tensor, k: Tensor) -> Tensor:
    """A map between ordinary operations, as in a model."""
    q, k = torch.nn.functional.silu(q), k.transpose(1, 2).contiguous().transpose(1, 2)
    return (fm.AttentionMap(q, k, backend=backend).entropy() * 2).softmax(-1)


FUNCTIONS = [
    reductions, options, products, topk, composition, round_trip, scores, in_the_middle,
]  # fmt: skip


def check_same(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, equal_nan=True)


# What is traced is the same for every backend: one is enough, where time is short.


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_one_graph_and_the_eager_answer(function: Function) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    check_same(compiled("auto", SOURCE, TARGET), function("auto", SOURCE, TARGET))


def test_one_graph_on_each_backend(backend: str) -> None:
    compiled = torch.compile(reductions, fullgraph=True, backend="aot_eager")
    check_same(compiled(backend, SOURCE, TARGET), reductions(backend, SOURCE, TARGET))


def test_composing_with_the_operator_breaks_the_graph_not_the_answer() -> None:
    """torch.compile traces no ``@`` of two objects of ours; fm.compose and torch.matmul it does."""

    def function(q: Tensor, k: Tensor, compose: Callable) -> tuple[Tensor, ...]:
        R = compose(fm.AttentionMap(q, k), fm.AttentionMap(k, q))
        return R.diagonal(), R @ torch.ones(q.shape[2], 2)

    want = function(SOURCE, TARGET, lambda A, B: A @ B)
    compiled = torch.compile(function, backend="aot_eager")
    check_same(compiled(SOURCE, TARGET, lambda A, B: A @ B), want)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    check_same(compiled(SOURCE, TARGET, fm.compose), want)
    check_same(compiled(SOURCE, TARGET, torch.matmul), want)


def test_a_tensor_cannot_come_first() -> None:
    A = fm.AttentionMap(SOURCE, SOURCE)
    with pytest.raises(TypeError, match="AttentionMap"):
        torch.ones(2, 3, 16) @ A
    torch.testing.assert_close(torch.matmul(A, torch.ones(16, 1)), torch.ones(2, 16, 1))
    torch.testing.assert_close(torch.matmul(A.mT, torch.ones(16, 1)), A.mT @ torch.ones(16, 1))


@pytest.mark.parametrize("function", [reductions, in_the_middle], ids=lambda f: f.__name__)
@pytest.mark.slow
def test_inductor(function: Function, backend: str) -> None:
    compiled = torch.compile(function, fullgraph=True)
    check_same(compiled(backend, SOURCE, TARGET), function(backend, SOURCE, TARGET))


@pytest.mark.parametrize("function", [reductions, topk], ids=lambda f: f.__name__)
def test_sizes_may_be_symbols(function: Function) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for side in (4, 5):
        q, k = tensor(2, 3, side + 7, 8), tensor(2, 3, side * side, 8, seed=1)
        check_same(compiled("auto", q, k), function("auto", q, k))


def test_half_precision() -> None:
    compiled = torch.compile(reductions, fullgraph=True, backend="aot_eager")
    q, k = SOURCE.bfloat16(), TARGET.bfloat16()
    check_same(compiled("auto", q, k), reductions("auto", q, k))


def test_wrong_shapes_are_still_named_in_a_graph() -> None:
    compiled = torch.compile(reductions, backend="aot_eager")
    with pytest.raises(ValueError, match="query has H = 3 heads but key has 2"):
        compiled("auto", SOURCE, TARGET[:, :2])


def test_a_row_without_a_visible_key_is_zero(backend: str) -> None:
    """A graph cannot look at the mask's values; what eager mode refuses gives zeros there."""

    def function(q: Tensor, k: Tensor, mask: Tensor, lse: Tensor | None = None):
        A = fm.AttentionMap(q, k, key_mask=mask, lse=lse, backend=backend)
        found = A.reduce("entropy", "max", "argmax", "expectation", "column_sum")
        B = fm.AttentionMap(q, k, key_mask=mask, normalize="rows", backend=backend)
        back = fm.AttentionMap(k, q, backend=backend)
        there = fm.round_trip(back, A).return_probability  # A may go nowhere
        everything = (*found._asdict().values(), A.to_dense(), A @ torch.ones(25, 2), B.to_dense())
        return (*everything, there, A.lse)

    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[1] = False
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for lse in (None, torch.full((2, 3, 16), -math.inf)):
        *answers, _ = compiled(SOURCE, TARGET, mask, lse)
        for answer in answers:
            assert (answer[1] == 0).all()
    whole = fm.AttentionMap(SOURCE[:1], TARGET[:1], backend=backend)
    *answers, lse = compiled(SOURCE, TARGET, mask)
    check_same(answers[0][:1], whole.entropy())
    check_same(lse[:1], whole.lse)
    assert (lse[1] == -math.inf).all()


# The two operators, by torch's own checks of schemas, fakes and dispatch.


def problem(backend: str, query: Tensor = SOURCE, key: Tensor = TARGET, **options):
    return fm.AttentionMap(query, key, backend=backend, **options).problem


@pytest.mark.parametrize(
    "names",
    ["entropy,argmax,column_sum", "lse", "product,max", "transposed_product", "dense",
     "topk_values,topk_indices", "pooled_keys", "column_entropy,column_max,column_argmax",
     "diagonal,expectation"],
)  # fmt: skip
def test_reduce_operator(names: str, backend: str) -> None:
    one = problem(backend, TARGET if "diagonal" in names else SOURCE,
                  key_mask=torch.arange(25) % 2 == 0, head_weights=[0.5, 0.25, 0.25],
                  pairs=[[0, 1], [1, 1]])  # fmt: skip
    right = tensor(2, 25, 3) if "product" in names.split(",") else None
    left = tensor(2, 16, 3) if "transposed_product" in names else None
    cells = torch.arange(25) % 4 if "pooled" in names else None
    args = (*one, names, right, left, 3, cells, 4, backend, None)
    torch.library.opcheck(torch.ops.flashmaps.reduce, args)


@pytest.mark.parametrize("normalize", [None, "rows"])
def test_round_trip_operator(normalize: str | None, backend: str) -> None:
    there = problem(backend)
    back = fm.AttentionMap(TARGET, SOURCE, normalize=normalize, backend=backend)
    back = back.problem._replace(lse=fm.AttentionMap(TARGET, SOURCE, backend=backend).lse)
    args = (*there, *back, "argmax,return_probability,product", tensor(2, 25, 4), backend, None)
    torch.library.opcheck(torch.ops.flashmaps.round_trip, args)


def test_fakes_have_the_shapes_of_the_outputs(backend: str) -> None:
    one = problem(backend)
    names = ("entropy", "argmax", "expectation", "lse", "dense", "topk_indices", "column_max")
    request = Request(names, k=3)
    real = ops.reduce(one, request, backend)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_problem = one._replace(query=mode.from_tensor(SOURCE), key=mode.from_tensor(TARGET))
        fake = ops.reduce(fake_problem, request, backend)
    for name in names:
        assert fake[name].shape == real[name].shape, name
        assert fake[name].dtype == real[name].dtype, name
        assert fake[name].stride() == real[name].stride(), name


def test_whoever_watches_sees_the_operator() -> None:
    """Without a watcher a call goes round the dispatcher; a mode or a profiler gets to see it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    lazy = fm.AttentionMap(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8))
    plain = lazy.entropy()
    with Watch() as watch:
        watched = lazy.entropy()
    assert torch.equal(plain, watched)
    assert any("flashmaps.reduce" in name for name in watch.seen)
    with torch.profiler.profile() as profiled:
        lazy.entropy()
    assert "flashmaps::reduce" in {each.key for each in profiled.key_averages()}
    query = lazy.problem.query.clone().requires_grad_()
    assert fm.AttentionMap(query, lazy.problem.key).entropy().grad_fn is not None
