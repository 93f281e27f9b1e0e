"""Every float result's gradients on one problem, against autograd through dense maps.

test_gradients.py has the backends of this machine checked by it; checks.py the GPU kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flashmaps as fm
import oracle
import torch
from dense_gradients import FLOAT_RESULTS, Dense, assert_gradients
from problems import Problem, inputs, truth
from torch import Tensor


def _leaves(
    problem: Problem, dtype: torch.dtype, into: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What wants gradients, in the dtype ``into`` (None: as given), and the other options."""
    query, key, options = inputs(problem, dtype)
    options = {name: x for name, x in options.items() if name != "lse"}
    compute = oracle.compute_dtype(dtype)
    leaves = {"query": query, "key": key}
    mask = options.get("key_mask")
    if mask is not None and mask.dtype != torch.bool:
        leaves["bias"] = options.pop("key_mask").to(compute)
    if "head_weights" in options:
        leaves["head_weights"] = torch.tensor(options.pop("head_weights"), dtype=compute)
    batch, (queries, keys) = _batch(problem, options), problem.shape[2:4]
    generator = torch.Generator().manual_seed(queries)
    for name, tokens in (("right", keys), ("left", queries)):
        drawn = torch.randn(batch, tokens, 3, generator=generator, dtype=torch.float64)
        leaves[name] = drawn.to(compute)
    made = {
        # Strides are part of the problem: gradients have none.
        name: (x if into is None else x.to(into)).detach().requires_grad_()
        for name, x in leaves.items()
    }
    return made, options


def _batch(problem: Problem, options: dict[str, Any]) -> int:
    if "pairs" in options:
        return len(options["pairs"])
    return max(problem.shape[0], problem.keys_shape[0])


def cells_of(problem: Problem, options: dict[str, Any]) -> tuple[tuple[int, int] | None, Any]:
    keys = problem.shape[3]
    side = math.isqrt(keys)
    grid = options.get("key_grid") or ((side, side) if side * side == keys else None)
    if grid is None:
        return None, None
    to = (max(1, grid[0] // 2), max(1, 2 * grid[1] // 3))
    return to, oracle.cells(grid, to)


def names_of(problem: Problem, grid: Any) -> tuple[str, ...]:
    queries, keys = problem.shape[2:4]
    without = {"diagonal"} if queries != keys else set()
    without |= {"expectation", "pool"} if grid is None else set()
    return tuple(name for name in FLOAT_RESULTS if name not in without)


def _mine(
    leaves: dict[str, Tensor], options: dict[str, Any], names: tuple[str, ...], k: int, to: Any,
    backend: str, lse: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    given = dict(options)
    if "bias" in leaves:
        given["key_mask"] = leaves["bias"]
    if "head_weights" in leaves:
        given["head_weights"] = leaves["head_weights"]
    A = fm.AttentionMap(leaves["query"], leaves["key"], **given, backend=backend, lse=lse)
    fused = [name for name in names if name in dir(A) and name not in OTHERS]
    found = A.reduce(*fused)._asdict() if fused else {}
    others: dict[str, Callable[[], Tensor]] = {
        "lse": lambda: A.lse,
        "product": lambda: A @ leaves["right"],
        "transposed_product": lambda: A.mT @ leaves["left"],
        "topk": lambda: A.topk(k)[0],
        "rows": lambda: A.rows([-1, 0, -1]),
        "dense": A.to_dense,
        "pool": lambda: A.pool(key_to=to),
    }
    return {name: found[name] if name in found else others[name]() for name in names}


OTHERS = ("lse", "product", "transposed_product", "topk", "rows", "dense", "pool")


def _upstream(results: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(results))
    return {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for name, x in results.items()
    }


def _gradients(
    results: dict[str, Tensor], g: dict[str, Tensor], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    loss = sum((results[name] * g[name].to(results[name])).sum() for name in results)
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


# Where two entries of a row are nearly the largest, both are right answers of an argmax, and have
# other gradients: those are left out.
PICKED = ("max", "topk", "column_max")


def _clear(name: str, dense: Tensor, k: int, apart: float) -> Tensor:
    """Where the largest entries are ``apart`` of each other, as a share of the larger one."""
    dim = 1 if name == "column_max" else 2
    size = dense.shape[dim]
    count = min(size, k + 1 if name == "topk" else 2)
    top = dense.topk(count, dim=dim).values.movedim(dim, -1)
    close = (top.diff(dim=-1).neg() <= apart * top[..., :-1]).any(-1)  # never, of one entry
    return ~(close[..., None].expand(*close.shape, k) if name == "topk" else close)


def check_gradients(
    problem: Problem,
    dtype: torch.dtype,
    names: tuple[str, ...],
    backend: str,
    place: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """``names`` together; ``place`` puts a tensor on the backend's device, strides and all."""
    mine, options = _leaves(problem, dtype, None)
    to, cells = cells_of(problem, options)
    k = min(3, problem.shape[3])
    compute = oracle.compute_dtype(dtype)
    dense = Dense(_leaves(problem, dtype, torch.float64)[0], options)
    rival = Dense(_leaves(problem, dtype, compute)[0], options)
    true, plain = (d.results(names, k, cells) for d in (dense, rival))
    g = _upstream(true)
    lse = None
    if problem.with_lse:
        lse = inputs(problem, dtype)[2]["lse"]
        names = tuple(name for name in names if name != "lse")
        true, plain, g = ({n: x[n] for n in names} for x in (true, plain, g))
    of, _ = truth(problem, dtype)
    for name in PICKED:
        if name in g:
            g[name] = g[name].where(_clear(name, of.values, k, 4 * oracle.band(of, dtype)), 0.0)
    if "column_entropy" in g:
        # Of a column that is mostly underflow there is nothing to go back through (oracle.py).
        lost = oracle.vanishing(of, dtype) / oracle.band(of, dtype)
        g["column_entropy"] = g["column_entropy"].where(of.values.sum(1) > lost, 0.0)
    mine = {name: place(x.detach()).requires_grad_() for name, x in mine.items()}
    options, lse = (
        {n: place(x) if isinstance(x, Tensor) else x for n, x in options.items()},
        None if lse is None else place(lse),
    )
    got = _mine(mine, options, names, k, to, backend, lse)
    found = {name: x.cpu() for name, x in _gradients(got, g, mine).items()}
    assert_gradients(
        f"{problem}, {', '.join(names)}",
        found, _gradients(true, g, dense.leaves),
        _gradients(plain, g, rival.leaves), dense.magnitudes(g, k, cells),
        dense.magnitudes(g, k, cells, problem.shape[1] * torch.finfo(compute).tiny),
        of, problem.shape[1], problem.shape[4], dtype,
    )  # fmt: skip
