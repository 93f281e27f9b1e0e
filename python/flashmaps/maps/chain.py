"""A_1 A_2 ... A_k, lazy: products stream from right to left, rows come strip by strip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmaps.maps.backends.reducers import Reduction, row_entropy
from flashmaps.maps.budget import budget_in_force, check_budget, too_small
from flashmaps.maps.budget import memory_budget as memory_budget_of
from flashmaps.maps.composition import Composition
from flashmaps.maps.grids import centres
from flashmaps.maps.lazy import (
    Lazy,
    LazyMap,
    Reductions,
    check_alike,
    check_reductions,
    check_square,
    stand_in,
)
from flashmaps.maps.planning import Ceilings, Plan, Step, plan, shares
from flashmaps.maps.problem import Cost, Request, empty_outputs, output_bytes
from flashmaps.maps.rows import Index, map_rows, row_index, rows_step
from flashmaps.maps.strips import DEFAULT_MEMORY_BUDGET, result
from flashmaps.maps.validation import check_count, check_k, check_operand


def chain(*maps: LazyMap, memory_budget: int | None = None) -> Chain | Composition:
    """The lazy product A_1 A_2 ... A_k of k >= 2 maps, each one's keys the next one's queries.

    Two maps make a `Composition`, more a `Chain`, which has the same face.
    """
    if len(maps) == 2:
        first, second = maps
        return Composition(first, second, memory_budget=memory_budget)  # type: ignore[arg-type]
    return Chain(*maps, memory_budget=memory_budget)


class Hops(NamedTuple):
    """A chain hop by hop, [k, batch, N] each.

    Attributes:
        hard: where the most likely steps lead: f_m(... f_1(i)), f_m(j) = argmax of row j of A_m.
        entropy: of row i of A_1 ... A_m, nats: how much every hop blurs.
    """

    hard: Tensor
    entropy: Tensor


class Chain(Lazy):
    """R = A_1 A_2 ... A_k, rows of which say where k soft steps lead.

    Args:
        maps: A_m of [batch, N_m, N_{m+1}], two or more.
        memory_budget: bytes for strips of rows and their temporaries, beyond inputs and outputs;
            default what `flashmaps.memory_budget` says when it runs, else 64 MiB. Each map is
            streamed once for each strip. The passes of the maps get a quarter of it.

    ``@``, ``transposed_product``, ``column_sum`` and ``expectation`` take no rows of R: they are k
    streamed products, from right to left or from left to right, whose operands between two maps
    are [batch, N_m, C].

    Everything is differentiable; gradients of what needs whole rows of R keep the rows of every
    strip, [batch, N_1, N_m] of each map in all, which no budget bounds. torch.compile makes one
    graph of products; whole rows break the graph (``fullgraph=True`` is refused by torch).

    Raises:
        TypeError: for what is no map. ValueError: shapes that do not chain, other dtypes or
            devices; at an operation, a memory_budget too small for one row.
    """

    def __init__(self, *maps: LazyMap, memory_budget: int | None = None) -> None:
        if len(maps) < 2:
            raise ValueError(f"a chain takes at least 2 maps, got {len(maps)}")
        for number, A in enumerate(maps):
            if not isinstance(A, LazyMap):
                raise TypeError(f"map {number} of the chain is a {type(A).__name__}, no map")
        for number, (A, B) in enumerate(pairwise(maps)):
            if A.shape[0] != B.shape[0] or A.shape[2] != B.shape[1]:
                raise ValueError(
                    f"maps {number} and {number + 1} of shape {A.shape} and {B.shape} do not "
                    "chain: the first one's keys must be the second one's queries, in equal "
                    "batches"
                )
            check_alike(f"map {number}", A, f"map {number + 1}", B)
        self.maps = maps
        self.memory_budget = check_budget(memory_budget)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, N_1, N_{k+1})."""
        return (*self.maps[0].shape[:2], self.maps[-1].shape[2])

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""
        return self.maps[0].dtype

    @property
    def lines(self) -> int:
        """What a row of R sums to."""
        return self.partial_lines(len(self.maps))

    def partial_lines(self, hops: int) -> int:
        """What a row of the first ``hops`` maps' product sums to."""
        total = 1
        for A in self.maps[:hops]:
            total *= A.problem.lines
        return total

    def __repr__(self) -> str:
        return f"Chain({len(self.maps)} maps, shape={self.shape})"

    # -- products ----------------------------------------------------------------------------------

    def __matmul__(self, other: Tensor) -> Tensor:
        """R @ x = A_1 (... (A_k x)): [batch, N_{k+1}, C] -> [batch, N_1, C]."""
        if not isinstance(other, Tensor):
            raise TypeError(f"Chain @ wants a tensor, got {type(other).__name__}")
        x = check_operand("x", other, self.shape[0], self.shape[2], self.maps[-1].problem.query)
        return self._walk("product", x)

    def transposed_product(self, y: Tensor) -> Tensor:
        """R^T y = A_k^T (... (A_1^T y)): [batch, N_1, C] -> [batch, N_{k+1}, C]."""
        y = check_operand("y", y, self.shape[0], self.shape[1], self.maps[0].problem.query)
        return self._walk("transposed_product", y)

    def _walk(self, name: str, operand: Tensor, own: int = 0) -> Tensor:
        """The k products of a tensor, each beside what lies between two maps."""
        budget = budget_in_force(self.memory_budget)
        steps = self._walk_steps(name, operand.shape[2], own)
        for A, given in zip(self._walked(name), shares(steps, budget, name), strict=True):
            side = "right" if name == "product" else "left"
            operand = A._fields(name, memory_budget=given, **{side: operand})[name]
        return operand

    def _walked(self, name: str) -> tuple[LazyMap, ...]:
        """The maps in the order in which a tensor meets them."""
        return self.maps[::-1] if name == "product" else self.maps

    def _walk_steps(self, name: str, columns: int, own: int = 0) -> list[Step]:
        """``own``: bytes of an operand that the operation has made itself."""
        steps, batch, size = [], self.shape[0], self.maps[0].problem.itemsize
        for place, A in enumerate(self._walked(name)):
            ins, outs = A.shape[1:][::-1] if name == "product" else A.shape[1:]
            before = batch * ins * columns * size if place else 0
            after = batch * outs * columns * size if place + 1 < len(self.maps) else 0
            side = "right" if name == "product" else "left"
            operand: dict[str, Any] = {side: stand_in(A.problem, batch, ins, columns)}
            steps.append(A._step(name, held=own + before + after, **operand))
        return steps

    @staticmethod
    def _onwards(y: Tensor, maps: tuple[LazyMap, ...], budget: int | None) -> Tensor:
        for A in maps:
            fields = A._fields("transposed_product", left=y, memory_budget=budget)
            y = fields["transposed_product"]
        return y

    def _left(self) -> int | None:
        """Of the context's or the chain's budget, what a pass of one map gets."""
        budget = budget_in_force(self.memory_budget)
        return None if budget is None else max(1, budget)

    # -- rows --------------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """The whole chain, [batch, N_1, N_{k+1}]."""
        return self.rows(slice(None))

    def rows(self, index: Index) -> Tensor:
        """Some rows of R: [batch, n, N_{k+1}]."""
        picked = row_index(index, self.shape[1], self.maps[0].device)
        out = torch.empty(
            (self.shape[0], len(picked), self.shape[2]), dtype=self.dtype, device=picked.device
        )
        for start, strip in self._strips(picked, ("dense",)):
            out[:, start : start + strip.shape[1]] = strip
        return out

    def reduce(self, *names: str) -> Reductions:
        """As `AttentionMap.reduce`, on R."""
        wanted = check_reductions(names, self.shape, self.maps[-1].key_grid)
        streamed = {name: self._streamed(name) for name in wanted if name in _STREAMED}
        others = tuple(name for name in wanted if name not in streamed)
        fields = self._reduced(others, 0) if others else {}
        return Reductions({name: {**fields, **streamed}[name] for name in wanted})

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest entries of each row of R: values and indices, [batch, N_1, k]."""
        k = check_k(k, self.shape[2])
        fields = self._reduced(("topk_values", "topk_indices"), k)
        return fields["topk_values"], fields["topk_indices"]

    def diagonal(self) -> Tensor:
        """R_ii, of a closed chain: [batch, N_1]."""
        check_square("diagonal", self.shape)
        return self._reduced(("diagonal",), 0)["diagonal"]

    def hops(self) -> Hops:
        """Hop by hop: where the most likely steps lead, and how much the soft ones have blurred."""
        batch, rows, _ = self.shape
        hard: list[Tensor] = []
        for A in self.maps:
            best = A._fields("argmax", memory_budget=self._left())["argmax"]
            hard.append(best if not hard else best.gather(1, hard[-1]))
        entropy = torch.empty(
            (len(self.maps), batch, rows), dtype=self.dtype, device=hard[0].device
        )
        every = torch.arange(rows, device=hard[0].device)
        _, budget = self._split(("entropy",))
        for start, strip in self._strips(every, ("entropy",), hops=1):
            x, stop = strip, start + strip.shape[1]
            entropy[0, :, start:stop] = row_entropy(x / self.partial_lines(1))
            for hop, A in enumerate(self.maps[1:], 1):
                x = self._onwards(x.mT.contiguous(), (A,), budget).mT
                entropy[hop, :, start:stop] = row_entropy(x / self.partial_lines(hop + 1))
        return Hops(torch.stack(hard), entropy)

    # -- plans -------------------------------------------------------------------------------------

    def plan(
        self,
        *names: str,
        k: int = 1,
        columns: int = 1,
        count: int = 1,
        memory_budget: int | None = None,
        ceilings: Ceilings | None = None,
    ) -> Plan:
        """What an operation of R will take, before it runs.

        Args:
            names: what `reduce` would be given; or one of "to_dense", "rows" (``count`` of them),
                "topk" (with ``k``), "product" and "transposed_product" (x with so many
                ``columns``).
            memory_budget: default that of the chain, or else the context's.
            ceilings: rates of the machine (`flashmaps.Ceilings`), for the expected time.
        """
        asked = self.memory_budget if memory_budget is None else memory_budget
        one = Chain(*self.maps, memory_budget=asked)
        batch, rows, ends = self.shape
        size = self.maps[0].problem.itemsize
        columns, count = check_count("columns", columns), check_count("count", count)
        match names:
            case ("product",) | ("transposed_product",):
                steps = one._walk_steps(names[0], columns)
                outputs = batch * (rows if names[0] == "product" else ends) * columns * size
            case ("to_dense",) | ("rows",):
                count = rows if names == ("to_dense",) else count
                steps, outputs = [one._strips_step(("dense",), count)], batch * count * ends * size
            case _:
                topk = names == ("topk",)
                fields = (
                    ("topk_values", "topk_indices")
                    if topk
                    else check_reductions(names, self.shape, self.maps[-1].key_grid)
                )
                k = check_k(k, ends) if topk else k
                steps = one._reduce_steps(fields)
                shape = result(self.maps[0].problem, self.maps[-1].problem)
                outputs = output_bytes(shape, Request(tuple(fields), k=k))
        return plan(
            ", ".join(names),
            " and ".join(dict.fromkeys(A.backend for A in self.maps)),
            steps,
            outputs=outputs,
            memory_budget=budget_in_force(asked),
            ceilings=ceilings,
        )

    def _reduce_steps(self, names: tuple[str, ...]) -> list[Step]:
        steps: list[Step] = []
        for name in names:
            if name == "column_sum":
                steps += self._walk_steps("transposed_product", 1, self._own(name))
            elif name == "expectation":
                steps += self._walk_steps("product", 2, self._own(name))
        others = tuple(name for name in names if name not in _STREAMED)
        return [*steps, self._strips_step(others, self.shape[1])] if others else steps

    def _strips_step(self, names: tuple[str, ...], count: int) -> Step:
        """All strips of ``count`` rows, one after the other."""
        size, given = self._split(names)
        size = min(size, count)
        strips = -(-count // size)

        def cost(_: int | None) -> Cost:
            first, *others = self.maps
            steps = [rows_step(first, size, size)]
            for A in others:
                left = stand_in(A.problem, A.shape[0], A.shape[1], size)
                steps.append(A._step("transposed_product", left=left))
            total = Cost()
            for step in steps:
                total = total.then(step.within(given))
            return replace(total.times(count / size), passes=total.passes * strips)

        return Step(size * self._row_bytes(names), cost)

    # -- inside ------------------------------------------------------------------------------------

    def _streamed(self, name: str) -> Tensor:
        like = self.maps[0]
        if name == "column_sum":
            ones = torch.ones((*self.shape[:2], 1), dtype=self.dtype, device=like.device)
            return self._walk("transposed_product", ones, self._own(name))[..., 0]
        grid = self.maps[-1].key_grid
        assert grid is not None  # check_reductions
        at = centres(grid, dtype=self.dtype, device=like.device)
        x = at.expand(self.shape[0], -1, -1)
        return self._walk("product", x, self._own(name)).div_(self.lines)

    def _own(self, name: str) -> int:
        """Bytes of the operand that a streamed reduction makes, and of what makes it."""
        batch, rows, ends = self.shape
        size = self.maps[0].problem.itemsize
        return batch * rows * size if name == "column_sum" else 2 * ends * (batch * size + 24)

    def _reduced(self, names: tuple[str, ...], k: int) -> dict[str, Tensor]:
        first, last = self.maps[0].problem, self.maps[-1].problem
        request = Request(names, k=k)
        reduction = Reduction(empty_outputs(result(first, last), request), request)
        grid = self.maps[-1].key_grid
        at = None if grid is None else centres(grid, dtype=self.dtype, device=first.query.device)
        every = torch.arange(self.shape[1], device=first.query.device)
        for start, strip in self._strips(every, names):
            reduction.update(strip, start, lines=self.lines, key_centres=at)
        return reduction.finish()

    def _strips(
        self, picked: Tensor, names: tuple[str, ...], hops: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(start, rows) of the product of the first ``hops`` maps, default all of them."""
        rows, budget = self._split(names)
        maps = self.maps[:hops]
        for start in range(0, len(picked), rows):
            with memory_budget_of(budget) if budget is not None else nullcontext():
                x = map_rows(maps[0], picked[start : start + rows])
            if len(maps) > 1:
                x = self._onwards(x.mT.contiguous(), maps[1:], budget).mT
            yield start, x

    def _split(self, names: tuple[str, ...]) -> tuple[int, int | None]:
        """Rows of a strip, and what each pass of a map may take beside them.

        Of one row there are an operand, its product and their turned copies at the widest map, and
        the reducers' temporaries. A pass gets a quarter of the budget, or the least that it needs.
        """
        asked = budget_in_force(self.memory_budget)
        budget = DEFAULT_MEMORY_BUDGET if asked is None else asked
        rows, row = self.shape[1], self._row_bytes(names)
        rows = min(rows, max(1, budget // row))
        while True:
            one = max(budget // 4, self._least(rows))
            if rows * row + one <= budget:
                return rows, None if asked is None else one
            if rows == 1:
                raise too_small(budget, row + self._least(1), ", ".join(names))
            rows = (rows + 1) // 2

    def _row_bytes(self, names: tuple[str, ...]) -> int:
        """Of one row of a strip."""
        batch, _, ends = self.shape
        widest = max(A.shape[2] for A in self.maps)
        size = self.maps[0].problem.itemsize
        return batch * (3 * widest * size + ends * (2 * size + 9) * bool(names))

    def _least(self, rows: int) -> int:
        """What the passes of a strip of so many rows take at the least."""
        first, *others = self.maps
        steps = [rows_step(first, rows, rows)]
        for A in others:
            left = stand_in(A.problem, A.shape[0], A.shape[1], rows)
            steps.append(A._step("transposed_product", left=left))
        return max(step.least() for step in steps)


_STREAMED = ("column_sum", "expectation")
