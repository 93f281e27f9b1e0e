"""A lazy object beside the truth about it, and how each of its answers is held to that truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flashmaps as fm
import oracle
import torch
from flashmaps.maps.lazy import REDUCTIONS
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
        _, queries, keys = self.truth.values.shape
        without = {"diagonal"} if queries != keys else set()
        without |= {"expectation"} if self.truth.key_centres is None else set()
        return [name for name in REDUCTIONS if name not in without]
