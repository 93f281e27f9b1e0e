"""The problems that backend "cuda" must solve, and its operations: emulated in test_cuda.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import checks
import torch
from checks import Checked
from contract import Subject
from problems import (
    PROBLEMS,
    Options,
    Problem,
    bool_mask,
    float_bias,
    hidden,
    pairs,
    plain,
    truth,
    weights,
)
from torch import Generator

FLOATS = (torch.float16, torch.bfloat16)

# One row, one key, every head dimension, rows and columns that tiles divide and that they do not,
# one tile and several, many heads.
SHAPES = (
    (1, 1, 1, 1, 40),
    (2, 3, 1, 37, 64),
    (2, 3, 37, 1, 40),
    (1, 2, 64, 64, 80),
    (2, 3, 25, 25, 128),
    (1, 2, 36, 49, 160),
    (1, 2, 130, 150, 40),
    (1, 20, 16, 16, 64),
)


def _all_at_once(generator: Generator, problem: Problem) -> Options:
    return {
        **float_bias(generator, problem),
        **pairs((1, 0), (0, 2), (1, 2), (1, 2))(generator, problem),
        **weights(0.5, 0.0, 0.125, 0.375)(generator, problem),
        "scale": 0.2,
    }


def _special() -> list[Problem]:
    """The contract's problems that are not about shapes or lines, with heads of 40 numbers."""
    found = []
    for problem in PROBLEMS:
        lines = problem.special.startswith(("rows", "columns", "everything"))
        if problem.special and not lines and problem.shape[3] < 1000:
            found.append(replace(problem, shape=(*problem.shape[:4], 40)))
    wide = (2, 4, 37, 81, 64)
    return [
        *found,
        Problem(wide, "all-at-once", key_batch=3, options=_all_at_once),
        Problem(wide, "all-at-once-lse", key_batch=3, options=_all_at_once, with_lse=True),
        Problem((1, 2, 33, 70, 128), "mask-128", options=bool_mask),
        Problem((1, 2, 19, 131, 80), "all-but-the-last-hidden", options=hidden(0, 130)),
    ]


def _cases() -> list[tuple[Problem, torch.dtype]]:
    """Shapes in both dtypes, specials in one or the other."""
    found = [(Problem(shape), dtype) for shape in SHAPES for dtype in FLOATS]
    return found + [(problem, FLOATS[n % 2]) for n, problem in enumerate(_special())]


CASES = _cases()
CASE_NAMES = [f"{problem}-{str(dtype).removeprefix('torch.')}" for problem, dtype in CASES]


def check_return_probability(of: Checked, dim: int = 64) -> None:
    """With a way back of other heads, head dimension, weights and a mask."""
    batch, sources, targets = of.lazy.shape
    back = Problem((batch, 2, targets, sources, dim), "back", options=_back)
    there = Checked(back, of.dtype, of.backend, of.device)
    maps = [(truth(p, of.dtype)[0], plain(p, of.dtype)[0]) for p in (of.problem, back)]
    composed = [a @ b for a, b in zip(*maps, strict=True)]
    both = Subject(of.subject.lazy, composed[0], composed[1], of.dtype)
    both.check("diagonal", (of.lazy @ there.lazy).diagonal().cpu())


def _back(generator: Generator, problem: Problem) -> dict[str, Any]:
    return {**bool_mask(generator, problem), **weights(0.25, 0.75)(generator, problem)}


# What the backend refuses is not among them, nor what needs heads of other dimensions, nor the way
# back, which is Triton's.
OPERATIONS = {
    name: check
    for name, check in checks.OPERATIONS.items()
    if name not in ("topk", "composition", "return_probability", "gradients", *checks.SPECIAL)
} | {"return_probability": check_return_probability}
