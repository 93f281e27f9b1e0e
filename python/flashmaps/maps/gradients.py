"""From gradients of results to the gradient of the map: each result's closed form, in one place.

docs/gradients.md derives them. Nothing here has N x M elements; where a result is itself of that
size (``to_dense``), so is its gradient, which the caller brought.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashmaps.maps.grids import centres
from flashmaps.maps.problem import FIELDS, Gradient, Problem, Request

# What the gradient of a result is made from, beside the result itself: asked of the same pass.
COMPANIONS = {
    "max": "argmax",
    "topk_values": "topk_indices",
    "column_max": "column_argmax",
    "column_entropy": "column_sum",
}


def is_float(name: str) -> bool:
    """Whether this field has a gradient at all."""
    return not FIELDS[name].is_index


def with_companions(names: Sequence[str]) -> tuple[str, ...]:
    """The fields that a pass has to give so that these can be differentiated."""
    more = [COMPANIONS[name] for name in names if name in COMPANIONS]
    return tuple(dict.fromkeys((*names, *more)))


def saved(names: Sequence[str]) -> tuple[str, ...]:
    """The results that the way back needs again."""
    kept = {COMPANIONS[name] for name in names if name in COMPANIONS}
    kept |= {"lse"} | {name for name in names if name == "column_entropy"}
    return tuple(name for name in names if name in kept)


class _Terms:
    """Terms of G as they come: products side by side, entries in one list."""

    def __init__(self) -> None:
        self.vectors: dict[str, Tensor] = {}
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self.index: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, name: str, term: Tensor) -> None:
        self.vectors[name] = self.vectors[name] + term if name in self.vectors else term

    def product(self, left: Tensor, right: Tensor) -> None:
        self.left.append(left)
        self.right.append(right)

    def entries(self, index: Tensor, values: Tensor) -> None:
        """Some entries of each row: [P, N, S] each."""
        self.index.append(index)
        self.values.append(values)

    def gradient(self, wanted: tuple[str, ...], **more: Any) -> Gradient:
        found: dict[str, Any] = dict(self.vectors)
        if self.left:
            found["left"] = _joined(self.left)
            found["right"] = _joined(self.right)
        if self.index:
            found["row_index"] = _joined(self.index)
            found["row_values"] = _joined(self.values)
        return Gradient(wanted, **found, **more)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)


def of_results(
    problem: Problem,
    request: Request,
    results: dict[str, Tensor],
    upstream: dict[str, Tensor],
    wanted: tuple[str, ...],
    *,
    lines: int | None = None,
) -> Gradient:
    """The `Gradient` of a pass whose results have the gradients ``upstream``.

    Args:
        results: those that `saved` names.
        upstream: dL/dr of each float result that the loss depends on, in its shape.
        wanted: as `Gradient.wanted`.
        lines: what a row of the map sums to, where ``problem`` does not know.
    """
    lines = problem.lines if lines is None else lines
    terms = _Terms()
    more: dict[str, Any] = {}
    for name, g in upstream.items():
        match name:
            case "lse":
                more["lse"] = g.contiguous()
            case "entropy":
                # H_i = -sum_j p log p with p = A / lines, so that
                # dH_i / dA_ij = -(log A_ij - log lines + 1) / lines.
                terms.add("row_log", g / lines)
                terms.add("row_add", g * ((math.log(lines) - 1) / lines))
            case "max":
                terms.entries(results["argmax"][..., None], g[..., None])
            case "topk_values":
                terms.entries(results["topk_indices"], g)
            case "diagonal":
                index = torch.arange(problem.num_queries, device=g.device)
                terms.entries(index[None, :, None].expand(*g.shape, 1), g[..., None])
            case "expectation":
                grid = (problem.grid_height, problem.grid_width)
                at = centres(grid, dtype=g.dtype, device=g.device)
                terms.product(g / lines, at.expand(problem.batch, *at.shape))
            case "product":
                assert request.right is not None
                terms.product(g, request.right)
            case "transposed_product":
                assert request.left is not None
                terms.product(request.left, g)
            case "column_sum":
                terms.add("column_add", g)
            case "column_max":
                more["column_index"] = results["column_argmax"]
                more["column_values"] = g.contiguous()
            case "column_entropy":
                # E_j = log c - sum_i A log A / c: dE_j / dA_ij = -(log A - sum_k A log A / c) / c,
                # and sum_k A log A / c = log c - E_j. An empty column has entropy 0 and no slope.
                mass = results["column_sum"]
                some = mass >= torch.finfo(mass.dtype).tiny
                safe = mass.where(some, torch.ones_like(mass))
                share = torch.where(some, g / safe, 0.0)
                terms.add("column_log", share)
                terms.add("column_add", share * (safe.log() - results["column_entropy"]))
            case "dense":
                more["dense"] = g.contiguous()
            case "pooled_keys":
                more["pooled"], more["cells"] = g.contiguous(), request.cells
            case "return_probability":
                partner = request.partner
                assert partner is not None
                terms.add("row_back", g / (lines * partner.lines))
                more["partner"] = partner
            case _:
                raise AssertionError(f"{name} has no gradient")
    return terms.gradient(wanted, **more)


def of_partner(
    problem: Problem, request: Request, upstream: dict[str, Tensor], wanted: tuple[str, ...]
) -> Gradient:
    """The same for the map back of a pass with "return_probability": dR_ii / dA'_ji = A_ij.

    ``problem`` carries its log-sum-exp.
    """
    partner, g = request.partner, upstream["return_probability"]
    assert partner is not None
    return Gradient(wanted, column_back=g / (problem.lines * partner.lines), partner=problem)


def held_bytes(gradient: Gradient) -> int:
    """What is held for the way back beside its workspace: the terms, but for what was brought."""
    brought = ("dense", "cells", "pooled", "lse")
    return sum(
        t.numel() * t.element_size()
        for name, t in gradient.tensors().items()
        if name not in brought
    )
