"""Every operation of a backend against float64, one function each, on any device.

test_triton.py has the Triton kernels interpreted by these; benches/gpu has them run on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flashmaps as fm
import oracle
import torch
from contract import Subject, smallest
from flashmaps.maps.backends.choice import get
from problems import Problem, grids, inputs, plain, truth
from torch import Tensor


class _Here:
    """A lazy map on a device whose answers come home to the CPU, where the truth is."""

    def __init__(self, lazy: Any) -> None:
        self.lazy = lazy

    def topk(self, k: int) -> tuple[Tensor, ...]:
        return tuple(each.cpu() for each in self.lazy.topk(k))


@dataclass
class Checked:
    """One problem in one dtype, on one backend and device."""

    problem: Problem
    dtype: torch.dtype
    backend: str
    device: str

    @cached_property
    def options(self) -> dict[str, Any]:
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in inputs(self.problem, self.dtype)[2].items()
        }

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Q and K with the strides they have."""
        query, key, _ = inputs(self.problem, self.dtype)
        return _to(query, self.device), _to(key, self.device)

    @cached_property
    def lazy(self) -> fm.AttentionMap:
        return fm.AttentionMap(*self.tokens, **self.options, backend=self.backend)

    @cached_property
    def subject(self) -> Subject:
        here = _Here(self.lazy)
        case = self.problem, self.dtype
        return Subject(here, truth(*case)[0], plain(*case)[0], self.dtype)  # type: ignore[arg-type]

    def random(self, *shape: int) -> tuple[Tensor, Tensor]:
        """The same numbers here and on the device."""
        generator = torch.Generator().manual_seed(sum(shape))
        drawn = torch.randn(shape, generator=generator, dtype=self.lazy.dtype)
        return drawn, drawn.to(self.device)


def _to(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides, and NaN between what is the tensor's own."""
    if tensor.device.type == device:
        return tensor
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    room = torch.full((reach,), torch.nan, dtype=tensor.dtype, device=device)
    copy = room.as_strided(tensor.shape, tensor.stride())
    if 0 in tensor.stride():  # an expanded dimension cannot be written to
        one = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
        copy[one].copy_(tensor[one])
        return copy
    return copy.copy_(tensor)


def check_lse(of: Checked) -> None:
    options = {name: value for name, value in of.options.items() if name != "lse"}
    fresh = fm.AttentionMap(*of.tokens, **options, backend=of.backend)
    case = of.problem, of.dtype
    answers = truth(*case)[1], plain(*case)[1]
    oracle.assert_within_budget("lse", fresh.lse.cpu(), *answers, of.subject.truth, of.dtype)


def check_dense(of: Checked) -> None:
    dense = of.lazy.to_dense().cpu()
    of.subject.check_entries("to_dense", dense, lambda values: values)
    assert (dense[of.subject.truth.values == 0] == 0).all()  # hidden keys are zero, not tiny


def check_rows(of: Checked) -> None:
    last = of.lazy.shape[1] - 1
    got = of.lazy.rows([last, 0, last]).cpu()
    of.subject.check_entries("rows", got, lambda values: values[:, [last, 0, last]])


def check_reductions(of: Checked) -> None:
    """All in one call; then some of them, which must have the same bits."""
    names = of.subject.reductions
    fields = of.lazy.reduce(*names)
    for name in names:
        of.subject.check_reduction(name, getattr(fields, name).cpu())
    for name in ("argmax", "column_entropy"):
        assert torch.equal(getattr(of.lazy, name)(), getattr(fields, name)), name


def check_topk(of: Checked) -> None:
    keys = of.lazy.shape[2]
    of.subject.check_topk(min(5, keys))
    if keys < 32 or keys > 64:  # in between it takes long and shows nothing new
        of.subject.check_topk(min(keys, 1000))


def check_product(of: Checked) -> None:
    batch, _, keys = of.lazy.shape
    for columns in (3, 40):
        here, there = of.random(batch, columns, keys)
        of.subject.check("product", (of.lazy @ there.mT).cpu(), here.mT)


def check_transposed_product(of: Checked) -> None:
    batch, queries, _ = of.lazy.shape
    here, there = of.random(batch, queries, 17)
    of.subject.check("transposed_product", (of.lazy.mT @ there).cpu(), here)


def check_pool(of: Checked) -> None:
    key_grid = grids(of.problem, of.dtype)[1]
    if key_grid is not None:
        to = (max(1, key_grid[0] // 2), max(1, 2 * key_grid[1] // 3))
        got = of.lazy.pool(key_to=to).cpu()
        of.subject.check("pool", got, None, oracle.cells(key_grid, to))
    if of.lazy.shape[2] < 1000:
        of.subject.check("pool", of.lazy.pool().cpu(), None, None)


def _way_back(of: Checked, **options: Any) -> tuple[fm.AttentionMap, list[oracle.Map]]:
    """A map of other heads, head dimension and weights; and its composition's truth and rival.

    Backend "cuda" takes neither every head dimension nor normalised lines.
    """
    batch, sources, targets = of.lazy.shape
    dim = 11
    if of.backend == "cuda":
        dim = of.problem.shape[4]
        options.pop("normalize", None)
    query, there_query = (x.to(of.dtype) for x in of.random(batch, 2, targets, dim))
    key, there_key = (x.to(of.dtype) for x in of.random(batch, 2, sources, dim))
    options |= {"head_weights": [0.25, 0.75], "key_grid": (1, sources)}
    back = fm.AttentionMap(there_query, there_key, **options, backend=of.backend)
    wanted = (torch.float64, oracle.compute_dtype(of.dtype))
    maps = [oracle.attention(query, key, dtype=dtype, **options)[0] for dtype in wanted]
    mine = (of.subject.truth, of.subject.plain)
    return back, [a @ b for a, b in zip(mine, maps, strict=True)]


def check_return_probability(of: Checked) -> None:
    back, composed = _way_back(of, normalize="columns")
    both = Subject(of.subject.lazy, composed[0], composed[1], of.dtype)
    both.check("diagonal", (of.lazy @ back).diagonal().cpu())


def check_composition(of: Checked) -> None:
    """Rows of A A', in as few strips as there are and in as many as a small budget allows."""
    back, composed = _way_back(of)
    both = Subject(None, composed[0], composed[1], of.dtype)  # type: ignore[arg-type]
    names = ("entropy", "max", "argmax", "expectation", "diagonal")
    least = smallest(lambda: fm.compose(of.lazy, back, memory_budget=1))
    for budget in (None, 6 * least):
        fields = fm.compose(of.lazy, back, memory_budget=budget).reduce(*names)
        for name in names:
            both.check_reduction(name, getattr(fields, name).cpu())


def check_gradients(of: Checked) -> None:
    """Of every float result together, with respect to all that is differentiable."""
    from gradient_checks import cells_of, check_gradients, names_of

    names = names_of(of.problem, cells_of(of.problem, inputs(of.problem, of.dtype)[2])[1])
    if of.backend == "cuda":
        names = tuple(name for name in names if name != "topk")
    check_gradients(of.problem, of.dtype, names, of.backend, lambda x: _to(x, of.device))


def check_plan(of: Checked) -> None:
    """What was planned is what was taken, by the backend's own account, and fits a budget."""
    module = get(of.backend)
    # The log-sum-exp is computed by a call of its own, once; after that it is known.
    for names in (of.subject.reductions, ("column_entropy",), ("argmax",)):
        of.lazy.reduce(*names)
        planned = of.lazy.plan(*names)
        of.lazy.reduce(*names)
        assert module.last_workspace_bytes() <= planned.workspace, names
        assert planned.workspace <= 4 * 2**20
        budget = max(planned.workspace // 2, of.lazy.plan(*names, memory_budget=2**40).workspace)
        with fm.memory_budget(budget):
            of.lazy.reduce(*names)
        assert module.last_workspace_bytes() <= budget, names


def check_again(of: Checked) -> None:
    """The same call gives the same bits."""
    names = of.subject.reductions
    first, second = (of.lazy.reduce(*names)._asdict() for _ in range(2))
    for name in names:
        assert torch.equal(first[name], second[name]), name
    _, there = of.random(of.lazy.shape[0], of.lazy.shape[2], 3)
    assert torch.equal(of.lazy @ there, of.lazy @ there)


def check_compile(of: Checked) -> None:
    """torch.compile sees operators with known shapes, in one graph."""

    def statistics(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        lazy = fm.AttentionMap(query, key, **of.options, backend=of.backend)
        ones = torch.ones(key.shape[2], 3, device=key.device, dtype=lazy.dtype)
        return lazy.entropy(), lazy @ ones

    compiled = torch.compile(statistics, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(*of.tokens), statistics(*of.tokens), strict=True):
        assert torch.equal(got, want)


def check_far_apart(of: Checked) -> None:
    """Tokens so far from each other that offsets take more than 32 bits."""
    torch.use_deterministic_algorithms(False)  # or all of what lies between would be filled
    try:
        query, key = of.tokens
        stride = 2**32 // query.shape[2] // 8 * 8

        def spread(x: Tensor) -> Tensor:
            strides = (x.shape[1] * x.shape[3], x.shape[3], stride, 1)
            size = stride * x.shape[2] + strides[0] * x.shape[0]
            room = torch.empty(size, dtype=x.dtype, device=x.device)
            return room.as_strided(x.shape, strides).copy_(x)

        far = fm.AttentionMap(spread(query), spread(key), **of.options, backend=of.backend)
        for name in ("entropy", "column_max"):
            of.subject.check_reduction(name, getattr(far, name)().cpu())
    finally:
        torch.use_deterministic_algorithms(True)


OPERATIONS: dict[str, Callable[[Checked], None]] = {
    name.removeprefix("check_"): check
    for name, check in globals().items()
    if name.startswith("check_")
}

# For one problem or two: they say nothing about the others.
SPECIAL = ("again", "compile", "far_apart")
EVERYWHERE = tuple(name for name in OPERATIONS if name not in SPECIAL)
