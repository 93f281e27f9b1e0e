"""Random problems against the float64 oracle: values, bits, budgets, and no crash on NaN.

    python tests/attack/core.py --seconds 600 --seed 7          # CPU builds and the reference
    python tests/attack/core.py --backend triton --seconds 60   # under triton's interpreter

A `Case` says all of a problem in plain values, and prints as the line of Python that makes it
again: a case that fails goes into found.py, where the default tests run it. The same seed draws the
same cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would print a line each time
if __name__ == "__main__":  # a program of its own: its neighbours, and tests/
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads are many, and work is small
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if "triton" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"

import flashmaps as fm
import gradient_checks as gradients
import oracle
import pytest
import torch
from contract import Subject
from dense_gradients import FLOAT_RESULTS, Dense, assert_gradients
from flashmaps.maps.backends import cpu
from gradient_checks import PICKED
from planned import check_operation, operations_of_a_map, operations_of_two
from problems import LAYOUTS, contiguous
from torch import Tensor

LAYOUT = {"contiguous": contiguous, **{each.__name__: each for each in LAYOUTS}}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16,
          "bfloat16": torch.bfloat16}  # fmt: skip
MASKS = (
    None, None, "bool", "few", "float", "float-hidden", "1e3", "1e5", "around-1e4", "lowest",
    "all-lowest", "largest", "half-precision",
)  # fmt: skip
VALUES = (
    "normal", "normal", "normal", "large", "ramp-up", "ramp-down", "equal", "zero", "few-distinct",
    "one-hot",
)  # fmt: skip
WRONG_VALUES = ("nan", "inf", "-inf", "nan-everywhere", "huge")


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, and what is asked of it."""

    backend: str
    dtype: str
    shape: tuple[int, int, int, int, int]  # B, H, N, M, d
    seed: int
    key_batch: int = 0  # if not B
    key_heads: int = 0  # if not H: shared by groups of query heads
    query_layout: str = "contiguous"
    key_layout: str = "contiguous"
    values: str = "normal"
    mask: str | None = None
    pairs: int = 0  # how many
    weights: str | None = None
    scale: float | None = None
    normalize: str | None = None
    key_grid: tuple[int, int] | None = None
    lse: bool = False
    threads: int = 1
    what: str = "values"  # or another of CHECKS

    def __str__(self) -> str:
        """The line that makes it again, without what is as it would be anyway."""
        plain = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in dataclasses.fields(self)
            if each.default is dataclasses.MISSING or getattr(self, each.name) != each.default
        ]
        return f"Case({', '.join(plain)})"


# How cases are drawn.


def _size(dice: random.Random, most: int) -> int:
    """Often small, or near a multiple of a tile."""
    kind = dice.random()
    if kind < 0.3:
        return dice.randint(1, min(most, 9))
    if kind < 0.6:
        near = dice.choice([8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 768])
        return max(1, min(most, near + dice.randint(-1, 1)))
    return dice.randint(1, most)


def _grid(dice: random.Random, tokens: int) -> tuple[int, int]:
    height = dice.choice([n for n in range(1, tokens + 1) if tokens % n == 0])
    return height, tokens // height


def draw(dice: random.Random, backends: tuple[str, ...]) -> Case:
    """A case; the same of the same dice."""
    backend = dice.choice(backends)
    what = dice.choices(tuple(CHECKS), (52, 8, 22, 7, 11))[0]
    slow = backend in ("triton", "cuda")
    most = (
        40
        if slow
        else 70
        if what in ("budgets", "gradients")
        else dice.choice([40, 70, 70, 300, 1100])
    )
    heads, dim = dice.choice([1, 1, 2, 3, 5]), dice.choice([1, 7, 8, 13, 16, 40, 64, 72, 128, 160])
    batch = dice.choice([1, 1, 2, 3])
    queries, keys = _size(dice, min(most, 400)), _size(dice, most)
    if dice.random() < 0.15:
        keys = queries  # square: it has a diagonal
    shared = [n for n in (1, 2, 3, 5) if n < heads and heads % n == 0]
    key_heads = dice.choice(shared) if shared and what != "gradients" and dice.random() < 0.3 else 0
    if not slow and what == "values" and dice.random() < 0.01:
        keys, queries = 33001 + dice.randint(0, 99), min(queries, 9)  # too long for a strip
        heads, dim, batch = min(heads, 2), min(dim, 16), 1
    key_batch, pairs = 0, 0
    if dice.random() < 0.3:
        pairs, key_batch = dice.randint(1, 5), dice.randint(1, 3)
    elif dice.random() < 0.1:
        key_batch = 1 if batch > 1 else dice.randint(1, 3)
    normalize = dice.choice([None, None, None, "rows", "columns"])
    values: tuple[str, ...] = VALUES
    masks: tuple[str | None, ...] = MASKS
    scales: tuple[float | None, ...] = (None, None, None, 0.0, -0.3, 0.05, 4.0, 20.0, 1e-30)
    if what == "gradients":  # of dense maps in float64, which masks of 1e38 would drown
        values = ("normal", "equal", "zero", "few-distinct", "ramp-up")
        masks, scales = (None, None, "bool", "few", "float", "float-hidden"), (None, -0.3, 0.05)
    elif what == "budgets":  # strips and blocks are compared, by a bound for moderate scores
        values, masks = ("normal", "equal", "zero", "few-distinct"), (None, "bool", "few", "float")
        scales = (None, 0.05)
    elif what == "wrong values":
        values = WRONG_VALUES
    return Case(
        backend=backend,
        dtype=dice.choice(["float32", "float16"] if backend == "triton" else [*DTYPES]),
        shape=(batch, heads, queries, keys, dim),
        seed=dice.randrange(2**31),
        key_batch=key_batch,
        key_heads=key_heads,
        query_layout=dice.choice([*LAYOUT]),
        key_layout=dice.choice([*LAYOUT]),
        values=dice.choice(values),
        mask=dice.choice(masks),
        pairs=pairs,
        weights=dice.choice([None, None, "random", "zeros", "one"]),
        scale=dice.choice(scales),
        normalize=normalize,
        key_grid=_grid(dice, keys) if normalize or dice.random() < 0.3 else None,
        lse=what != "wrong values" and dice.random() < 0.2,
        threads=dice.choice([1, 1, 2, 3]),
        what=what,
    )


# What a case means.


@dataclasses.dataclass
class Made:
    """The inputs of a case, and the truth where there is one."""

    case: Case
    query: Tensor
    key: Tensor
    options: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.case.dtype]

    def map(self, **others: Any) -> fm.AttentionMap:
        options = {**self.options, "backend": _backend(self.case.backend), **others}
        return fm.AttentionMap(self.query, self.key, **options)

    def oracle(self, dtype: torch.dtype) -> tuple[oracle.Map, oracle.Value]:
        """The map in ``dtype``; in float64 it is the truth.

        A row of a mask may be shifted by any constant, and float64 too would lose the scores beside
        a bias of 1e38: so the truth is of a mask that is shifted first.
        """
        options = {name: value for name, value in self.options.items() if name != "lse"}
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        mask = options.get("key_mask")
        if dtype != torch.float64 or mask is None or mask.dtype == torch.bool:
            return oracle.attention(self.query, key, dtype=dtype, **options)
        mask = mask.double()
        offset = mask.amax(-1, keepdim=True)
        options["key_mask"] = mask - offset
        found, lse = oracle.attention(self.query, key, dtype=dtype, **options)
        of_batch = offset.reshape(-1).expand(self.key.shape[0])
        pairs = options.get("pairs")
        of_map = of_batch if pairs is None else of_batch[pairs[:, 1]]
        return found, oracle.Value(lse.value + of_map[:, None, None], lse.magnitude)


def _values(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    batch, heads, queries, keys, dim = case.shape
    of_key = case.key_batch or batch, case.key_heads or heads
    shapes = (batch, heads, queries, dim), (*of_key, keys, dim)
    query, key = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    if case.values == "large":
        return query * 8, key * 8
    if case.values.startswith("ramp"):
        along = torch.linspace(-200, 200, keys, dtype=torch.float64) / math.sqrt(dim)
        along = along if case.values == "ramp-up" else along.flip(0)
        return 1 + 0.05 * query, along[:, None] + 0.3 * key
    if case.values == "equal":
        return query, key[:, :, :1].expand(key.shape).clone()
    if case.values == "zero":
        return query, key * 0
    if case.values == "few-distinct":
        return query.round(), key.sign()
    if case.values == "one-hot":
        return query * 30, key * 30
    return query, key


def _spoil(tokens: Tensor, how: str, generator: torch.Generator) -> Tensor:
    if how == "nan-everywhere":
        return tokens * math.nan
    if how == "huge":
        return tokens * (torch.finfo(tokens.dtype).max / 4)
    where = torch.rand(tokens.shape, generator=generator) < 0.02
    where.view(-1)[0] = True
    return tokens.masked_fill(where, float(how))


def _mask(case: Case, batch: int, keys: int, generator: torch.Generator) -> Tensor | None:
    noise = torch.randn(batch, keys, generator=generator)
    some = torch.rand(batch, keys, generator=generator) < 0.4
    some[:, torch.randint(keys, (1,), generator=generator)] = False
    limits = torch.finfo(torch.float32)
    made = {
        "bool": ~some,
        "few": torch.nn.functional.one_hot(noise.argmax(1), keys).bool(),
        "float": 3 * noise,
        "float-hidden": noise.masked_fill(some, -math.inf),
        "1e3": 1e3 * noise,
        "1e5": 1e5 * noise,
        "around-1e4": 1e4 + noise,
        "lowest": torch.where(some, limits.min, 0.0),
        "all-lowest": torch.full((batch, keys), limits.min),
        "largest": torch.where(some, 0.0, limits.max),
        "half-precision": (3 * noise).half(),
    }
    return None if case.mask is None else made[case.mask]


def make(case: Case) -> Made:
    """The inputs that a case stands for."""
    generator = torch.Generator().manual_seed(case.seed)
    query, key = (x.to(DTYPES[case.dtype]) for x in _values(case, generator))
    if case.values in WRONG_VALUES:
        query = _spoil(query, case.values, generator)
    query, key = LAYOUT[case.query_layout](query), LAYOUT[case.key_layout](key)
    options: dict[str, Any] = {}
    mask = _mask(case, key.shape[0], key.shape[2], generator)
    if mask is not None:
        options["key_mask"] = mask
    if case.pairs:
        sizes = torch.tensor([query.shape[0], key.shape[0]])
        drawn = torch.rand(case.pairs, 2, generator=generator)
        options["pairs"] = (drawn * sizes).long()
    heads = case.shape[1]
    if case.weights is not None:
        weights = torch.rand(heads, generator=generator, dtype=torch.float64)
        if case.weights == "one":
            weights = (torch.arange(heads) == heads - 1).double()
        elif case.weights == "zeros" and heads > 1:
            weights[0] = 0
        options["head_weights"] = weights / weights.sum()
    for name in ("scale", "normalize", "key_grid"):
        if getattr(case, name) is not None:
            options[name] = getattr(case, name)
    made = Made(case, query, key, options)
    if case.lse:
        lse = made.oracle(oracle.compute_dtype(DTYPES[case.dtype]))[1].value
        if lse.abs().max() < 1e5:  # else it has too few digits, and may be refused
            options["lse"] = lse
    return made


class _OneBuild:
    """The extension, with every call sent to one of its builds."""

    def __init__(self, name: str, of: Any) -> None:
        self.name, self.of = name, of

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.of, attribute)

    def reduce(self, *arguments: Any) -> Any:
        return self.of.reduce(*arguments, instruction_set=self.name)


def _backend(name: str) -> str:
    return name.partition("-")[0]


@contextmanager
def _running(case: Case) -> Iterator[None]:
    """On the case's build ("cpu-avx2") and so many threads; every torch.empty begins as NaN."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    extension = cpu._C
    torch.set_num_threads(case.threads)
    torch.use_deterministic_algorithms(True)
    if (build := case.backend.partition("-")[2]) and extension is not None:
        cpu._C = _OneBuild(build, extension)
    try:
        yield
    finally:
        cpu._C = extension
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)


# What is checked.


def run(case: Case) -> None:
    """AssertionError, or whatever was raised, where something does not hold."""
    with _running(case):
        CHECKS[case.what](make(case))


def _dice(case: Case) -> random.Random:
    return random.Random(case.seed)


def _random(made: Made, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(made.case.seed + 1)
    dtype = oracle.compute_dtype(made.dtype)
    return torch.randn(shape, generator=generator, dtype=dtype)


def check_values(made: Made) -> None:
    """Two or three operations against the oracle."""
    dice, lazy = _dice(made.case), made.map()
    truth, lse = made.oracle(torch.float64)
    plain, plain_lse = made.oracle(oracle.compute_dtype(made.dtype))
    if not torch.isfinite(plain.values).all():  # torch too is lost there
        assert lazy.to_dense().shape == truth.values.shape
        return
    truth.faintest = plain.faintest = _faintest_line(made)
    if truth.faintest < 1e-30:  # it may be zero or not: docs/maths.md
        dense = lazy.to_dense()
        height, width = made.options["key_grid"]
        axis = 3 if made.case.normalize == "rows" else 2
        mass = dense.unflatten(2, (height, width)).sum(axis)
        off = 4 * torch.finfo(mass.dtype).eps * math.sqrt(max(height, width))
        assert ((mass == 0) | ((mass - 1).abs() <= off)).all(), "a line sums neither to 0 nor to 1"
        return
    subject = Subject(lazy, truth, plain, made.dtype)
    batch, queries, keys = lazy.shape
    if made.case.values.startswith("ramp"):
        # d terms of one sign: their sum so far grows evenly, and so do its roundings; their root
        # mean square is sqrt(d) / 3 of the last one's. (Of both signs, they stay near the oracle's
        # one rounding of the whole.)
        for each in (truth, plain):
            each.roundings *= max(1.0, math.sqrt(made.case.shape[4]) / 3)
    if made.case.lse:
        # Its roundings are the caller's: they move all of a row by as much.
        size = 0.0 if "lse" not in made.options else float(made.options["lse"].abs().max())
        truth.roundings += size
        plain.roundings += size

    def reductions() -> None:
        names = subject.reductions
        some = dice.sample(names, dice.randint(1, len(names)))
        fields = lazy.reduce(*some)
        for name in some:
            subject.check_reduction(name, getattr(fields, name))

    def dense() -> None:
        got = lazy.to_dense()
        subject.check_entries("to_dense", got, lambda values: values)
        assert (got >= 0).all()

    def rows() -> None:
        index = [dice.randrange(-queries, queries) for _ in range(dice.randint(1, 5))]
        at = torch.arange(queries)[index]
        subject.check_entries("rows", lazy.rows(index), lambda values: values[:, at])

    def topk() -> None:
        subject.check_topk(dice.choice([1, min(5, keys), min(65, keys), dice.randint(1, keys)]))

    def product() -> None:
        x = _random(made, batch, keys, dice.choice([1, 2, 3, 7, 16, 33]))
        subject.check("product", lazy @ x, x)

    def transposed() -> None:
        y = _random(made, batch, queries, dice.choice([1, 2, 5, 16, 40]))
        subject.check("transposed_product", lazy.mT @ y, y)

    def log_sum_exp() -> None:
        fresh = fm.AttentionMap(
            made.query, made.key, backend=_backend(made.case.backend),
            **{name: value for name, value in made.options.items() if name != "lse"},
        )  # fmt: skip
        if torch.isfinite(plain_lse.value).all():
            size = lse.value.abs().clamp_min(1)  # it is rounded where it is kept
            answers = (oracle.Value(each.value, size) for each in (lse, plain_lse))
            oracle.assert_within_budget("lse", fresh.lse, *answers, truth, made.dtype)

    def pool() -> None:
        grid = lazy.key_grid
        if grid is None:
            return subject.check("pool", lazy.pool(), None, None)
        to = dice.randint(1, grid[0]), dice.randint(1, grid[1])
        subject.check("pool", lazy.pool(key_to=to), None, oracle.cells(grid, to))

    def of_a_head() -> None:
        heads = made.case.shape[1]
        which = dice.randrange(heads)
        alone = torch.nn.functional.one_hot(torch.tensor(which), heads).double()
        one = dataclasses.replace(made, options={**made.options, "head_weights": alone})
        maps = (one.oracle(torch.float64)[0], one.oracle(oracle.compute_dtype(made.dtype))[0])
        for each in maps:
            each.roundings, each.faintest = truth.roundings, _faintest_line(one)
        if maps[0].faintest < 1e-30:  # a head's line may be lost where that of their mean is not
            return
        name = dice.choice(subject.reductions)
        found = getattr(lazy.reduce(name, per_head=True), name)[:, which]
        Subject(lazy, *maps, made.dtype).check_reduction(name, found)

    def two_maps() -> None:
        _check_two_maps(made, lazy, truth, plain, dice)

    operations = [reductions, reductions, dense, rows, topk, product, transposed, log_sum_exp, pool]
    operations.append(of_a_head)
    if keys < 1000:
        operations += [two_maps, two_maps]
    for operation in dice.sample(operations, 2 if keys < 1000 else 1):
        operation()


def _faintest_line(made: Made) -> float:
    """The least mass of a line that is to be normalised; 1 where nothing is."""
    if made.case.normalize is None:
        return 1.0
    plain = Made(made.case, made.query, made.key, {**made.options, "normalize": None})
    values = plain.oracle(torch.float64)[0].values.unflatten(2, made.options["key_grid"])
    mass = values.sum(3 if made.case.normalize == "rows" else 2)
    return float(mass.where(mass > 0, torch.ones_like(mass)).min())


def _check_two_maps(
    made: Made, lazy: fm.AttentionMap, truth: oracle.Map, plain: oracle.Map, dice: random.Random
) -> None:
    """The way back has heads, head dimension and weights of its own."""
    batch, sources, targets = lazy.shape
    query, key = (_random(made, batch, 2, n, 11).to(made.dtype) for n in (targets, sources))
    options: dict[str, Any] = {"head_weights": [0.25, 0.75], "key_grid": (1, sources)}
    if dice.random() < 0.3:
        options["normalize"] = dice.choice(["rows", "columns"])
    backend = _backend(made.case.backend)
    back = fm.AttentionMap(query, key, **options, backend=backend)
    dtypes = (torch.float64, oracle.compute_dtype(made.dtype))
    both = [oracle.attention(query, key, dtype=dtype, **options)[0] for dtype in dtypes]
    composed = [one @ other for one, other in zip((truth, plain), both, strict=True)]
    pair = Subject(None, *composed, made.dtype)  # type: ignore[arg-type]
    R = lazy @ back
    which = dice.choice(["reduce", "product", "trip", "rows", "topk"])
    if which == "reduce":
        some = dice.sample(["entropy", "max", "argmax", "diagonal", "column_sum", "expectation"], 3)
        fields = R.reduce(*some)
        for name in some:
            pair.check_reduction(name, getattr(fields, name))
    elif which == "product":
        x = _random(made, batch, sources, 3)
        pair.check("product", R @ x, x)
        pair.check("transposed_product", R.transposed_product(x), x)
    elif which == "rows":
        at = [dice.randrange(sources) for _ in range(3)]
        pair.check_entries("rows", R.rows(at), lambda values: values[:, at])
    elif which == "topk":
        subject = Subject(R, *composed, made.dtype)
        subject.check_topk(dice.randint(1, min(9, sources)))
    else:
        given = fm.AttentionMap(
            made.query, made.key, query_grid=(1, sources), backend=backend, **made.options
        )
        trip = fm.round_trip(given, back)
        home = Subject(None, *both, made.dtype)  # type: ignore[arg-type]
        there = Subject(None, truth, plain, made.dtype)  # type: ignore[arg-type]
        lines = truth.lines * both[0].lines
        pair.check("diagonal", trip.return_probability * lines)
        home.check("entropy", trip.inverse_entropy)
        there.check("column_sum", trip.soft_density * truth.lines)
        home.check_reduction("argmax", trip.backward)
        there.check_reduction("argmax", trip.forward)


def check_bits(made: Made) -> None:
    """The same on another number of threads, again, and of the same numbers laid out otherwise."""
    dice = _dice(made.case)
    names = ("entropy", "max", "argmax", "column_sum", "column_entropy", "column_argmax")

    def everything(lazy: fm.AttentionMap) -> list[Tensor]:
        x, y = (_random(made, lazy.shape[0], n, 5) for n in lazy.shape[:0:-1])
        values, indices = lazy.topk(min(3, lazy.shape[2]))
        fields = lazy.reduce(*names)._asdict()
        return [*fields.values(), values, indices, lazy @ x, lazy.mT @ y, lazy.lse]

    want = everything(made.map())
    torch.set_num_threads(dice.choice([1, 2, 3, 4]) if made.case.backend != "reference" else 1)
    plain = dataclasses.replace(made, query=made.query.contiguous(), key=made.key.contiguous())
    for other in (made, plain):
        if made.case.backend == "reference" and (other is plain or made.case.threads > 1):
            continue  # torch's own products promise neither
        for got, wanted in zip(everything(other.map()), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def check_budgets(made: Made) -> None:
    """A plan is possible exactly where its operation is; what is held keeps plan and budget."""
    dice, lazy = _dice(made.case), made.map()
    if _backend(made.case.backend) not in ("cpu", "reference"):
        return check_values(made)  # torch and C++ do not know what the others hold
    operations = operations_of_a_map(lazy)
    if dice.random() < 0.4:
        batch, sources, targets = lazy.shape
        query, key = (_random(made, batch, 2, n, 11).to(made.dtype) for n in (targets, sources))
        back = fm.AttentionMap(query, key, backend=lazy.backend)
        operations = operations_of_two(lazy, back)
    what = dice.choice([*operations])
    budgets = (1, dice.choice([2, 3, 5, 9, 40]))
    check_operation(*operations[what], what, budgets=budgets, factor=None)
    return None


def check_gradients(made: Made) -> None:
    """Of a few results at once, against autograd through the dense map."""
    dice, compute = _dice(made.case), oracle.compute_dtype(made.dtype)
    options = {name: value for name, value in made.options.items() if name != "lse"}
    given = {"query": made.query, "key": made.key}
    mask = options.get("key_mask")
    if mask is not None and mask.dtype != torch.bool:
        given["bias"] = options.pop("key_mask").to(compute)
    if "head_weights" in options:
        given["head_weights"] = options.pop("head_weights").to(compute)
    batch, queries, keys = made.map().shape
    given |= {"right": _random(made, batch, keys, 3), "left": _random(made, batch, queries, 3)}

    def leaves(dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: (x if dtype is None else x.to(dtype)).detach().requires_grad_()
            for name, x in given.items()
        }

    names = [name for name in FLOAT_RESULTS if name not in ("pool", *PICKED)]
    names = [name for name in names if name != "diagonal" or queries == keys]
    names = [name for name in names if name != "expectation" or made.map().key_grid is not None]
    some = tuple(dice.sample(names, dice.randint(1, 4)))
    dense, rival = (Dense(leaves(dtype), options) for dtype in (torch.float64, compute))
    true, plain = (each.results(some, 1, None) for each in (dense, rival))
    g = gradients._upstream(true)
    of, _ = made.oracle(torch.float64)
    if made.case.values == "ramp-up":
        of.roundings *= max(1.0, math.sqrt(made.case.shape[4]) / 3)
    of.faintest = _faintest_line(made)
    if of.faintest < 1e-30:
        return
    if "column_entropy" in g:
        lost = oracle.vanishing(of, made.dtype) / oracle.band(of, made.dtype)
        g["column_entropy"] = g["column_entropy"].where(of.values.sum(1) > lost, 0.0)
    mine = leaves(None)
    got = gradients._mine(mine, options, some, 1, None, _backend(made.case.backend))
    assert_gradients(
        ", ".join(some),
        gradients._gradients(got, g, mine), gradients._gradients(true, g, dense.leaves),
        gradients._gradients(plain, g, rival.leaves), dense.magnitudes(g, 1, None),
        dense.magnitudes(g, 1, None, made.case.shape[1] * torch.finfo(compute).tiny / of.faintest),
        of, made.case.shape[1], made.case.shape[4], made.dtype,
    )  # fmt: skip


def check_wrong_values(made: Made) -> None:
    """NaN and inf: no crash, no hang, indices within the map; the reference refuses them."""
    finite = torch.isfinite(made.query).all()
    lazy = made.map()
    names = [n for n in fm_reductions(lazy) if n != "diagonal" or lazy.shape[1] == lazy.shape[2]]
    try:
        fields = lazy.reduce(*names)
    except ValueError as error:
        assert not finite and "query has" in str(error)
        return
    assert finite or lazy.backend != "reference"
    for name, size in (("argmax", lazy.shape[2]), ("column_argmax", lazy.shape[1])):
        index = getattr(fields, name)
        assert ((index >= 0) & (index < size)).all(), name
    k = min(70, lazy.shape[2])
    indices = lazy.topk(k)[1]
    assert ((indices >= 0) & (indices < lazy.shape[2])).all(), "topk"
    lazy.to_dense()
    lazy @ _random(made, lazy.shape[0], lazy.shape[2], 3)
    lazy.mT @ _random(made, lazy.shape[0], lazy.shape[1], 3)
    query = made.query.detach().requires_grad_()
    grows = dataclasses.replace(made, query=query).map()
    (grows.entropy().sum() + grows.column_entropy().sum()).backward()
    assert query.grad is not None and query.grad.shape == query.shape


def fm_reductions(lazy: fm.AttentionMap) -> list[str]:
    """Those that need no grid that is not there."""
    from flashmaps.maps.lazy import REDUCTIONS

    return [n for n in REDUCTIONS if n != "expectation" or lazy.key_grid is not None]


CHECKS: dict[str, Callable[[Made], None]] = {
    "values": check_values,
    "bits": check_bits,
    "budgets": check_budgets,
    "wrong values": check_wrong_values,
    "gradients": check_gradients,
}


# The attack.


def backends() -> tuple[str, ...]:
    """All builds that run here, the best one most often, and the reference."""
    builds = cpu._C.instruction_sets() if fm.backends()["cpu"] else []
    return ("reference", *(["cpu"] * 2 if builds else []), *(f"cpu-{name}" for name in builds[1:]))


def attack(
    seconds: float, seed: int, *, of: tuple[str, ...] | None = None, most: int | None = None
) -> Counter[str]:
    """Cases for so long, or ``most`` of them: how many of each kind. Raises at the first failure.

    The error's notes have the line for found.py.
    """
    done: Counter[str] = Counter()
    end = time.monotonic() + seconds
    number = 0
    while (time.monotonic() < end) if most is None else number < most:
        case = draw(random.Random(f"{seed}:{number}"), of or backends())
        try:
            run(case)
        except BaseException as error:
            error.add_note(f"case {number} of seed {seed}, for tests/attack/found.py:\n    {case},")
            raise
        done[f"{case.backend} {case.what}"] += 1
        number += 1
    return done


def main() -> None:
    """Attack, print how many cases held, and go on past failures to print each of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--backend", action="append", help="may be repeated; default: CPU ones")
    parser.add_argument("--keep-going", action="store_true", help="past the first failure")
    given = parser.parse_args()
    of = tuple(given.backend) if given.backend else backends()
    done: Counter[str] = Counter()
    failures = number = 0
    end = time.monotonic() + given.seconds
    while time.monotonic() < end:
        case = draw(random.Random(f"{given.seed}:{number}"), of)
        try:
            run(case)
        except (Exception, pytest.fail.Exception) as error:
            failures += 1
            text = str(error).strip().splitlines() or [""]
            print(f"case {number} of seed {given.seed}: {type(error).__name__}: {text[0][:300]}")
            print(f"    {case},", flush=True)
            if not given.keep_going:
                break
        done[f"{case.backend} {case.what}"] += 1
        number += 1
    for kind, count in sorted(done.items()):
        print(f"{count:7d} {kind}")
    print(f"core: {sum(done.values())} cases of seed {given.seed}, {failures} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
