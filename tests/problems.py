"""The problems that every operation must solve: shapes, masks, pairs, scales, strides.

A problem's name is its shape, BxHxNxMxd (with B' keys: BtoB'), then what is special about it.
Values are drawn in float64 and rounded to the dtype under test; the truth is computed from the
rounded ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from torch import Generator, Tensor

Options = dict[str, Any]
Layout = Callable[[Tensor], Tensor]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# Layouts: the same values, elsewhere in memory. What lies between them is NaN, so that a read
# outside the tensor shows.


def _inside(x: Tensor, shape: tuple[int, ...], view: Layout) -> Tensor:
    out = view(torch.full(shape, torch.nan, dtype=x.dtype))
    return out.copy_(x)


def contiguous(x: Tensor) -> Tensor:
    return x


def tokens_first(x: Tensor) -> Tensor:
    """[B, N, H, d], as projections give it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fused(x: Tensor) -> Tensor:
    """The middle third of one projection: [B, N, 3, H, d]."""
    batch, heads, tokens, width = x.shape
    shape = (batch, tokens, 3, heads, width)
    return _inside(x, shape, lambda buffer: buffer[:, :, 1].transpose(1, 2))


def wide_rows(x: Tensor) -> Tensor:
    """Rows with a gap after them that keeps no alignment."""
    *lead, width = x.shape
    return _inside(x, (*lead, width + 3), lambda buffer: buffer[..., 1 : width + 1])


def page_rows(x: Tensor) -> Tensor:
    """Rows 4096 bytes apart, which all fall in the same few sets of a cache."""
    *lead, width = x.shape
    return _inside(x, (*lead, 4096 // x.element_size()), lambda buffer: buffer[..., :width])


def every_second(x: Tensor) -> Tensor:
    *lead, width = x.shape
    return _inside(x, (*lead, 2 * width), lambda buffer: buffer[..., ::2])


def width_first(x: Tensor) -> Tensor:
    """[B, H, d, N]: the stride of d is N."""
    return x.mT.contiguous().mT


def unaligned(x: Tensor) -> Tensor:
    """One element past an aligned address, with NaN on both sides."""
    return _inside(x, (x.numel() + 2,), lambda buffer: buffer[1:-1].view(x.shape))


def one_batch(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def one_head(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


def one_token(x: Tensor) -> Tensor:
    return x[:, :, :1].expand(x.shape)


LAYOUTS = (
    tokens_first, fused, wide_rows, page_rows, every_second, width_first, unaligned,
    one_batch, one_head, one_token,
)  # fmt: skip


# Options, from a generator and the numbers of query batches, key batches, heads, queries, keys.


@dataclass(frozen=True)
class Problem:
    """Inputs of `AttentionMap`, for any dtype."""

    shape: tuple[int, int, int, int, int]  # B, H, N, M, d
    special: str = ""
    key_batch: int | None = None  # B'
    options: Callable[[Generator, Problem], Options] = lambda g, p: {}
    query_layout: Layout = contiguous
    key_layout: Layout = contiguous
    values: Callable[[Generator, Problem], tuple[Tensor, Tensor]] | None = None
    with_lse: bool = False
    scores: float = 3.0  # spread of the scores at the default scale

    def __str__(self) -> str:
        sizes = [str(n) for n in self.shape]
        if self.key_batch is not None:
            sizes[0] += f"to{self.key_batch}"
        return "x".join(sizes) + (f"-{self.special}" if self.special else "")

    @property
    def keys_shape(self) -> tuple[int, int, int, int]:
        batch, heads, _, keys, width = self.shape
        return (self.key_batch or batch, heads, keys, width)

    def draw(self, generator: Generator) -> tuple[Tensor, Tensor]:
        batch, heads, queries, _, width = self.shape
        if self.values is not None:
            return self.values(generator, self)
        query = torch.randn(
            batch, heads, queries, width, generator=generator, dtype=torch.float64
        ) * math.sqrt(self.scores)
        key = torch.randn(self.keys_shape, generator=generator, dtype=torch.float64)
        return query, key * math.sqrt(self.scores)


def _seed(problem: Problem) -> int:
    # From the name, so that a new problem changes no other.
    return sum(ord(c) * (i + 1) for i, c in enumerate(str(problem)))


@functools.cache
def inputs(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Options]:
    """Query, key and options; the same ones on every call."""
    generator = torch.Generator().manual_seed(_seed(problem))
    query, key = problem.draw(generator)
    query = problem.query_layout(query.to(dtype))
    key = problem.key_layout(key.to(dtype))
    options = problem.options(generator, problem)
    if problem.with_lse:
        wanted = {k: v for k, v in options.items() if k != "normalize"}
        lse = oracle.attention(query, key, dtype=oracle.compute_dtype(dtype), **wanted)[1].value
        options = {**options, "lse": lse}
    return query, key, options


@functools.cache
def truth(problem: Problem, dtype: torch.dtype) -> tuple[oracle.Map, oracle.Value]:
    query, key, options = inputs(problem, dtype)
    return oracle.attention(query, key, dtype=torch.float64, **options)


@functools.cache
def plain(problem: Problem, dtype: torch.dtype) -> tuple[oracle.Map, oracle.Value]:
    """What torch gives in the dtype that flashmaps computes in."""
    query, key, options = inputs(problem, dtype)
    return oracle.attention(query, key, dtype=oracle.compute_dtype(dtype), **options)


def grids(problem: Problem, dtype: torch.dtype) -> tuple[Any, Any]:
    """(query grid, key grid): given, or the square, or None."""
    *_, options = inputs(problem, dtype)
    _, _, queries, keys, _ = problem.shape

    def square(tokens: int) -> tuple[int, int] | None:
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else None

    return (
        options.get("query_grid") or square(queries),
        options.get("key_grid") or square(keys),
    )


def bool_mask(generator: Generator, problem: Problem) -> Options:
    batch, _, keys, _ = problem.keys_shape
    mask = torch.rand(batch, keys, generator=generator) > 0.4
    mask[:, keys // 2] = True
    return {"key_mask": mask}


def hidden(start: int, stop: int) -> Callable[[Generator, Problem], Options]:
    """A mask that hides keys start .. stop - 1 of every batch."""

    def options(generator: Generator, problem: Problem) -> Options:
        mask = torch.ones(problem.shape[3], dtype=torch.bool)
        mask[start:stop] = False
        return {"key_mask": mask}

    return options


def float_bias(generator: Generator, problem: Problem) -> Options:
    """A bias of size three with the first half hidden in one batch, the last in another."""
    batch, _, keys, _ = problem.keys_shape
    bias = 3 * torch.randn(batch, keys, generator=generator)
    bias[0, : keys // 2] = -math.inf
    bias[-1, -(keys // 3) :] = -math.inf
    return {"key_mask": bias}


def pairs(*which: tuple[int, int]) -> Callable[[Generator, Problem], Options]:
    return lambda generator, problem: {"pairs": torch.tensor(which)}


def weights(*which: float) -> Callable[[Generator, Problem], Options]:
    return lambda generator, problem: {"head_weights": list(which)}


def lines(how: str, grid: tuple[int, int]) -> Callable[[Generator, Problem], Options]:
    return lambda generator, problem: {"normalize": how, "key_grid": grid}


def scale(value: float) -> Callable[[Generator, Problem], Options]:
    return lambda generator, problem: {"scale": value}


def everything(generator: Generator, problem: Problem) -> Options:
    """Mask, pairs, weights, lines and scale together; key grid 5 x 9, query grid 3 x 7."""
    return {
        **bool_mask(generator, problem),
        "pairs": [[1, 0], [0, 2], [1, 2], [1, 2]],
        "head_weights": [0.5, 0.0, 0.125, 0.375],
        "normalize": "rows",
        "query_grid": (3, 7),
        "key_grid": (5, 9),
        "scale": 0.2,
    }


def ramp(first: float, last: float) -> Callable[[Generator, Problem], tuple[Tensor, Tensor]]:
    """Scores that go from first to last along the keys, so a running maximum moves all the way."""

    def values(generator: Generator, problem: Problem) -> tuple[Tensor, Tensor]:
        batch, heads, queries, keys, width = problem.shape
        along = torch.linspace(first, last, keys, dtype=torch.float64)
        query = torch.ones(batch, heads, queries, width, dtype=torch.float64)
        query += 0.05 * torch.randn(query.shape, generator=generator, dtype=torch.float64)
        key = along[:, None].expand(problem.keys_shape) / math.sqrt(width)
        noise = torch.randn(problem.keys_shape, generator=generator, dtype=torch.float64)
        return query, key + 0.3 * noise

    return values


def _problems() -> list[Problem]:
    shapes = [
        (1, 1, 1, 1, 8),
        (2, 3, 1, 37, 40),  # one row
        (2, 3, 37, 1, 40),  # one key
        (2, 5, 33, 47, 64),
        (1, 2, 16, 25, 72),
        (1, 2, 36, 49, 128),
        (1, 1, 9, 16, 256),
        (2, 3, 25, 25, 13),
        (1, 20, 16, 16, 8),
        (1, 2, 37, 517, 40),  # keys for many tiles and a rest
        (2, 2, 301, 77, 16),  # rows for many strips and a rest
    ]
    wide = (2, 3, 21, 45, 24)
    found = [Problem(shape) for shape in shapes]
    found += [
        Problem((1, 2, 19, 33001, 8), "two-passes"),  # rows too long for the strips of csrc/
        Problem(wide, "mask", options=bool_mask),
        Problem((1, 2, 19, 131, 40), "first-120-hidden", options=hidden(0, 120)),
        Problem((1, 2, 19, 131, 40), "last-120-hidden", options=hidden(11, 131)),
        Problem((1, 2, 19, 131, 40), "first-key-only", options=hidden(1, 131)),
        Problem(wide, "bias", options=float_bias),
        Problem((2, 2, 11, 45, 24), "pairs", key_batch=3,
                options=pairs((1, 2), (0, 0), (1, 2), (0, 1), (1, 0))),
        Problem((1, 2, 11, 45, 24), "one-to-many", key_batch=3, options=bool_mask),
        Problem((3, 2, 11, 45, 24), "many-to-one", key_batch=1, options=bool_mask),
        Problem(wide, "weights", options=weights(0.7, 0.0, 0.3)),
        Problem(wide, "one-head-counts", options=weights(0.0, 0.0, 1.0)),
        Problem((1, 2, 11, 45, 24), "block", options=lines("block", (5, 9))),
        Problem((1, 2, 11, 45, 24), "rows", options=lines("rows", (5, 9))),
        Problem((1, 2, 11, 45, 24), "columns", options=lines("columns", (5, 9))),
        Problem((1, 2, 45, 45, 24), "columns-square", options=lines("columns", (3, 15))),
        Problem((2, 2, 25, 25, 24), "rows-mask",
                options=lambda g, p: {**bool_mask(g, p), "normalize": "rows"}),
        Problem((1, 2, 11, 45, 24), "rows-two-lines-hidden",
                options=lambda g, p: {**hidden(0, 18)(g, p), **lines("rows", (5, 9))(g, p)}),
        Problem((2, 3, 26, 130, 40), "lse", with_lse=True),
        Problem((2, 4, 21, 45, 24), "everything", key_batch=3, options=everything),
        Problem((2, 4, 21, 45, 24), "everything-lse", key_batch=3, options=everything,
                with_lse=True),
        Problem(wide, "one-hot", options=scale(20.0)),
        Problem(wide, "scale-0", options=scale(0.0)),
        Problem(wide, "scale-negative", options=scale(-0.3)),
        Problem((1, 2, 19, 131, 16), "hundreds", scores=100.0),
        Problem((1, 2, 19, 131, 16), "rising", values=ramp(-300, 300)),
        Problem((1, 2, 19, 131, 16), "falling", values=ramp(300, -300)),
        Problem((1, 2, 19, 131, 16), "rising-slowly", values=ramp(0, 12)),
    ]  # fmt: skip
    for layout in LAYOUTS:
        name = layout.__name__.replace("_", "-")
        found.append(Problem((2, 3, 26, 45, 24), name, query_layout=layout, key_layout=layout))
    found.append(
        Problem((2, 3, 26, 45, 24), "mixed-strides", query_layout=fused, key_layout=width_first)
    )
    return found


PROBLEMS = _problems()


def _cases() -> list[tuple[Problem, torch.dtype]]:
    """Plain shapes in every dtype; each special problem in float32 and, in turn, another one."""
    found = []
    others = [dtype for dtype in DTYPES if dtype != torch.float32]
    for index, problem in enumerate(PROBLEMS):
        pair = (torch.float32, others[index % 3])
        found += [(problem, dtype) for dtype in (pair if problem.special else DTYPES)]
    return found


CASES = _cases()
CASE_NAMES = [f"{problem}-{str(dtype).removeprefix('torch.')}" for problem, dtype in CASES]
