"""Gradients of maps by autograd through dense maps, and how far an honest one may be off.

In float64 this is the truth, in the compute dtype the rival, as in oracle.py. A gradient's
magnitude is how far it moves when each of the things that it is made from moves by its own size:
the probabilities, the terms of G, queries and keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
from torch import Tensor

FLOAT_RESULTS = (
    "lse", "entropy", "max", "expectation", "diagonal", "column_sum", "column_max",
    "column_entropy", "product", "transposed_product", "topk", "rows", "dense", "pool",
)  # fmt: skip


@dataclass
class Dense:
    """A dense map with a graph, and leaves that want gradients."""

    leaves: dict[str, Tensor]  # query, key, and bias, head_weights, right, left where given
    options: dict[str, Any]
    scores: Tensor = field(init=False)
    each: Tensor = field(init=False)  # P_h
    plain: Tensor = field(init=False)  # before normalisation
    values: Tensor = field(init=False)
    lines: int = 1
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        query, key = self.leaves["query"], self.leaves["key"]
        batch = max(query.shape[0], key.shape[0])
        bias = self.leaves.get("bias")
        if bias is None:
            bias = query.new_zeros(key.shape[0], key.shape[2])
            mask = self.options.get("key_mask")
            if mask is not None:
                bias = bias.masked_fill(~mask, -math.inf)
        bias = bias.expand(key.shape[0], -1)
        pairs = self.options.get("pairs")
        if pairs is None:
            self.of = [torch.arange(batch) % n.shape[0] for n in (query, key)]
        else:
            self.of = list(torch.as_tensor(pairs).unbind(1))
        self.q, self.k, bias = query[self.of[0]], key[self.of[1]], bias[self.of[1]]
        self.scale = self.options.get("scale")
        if self.scale is None:
            self.scale = query.shape[3] ** -0.5
        self.scores = self.scale * self.q @ self.k.mT + bias[:, None, None]
        self.each = self.scores.softmax(-1)
        heads = key.shape[1]
        self.weights = self.leaves.get("head_weights", query.new_full((heads,), 1 / heads))
        self.plain = torch.einsum("h,bhnm->bnm", self.weights, self.each)
        keys = key.shape[2]
        side = math.isqrt(keys)
        self.grid = self.options.get("key_grid") or ((side, side) if side * side == keys else None)
        self.values = self._normalized(self.plain)

    def _mass(self, plain: Tensor) -> tuple[Tensor, int, int]:
        assert self.grid is not None
        how = self.options["normalize"]
        lines, axis = (self.grid[0], -1) if how == "rows" else (self.grid[1], -2)
        return plain.unflatten(-1, self.grid).sum(axis, keepdim=True), lines, axis

    def _normalized(self, plain: Tensor) -> Tensor:
        if self.options.get("normalize") not in ("rows", "columns"):
            return plain
        mass, self.lines, _ = self._mass(plain)
        safe = mass.where(mass > 0, torch.ones_like(mass))
        return (plain.unflatten(-1, self.grid) / safe).flatten(-2)

    def results(self, names: tuple[str, ...], k: int, cells: Tensor | None) -> dict[str, Tensor]:
        a, p = self.values, self.values / self.lines
        some = a > 0
        log = a.where(some, torch.ones_like(a)).log()
        mass = a.sum(1)
        alive = mass > 0
        safe = mass.where(alive, torch.ones_like(mass))
        found = {
            "lse": lambda: self.scores.logsumexp(-1),
            "entropy": lambda: -(p * (log - math.log(self.lines)).where(some, 0.0)).sum(-1),
            "max": lambda: a.gather(2, a.argmax(2, keepdim=True))[..., 0],
            "expectation": lambda: p @ oracle.centres(self.grid, p.dtype),  # type: ignore[arg-type]
            "diagonal": lambda: a.diagonal(dim1=1, dim2=2),
            "column_sum": lambda: mass,
            "column_max": lambda: a.gather(1, a.argmax(1, keepdim=True))[:, 0],
            "column_entropy": lambda: torch.where(alive, safe.log() - (a * log).sum(1) / safe, 0.0),
            "product": lambda: a @ self.leaves["right"],
            "transposed_product": lambda: a.mT @ self.leaves["left"],
            "topk": lambda: a.topk(k, dim=-1).values,
            "rows": lambda: a[:, [-1, 0, -1]],
            "dense": lambda: a,
            "pool": lambda: a @ cells.to(a.dtype),  # type: ignore[union-attr]
        }
        return {name: found[name]() for name in names}

    def magnitudes(
        self, g: dict[str, Tensor], k: int, cells: Tensor | None, tiny: float = 0.0
    ) -> dict[str, Tensor]:
        """Of the gradient with respect to each leaf, given those of the results.

        With ``tiny`` (times heads, since each one's share of the mean underflows by itself): what
        is lost where each probability loses that much, as one below the smallest normal number
        does.
        """
        a = self.values.detach()
        size = torch.zeros_like(a)
        log = torch.where(a > 0, a.clamp_min(torch.finfo(a.dtype).tiny).log(), 0.0).abs()
        mass = a.sum(1)
        for name, of in g.items():
            u = of.abs()
            if name == "entropy":
                size += u[..., None] * (log + 1 + math.log(self.lines)) / self.lines
            elif name == "max":
                size.scatter_add_(2, a.argmax(2, keepdim=True), u[..., None])
            elif name == "topk":
                size.scatter_add_(2, a.topk(k, dim=-1).indices, u)
            elif name == "expectation":
                at = oracle.centres(self.grid, a.dtype)  # type: ignore[arg-type]
                size += u @ at.mT / self.lines
            elif name == "diagonal":
                size += torch.diag_embed(u)
            elif name == "column_sum":
                size += u[:, None]
            elif name == "column_max":
                size.scatter_add_(1, a.argmax(1, keepdim=True), u[:, None])
            elif name == "column_entropy":
                some = mass > 0
                safe = mass.where(some, torch.ones_like(mass))
                share = torch.where(some, u / safe, 0.0)[:, None]
                inner = ((a * log).sum(1) / safe)[:, None]
                size += share * (log + inner + 1 + safe.log().abs()[:, None])
            elif name == "product":
                size += u @ self.leaves["right"].detach().abs().mT
            elif name == "transposed_product":
                size += self.leaves["left"].detach().abs() @ u.mT
            elif name == "rows":
                size[:, -1] += u[:, 0] + u[:, 2]
                size[:, 0] += u[:, 1]
            elif name == "dense":
                size += u
            elif name == "pool":
                size += u @ cells.to(a.dtype).mT  # type: ignore[union-attr]
        if self.lines > 1 or self.options.get("normalize") in ("rows", "columns"):
            mass_of, _, axis = self._mass(self.plain.detach())
            block = size.unflatten(-1, self.grid)
            mean = (block * a.unflatten(-1, self.grid)).sum(axis, keepdim=True)
            inverse = torch.where(mass_of > 0, 1 / mass_of.clamp_min(1e-300), 0.0)
            size = ((block + mean) * inverse).flatten(-2)
        each = self.each.detach()
        inner = torch.einsum("bhnm,bnm->bhn", each, size)
        slope = self.weights.detach()[:, None, None] * (size[:, None] + inner[..., None])
        if "lse" in g:
            slope = slope + g["lse"].abs()[..., None]
        scores = (each if tiny == 0 else torch.full_like(each, tiny)) * slope
        query, key = self.leaves["query"].detach(), self.leaves["key"].detach()
        scale = abs(self.scale)
        of_query = scale * scores @ self.k.detach().abs()
        of_key = scale * scores.mT @ self.q.detach().abs()
        found = {
            "query": torch.zeros_like(query).index_add_(0, self.of[0], of_query),
            "key": torch.zeros_like(key).index_add_(0, self.of[1], of_key),
            "head_weights": (inner if tiny == 0 else tiny * size.sum(2)[:, None]).sum((0, 2))
            * torch.ones_like(self.weights.detach()),
        }
        if "bias" in self.leaves:
            of_bias = torch.zeros(key.shape[0], key.shape[2], dtype=key.dtype)
            of_bias.index_add_(0, self.of[1], scores.sum((1, 2)))
            shape = self.leaves["bias"].shape
            found["bias"] = of_bias if shape == of_bias.shape else of_bias.sum(0).reshape(shape)
        if "product" in g:
            a = a if tiny == 0 else torch.full_like(a, tiny)
            found["right"] = a.mT @ g["product"].abs()
        if "transposed_product" in g:
            a = a if tiny == 0 else torch.full_like(a, tiny)
            found["left"] = a @ g["transposed_product"].abs()
        return {name: found[name] for name in self.leaves if name in found}


def roundings(of: oracle.Map, heads: int, dim: int) -> float:
    """Of a gradient's entry: those of P, of G that is made from A, of D; then sums over the other
    side's tokens, heads, and the features of a score. P is made again from the score and a
    log-sum-exp that was rounded too, which may be as large.
    """
    sums = math.sqrt(max(of.values.shape[1:])) + math.sqrt(heads) + math.sqrt(dim)
    return 3 * 2 * of.roundings + sums


def assert_gradients(
    what: str,
    got: dict[str, Tensor],
    truth: dict[str, Tensor],
    plain: dict[str, Tensor],
    size: dict[str, Tensor],
    lost: dict[str, Tensor],
    of: oracle.Map,
    heads: int,
    dim: int,
    dtype: torch.dtype,
) -> None:
    """Error at most twice that of plain torch in the compute dtype, plus the band.

    Each operator's share in a gradient of half precision is rounded to it, and each sum of shares.
    """
    unit = torch.finfo(oracle.compute_dtype(dtype)).eps / 2
    band = oracle.FOUR_SIGMA * unit * roundings(of, heads, dim)
    for name in size:
        mine, true = got[name], truth[name]
        assert mine.shape == true.shape, f"{what}: d{name} is {mine.shape}, not {true.shape}"
        assert torch.isfinite(mine).all(), f"{what}: d{name} has NaN or inf"
        floor = lost[name]
        half = mine.dtype in (torch.float16, torch.bfloat16)
        shares = 2 * len(FLOAT_RESULTS)
        rounded = shares * torch.finfo(mine.dtype).eps / 2 if half else 0.0
        if mine.dtype == torch.float16:
            floor = floor + shares * 2**-25  # half of its smallest subnormal number
        # A share that is itself below the smallest normal number is zero: docs/maths.md.
        floor = floor + shares * torch.finfo(oracle.compute_dtype(dtype)).tiny
        value = oracle.Value(true, size[name].clamp_min(1e-300))
        theirs = (
            0.0
            if dtype == torch.float64
            else (oracle.error(plain[name], value, floor).max().item())
        )
        budget = 2 * theirs + band + rounded
        error = oracle.error(mine, value, floor)
        assert error.max().item() <= budget, (
            f"{what}: d{name} is off by {error.max().item():.3g} of its magnitude; the budget is "
            f"2 x {theirs:.3g} (plain torch) + {band + rounded:.3g} (band)"
        )
