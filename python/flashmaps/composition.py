"""R = A_st A_ts, the round trip, lazy: products stream, row statistics come strip by strip."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashmaps import ops
from flashmaps._problem import Problem, Request, empty_outputs
from flashmaps._validation import check_k, check_operand, need_grid
from flashmaps.attention_map import AttentionMap, Lazy, Reductions, check_reductions, row_index
from flashmaps.grids import centres
from flashmaps.reducers import Reduction

DEFAULT_MEMORY_BUDGET = 64 * 2**20

# Bytes of temporaries that the torch reducers of reducers.py take for one float of a row: masks and
# int64 indices of argmax, the sort of top-k.
_REDUCER_BYTES = 48


def compose(
    first: AttentionMap, second: AttentionMap, *, memory_budget: int | None = None
) -> Composition:
    """The lazy product of two maps: `Composition`."""
    return Composition(first, second, memory_budget=memory_budget)


class Composition(Lazy):
    """R = A @ A', rows of which are distributions over where the round trip may end.

    Args:
        first: A, [batch, N, M]. second: A', [batch, M, K].
        memory_budget: bytes beyond inputs and outputs for what needs whole rows of R (entropy, max,
            argmax, columns, top-k); default 64 MiB. They are computed a strip of rows at a time,
            and A' is streamed once for each strip: a larger budget means fewer passes. The
            backend's own workspace comes on top: a few MB on "cpu", up to 64 MiB on
            "reference".

    ``@``, ``diagonal``, ``column_sum`` and ``expectation`` need no rows of R and stream.

    Raises:
        ValueError: shapes that do not chain; a budget too small for one row (the message says the
            smallest that works).
    """

    def __init__(
        self, first: AttentionMap, second: AttentionMap, *, memory_budget: int | None = None
    ) -> None:
        if not isinstance(first, AttentionMap) or not isinstance(second, AttentionMap):
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
        self.memory_budget = DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget
        self._check_budget()

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

    def __matmul__(self, other: Tensor) -> Tensor:
        """R @ x = A (A' x): [batch, K, C] -> [batch, N, C]; two streamed products."""
        if not isinstance(other, Tensor):
            raise TypeError(f"Composition @ wants a tensor, got {type(other).__name__}")
        # By name: while torch.compile traces one ``@`` of a lazy map it takes no other.
        return self.first.__matmul__(self.second.__matmul__(other))

    def transposed_product(self, y: Tensor) -> Tensor:
        """R^T y = A'^T (A^T y): [batch, N, C] -> [batch, K, C]."""
        return self.second.mT @ (self.first.mT @ y)

    def diagonal(self) -> Tensor:
        """R_ii = sum_j A_ij A'_ji, tile by tile, R never built: [batch, N]."""
        self._check_square("diagonal")
        fields = round_trip_fields(self.first, self.second, ("return_probability",))
        return fields["return_probability"] * self.lines

    def to_dense(self) -> Tensor:
        """The whole composition, [batch, N, K]."""
        return self._strips(("dense",))["dense"]

    def rows(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """Some rows of R: [batch, n, K]."""
        picked = row_index(index, self.shape[1], self.first.device)
        rows = self.first.rows(picked)  # [batch, n, M]
        out = rows.new_empty((*rows.shape[:2], self.shape[2]))
        block = self._plan()[1]
        for one in range(self.shape[0]):
            self._times_second(rows[one], _one_map(self.second.problem, one), block, out[one])
        return out

    def reduce(self, *names: str) -> Reductions:
        """As `AttentionMap.reduce`, on R: entropies and argmaxes of the whole round trip."""
        wanted = check_reductions(names)
        if "expectation" in wanted:
            need_grid("key_grid", self.second.key_grid, self.shape[2], "expectation")
        if "diagonal" in wanted:
            self._check_square("diagonal")
        streamed: dict[str, Callable[[], Tensor]] = {
            "diagonal": self.diagonal,
            "column_sum": self._column_sum,
            "expectation": self._expectation,
        }
        if all(name in streamed for name in wanted):
            return Reductions({name: streamed[name]() for name in wanted})
        return Reductions(self._strips(wanted))

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest entries of each row of R: values and indices, [batch, N, k]."""
        k = check_k(k, self.shape[2])
        fields = self._strips(("topk_values", "topk_indices"), k=k)
        return fields["topk_values"], fields["topk_indices"]

    def _check_square(self, what: str) -> None:
        if self.shape[1] != self.shape[2]:
            raise ValueError(
                f"{what} needs a square map, this one is {self.shape[1]} x {self.shape[2]}"
            )

    def _column_sum(self) -> Tensor:
        ones = torch.ones((*self.shape[:2], 1), dtype=self.dtype, device=self.first.device)
        return self.transposed_product(ones)[..., 0]

    def _key_centres(self) -> Tensor | None:
        if self.second.key_grid is None:
            return None
        return centres(self.second.key_grid, dtype=self.dtype, device=self.first.device)

    def _expectation(self) -> Tensor:
        at = self._key_centres()
        assert at is not None
        return (self @ check_operand("x", at, self.shape[0], self.shape[2], at)) / self.lines

    # How much of R to hold at once. A strip of S rows keeps S x M of A and S x K of R beside a
    # block of B rows of A' (B x K) and the reducers' temporaries for a few rows.

    def _bytes(self, strip: int, block: int) -> int:
        itemsize = 8 if self.dtype == torch.float64 else 4
        _, _, keys = self.first.shape
        ends = self.shape[2]
        held = strip * (keys + ends) + block * ends
        return held * itemsize + _reducer_rows(strip, ends) * ends * _REDUCER_BYTES

    def _check_budget(self) -> None:
        smallest = self._bytes(1, 1)
        if not isinstance(self.memory_budget, int):
            raise TypeError(
                f"memory_budget must be a whole number of bytes, such as 64 * 2**20, got "
                f"{self.memory_budget!r}"
            )
        if self.memory_budget < smallest:
            raise ValueError(
                f"memory_budget = {self.memory_budget} bytes is too small for one row of this "
                f"composition: the smallest that works is {smallest}"
            )

    def _plan(self) -> tuple[int, int]:
        """(S, B): the largest strip that fits beside a block of at least a sixteenth of it."""
        rows = self.shape[1]
        keys = self.first.shape[2]
        low, high = 1, rows
        while low < high:
            strip = (low + high + 1) // 2
            if self._bytes(strip, min(keys, -(-strip // 16))) <= self.memory_budget:
                low = strip
            else:
                high = strip - 1
        block = min(keys, max(1, -(-low // 16)))
        while block < min(keys, 512) and self._bytes(low, 2 * block) <= self.memory_budget:
            block = min(keys, 2 * block)
        return low, block

    def _times_second(self, rows: Tensor, second: Problem, block: int, out: Tensor) -> None:
        """out = rows @ A', streaming A' a block of rows at a time: [S, M] -> [S, K]."""
        dense = Request(("dense",))
        out.zero_()
        for start in range(0, second.num_queries, block):
            stop = min(start + block, second.num_queries)
            part = ops.reduce(second.query_rows(start, stop), dense, self.second.backend)
            out.addmm_(rows[:, start:stop], part["dense"][0])

    def _strips(self, names: tuple[str, ...], k: int = 0) -> dict[str, Tensor]:
        """Fields of R by `flashmaps.reducers`, one map and one strip of rows at a time."""
        batch, rows, ends = self.shape
        request = Request(names, k=k)
        # R has the queries of A and the keys of A'; only its shape matters to the outputs.
        shape_of_r = self.first.problem._replace(
            key=self.second.problem.key, pairs=_all_pairs(self.first.problem)
        )
        reduction = Reduction(empty_outputs(shape_of_r, request), request)
        strip, block = self._plan()
        step = _reducer_rows(strip, ends)
        held = torch.empty((strip, ends), dtype=self.dtype, device=self.first.device)
        for one in range(batch):
            first = _one_map(self.first.problem, one)
            second = _one_map(self.second.problem, one)
            for start in range(0, rows, strip):
                stop = min(start + strip, rows)
                dense = ops.reduce(
                    first.query_rows(start, stop), Request(("dense",)), self.first.backend
                )["dense"][0]
                values = held[: stop - start]
                self._times_second(dense, second, block, values)
                for low in range(0, stop - start, step):
                    reduction.update(
                        values[None, low : low + step],
                        start + low,
                        maps=slice(one, one + 1),
                        lines=self.lines,
                        key_centres=self._key_centres(),
                    )
                del dense  # before the next one is made: the budget holds one
        return reduction.finish()


def _reducer_rows(strip: int, ends: int) -> int:
    """Rows reduced at once: their temporaries stay near 8 MB, and never exceed a strip."""
    return max(1, min(strip, 2**23 // (ends * _REDUCER_BYTES)))


def _all_pairs(problem: Problem) -> Tensor:
    if problem.pairs is not None:
        return problem.pairs
    index = torch.arange(problem.batch, device=problem.query.device)
    return torch.stack((index, index), dim=1)


def _one_map(problem: Problem, index: int) -> Problem:
    """Map ``index`` of a batch as a batch of one (views)."""
    lse = None if problem.lse is None else problem.lse[index : index + 1]
    return problem._replace(pairs=_all_pairs(problem)[index : index + 1], lse=lse)


def check_alike(name: str, first: AttentionMap, other: str, second: AttentionMap) -> None:
    """ValueError unless two maps that meet have one dtype and one device."""
    if first.dtype != second.dtype or first.device != second.device:
        raise ValueError(
            f"{name} is {first.dtype} on {first.device}, {other} is {second.dtype} on "
            f"{second.device}: make them alike"
        )


def round_trip_fields(
    first: AttentionMap,
    second: AttentionMap,
    names: tuple[str, ...],
    *,
    right: Tensor | None = None,
    lse: Tensor | None = None,
) -> dict[str, Tensor]:
    """One pass over ``first`` with the map back at hand, for "return_probability" among ``names``.

    ``lse`` is the second map's, if it is known; else it is computed first.
    """
    partner = second.problem._replace(lse=second.lse if lse is None else lse)
    return ops.reduce(first.problem, Request(names, right=right, partner=partner), first.backend)
