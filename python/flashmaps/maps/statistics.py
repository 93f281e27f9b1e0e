"""The note's statistics of a pair of maps, eq. 2.7 to the end. docs/maths.md has every reading.

A_st is the map from source to target, [batch, N_s, N_t]; A_ts the map back, [batch, N_t, N_s].
x_i are the cell centres of the source grid in the unit square, so distances are in units of the
image's side. Under normalize="rows"/"columns" both maps are first divided by their number of lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.budget import budget_in_force
from flashmaps.maps.composition import compose
from flashmaps.maps.grids import centres
from flashmaps.maps.lazy import check_alike, lse_bytes, round_trip_fields, stand_in, with_lse
from flashmaps.maps.planning import Ceilings, Plan, Step, plan, shares
from flashmaps.maps.validation import need_grid


class Nims(NamedTuple):
    """The two ratios of entropy to density, each NaN where it is undefined."""

    nims: Tensor  # IME / log MD, where MD >= 2
    valid: Tensor  # bool, MD >= 2
    log1p: Tensor  # IME / log(1 + MD), where MD >= 1


@dataclass(frozen=True)
class RoundTrip:
    """Every statistic of section 3 of the note for a pair of maps; batch first.

    Per source token, [batch, N_s]:
        forward: f(i) = argmax_j A_st[i, j], int64.
        hard_distance: |x_i - x_g(f(i))|, note eq. 2.7 with the argmax as the mapping.
        soft_distance: |x_i - (A_st (A_ts C))_i|, note eq. 2.9.
        spread: sqrt(E_{k ~ R_i} |x_k - x_i|^2), R = A_st A_ts.
        return_probability: R_ii.
    Per target token, [batch, N_t]:
        backward: g(j) = argmax_k A_ts[j, k], int64.
        inverse_entropy: IME(j) = -sum_k A_ts[j, k] log A_ts[j, k], nats.
        density: MD(j), how many sources have f(i) = j, int64.
        soft_density: sum_i A_st[i, j].
        nims, nims_valid, nims_log1p: see `nims`.
    Per map, [batch]:
        hard_ims, soft_ims: means of the distances, note eq. 2.8.
    """

    forward: Tensor
    hard_distance: Tensor
    soft_distance: Tensor
    spread: Tensor
    return_probability: Tensor
    backward: Tensor
    inverse_entropy: Tensor
    density: Tensor
    soft_density: Tensor
    nims: Tensor
    nims_valid: Tensor
    nims_log1p: Tensor
    hard_ims: Tensor
    soft_ims: Tensor


def check_map(name: str, value: object) -> None:
    """TypeError, naming the argument, unless ``value`` is a map."""
    if not isinstance(value, AttentionMap):
        raise TypeError(f"{name} must be an AttentionMap, got {type(value).__name__}")


def check_pair(A_st: AttentionMap, A_ts: AttentionMap) -> None:
    """ValueError unless A_ts maps back to where A_st comes from."""
    check_map("A_st", A_st)
    check_map("A_ts", A_ts)
    batch, sources, targets = A_st.shape
    if A_ts.shape != (batch, targets, sources):
        raise ValueError(
            f"A_ts has shape {A_ts.shape}, but the way back from A_st {A_st.shape} is "
            f"{(batch, targets, sources)}: A_st = map(Q_s, K_t) and A_ts = map(Q_t, K_s)"
        )
    check_alike("A_st", A_st, "A_ts", A_ts)


def source_centres(A_st: AttentionMap, A_ts: AttentionMap) -> Tensor:
    """x_i, [N_s, 2], from the source grid as either map knows it."""
    grid = A_st.query_grid or A_ts.key_grid
    grid = need_grid("query_grid (of A_st)", grid, A_st.shape[1], "a distance")
    if A_ts.key_grid is not None and A_ts.key_grid != grid:
        raise ValueError(
            f"the source grid is {grid} as A_st.query_grid but {A_ts.key_grid} as A_ts.key_grid: "
            f"pass the same (height, width) to both maps"
        )
    return centres(grid, dtype=A_st.dtype, device=A_st.device)


def hard_chain(forward: Tensor, backward: Tensor, at: Tensor) -> Tensor:
    """|x_i - x_g(f(i))|: [batch, N_s]."""
    return (at - at[backward.gather(1, forward)]).norm(dim=-1)


_BACK = ("argmax", "entropy", "product", "lse")
_THERE = ("argmax", "column_sum", "product", "return_probability")


def round_trip(
    A_st: AttentionMap, A_ts: AttentionMap, *, memory_budget: int | None = None
) -> RoundTrip:
    """Every statistic of the trip source -> target -> source in two fused passes.

    One pass over A_ts (argmax, entropy, LSE, and its product with [x, y, |x|^2, 1]) and one over
    A_st (argmax, column sums, product with what came back, and R_ii from both maps' tiles). Memory
    is O(N); the composition is never built. See `RoundTrip` for the fields.

    The spread is sqrt(E|x|^2 - 2 x_i E x + |x_i|^2): in float32 it cannot resolve less than about
    3e-4 of the image's side.

    ``memory_budget``: bytes that it may take beyond the maps and its result; default what
    `flashmaps.memory_budget` says. `plan_round_trip` says what it takes.
    """
    check_pair(A_st, A_ts)
    at = source_centres(A_st, A_ts)
    batch = A_st.shape[0]
    budget = budget_in_force(memory_budget)
    steps = [] if budget is None else _round_trip_steps(A_st, A_ts)
    of_back, of_there, _ = shares(steps, budget, "round_trip") if steps else (None, None, None)
    moments = torch.cat((at, at.square().sum(-1, keepdim=True), torch.ones_like(at[:, :1])), dim=-1)
    known = A_ts._lse
    back = A_ts._fields(
        *(_BACK if known is None else _BACK[:-1]),
        right=moments.expand(batch, *moments.shape),
        memory_budget=of_back,
    )
    there = round_trip_fields(
        A_st,
        A_ts,
        _THERE,
        right=_divided(back["product"], A_ts.problem.lines),
        lse=back["lse"].detach() if known is None else known,
        memory_budget=of_there,
    )
    # [batch, N_s, 4]: E x, E y, E |x|^2, mass
    ends = _divided(there["product"], A_st.problem.lines)
    mean = ends[..., :2]
    square = ends[..., 2] - 2 * (at * mean).sum(-1) + at.square().sum(-1) * ends[..., 3]
    hard = hard_chain(there["argmax"], back["argmax"], at)
    soft = (at - mean).norm(dim=-1)
    density = _count(there["argmax"], A_st.shape[2])
    ratios = nims(back["entropy"], density)
    return RoundTrip(
        forward=there["argmax"],
        hard_distance=hard,
        soft_distance=soft,
        spread=_root(square),
        return_probability=there["return_probability"],
        backward=back["argmax"],
        inverse_entropy=back["entropy"],
        density=density,
        soft_density=_divided(there["column_sum"], A_st.problem.lines),
        nims=ratios.nims,
        nims_valid=ratios.valid,
        nims_log1p=ratios.log1p,
        hard_ims=hard.mean(1),
        soft_ims=soft.mean(1),
    )


def _round_trip_steps(A_st: AttentionMap, A_ts: AttentionMap) -> list[Step]:
    """The pass over A_ts, the one over A_st, and the arithmetic on their results."""
    batch, sources, targets = A_st.shape
    size = A_st.problem.itemsize
    moments = stand_in(A_ts.problem, 1, sources, 4).expand(batch, -1, -1)
    lse = lse_bytes(A_ts)
    held = 6 * sources * size + 4 * batch * targets * size + lse
    trip = held + 4 * batch * sources * size  # and where it ends
    right = stand_in(A_st.problem, batch, targets, 4)
    # Distances and what they are made from; counts, and ratios of entropies to their logarithms.
    glue = batch * (sources * (10 * size + 16) + targets * (5 * size + 8))
    return [
        A_ts._step(*(_BACK if lse else _BACK[:-1]), held=held, right=moments),
        A_st._step(*_THERE, held=trip, right=right, partner=with_lse(A_ts)),
        Step(trip + glue),
    ]


def plan_round_trip(
    A_st: AttentionMap,
    A_ts: AttentionMap,
    *,
    memory_budget: int | None = None,
    ceilings: Ceilings | None = None,
) -> Plan:
    """What `round_trip` of these maps will take, before it runs, as `AttentionMap.plan`."""
    check_pair(A_st, A_ts)
    batch, sources, targets = A_st.shape
    size = A_st.problem.itemsize
    per_map = sources * (8 + 4 * size) + targets * (16 + 4 * size + 1) + 2 * size
    return plan(
        "round_trip",
        " and ".join(dict.fromkeys((A_st.backend, A_ts.backend))),
        _round_trip_steps(A_st, A_ts),
        outputs=batch * per_map,
        memory_budget=budget_in_force(memory_budget),
        ceilings=ceilings,
    )


def inverse_mapping_score(A_st: AttentionMap, A_ts: AttentionMap, kind: str = "hard") -> Tensor:
    """IMS, the mean distance between x_i and where it returns to (note eq. 2.8): [batch].

    kind="hard": x_g(f(i)), the chain of argmaxes. kind="soft": (A_st (A_ts C))_i, note eq. 2.9; on
    diffuse maps it is large although the hard chain may be perfect.
    """
    check_pair(A_st, A_ts)
    at = source_centres(A_st, A_ts)
    batch, sources, targets = A_st.shape
    size = A_st.problem.itemsize
    budget, what = budget_in_force(None), "inverse_mapping_score"
    if kind == "hard":
        index = 8 * batch * (sources + targets)
        glue = Step(index + batch * sources * (8 + 6 * size))
        steps = [A_st._step("argmax", held=index), A_ts._step("argmax", held=index), glue]
        there, back, _ = shares(steps, budget, what)
        forward = A_st.reduce("argmax", memory_budget=there).argmax
        backward = A_ts.reduce("argmax", memory_budget=back).argmax
        return hard_chain(forward, backward, at).mean(1)
    if kind == "soft":
        R, x = compose(A_st, A_ts), at.expand(batch, *at.shape)
        result = x.numel() * size
        steps = [Step(s.held + result, s.cost) for s in R._product_steps("product", x, own=True)]
        given = shares([*steps, Step(4 * result)], budget, what)
        ends = R._two_products("product", x, given)
        ends = _divided(ends, A_st.problem.lines * A_ts.problem.lines)
        return (at - ends).norm(dim=-1).mean(1)
    raise ValueError(f"kind = {kind!r} is unknown; choose 'hard' or 'soft'")


def inverse_mapping_entropy(A: AttentionMap, kind: str = "rows") -> Tensor:
    """IME(j) = -sum_i P(S_i | T_j) log P(S_i | T_j) in nats: [batch, N_t].

    kind="rows": give A_ts; its rows are P(S | T_j). kind="bayes": give A_st; P(S_i | T_j) is its
    column j divided by its sum (Bayes' rule with a uniform prior over sources).
    """
    check_map("A", A)
    if kind == "rows":
        return A.entropy()
    if kind == "bayes":
        return A.column_entropy()
    raise ValueError(f"kind = {kind!r} is unknown; choose 'rows' (of A_ts) or 'bayes' (from A_st)")


def mapping_density(A_st: AttentionMap, kind: str = "hard") -> Tensor:
    """MD(j): [batch, N_t]. "hard": how many i have argmax A_st[i] = j. "soft": column sums."""
    check_map("A_st", A_st)
    if kind == "hard":
        batch, sources, _ = A_st.shape
        step = A_st._step("argmax", held=16 * batch * sources)
        (budget,) = shares([step], budget_in_force(None), "mapping_density")
        return _count(A_st.reduce("argmax", memory_budget=budget).argmax, A_st.shape[2])
    if kind == "soft":
        return _divided(A_st.column_sum(), A_st.problem.lines)
    raise ValueError(f"kind = {kind!r} is unknown; choose 'hard' or 'soft'")


def nims(entropy: Tensor, density: Tensor) -> Nims:
    """NIMS = IME / log MD where MD >= 2, with its validity, and IME / log(1 + MD) where MD >= 1.

    log 1 = 0 and log 0 diverges, so NIMS itself is undefined below two sources: NaN there, and
    everywhere for a perfect bijection. Shapes as given (they broadcast).
    """
    for name, value in (("entropy", entropy), ("density", density)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not entropy.is_floating_point():
        raise TypeError(f"entropy has dtype {entropy.dtype}; wanted a float, use entropy.float()")
    try:
        torch.broadcast_shapes(entropy.shape, density.shape)
    except RuntimeError:
        raise ValueError(
            f"entropy {list(entropy.shape)} and density {list(density.shape)} do not go together: "
            "give both of the same maps"
        ) from None
    counts = density.to(entropy.dtype)
    valid, some = counts >= 2, counts >= 1
    # Divided by something even where the ratio is undefined: or its gradient would be NaN there.
    two = torch.full_like(counts, 2.0)
    return Nims(
        nims=torch.where(valid, entropy / counts.where(valid, two).log(), torch.nan),
        valid=valid,
        log1p=torch.where(some, entropy / counts.where(some, two).log1p(), torch.nan),
    )


def _divided(x: Tensor, lines: int) -> Tensor:
    """x / lines, in place: x was made for it, and autograd does not keep it."""
    return x.div_(lines) if lines > 1 else x


def _root(square: Tensor) -> Tensor:
    """sqrt, 0 below 0; with the slope 0 there, where sqrt has none."""
    some = square > 0
    return torch.where(some, square.where(some, torch.ones_like(square)).sqrt(), 0.0)


def _count(index: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 occurs in each row of ``index``: [batch, size] int64."""
    counts = torch.zeros((index.shape[0], size), dtype=torch.int64, device=index.device)
    return counts.scatter_add_(1, index, torch.ones_like(index))
