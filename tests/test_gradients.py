"""Gradients of every float result, on every backend, against autograd through dense maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flashmaps as fm
import oracle
import pytest
import torch
from dense_gradients import FLOAT_RESULTS, Dense, roundings
from gradient_checks import OTHERS, cells_of, check_gradients, names_of
from problems import CASE_NAMES, CASES, Problem, inputs
from torch import Tensor

# By default each backend sees every problem in one dtype; in the others they are marked slow.
EACH = [
    pytest.param(*case, id=name, marks=() if case[1] == torch.float32 else pytest.mark.slow)
    for case, name in zip(CASES, CASE_NAMES, strict=True)
]


@pytest.mark.parametrize(("problem", "dtype"), EACH)
def test_all_results_together(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    grid = cells_of(problem, inputs(problem, dtype)[2])[1]
    names = names_of(problem, grid)
    check_gradients(problem, dtype, names, backend)


# Two maps at once.


def _two(dtype: torch.dtype, backend: str, **options: Any) -> tuple[list[Tensor], Any]:
    """Leaves of a map and the way back, 12 tokens and 20; and what makes both of them."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 3, 12, 8), (2, 3, 20, 8), (2, 3, 20, 8), (2, 3, 12, 8)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    grids = {"query_grid": (3, 4), "key_grid": (4, 5)}

    def make(q: Tensor, k: Tensor, back_q: Tensor, back_k: Tensor) -> tuple[Any, Any]:
        back_grids = {"query_grid": (4, 5), "key_grid": (3, 4)}
        A = fm.AttentionMap(q, k, **grids, **options, backend=backend)
        return A, fm.AttentionMap(back_q, back_k, **back_grids, **options, backend=backend)

    return [x.requires_grad_() for x in leaves], make


COMPOSED = ("entropy", "expectation", "column_sum", "column_entropy")


def _of_two(A: Any, B: Any) -> dict[str, Tensor]:
    rt = fm.round_trip(A, B)
    named = ("soft_distance", "spread", "return_probability", "inverse_entropy", "soft_density")
    found = {name: getattr(rt, name) for name in (*named, "soft_ims")}
    R = A @ B
    found |= {f"R {name}": x for name, x in R.reduce(*COMPOSED)._asdict().items()}
    found["R diagonal"] = R.diagonal()
    found["R rows"] = R.rows([3, 0, 3])
    found["R topk"] = R.topk(2)[0]
    found["R @ x"] = R @ _ramp(A, R.shape[2])
    found["R^T y"] = R.transposed_product(_ramp(A, R.shape[1]))
    return found


def _ramp(A: Any, tokens: int) -> Tensor:
    return torch.linspace(-1, 1, tokens, dtype=A.dtype)[:, None]


def _dense_of_two(a: Tensor, b: Tensor, lines: int, back_lines: int) -> dict[str, Tensor]:
    """The same from dense printed maps."""
    there, back = a / lines, b / back_lines
    x = oracle.centres((3, 4), a.dtype)
    trip, printed = there @ back, a @ b
    mean = trip @ x
    soft = (x - mean).norm(dim=-1)
    square = (
        (trip @ x.square().sum(-1)) - 2 * (x * mean).sum(-1) + x.square().sum(-1) * trip.sum(-1)
    )
    mass = printed.sum(1)
    plogp = (printed * printed.log()).sum(1)
    return {
        "soft_distance": soft,
        "spread": square.sqrt(),
        "return_probability": trip.diagonal(dim1=1, dim2=2),
        "inverse_entropy": -(back * back.log()).sum(-1),
        "soft_density": there.sum(1),
        "soft_ims": soft.mean(1),
        "R entropy": -(trip * trip.log()).sum(-1),
        "R expectation": mean,
        "R column_sum": mass,
        "R column_entropy": mass.log() - plogp / mass,
        "R diagonal": printed.diagonal(dim1=1, dim2=2),
        "R rows": printed[:, [3, 0, 3]],
        "R topk": printed.topk(2, dim=-1).values,
        "R @ x": printed @ torch.linspace(-1, 1, 12, dtype=a.dtype)[:, None],
        "R^T y": printed.mT @ torch.linspace(-1, 1, 12, dtype=a.dtype)[:, None],
    }


TWO = {
    "plain": {},
    "pairs": {"pairs": [[0, 1], [1, 1], [1, 0]]},
    "rows": {"normalize": "rows"},
    "columns": {"normalize": "columns"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", TWO)
def test_round_trips_and_compositions(which: str, dtype: torch.dtype, backend: str) -> None:
    options = TWO[which]
    leaves, make = _two(dtype, backend, **options)
    got = _of_two(*make(*leaves))
    wide = [x.detach().double().requires_grad_() for x in leaves]
    pair = [
        Dense({"query": wide[n], "key": wide[n + 1]}, {**options, "key_grid": grid})
        for n, grid in ((0, (4, 5)), (2, (3, 4)))
    ]
    lines = pair[0].lines, pair[1].lines
    true = _dense_of_two(pair[0].values, pair[1].values, *lines)
    moved = [_dense_of_two(*(_shaken(x.values, seed) for x in pair), *lines) for seed in range(3)]
    known = [
        oracle.attention(
            *(x.detach() for x in wide[n : n + 2]), dtype=torch.float64, key_grid=grid, **options
        )[0]
        for n, grid in ((0, (4, 5)), (2, (3, 4)))
    ]
    unit = torch.finfo(dtype).eps / 2
    for name, mine in got.items():
        g = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = torch.autograd.grad(
            mine, leaves, g.to(dtype), retain_graph=True, materialize_grads=True
        )
        wanted, *others = (
            torch.autograd.grad(of[name], wide, g, retain_graph=True, materialize_grads=True)
            for of in (true, *moved)
        )
        for which_leaf, (a, b) in enumerate(zip(found, wanted, strict=True)):
            # How far it moves where every entry of both maps moves by its own size.
            moves = max((x[which_leaf] - b).abs().max().item() for x in others) / _SHAKE
            counted = sum(roundings(of, leaves[0].shape[1], leaves[0].shape[3]) for of in known)
            budget = oracle.FOUR_SIGMA * unit * counted * max(moves, b.abs().max().item())
            off = (a.double() - b).abs().max().item()
            assert off <= budget, f"{name}, leaf {which_leaf}: off by {off:.3g} of {budget:.3g}"


_SHAKE = 1e-6


def _shaken(values: Tensor, seed: int) -> Tensor:
    """A map each entry of which is off by a random part of itself, as rounding leaves it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
    return values * (1 + _SHAKE * noise)


@pytest.mark.parametrize("normalize", [None, "rows", "columns"])
def test_gradcheck(normalize: str | None, backend: str) -> None:
    """Against differences of the results themselves, in float64."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, mask, x, y = leaf(2, 2, 4, 3), leaf(2, 2, 4, 3), leaf(2, 4), leaf(4, 2), leaf(4, 2)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)

    def everything(*leaves: Tensor) -> tuple[Tensor, ...]:
        query, key, mask, x, y, weights = leaves
        A = fm.AttentionMap(
            query, key, key_mask=mask, head_weights=weights, normalize=normalize, backend=backend
        )
        B = fm.AttentionMap(key, query, normalize=normalize, backend=backend)
        names = [name for name in FLOAT_RESULTS if name in dir(A) and name not in OTHERS]
        return (
            *A.reduce(*names)._asdict().values(),
            A.lse, A @ x, A.mT @ y, A.topk(2)[0], A.rows([0, 3]), A.to_dense(), A.pool((2, 1)),
            *_of_two_small(A, B),
        )  # fmt: skip

    assert torch.autograd.gradcheck(everything, (query, key, mask, x, y, weights), fast_mode=True)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_gradcheck_of_every_head_and_of_shared_keys(key_heads: int, backend: str) -> None:
    """Per head, and the mean; 4 query heads."""
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(2, heads, 4, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, key_heads)
    )

    def everything(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        A = fm.AttentionMap(query, key, backend=backend)
        names = ("entropy", "max", "expectation", "column_sum", "column_entropy", "lse")
        of_heads = A.reduce(*names, per_head=True)._asdict().values()
        return (*of_heads, *A.reduce("entropy", "column_max")._asdict().values())

    assert torch.autograd.gradcheck(everything, (query, key), fast_mode=True)


def _of_two_small(A: Any, B: Any) -> tuple[Tensor, ...]:
    rt = fm.round_trip(A, B)
    found = (A @ B).reduce("entropy", "column_entropy", "column_max", "max")
    return rt.spread, rt.soft_distance, rt.return_probability, *found._asdict().values()


# What has no gradient.


def maps(backend: str, wanted: bool = True) -> tuple[fm.AttentionMap, fm.AttentionMap]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 16, 8, generator=generator) for _ in range(2))
    query.requires_grad_(wanted)
    return (
        fm.AttentionMap(query, key, backend=backend),
        fm.AttentionMap(key, query, backend=backend),
    )


def test_indices_have_no_gradient(backend: str) -> None:
    A, B = maps(backend)
    rt = fm.round_trip(A, B)
    for index in (A.argmax(), A.topk(2)[1], A.column_argmax(), rt.forward, rt.density):
        assert not index.requires_grad
    assert not rt.hard_distance.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable, backend: str) -> None:
    with mode():
        A, B = maps(backend)
        got = A.entropy(), (A @ B).reduce("max").max, fm.round_trip(A, B).soft_ims
    assert not any(t.requires_grad for t in got)


def test_second_derivatives_raise(backend: str) -> None:
    A, _ = maps(backend)
    query = A.problem.query
    (slope,) = torch.autograd.grad(A.entropy().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        slope.square().sum().backward()
    R = A @ maps(backend, wanted=False)[1]
    (slope,) = torch.autograd.grad(R.reduce("entropy").entropy.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        slope.square().sum().backward()


def test_a_kept_log_sum_exp_hides_no_gradient(backend: str) -> None:
    """It is computed once without a graph, and asked for again with one."""
    A, _ = maps(backend)
    with torch.no_grad():
        kept = A.lse
    (slope,) = torch.autograd.grad(A.lse.sum(), A.problem.query)
    assert torch.equal(kept, A.lse.detach()) and slope.abs().sum() > 0


def test_a_given_log_sum_exp_is_an_input_of_its_own(backend: str) -> None:
    """With its gradient, the sum of both ways is that of the map without it."""
    A, _ = maps(backend)
    query, key = A.problem.query, A.problem.key
    given = fm.AttentionMap(query, key, lse=A.lse, backend=backend)
    constant = fm.AttentionMap(query, key, lse=A.lse.detach(), backend=backend)
    wanted, *found = (
        torch.autograd.grad(m.entropy().sum(), query)[0] for m in (A, given, constant)
    )
    for mine in found:
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_checkpointing_and_compile(backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    A, _ = maps(backend)
    query, key = A.problem.query, A.problem.key

    def loss(query: Tensor, key: Tensor) -> Tensor:
        A = fm.AttentionMap(query, key, backend=backend)
        found = A.reduce("entropy", "max", "column_entropy")
        return found.entropy.sum() + found.max.sum() + found.column_entropy.sum()

    (wanted,) = torch.autograd.grad(loss(query, key), query)
    (again,) = torch.autograd.grad(checkpoint(loss, query, key, use_reentrant=False), query)
    assert torch.equal(again, wanted)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (traced,) = torch.autograd.grad(compiled(query, key), query)
    assert torch.equal(traced, wanted)


# Memory.


@pytest.mark.parametrize("names", [("entropy", "expectation"), ("max", "column_entropy")])
def test_plans_and_budgets_of_the_way_back(names: tuple[str, ...], backend: str) -> None:
    """What is planned holds, a smaller budget takes less, and gives the same within rounding."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 3, 100, 16, generator=generator) for _ in range(2))
    query.requires_grad_()
    A = fm.AttentionMap(query, key, backend=backend)

    def slope() -> Tensor:
        found = A.reduce(*names)._asdict().values()
        return torch.autograd.grad(sum(x.sum() for x in found), query)[0]

    plain, planned = slope(), A.plan(*names, backward=True)
    assert planned.operation.startswith("backward of ")
    with pytest.raises(ValueError, match="the smallest that works is") as error:
        A.plan(*names, backward=True, memory_budget=1)
    least = int(str(error.value).rsplit(" ", 1)[1])
    assert least <= planned.workspace
    budget = max(least, A.plan(*names, memory_budget=2**40).workspace)
    with fm.memory_budget(budget):
        assert A.plan(*names, backward=True).workspace <= budget
        torch.testing.assert_close(slope(), plain, rtol=1e-4, atol=1e-6)


def test_the_same_bits_on_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 3, 301, 24, generator=generator) for _ in range(2))
    leaves = [query.requires_grad_(), key.requires_grad_()]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            A = fm.AttentionMap(*leaves)
            result = A.reduce("entropy", "column_entropy", "max")._asdict().values()
            found.append(torch.autograd.grad(sum(x.sum() for x in result), leaves))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
