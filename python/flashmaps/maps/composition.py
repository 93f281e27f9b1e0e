"""R = A_st A_ts, the round trip, lazy: products stream, row statistics come strip by strip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashmaps.maps import operators as ops
from flashmaps.maps import strips
from flashmaps.maps.budget import budget_in_force, check_budget, too_small
from flashmaps.maps.grids import centres
from flashmaps.maps.lazy import (
    REDUCTIONS,
    Lazy,
    LazyMap,
    Reductions,
    check_alike,
    check_reductions,
    check_square,
    known_lse,
    lse_bytes,
    round_trip_fields,
    stand_in,
    with_lse,
)
from flashmaps.maps.map_plans import composed_backward_step
from flashmaps.maps.planning import Ceilings, Plan, Step, plan, portion, shares
from flashmaps.maps.problem import Cost, Problem, Request, output_bytes
from flashmaps.maps.rows import Index, rows_held, rows_in_portions
from flashmaps.maps.validation import check_count, check_k, check_operand

if TYPE_CHECKING:
    from flashmaps.maps.attention_map import AttentionMap


def compose(
    first: AttentionMap, second: AttentionMap, *, memory_budget: int | None = None
) -> Composition:
    """The lazy product of two maps: `Composition`."""
    return Composition(first, second, memory_budget=memory_budget)


class Composition(Lazy):
    """R = A @ A', rows of which are distributions over where the round trip may end.

    Args:
        first: A, [batch, N, M]. second: A', [batch, M, K].
        memory_budget: bytes that an operation may take beyond inputs and outputs; default what
            `flashmaps.memory_budget` says when it runs, and else 64 MiB for what needs whole rows
            of R (entropy, max, argmax, columns, top-k, rows). These are computed a strip of rows
            at a time, and A' is streamed once for each strip: a larger budget means fewer passes.

    ``@``, ``diagonal``, ``column_sum`` and ``expectation`` need no rows of R and stream.

    Raises:
        ValueError: shapes that do not chain; a memory_budget too small for one of the reductions,
            topk or rows (the message says the smallest that works).
    """

    def __init__(
        self, first: AttentionMap, second: AttentionMap, *, memory_budget: int | None = None
    ) -> None:
        if not isinstance(first, LazyMap) or not isinstance(second, LazyMap):
            raise TypeError(
                "compose() takes two AttentionMaps, got "
                f"{type(first).__name__} and {type(second).__name__}"
            )
        if first.shape[0] != second.shape[0] or first.shape[2] != second.shape[1]:
            raise ValueError(
                f"maps of shape {first.shape} and {second.shape} do not chain: the first one's "
                f"keys must be the second one's queries, in equal batches"
            )
        check_alike("the first map", first, "the second", second)
        self.first = first
        self.second = second
        self.memory_budget = check_budget(memory_budget)
        if self.memory_budget is not None and not torch.compiler.is_compiling():
            least = self._least()
            if least > self.memory_budget:
                raise too_small(self.memory_budget, least, "this composition")

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.first.shape[:2], self.second.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def lines(self) -> int:
        """What a row of R sums to."""
        return self.first.problem.lines * self.second.problem.lines

    def __repr__(self) -> str:
        return f"Composition(shape={self.shape}, memory_budget={self.memory_budget})"

    def _budget(self) -> int | None:
        return budget_in_force(self.memory_budget)

    def __matmul__(self, other: Tensor) -> Tensor:
        """R @ x = A (A' x): [batch, K, C] -> [batch, N, C]; two streamed products."""
        if not isinstance(other, Tensor):
            raise TypeError(f"Composition @ wants a tensor, got {type(other).__name__}")
        x = check_operand("x", other, self.shape[0], self.shape[2], self.second.problem.query)
        own = x.dtype != other.dtype
        given = self._given(lambda: self._product_steps("product", x, own=own), "product")
        return self._two_products("product", x, given)

    def transposed_product(self, y: Tensor) -> Tensor:
        """R^T y = A'^T (A^T y): [batch, N, C] -> [batch, K, C]."""
        name = "transposed_product"
        x = check_operand("y", y, self.shape[0], self.shape[1], self.first.problem.query)
        own = x.dtype != y.dtype
        given = self._given(lambda: self._product_steps(name, x, own=own), name)
        return self._two_products(name, x, given)

    def _given(self, steps: Callable[[], list[Step]], what: str) -> Sequence[int | None]:
        """What each step may take."""
        budget = self._budget()
        return (None, None, None) if budget is None else shares(steps(), budget, what)

    def _two_products(self, name: str, x: Tensor, given: Sequence[int | None]) -> Tensor:
        one, other, operand = self._order(name)
        between = one._fields(name, memory_budget=given[0], **{operand: x})[name]
        return other._fields(name, memory_budget=given[1], **{operand: between})[name]

    def _product_steps(self, name: str, x: Tensor, *, own: bool = False) -> list[Step]:
        """Of the two products with x, or with something of its shape.

        ``own``: it is no input of the operation, but made for it.
        """
        one, other, operand = self._order(name)
        size = self.first.problem.itemsize
        between = stand_in(self.first.problem, self.shape[0], self.first.shape[2], x.shape[2])
        held = size * (between.numel() + own * x.numel())
        given: dict[str, Any] = {operand: x}
        then: dict[str, Any] = {operand: between}
        return [one._step(name, held=held, **given), other._step(name, held=held, **then)]

    def _order(self, name: str) -> tuple[AttentionMap, AttentionMap, str]:
        """Which map comes first, and what their operand is called."""
        if name == "product":
            return self.second, self.first, "right"
        return self.first, self.second, "left"

    def diagonal(self) -> Tensor:
        """R_ii = sum_j A_ij A'_ji, tile by tile, R never built: [batch, N]."""
        check_square("diagonal", self.shape)
        of_lse, of_trip, *_ = self._given(self._diagonal_steps, "diagonal")
        out = round_trip_fields(
            self.first,
            self.second,
            ("return_probability",),
            lse=known_lse(self.second, of_lse),
            memory_budget=of_trip,
        )["return_probability"]
        return out.mul_(self.lines) if self.lines > 1 else out

    def _diagonal_steps(self) -> list[Step]:
        held = lse_bytes(self.second)
        partner = with_lse(self.second)
        return [
            self.second._step("lse", held=held) if held else Step(0),
            self.first._step("return_probability", held=held, partner=partner),
        ]

    def to_dense(self) -> Tensor:
        """The whole composition, [batch, N, K]."""
        return self._strips(("dense",))["dense"]

    def rows(self, index: Index) -> Tensor:
        """Some rows of R: [batch, n, K]."""
        return rows_in_portions(
            index,
            self.first.problem,
            self.shape[2],
            step_of=self._rows_step,
            dense=lambda some, budget: self._strips(("dense",), first=some, memory_budget=budget)[
                "dense"
            ],
            budget=self._budget(),
        )

    def _rows_step(self, size: int, count: int) -> Step:
        held = rows_held(self.first.problem, self.shape[2], size, count)
        return self._strips_step(
            ("dense",), held=held, first=self.first.problem.query_rows(0, size)
        )

    def reduce(self, *names: str) -> Reductions:
        """As `AttentionMap.reduce`, on R: entropies and argmaxes of the whole round trip."""
        wanted = check_reductions(names, self.shape, self.second.key_grid)
        if all(name in _STREAMED for name in wanted):
            self._given(lambda: self._reduce_steps(wanted), ", ".join(wanted))
            return Reductions({name: _STREAMED[name](self) for name in wanted})
        return Reductions(self._strips(wanted))

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest entries of each row of R: values and indices, [batch, N, k]."""
        k = check_k(k, self.shape[2])
        fields = self._strips(("topk_values", "topk_indices"), k=k)
        return fields["topk_values"], fields["topk_indices"]

    def plan(
        self,
        *names: str,
        k: int = 1,
        columns: int = 1,
        count: int = 1,
        memory_budget: int | None = None,
        ceilings: Ceilings | None = None,
        backward: bool = False,
    ) -> Plan:
        """What an operation of R will take, before it runs, as `AttentionMap.plan` of a map.

        Args:
            names: what `reduce` would be given; or one of "to_dense", "rows" (``count`` of them),
                "topk" (with ``k``), "product" and "transposed_product" (x with so many
                ``columns``).
            memory_budget: default that of the composition, or else the context's.
            ceilings: rates of the machine (`flashmaps.Ceilings`), for the expected time.
            backward: of the way back to Q and K of both maps, of what needs whole rows of R. What
                streams goes back by products with each map: ask those.
        """
        batch, rows, ends = self.shape
        columns, count = check_count("columns", columns), check_count("count", count)
        asked = self.memory_budget if memory_budget is None else memory_budget
        budget = budget_in_force(asked)
        what = ", ".join(names)
        outputs: int | None = None
        fields: tuple[str, ...] = names
        match names:
            case ("to_dense",):
                fields = ("dense",)
                steps = [self._strips_step(fields)]
            case ("topk",):
                fields = ("topk_values", "topk_indices")
                k = check_k(k, ends)
                steps = [self._strips_step(fields, k=k)]
            case ("product",):
                steps = self._product_steps("product", self._operand(ends, columns))
                outputs = batch * rows * columns * self.first.problem.itemsize
            case ("transposed_product",):
                steps = self._product_steps("transposed_product", self._operand(rows, columns))
                outputs = batch * ends * columns * self.first.problem.itemsize
            case ("rows",):
                size, _ = portion(count, lambda n: self._rows_step(n, count), budget, what)
                steps = [self._rows_step(size, count)] * -(-count // size)
                outputs = batch * count * ends * self.first.problem.itemsize
            case _:
                fields = check_reductions(names, self.shape, self.second.key_grid)
                steps = self._reduce_steps(fields)
        if backward:
            if what in ("product", "transposed_product", "rows") or (
                all(name in _STREAMED for name in fields)
            ):
                raise ValueError(
                    f"backward=True plans the way back of what needs whole rows of R, not of "
                    f"{what!r}: plan the products with each map"
                )
            step, outputs = composed_backward_step(
                self.first.problem, self.second.problem, Request(fields, k=k), self._backends
            )
            what, steps = f"backward of {what}", [step]
        if outputs is None:
            shape = strips.result(self.first.problem, self.second.problem)
            outputs = output_bytes(shape, Request(fields, k=k))
        return plan(
            what,
            " and ".join(dict.fromkeys((self.first.backend, self.second.backend))),
            steps,
            outputs=outputs,
            memory_budget=budget,
            ceilings=ceilings,
        )

    def _operand(self, tokens: int, columns: int) -> Tensor:
        return stand_in(self.first.problem, self.shape[0], tokens, columns)

    def _reduce_steps(self, names: tuple[str, ...]) -> list[Step]:
        if not all(name in _STREAMED for name in names):
            return [self._strips_step(names)]
        batch, rows, ends = self.shape
        steps: list[Step] = []
        for name in names:
            if name == "diagonal":
                steps += self._diagonal_steps()
            elif name == "column_sum":
                ones = self._operand(rows, 1)
                steps += self._product_steps("transposed_product", ones, own=True)
            else:
                at = self._operand(ends, 2)[:1].expand(batch, -1, -1)
                steps += self._product_steps("product", at, own=True)
                steps.append(Step(6 * 8 * ends))  # to make the centres
        return steps

    def _column_sum(self) -> Tensor:
        given = self._given(lambda: self._reduce_steps(("column_sum",)), "column_sum")
        ones = torch.ones((*self.shape[:2], 1), dtype=self.dtype, device=self.first.device)
        return self._two_products("transposed_product", ones, given)[..., 0]

    def _expectation(self) -> Tensor:
        grid = self.second.key_grid
        assert grid is not None
        given = self._given(lambda: self._reduce_steps(("expectation",)), "expectation")
        at = centres(grid, dtype=self.dtype, device=self.first.device)
        x = check_operand("x", at, self.shape[0], self.shape[2], at)
        return self._two_products("product", x, given).div_(self.lines)

    # What needs whole rows of R is one operator.

    def _strips(
        self,
        names: tuple[str, ...],
        k: int = 0,
        *,
        first: Problem | None = None,
        memory_budget: int | None = None,
    ) -> dict[str, Tensor]:
        budget = self._budget() if memory_budget is None else memory_budget
        return ops.compose(
            self.first.problem if first is None else first,
            self.second.problem,
            Request(names, k=k, memory_budget=budget),
            self._backends,
        )

    @property
    def _backends(self) -> tuple[str, str]:
        return self.first.backend, self.second.backend

    def _strips_step(
        self, names: tuple[str, ...], k: int = 0, held: int = 0, first: Problem | None = None
    ) -> Step:
        one = self.first.problem if first is None else first

        def cost(budget: int | None) -> Cost:
            request = Request(names, k=k, memory_budget=budget)
            return strips.plan(one, self.second.problem, request, self._backends)

        return Step(held, cost)

    def _least(self) -> int:
        """The smallest budget that any reduction, topk and one of the rows can do with."""
        _, rows, ends = self.shape
        possible = [
            name
            for name in REDUCTIONS
            if (name != "diagonal" or rows == ends)
            and (name != "expectation" or self.second.key_grid is not None)
        ]
        steps = [
            self._strips_step(tuple(possible)),
            self._strips_step(("topk_values", "topk_indices"), k=ends),
            self._rows_step(1, rows),
        ]
        for name in _STREAMED:
            if name in possible:
                steps += self._reduce_steps((name,))
        return max(step.least() for step in steps)


_STREAMED: dict[str, Callable[[Composition], Tensor]] = {
    "diagonal": Composition.diagonal,
    "column_sum": Composition._column_sum,
    "expectation": Composition._expectation,
}
