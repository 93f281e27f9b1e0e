"""The lazy head-averaged attention map: Q, K and what can be asked of softmax(Q K^T) unbuilt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from flashmaps.arguments import number, switch
from flashmaps.maps.backends.choice import select
from flashmaps.maps.budget import budget_in_force
from flashmaps.maps.composition import Composition
from flashmaps.maps.grids import Grid
from flashmaps.maps.heads import reduce_heads
from flashmaps.maps.lazy import (
    Lazy,
    LazyMap,
    Reductions,
    check_reductions,
    joined_lse,
    lse_with_graph,
)
from flashmaps.maps.map_plans import plan_map
from flashmaps.maps.operators import wants_gradients
from flashmaps.maps.planning import Ceilings, Plan, shares
from flashmaps.maps.pooling import reduce_and_pool
from flashmaps.maps.problem import Problem
from flashmaps.maps.rows import Index, map_rows
from flashmaps.maps.validation import check_k, check_operand, make_problem


class AttentionMap(LazyMap):
    """A = sum_h w_h softmax(scale * Q_h K_h^T + mask), N x M, never built (note eq. 2.1, 2.2).

    Args:
        query: [B, H, N, d], float64, float32, float16 or bfloat16, any strides.
        key: [B', H, M, d], same dtype and device. Fewer heads, a divisor of H, are each shared by
            as many query heads, one after another (grouped queries; one head for all: multi-query).
            Backend "cpu" reads them as they are; others get copies, but of a single head.
        scale: multiplies Q K^T; default 1 / sqrt(d).
        key_mask: [B', M] or [M]; bool (True may be attended, as in SDPA) or a float that is added
            to the scaled scores. Or bool [B', N, M] where it differs between queries (causal,
            windowed, padded by query): on backend "reference" alone, without gradients; a query
            that may attend to nothing has a row of zeros.
        head_weights: [H], >= 0, summing to 1; default 1 / H.
        pairs: [P, 2] integers (query batch index, key batch index); default i with i. All pairs of
            n images cost the memory of n images.
        normalize: note eq. 2.3, reading each row as a g_h x g_w map: None or "block" (the whole map
            sums to 1), "columns" (each of its columns does), "rows" (each of its rows does). See
            docs/maths.md.
        query_grid, key_grid: (height, width) of the tokens, row-major; default the square.
        lse: [batch, H, N] per-head log-sum-exp in natural log, if attention already returned it:
            it saves a pass where rows do not fit the cache.
        backend: "auto", "cpu" or "reference" (see `flashmaps.maps.backends.choice`).

    Half precision is accumulated, and all results are returned, in float32; float64 stays float64.

    Raises:
        TypeError, ValueError, IndexError: bad input, named. RuntimeError: the backend asked for
            cannot run.

    >>> import torch, flashmaps as fm
    >>> A = fm.AttentionMap(torch.randn(1, 5, 64, 16), torch.randn(1, 5, 64, 16))
    >>> A.shape, A.entropy().shape
    ((1, 64, 64), torch.Size([1, 64]))
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        head_weights: Tensor | Sequence[float] | None = None,
        pairs: Tensor | Sequence[Sequence[int]] | None = None,
        normalize: str | None = None,
        query_grid: Grid | None = None,
        key_grid: Grid | None = None,
        lse: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        problem, self.query_grid, self.key_grid, self._lse_offset = make_problem(
            query,
            key,
            scale=scale,
            key_mask=key_mask,
            head_weights=head_weights,
            pairs=pairs,
            normalize=normalize,
            query_grid=query_grid,
            key_grid=key_grid,
            lse=lse,
        )
        self.backend = select(backend, problem)
        # Keys shared by groups of query heads: the C++ kernels read them where they are.
        grows = wants_gradients(query, key, problem.bias, problem.head_weights, problem.lse)
        if problem.key_group > 1 and (self.backend != "cpu" or grows):
            problem = problem._replace(key=_for_every_head(problem))
        self._take(problem)

    @classmethod
    def average(
        cls, maps: Sequence[AttentionMap], weights: Sequence[float] | None = None
    ) -> AttentionMap:
        """The weighted mean of maps over layers or timesteps, as one lazy map with all their heads.

        Concatenates heads (O(N d) memory). Head dimensions and scales may differ; N, M, batch,
        pairs, masks, normalisation and dtype may not, and the first map's are used. Under
        normalize="rows"/"columns" the mean is normalised, not each map. Half-precision maps whose
        scales differ are kept in float32.
        """
        if isinstance(maps, AttentionMap):
            raise TypeError(
                "average() takes a sequence of AttentionMaps, got one: put it in a list"
            )
        if not maps:
            raise ValueError("average() needs at least one map")
        if weights is None:
            weights = [1.0 / len(maps)] * len(maps)
        if not isinstance(weights, Tensor):
            weights = [number(f"weights[{index}]", each) for index, each in enumerate(weights)]
        if len(weights) != len(maps):
            raise ValueError(f"weights has {len(weights)} entries for {len(maps)} maps")
        if not math.isclose(sum(weights), 1.0, rel_tol=1e-4) or min(weights) < 0:
            raise ValueError(f"weights must be >= 0 and sum to 1, got {list(weights)}")
        first = maps[0]
        for index, other in enumerate(maps):
            if not isinstance(other, AttentionMap):
                raise TypeError(
                    f"maps[{index}] must be an AttentionMap, got {type(other).__name__}"
                )
            if (other.shape, other.dtype, other.problem.normalize) != (
                first.shape,
                first.dtype,
                first.problem.normalize,
            ):
                raise ValueError(
                    f"maps[{index}] is {other}, but maps[0] is {first}: only maps of one shape, "
                    f"dtype and normalisation average"
                )
            if first.problem.normalize != "block" and other.key_grid != first.key_grid:
                raise ValueError(
                    f"maps[{index}] has key_grid {other.key_grid}, but maps[0] has "
                    f"{first.key_grid}: their normalised lines are not the same keys"
                )
            for name in ("bias", "pairs"):
                mine, theirs = getattr(first.problem, name), getattr(other.problem, name)
                if (mine is None) != (theirs is None) or (
                    mine is not None and not torch.equal(mine, theirs)
                ):
                    what = "key_mask" if name == "bias" else name
                    raise ValueError(f"maps[{index}] has another {what} than maps[0]")
            if not _same_offset(first._lse_offset, other._lse_offset):
                raise ValueError(f"maps[{index}] has another key_mask than maps[0]")
        width = max(m.problem.query.shape[3] for m in maps)
        scale, dtype = first.problem.scale, first.problem.query.dtype
        # One scale for all heads: where they differ, queries take them up, in the compute dtype:
        # rounding that to half precision would cost percents of the map.
        alike = all((m.problem.scale, m.problem.query.dtype) == (scale, dtype) for m in maps)
        if not alike:
            scale, dtype = 1.0, first.dtype
        queries, keys, heads = [], [], []
        for one, weight in zip(maps, weights, strict=True):
            problem = one.problem
            pad = (0, width - problem.query.shape[3])
            query, key = problem.query.to(dtype), _for_every_head(problem).to(dtype)
            if not alike:
                query = query * problem.scale
            queries.append(torch.nn.functional.pad(query, pad))
            keys.append(torch.nn.functional.pad(key, pad))
            each = problem.head_weights
            if each is None:
                each = torch.full(
                    (problem.heads,), 1.0 / problem.heads, dtype=problem.compute_dtype
                ).to(problem.query.device)
            heads.append(weight * each)
        # A log-sum-exp that was given may be that of more keys than these (a block of a joint map).
        given = any(m.problem.lse is not None for m in maps)
        made = cls(
            torch.cat(queries, 1),
            torch.cat(keys, 1),
            scale=scale,
            key_mask=first.problem.bias,
            head_weights=torch.cat(heads),
            pairs=first.problem.pairs,
            normalize=first.problem.normalize,
            query_grid=first.query_grid,
            key_grid=first.key_grid,
            lse=joined_lse(maps) if given else None,
            backend=first.backend,
        )
        made._lse_offset = first._lse_offset
        return made

    @property
    def lse(self) -> Tensor:
        """log sum_j exp(scale * q_i k_j + mask_j) of every head, natural log: [batch, H, N].

        Kept until Q or K is changed in place (by torch, in a way that it counts: not through
        ``.data`` or numpy, and in inference mode nothing is kept).
        """
        lse = lse_with_graph(self)
        return lse if self._lse_offset is None else lse + self._lse_offset

    @property
    def mT(self) -> TransposedMap:
        """A transposed, lazy: ``A.mT @ y``."""
        return TransposedMap(self)

    def __repr__(self) -> str:
        return (
            f"AttentionMap(shape={self.shape}, heads={self.problem.heads}, "
            f"normalize={self.problem.normalize!r}, dtype={self.dtype}, backend={self.backend!r})"
        )

    def _product(self, name: str, operand: str, given: Tensor, x: Tensor) -> Tensor:
        """A product with x; what was ``given`` may have had to be converted to that."""
        converted = x.numel() * x.element_size() if given.dtype != x.dtype else 0
        operands: dict[str, Any] = {operand: x}
        step = self._step(name, held=converted, **operands)
        (budget,) = shares([step], budget_in_force(None), name)
        return self._fields(name, memory_budget=budget, **operands)[name]

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: AttentionMap) -> Composition: ...
    def __matmul__(self, other: Tensor | AttentionMap) -> Tensor | Composition:
        """A @ x: [batch, M, C] -> [batch, N, C]; or A @ A', the lazy `Composition`.

        In one graph of torch.compile, write fm.compose(A, A'): it cannot trace ``@`` of two maps.
        """
        if isinstance(other, AttentionMap):
            return Composition(self, other)
        right = check_operand("x", other, self.shape[0], self.shape[2], self.problem.query)
        return self._product("product", "right", other, right)

    def to_dense(self) -> Tensor:
        """The whole map, [batch, N, M]: 67 MB for one map of 4096 x 4096 in float32."""
        return self._fields("dense")["dense"]

    def rows(self, index: Index) -> Tensor:
        """Some rows of the map: [batch, n, M] (n = 1 for an int).

        Their queries are copied; under a memory budget, as many at a time as fit.
        """
        return map_rows(self, index)

    def reduce(
        self, *names: str, per_head: bool = False, memory_budget: int | None = None
    ) -> Reductions:
        """Any subset of the reductions in one pass over the map.

        With p = A[i] (divided by its number of lines under normalize="rows"/"columns", so that it
        is a distribution, for entropy and expectation):

        - "entropy": -sum_j p_j log p_j, nats, 0 log 0 = 0: [batch, N]
        - "max", "argmax": of the row, the lowest index among ties: [batch, N]
        - "expectation": sum_j p_j C_j, C the cell centres of the key grid as (x, y): [batch, N, 2]
        - "diagonal": A[i, i], for square maps: [batch, N]
        - "column_sum": sum_i A[i, j]: [batch, M]
        - "column_entropy": entropy over i of A[i, j] / column_sum[j] (0 for an empty column)
        - "column_max", "column_argmax": over i: [batch, M]

        ``per_head=True``: of each head's own map P_h, [batch, H, ...], in one pass; the weights of
        heads have no part in it. There are also "max_logit", the largest scale * q_i k_j + mask_j
        of a row (lse + log max), and "lse": [batch, H, N].

        ``memory_budget``: bytes that it may take beyond inputs and outputs; default what
        `flashmaps.memory_budget` says around the call, and else whatever is fastest. `plan` says
        what that is.
        """
        budget = budget_in_force(memory_budget)
        if switch("per_head", per_head):
            return reduce_heads(self, names, memory_budget=budget)
        return Reductions(
            self._fields(*check_reductions(names, self.shape, self.key_grid), memory_budget=budget)
        )

    def entropy(self) -> Tensor:
        """-sum_j A_ij log A_ij in nats: [batch, N]."""
        return self.reduce("entropy").entropy

    def max(self) -> Tensor:
        """max_j A_ij: [batch, N]."""
        return self.reduce("max").max

    def argmax(self) -> Tensor:
        """argmax_j A_ij, the lowest j among ties: [batch, N] int64."""
        return self.reduce("argmax").argmax

    def expectation(self) -> Tensor:
        """Mean position under each row, (x, y) in the unit square: [batch, N, 2]."""
        return self.reduce("expectation").expectation

    def diagonal(self) -> Tensor:
        """A_ii of a square map: [batch, N]."""
        return self.reduce("diagonal").diagonal

    def column_sum(self) -> Tensor:
        """sum_i A_ij: [batch, M]."""
        return self.reduce("column_sum").column_sum

    def column_entropy(self) -> Tensor:
        """Entropy over i of the normalised column j, in nats: [batch, M]."""
        return self.reduce("column_entropy").column_entropy

    def column_max(self) -> Tensor:
        """max_i A_ij: [batch, M]."""
        return self.reduce("column_max").column_max

    def column_argmax(self) -> Tensor:
        """argmax_i A_ij, the lowest i among ties: [batch, M] int64."""
        return self.reduce("column_argmax").column_argmax

    def topk(self, k: int, *, memory_budget: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest entries of each row, largest first: values and indices, [batch, N, k]."""
        k = check_k(k, self.shape[2])
        budget = budget_in_force(memory_budget)
        fields = self._fields("topk_values", "topk_indices", k=k, memory_budget=budget)
        return fields["topk_values"], fields["topk_indices"]

    def pool(
        self,
        query_to: Grid | Tensor | None = None,
        key_to: Grid | Tensor | None = None,
        *,
        memory_budget: int | None = None,
    ) -> Tensor:
        """A small dense map: mean over the queries of a cell, sum over the keys of a cell.

        Returns [batch, h_q * w_q, h_k * w_k]; rows still sum to what they summed to. None leaves
        that side as it is. A token falls in the cell floor(row * h' / h), floor(column * w' / w);
        or, where a side is given labels (a tensor of whole numbers from 0, one for each of its
        tokens), in the cell of its label. A label that no query has gives a row that is NaN.
        """
        return self.reduce_and_pool((), query_to, key_to, memory_budget=memory_budget)[1]

    def reduce_and_pool(
        self,
        names: Sequence[str],
        query_to: Grid | Tensor | None,
        key_to: Grid | Tensor | None,
        *,
        memory_budget: int | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The fields of `reduce(*names)` and the result of `pool`, in one pass where that is cheap.

        One pass keeps each row's sums over the key cells. Where these are more numbers than the
        row's query has, rows are pooled in portions, apart from the reductions.
        """
        return reduce_and_pool(self, names, query_to, key_to, memory_budget=memory_budget)

    def plan(
        self,
        *names: str,
        k: int = 1,
        columns: int = 1,
        count: int = 1,
        query_to: Grid | None = None,
        key_to: Grid | None = None,
        memory_budget: int | None = None,
        ceilings: Ceilings | None = None,
        backward: bool = False,
    ) -> Plan:
        """What an operation of this map will take, before it runs: `flashmaps.maps.planning.Plan`.

        Args:
            names: what `reduce` would be given; or one of "lse", "to_dense", "rows" (``count`` of
                them), "topk" (with ``k``), "product" (A @ x, x with so many ``columns``),
                "transposed_product" (A.mT @ y, likewise), "pool" (``query_to``, ``key_to``).
            memory_budget: that the operation would be given; default the context's.
            ceilings: rates of the machine (`flashmaps.Ceilings`), for the expected time.
            backward: plan the way back to queries and keys instead, its outputs their gradients.

        Raises ValueError for a budget that the operation would refuse.

        >>> import torch, flashmaps as fm
        >>> A = fm.AttentionMap(torch.randn(1, 5, 64, 16), torch.randn(1, 5, 64, 16))
        >>> A.plan("entropy", "max").passes
        1
        """
        return plan_map(
            self,
            names,
            k=k,
            columns=columns,
            count=count,
            query_to=query_to,
            key_to=key_to,
            memory_budget=memory_budget,
            ceilings=ceilings,
            backward=backward,
        )


def _for_every_head(problem: Problem) -> Tensor:
    """The keys, with one head for each of the queries' (a copy where they are shared)."""
    return (
        problem.key.repeat_interleave(problem.key_group, 1)
        if problem.key_group > 1
        else problem.key
    )


def _same_offset(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two masks are alike, of which one may be boolean and the other a float."""
    if one is None or other is None:
        given = one if other is None else other
        return given is None or not bool(given.any())
    return torch.equal(one, other)


class TransposedMap(Lazy):
    """A.mT, lazy."""

    def __init__(self, of: AttentionMap) -> None:
        self.mT = of

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, queries, keys = self.mT.shape
        return (batch, keys, queries)

    def __matmul__(self, other: Tensor) -> Tensor:
        """A^T y: [batch, N, C] -> [batch, M, C]."""
        batch, _, queries = self.shape
        y = check_operand("y", other, batch, queries, self.mT.problem.query)
        return self.mT._product("transposed_product", "left", other, y)

    def to_dense(self) -> Tensor:
        return self.mT.to_dense().mT

    def __repr__(self) -> str:
        return f"{self.mT!r}.mT"
