"""Chains and cycles of maps: the dense products of the maps' own dense truth."""

from __future__ import annotations

from itertools import pairwise

import flashmaps as fm
import pytest
import torch
from flashmaps.maps.chain import Chain
from flashmaps.maps.lazy import REDUCTIONS
from workspaces import output_bytes, peak

GRIDS = ((3, 4), (2, 5), (4, 4), (3, 3), (3, 4))  # rectangular all along, and closed


def maps_along(count, *, backend="auto", dtype=torch.float64, batch=2, heads=3, grids=GRIDS):
    generator = torch.Generator().manual_seed(count)

    def tokens(grid):
        return torch.randn(
            batch, heads, grid[0] * grid[1], 8, generator=generator, dtype=torch.float64
        ).to(dtype)

    return [
        fm.AttentionMap(
            3 * tokens(a), tokens(b), query_grid=a, key_grid=b, backend=backend
        )
        for a, b in pairwise(grids[: count + 1])
    ]  # fmt: skip


def truth(maps):
    dense = maps[0].to_dense()
    for A in maps[1:]:
        dense = dense @ A.to_dense()
    return dense


@pytest.fixture(params=["reference", "cpu"])
def name(request):
    if not fm.backends()[request.param]:
        pytest.skip(f"backend {request.param} is not built")
    return request.param


@pytest.mark.parametrize("count", [3, 4])
def test_a_chain_is_the_product_of_its_maps(name, count):
    maps = maps_along(count, backend=name)
    C, R = fm.chain(*maps), truth(maps)
    assert C.shape == tuple(R.shape) and isinstance(C, Chain) and C.dtype == torch.float64
    # float64 all along: sums of at most 16 products, a hundred roundings or so.
    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(C.to_dense(), R, **close)
    torch.testing.assert_close(C.rows([2, -1, 0]), R[:, [2, -1, 0]], **close)
    x, y = torch.randn(2, R.shape[2], 3).double(), torch.randn(2, R.shape[1], 3).double()
    torch.testing.assert_close(C @ x, R @ x, **close)
    torch.testing.assert_close(torch.matmul(C, x), R @ x, **close)
    torch.testing.assert_close(C.transposed_product(y), R.mT @ y, **close)
    values, indices = C.topk(4)
    torch.testing.assert_close(values, R.topk(4).values, **close)
    torch.testing.assert_close(R.gather(2, indices), values, **close)
    names = [each for each in REDUCTIONS if each != "diagonal" or R.shape[1] == R.shape[2]]
    found = C.reduce(*names)
    at = centres_of(GRIDS[count])
    mass = R.sum(1, keepdim=True)
    wanted = {
        "entropy": -torch.xlogy(R, R).sum(-1), "max": R.amax(-1), "argmax": R.argmax(-1),
        "expectation": R @ at, "column_sum": R.sum(1), "column_max": R.amax(1),
        "column_argmax": R.argmax(1), "column_entropy": -torch.xlogy(R / mass, R / mass).sum(1),
        "diagonal": R.diagonal(dim1=1, dim2=2) if R.shape[1] == R.shape[2] else None,
    }  # fmt: skip
    for each in names:
        torch.testing.assert_close(getattr(found, each), wanted[each], **close)


def centres_of(grid):
    height, width = grid
    y, x = torch.meshgrid(
        (torch.arange(height).double() + 0.5) / height,
        (torch.arange(width).double() + 0.5) / width, indexing="ij",
    )  # fmt: skip
    return torch.stack((x.flatten(), y.flatten()), -1)


def test_two_maps_are_a_composition():
    maps = maps_along(2)
    assert isinstance(fm.chain(*maps), fm.Composition)
    torch.testing.assert_close(Chain(*maps).to_dense(), fm.compose(*maps).to_dense())


def test_hops_say_where_each_step_leads_and_how_much_it_blurs(name):
    maps = maps_along(4, backend=name)
    hops = fm.chain(*maps).hops()
    place = torch.arange(12).expand(2, -1)
    for number, A in enumerate(maps):
        place = A.to_dense().argmax(-1).gather(1, place)
        assert torch.equal(hops.hard[number], place)
        R = truth(maps[: number + 1])
        torch.testing.assert_close(hops.entropy[number], -torch.xlogy(R, R).sum(-1))
    # Soft steps only blur: entropy may fall, but never below what the last map alone allows.
    assert (hops.entropy >= 0).all() and hops.entropy.shape == (4, 2, 12)


def test_rows_of_other_normalizations_sum_to_the_product_of_theirs():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 2, n, 8, generator=generator) for n in (6, 9, 9, 6, 6, 6)]
    maps = [
        fm.AttentionMap(parts[i], parts[i + 1], normalize=normalize, key_grid=grid)
        for i, normalize, grid in ((0, "rows", None), (2, "block", None), (4, "columns", (2, 3)))
    ]
    C = Chain(*maps)
    R = truth(maps)
    torch.testing.assert_close(C.to_dense(), R, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(C.reduce("max").max, R.amax(-1), rtol=1e-5, atol=1e-7)


def test_a_budget_makes_strips_of_the_same_rows():
    maps = maps_along(4, dtype=torch.float32, batch=1, grids=((16, 16),) * 5)
    free, tight = Chain(*maps), Chain(*maps, memory_budget=200_000)
    rows, one = tight._split(("entropy",))
    assert rows < 64 <= free._split(("entropy",))[0] and one is not None
    names = ("entropy", "argmax", "column_max", "diagonal")
    for one, other in zip(
        free.reduce(*names)._asdict().values(), tight.reduce(*names)._asdict().values(), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert torch.equal(free.hops().hard, tight.hops().hard)
    with pytest.raises(ValueError, match="memory_budget"):
        Chain(*maps, memory_budget=1000).reduce("entropy")


def test_cycles_are_what_comes_home(name):
    maps = maps_along(4, backend=name)
    found = fm.cycles(*maps)
    R, at = truth(maps), centres_of((3, 4))
    place = torch.arange(12).expand(2, -1)
    for A in maps:
        place = A.to_dense().argmax(-1).gather(1, place)
    assert torch.equal(found.hard, place)
    assert torch.equal(found.closed, place == torch.arange(12))
    torch.testing.assert_close(found.return_probability, R.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(found.hard_distance, (at[place] - at).norm(dim=-1))
    torch.testing.assert_close(found.soft_distance, (R @ at - at).norm(dim=-1))
    assert found.per_image["closed"].shape == (2,)


def test_cycles_of_permutations_are_known():
    # Keys far apart: each map is a permutation to within exp(-40).
    order = [torch.randperm(12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    eye = torch.eye(12)[None, None] * 40
    there = [fm.AttentionMap(eye[:, :, p], eye / 40, scale=1.0, key_grid=(3, 4)) for p in order]
    back = order[2][order[1][order[0]]]
    found = fm.cycles(*there)
    assert torch.equal(found.hard[0], back)
    home = fm.AttentionMap(eye[:, :, back.argsort()], eye / 40, scale=1.0, key_grid=(3, 4))
    closed = fm.cycles(*there, home)
    assert closed.closed.all() and (closed.hard_distance == 0).all()
    torch.testing.assert_close(closed.return_probability, torch.ones(1, 12))


def test_two_maps_go_and_return_as_a_round_trip():
    maps = maps_along(2, grids=((3, 4), (2, 5), (3, 4)))
    trip, found = fm.round_trip(*maps), fm.cycles(*maps)
    torch.testing.assert_close(found.return_probability, trip.return_probability)
    torch.testing.assert_close(found.hard_distance, trip.hard_distance)
    torch.testing.assert_close(found.soft_distance, trip.soft_distance)


def test_mistakes_are_named():
    maps = maps_along(4)
    with pytest.raises(ValueError, match="at least 2 maps, got 1"):
        fm.chain(maps[0])
    with pytest.raises(ValueError, match=r"maps 0 and 1 of shape .* do not chain"):
        fm.chain(maps[1], maps[0], maps[2])
    with pytest.raises(TypeError, match="map 1 of the chain is a int"):
        fm.chain(maps[0], 3, maps[1])
    with pytest.raises(ValueError, match="does not close: it leads from 12 tokens to 9"):
        fm.cycles(*maps[:3])
    with pytest.raises(TypeError, match="wants a tensor"):
        fm.chain(*maps) @ 3
    with pytest.raises(ValueError, match=r"map 1 is torch\.float32"):
        fm.chain(maps[0], *maps_along(4, dtype=torch.float32)[1:])


def test_the_budget_bounds_what_torch_holds(name):
    budget = 400_000
    maps = maps_along(3, backend=name, dtype=torch.float32, batch=1, grids=((12, 12),) * 4)
    C = fm.chain(*maps, memory_budget=budget)
    run = lambda: C.reduce("entropy", "argmax", "column_sum", "expectation")  # noqa: E731
    run()  # what is loaded and kept once
    most, _ = peak(run)
    assert most <= budget


OPERATIONS = [
    ("entropy", "argmax", "column_max"), ("column_sum",), ("expectation",), ("diagonal",),
    ("to_dense",), ("rows",), ("topk",), ("product",), ("transposed_product",),
]  # fmt: skip


@pytest.mark.parametrize("names", OPERATIONS, ids="-".join)
@pytest.mark.parametrize("budget", [None, 400_000])
def test_a_plan_bounds_what_is_held_and_keeps_to_the_budget(name, names, budget):
    maps = maps_along(3, backend=name, dtype=torch.float32, batch=1, grids=((12, 12),) * 4)
    C = fm.chain(*maps, memory_budget=budget)
    x = torch.ones(1, 144, 5)
    run = {
        "to_dense": lambda: C.to_dense(),
        "rows": lambda: C.rows(slice(0, 60)),
        "topk": lambda: C.topk(3),
        "product": lambda: C @ x,
        "transposed_product": lambda: C.transposed_product(x),
    }.get(names[0], lambda: C.reduce(*names))
    told = C.plan(*names, k=3, columns=5, count=60)
    run()
    most, result = peak(run)
    assert most <= told.workspace
    assert told.outputs == output_bytes(result)
    assert told.passes >= 3 and told.flops > 0 and str(told)
    if budget is not None:
        assert told.workspace <= budget == told.memory_budget
        with pytest.raises(ValueError, match="memory_budget"):
            C.plan(*names, memory_budget=100)


GRADIENTS = {
    "product": (lambda R, x: R @ x, lambda D, x: D @ x),
    "transposed_product": (lambda R, x: R.transposed_product(x), lambda D, x: D.mT @ x),
    "rows": (lambda R, x: R.rows(slice(1, 5)), lambda D, x: D[:, 1:5]),
    "entropy": (lambda R, x: R.reduce("entropy").entropy, lambda D, x: -(D * D.log()).sum(-1)),
    "max": (lambda R, x: R.reduce("max").max, lambda D, x: D.amax(-1)),
    "column_sum": (lambda R, x: R.reduce("column_sum").column_sum, lambda D, x: D.sum(1)),
    "diagonal": (lambda R, x: R.diagonal(), lambda D, x: D.diagonal(dim1=1, dim2=2)),
    "topk": (lambda R, x: R.topk(2)[0], lambda D, x: D.topk(2).values),
}


@pytest.mark.parametrize("what", GRADIENTS)
def test_gradients_are_those_of_the_dense_product(what):
    maps = maps_along(4)
    leaves = [t.requires_grad_() for A in maps for t in (A.problem.query, A.problem.key)]
    x = torch.randn(2, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    of_chain, of_dense = GRADIENTS[what]
    found = of_chain(fm.chain(*maps), x)
    wanted = of_dense(truth(maps), x)
    along = torch.randn(
        wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6)
    )
    for one, other in zip(
        torch.autograd.grad(found, leaves, along), torch.autograd.grad(wanted, leaves, along),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_products_of_a_chain_are_one_graph():
    maps = maps_along(4)
    x = torch.randn(2, 12, 3, dtype=maps[0].dtype)
    compiled = torch.compile(lambda y: fm.chain(*maps) @ y, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), fm.chain(*maps) @ x)
