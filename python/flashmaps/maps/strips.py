"""R = A A' a strip of rows at a time, from dense pieces of both maps, under a memory budget.

What stands below the operator `flashmaps::compose`. A backend with kernels of its own for this
offers ``composes``, ``compose`` and ``plan_compose`` (ARCHITECTURE.md, "How to add").
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from flashmaps.maps.backends.choice import get, plan_pass
from flashmaps.maps.backends.reducers import Reduction, state_bytes, tile_bytes
from flashmaps.maps.budget import too_small
from flashmaps.maps.grids import centres
from flashmaps.maps.problem import Cost, Problem, Request, empty_outputs, output_bytes

DEFAULT_MEMORY_BUDGET = 64 * 2**20

# Rows of A' that are made at once, at most.
_MOST_BLOCK = 768

# The reducers see so many rows at once that their temporaries stay near this.
_TEMPORARY_BYTES = 2**23

Backends = tuple[str, str]  # of A and of A'


def result(first: Problem, second: Problem) -> Problem:
    """A problem with the shape of R: the queries of A and the keys of A'. Only that is meant."""
    batch, like = first.batch, first.query
    number = like[:1, :1, :1, :1]
    return first._replace(
        query=number.expand(batch, *like.shape[1:]),
        key=number.expand(batch, first.heads, second.num_keys, like.shape[3]),
        pairs=None,
        grid_height=second.grid_height,
        grid_width=second.grid_width,
    )


def one_map(problem: Problem, index: int) -> Problem:
    """Map ``index`` of a batch as a batch of one (views)."""
    return problem.some_maps(slice(index, index + 1))


def _own(first: Problem, second: Problem, request: Request, names: Backends) -> ModuleType | None:
    """The backend of both maps, where it composes by itself."""
    module = get(names[0])
    if names[0] != names[1] or not hasattr(module, "compose"):
        return None
    return module if module.composes(first, second, request) else None


class _Split(NamedTuple):
    """How the budget is spent. All in bytes, but for rows."""

    strip: int  # rows of R, and of A
    block: int  # rows of A' made at once
    step: int  # rows reduced at once
    backend: int  # what each pass of a backend may take
    total: int


class _Sizes:
    """The arithmetic of one composition."""

    def __init__(self, first: Problem, second: Problem, request: Request, names: Backends) -> None:
        self.first, self.second, self.names = one_map(first, 0), one_map(second, 0), names
        self.request = request
        self.rows, self.keys, self.ends = first.num_queries, first.num_keys, second.num_keys
        self.s = first.itemsize
        self.lines = first.lines * second.lines
        self.state, self.finishing = state_bytes(request, first.batch * self.ends, self.s)
        if "expectation" in request.names:
            self.state += 2 * self.ends * self.s
            self.finishing = max(self.finishing, self.ends * (2 * self.s + 8))

    def reducers(self, rows: int) -> int:
        return tile_bytes(self.request, (1, rows, self.ends), self.s, self.lines)

    def step(self, strip: int) -> int:
        return max(1, min(strip, _TEMPORARY_BYTES // max(1, self.reducers(1))))

    def held(self, strip: int, block: int, backend: int) -> int:
        """A strip of R and of A beside either a block of A' being made, or the reducers."""
        strips = strip * (self.keys + self.ends) * self.s
        making = block * self.ends * self.s + backend
        return self.state + max(
            strips + max(making, self.reducers(self.step(strip))), self.finishing
        )

    def passes(self, budget: int) -> tuple[Cost, Cost]:
        """A pass over all of one A and one A', each under the budget."""
        dense = Request(("dense",), memory_budget=max(1, budget))
        return (
            plan_pass(self.names[0], self.first, dense),
            plan_pass(self.names[1], self.second, dense),
        )

    def split(self, budget: int) -> _Split:
        """The largest strip that fits beside a block of at least a sixteenth of it.

        Backends may take an eighth of the budget, or the least they need. They seldom do, but what
        they do take may depend on the number of threads, and the order of sums must not.
        A budget that is too small gives what takes least.
        """
        least = max(cost.workspace for cost in self.passes(1))
        backend = max(least, budget // 8)
        if self.held(1, 1, backend) > budget:
            backend = least

        def fits(strip: int, block: int) -> bool:
            return self.held(strip, min(block, self.keys), backend) <= budget

        low, high = 1, self.rows
        while low < high:
            strip = (low + high + 1) // 2
            low, high = (strip, high) if fits(strip, -(-strip // 16)) else (low, strip - 1)
        # As many strips again, of one size. R is read and written once for each block: what smaller
        # strips leave makes blocks larger, in numbers that vectors and threads divide well.
        low = -(-self.rows // -(-self.rows // low))
        block = min(self.keys, -(-low // 16))
        most = min(self.keys, _MOST_BLOCK)
        wider = (most, *range(most // 192 * 192, 0, -192), 96, 48, 24, 12, 6, 3)
        block = next((n for n in wider if block < n <= most and fits(low, n)), block)
        taken = max(cost.workspace for cost in self.passes(backend))
        return _Split(low, block, self.step(low), backend, self.held(low, block, taken))


def plan(first: Problem, second: Problem, request: Request, names: Backends) -> Cost:
    """What `reduce` takes; a budget that is too small gives the least there is."""
    module = _own(first, second, request, names)
    if module is not None:
        cost: Cost = module.plan_compose(first, second, request)
        return cost
    sizes = _Sizes(first, second, request, names)
    budget = DEFAULT_MEMORY_BUDGET if request.memory_budget is None else request.memory_budget
    split = sizes.split(budget)
    there, back = sizes.passes(split.backend)
    strips = -(-sizes.rows // split.strip)
    product = 2.0 * sizes.rows * sizes.keys * sizes.ends
    # Dense pieces are written and read again, and R is added to for each block.
    pieces = 2 * sizes.rows * sizes.keys + 2 * strips * sizes.keys * sizes.ends
    pieces += 2 * sizes.rows * sizes.ends * -(-sizes.keys // split.block)
    glue = Cost(flops=product, traffic=float(pieces * sizes.s))
    one = there.then(back.times(strips)).then(glue).times(first.batch)
    passes = there.passes + strips * back.passes
    outputs = output_bytes(result(first, second), request)
    return replace(one, workspace=split.total, passes=passes, traffic=one.traffic + outputs)


def reduce(first: Problem, second: Problem, request: Request, names: Backends) -> dict[str, Tensor]:
    """Fields of R by `flashmaps.maps.backends.reducers`, one map and one strip of rows at a time.

    Raises ValueError for a budget too small for one row.
    """
    budget = DEFAULT_MEMORY_BUDGET if request.memory_budget is None else request.memory_budget
    what = f"{', '.join(request.names)} of one row of this composition"
    module = _own(first, second, request, names)
    if module is not None:
        least = plan(first, second, request, names).workspace
        if least > budget:
            raise too_small(budget, least, what)
        fields: dict[str, Tensor] = module.compose(first, second, request)
        return fields
    split = _Sizes(first, second, request, names).split(budget)
    if split.total > budget:
        raise too_small(budget, split.total, what)
    shape = result(first, second)
    reduction = Reduction(empty_outputs(shape, request), request)
    dense = Request(("dense",), memory_budget=max(1, split.backend))
    there, back = (get(name) for name in names)
    rows = first.num_queries
    at = _centres(second) if "expectation" in request.names else None
    held = first.query.new_empty((split.strip, second.num_keys), dtype=first.compute_dtype)
    for index in range(first.batch):
        one, other = one_map(first, index), one_map(second, index)
        for start in range(0, rows, split.strip):
            stop = min(start + split.strip, rows)
            strip = there.reduce(one.query_rows(start, stop), dense)["dense"][0]
            values = held[: stop - start].zero_()
            for low in range(0, other.num_queries, split.block):
                high = min(low + split.block, other.num_queries)
                part = back.reduce(other.query_rows(low, high), dense)["dense"][0]
                values.addmm_(strip[:, low:high], part)
                del part  # before the next one is made: the budget holds one
            for low in range(0, stop - start, split.step):
                reduction.update(
                    values[None, low : low + split.step],
                    start + low,
                    maps=slice(index, index + 1),
                    lines=first.lines * second.lines,
                    key_centres=at,
                )
            del strip
    return reduction.finish()


def _centres(problem: Problem) -> Tensor:
    grid = (problem.grid_height, problem.grid_width)
    return centres(grid, dtype=problem.compute_dtype, device=problem.query.device)
