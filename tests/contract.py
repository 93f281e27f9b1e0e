"""A lazy object beside the truth about it, and how each of its answers is held to that truth."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flashmaps as fm
import oracle
import torch
from flashmaps.maps.lazy import REDUCTIONS
from problems import Problem, inputs, plain, truth
from torch import Tensor


@dataclass
class Subject:
    """An `AttentionMap` or a `Composition`, the truth, and what plain torch makes of it."""

    lazy: fm.AttentionMap | fm.Composition
    truth: oracle.Map
    plain: oracle.Map
    dtype: torch.dtype  # of the inputs

    def check(self, what: str, got: Tensor, *operands: Tensor) -> None:
        """``got`` within the budget of the oracle's operation of that name."""
        answers = [getattr(m, what)(*operands) for m in (self.truth, self.plain)]
        oracle.assert_within_budget(what, got, *answers, self.truth, self.dtype)

    def check_entries(self, what: str, got: Tensor, pick: Callable[[Tensor], Tensor]) -> None:
        """``got`` within the budget of entries of the map, picked from the dense map."""
        answers = [oracle.positive(pick(m.values)) for m in (self.truth, self.plain)]
        oracle.assert_within_budget(what, got, *answers, self.truth, self.dtype)

    def check_reduction(self, name: str, got: Tensor) -> None:
        if name in ("argmax", "column_argmax"):
            dim = 2 if name == "argmax" else 1
            dense = (self.truth.values, self.plain.values)
            oracle.assert_picks_maximum(name, got, *dense, self.truth, self.dtype, dim)
        elif name == "column_entropy":
            oracle.assert_column_entropy(name, got, self.truth, self.plain, self.dtype)
        else:
            self.check(name, got)

    def check_reductions(self) -> None:
        """All that there are, in one call."""
        fields = self.lazy.reduce(*self.reductions)
        for name in self.reductions:
            self.check_reduction(name, getattr(fields, name))

    def check_rows(self, index: Any) -> None:
        picked = torch.arange(self.truth.values.shape[1])[index].reshape(-1)
        got = self.lazy.rows(index)
        self.check_entries(f"rows({index})", got, lambda values: values[:, picked])

    def check_topk(self, k: int) -> None:
        """Values as the oracle's; indices distinct, and where those values are."""
        values, indices = self.lazy.topk(k)
        keys = self.truth.values.shape[2]
        self.check_entries(f"topk({k})", values, lambda dense: dense.topk(k, sorted=True).values)
        assert (values.diff(dim=-1) <= 0).all(), "not the largest first"
        assert indices.dtype == torch.int64
        assert ((indices >= 0) & (indices < keys)).all()
        assert (indices.sort(-1).values.diff(dim=-1) > 0).all(), "an index comes twice"
        self.check_entries(f"topk({k}) gathered", values, lambda dense: dense.gather(2, indices))

    @property
    def reductions(self) -> list[str]:
        """The names that this shape and grid allow."""
        shape = self.truth.values.shape
        return possible(shape, has_grid=self.truth.key_centres is not None)


def possible(shape: tuple[int, ...], *, has_grid: bool) -> list[str]:
    """The reductions of a map [batch, N, M], with or without a key grid."""
    without = {"diagonal"} if shape[1] != shape[2] else set()
    without |= set() if has_grid else {"expectation"}
    return [name for name in REDUCTIONS if name not in without]


def lazy_map(problem: Problem, dtype: torch.dtype, backend: str) -> fm.AttentionMap:
    query, key, options = inputs(problem, dtype)
    return fm.AttentionMap(query, key, **options, backend=backend)


def subject_of(case: tuple[Problem, torch.dtype], backend: str) -> Subject:
    """A map, and what is true of it."""
    return Subject(lazy_map(*case, backend), truth(*case)[0], plain(*case)[0], case[1])


def smallest(run: Callable[[], object]) -> int:
    """The smallest memory budget, as the error says; ``run`` gives one byte."""
    try:
        run()
    except ValueError as error:
        known = r"memory_budget = 1 bytes is too small for .* the smallest that works is (\d+)$"
        found = re.search(known, str(error), flags=re.DOTALL)
        assert found, str(error)
        return int(found[1])
    raise AssertionError("one byte was enough")
