"""What is common to lazy maps: the face that composition and statistics see, and what reduce gives.

`LazyMap` is one problem on one backend, and the passes over it; `AttentionMap` adds what a user
may ask of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashmaps.maps import operators as ops
from flashmaps.maps.backends.choice import plan_pass
from flashmaps.maps.grids import Grid
from flashmaps.maps.planning import Step
from flashmaps.maps.problem import Cost, Problem, Request
from flashmaps.maps.validation import need_grid

REDUCTIONS = (
    "entropy",
    "max",
    "argmax",
    "expectation",
    "diagonal",
    "column_sum",
    "column_entropy",
    "column_max",
    "column_argmax",
)


class Reductions:
    """The results of `AttentionMap.reduce`, one attribute for each name that was asked for."""

    def __init__(self, fields: dict[str, Tensor]) -> None:
        self._fields = fields

    def __getattr__(self, name: str) -> Tensor:
        fields = self.__dict__.get("_fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"{name!r} was not asked for: reduce() was given {list(fields)}")

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(t.shape)}" for name, t in self._fields.items())
        return f"Reductions({shapes})"

    def _asdict(self) -> dict[str, Tensor]:
        return dict(self._fields)


def check_reductions(
    names: Sequence[str], shape: tuple[int, int, int], key_grid: Grid | None
) -> tuple[str, ...]:
    """The names without repeats, or an error that lists the reductions there are.

    Or that says what a map of this shape and grid lacks for one of them.
    """
    if not names:
        raise ValueError(f"reduce() needs at least one of {', '.join(REDUCTIONS)}")
    for name in names:
        if name not in REDUCTIONS:
            raise ValueError(
                f"reduction {name!r} is unknown; choose from {', '.join(REDUCTIONS)}"
                + (" (top-k is A.topk(k))" if name == "topk" else "")
            )
    if "expectation" in names:
        need_grid("key_grid", key_grid, shape[2], "expectation")
    if "diagonal" in names:
        check_square("diagonal", shape)
    return tuple(dict.fromkeys(names))


def check_square(what: str, shape: tuple[int, int, int]) -> None:
    """ValueError for a map that has no diagonal."""
    if shape[1] != shape[2]:
        raise ValueError(f"{what} needs a square map, this one is {shape[1]} x {shape[2]}")


def stand_in(like: Problem, *shape: int) -> Tensor:
    """An operand with a shape and nothing else, for plans."""
    return torch.empty(shape, dtype=like.compute_dtype, device="meta")


class Lazy:
    """Lets torch see ``@``: ``torch.matmul(A, x)`` works, and torch.compile traces ``A @ x``."""

    __matmul__: Any

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in (torch.matmul, Tensor.matmul):
            return NotImplemented
        left, right = args
        if torch.compiler.is_compiling() and not isinstance(left, Lazy):
            # torch.compile presents A @ x as Tensor.matmul(x, A): it swaps the operands so that the
            # tensor comes first, and has no reverse of matmul. (x @ A itself is a TypeError.)
            left, right = right, left
        return left.__matmul__(right) if isinstance(left, Lazy) else NotImplemented


class LazyMap(Lazy):
    """One problem on one backend, as the rooms above see it: its shape and passes over it."""

    backend: str
    query_grid: Grid | None
    key_grid: Grid | None
    _lse_offset: Tensor | None  # [P, 1, 1]: what users call the log-sum-exp is larger by this
    _problem: Problem
    _given: object = None  # which Q and K a given log-sum-exp is of
    _kept: tuple[Tensor, object] | None = None  # one that was computed, and of which Q and K

    @property
    def problem(self) -> Problem:
        """What is computed; ValueError where Q or K are no longer those of a given ``lse``."""
        if self._given is not None and self._given != _versions(self._problem):
            raise ValueError(
                "query or key was changed in place after the map was made with lse=, which is "
                "theirs no longer: make a new map"
            )
        return self._problem

    def _take(self, problem: Problem) -> None:
        self._problem = problem
        if problem.lse is not None and not torch.compiler.is_compiling():
            versions = _versions(problem)
            self._given = None if versions is None else versions

    @property
    def _lse(self) -> Tensor | None:
        """Of every head and of ``problem``, where it is known for Q and K as they are now."""
        if self.problem.lse is not None:
            return self.problem.lse
        if self._kept is None or self._kept[1] is None or self._kept[1] != _versions(self._problem):
            return None
        return self._kept[0]

    @_lse.setter
    def _lse(self, lse: Tensor | None) -> None:
        self._kept = None if lse is None else (lse, _versions(self._problem))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, N, M); batch is the number of pairs where pairs were given."""
        return (self.problem.batch, self.problem.num_queries, self.problem.num_keys)

    @property
    def dtype(self) -> torch.dtype:
        """Of the results: float64 for float64 inputs, else float32."""
        return self.problem.compute_dtype

    @property
    def device(self) -> torch.device:
        return self.problem.query.device

    def _fields(
        self, *names: str, memory_budget: int | None = None, **operands: Any
    ) -> dict[str, Tensor]:
        request = Request(names, memory_budget=memory_budget, **operands)
        return ops.reduce(self.problem, request, self.backend)

    def _step(
        self, *names: str, held: int = 0, problem: Problem | None = None, **operands: Any
    ) -> Step:
        """The pass of `_fields`, for plans; or of another problem on this backend."""
        one = self.problem if problem is None else problem

        def cost(budget: int | None) -> Cost:
            request = Request(names, memory_budget=budget, **operands)
            return plan_pass(self.backend, one, request)

        return Step(held, cost)


def _versions(problem: Problem) -> tuple[int, ...] | None:
    """Changes with Q and K; None where torch does not count their changes (in inference mode).

    (Masks, weights and pairs are copies of what the user holds.)
    """
    if torch.compiler.is_compiling():  # in one graph nothing changes unseen
        return ()
    if problem.query.is_inference() or problem.key.is_inference():
        return None
    return problem.query._version, problem.key._version


def check_alike(name: str, first: LazyMap, other: str, second: LazyMap) -> None:
    """ValueError unless two maps that meet have one dtype and one device."""
    if first.dtype != second.dtype or first.device != second.device:
        raise ValueError(
            f"{name} is {first.dtype} on {first.device}, {other} is {second.dtype} on "
            f"{second.device}: make them alike"
        )


# The log-sum-exp of the map back, which the return probability needs.


def lse_bytes(A: LazyMap) -> int:
    """What it takes to keep it. Kept by the map from an earlier call it counts all the same.

    So what a budget leaves for other things does not depend on what was asked before.
    """
    batch, queries, _ = A.shape
    given = A.problem.lse is not None
    return 0 if given else batch * A.problem.heads * queries * A.problem.itemsize


def with_lse(A: LazyMap) -> Problem:
    """The problem as it will be then, for plans."""
    batch, queries, _ = A.shape
    lse = A._lse
    if lse is None:
        lse = stand_in(A.problem, batch, A.problem.heads, queries)
    return A.problem._replace(lse=lse)


def known_lse(A: LazyMap, memory_budget: int | None) -> Tensor:
    """Computed where it is not there, and kept by the map: a number to compute with.

    It has no graph. Gradients take the log-sum-exp for the function of Q and K that it is.
    """
    lse = A._lse
    if lse is None:
        with torch.no_grad():
            A._lse = lse = A._fields("lse", memory_budget=memory_budget)["lse"]
    return lse


def lse_with_graph(A: LazyMap) -> Tensor:
    """The log-sum-exp as a result, with gradients where they are wanted; or as it was given."""
    if A.problem.lse is None and ops.wants_gradients(*A.problem):
        return A._fields("lse")["lse"]
    return known_lse(A, None)


def joined_lse(maps: Sequence[LazyMap]) -> Tensor:
    """Of all heads of several maps. Where one was given with a graph, it is an input of its own.

    So are all of them then.
    """
    given = [m.problem.lse for m in maps]
    free = ops.wants_gradients(*given)
    found = [lse_with_graph(m) if free else known_lse(m, None) for m in maps]
    return torch.cat(found, 1)


def round_trip_fields(
    first: LazyMap,
    second: LazyMap,
    names: tuple[str, ...],
    *,
    lse: Tensor,
    right: Tensor | None = None,
    memory_budget: int | None = None,
) -> dict[str, Tensor]:
    """One pass over ``first`` with the map back at hand, for "return_probability" among ``names``.

    ``lse`` is the second map's.
    """
    partner = second.problem._replace(lse=lse)
    request = Request(names, right=right, partner=partner, memory_budget=memory_budget)
    return ops.reduce(first.problem, request, first.backend)
