"""Shapes named after the model and the level of its UNet, and tensors of those shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One attention layer of one image: H heads, N queries, M keys, d numbers a head."""

    name: str
    heads: int
    grid: tuple[int, int]  # of the queries; and of the keys, unless they are text
    dim: int
    text_keys: int = 0

    @property
    def queries(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def keys(self) -> int:
        return self.text_keys or self.queries

    @property
    def scores(self) -> int:
        """H N M: how many elements the maps of all heads have."""
        return self.heads * self.queries * self.keys

    @property
    def key_grid(self) -> tuple[int, int] | None:
        return None if self.text_keys else self.grid

    def __str__(self) -> str:
        return f"{self.name} {self.heads}x{self.queries}x{self.dim}" + (
            f" on {self.text_keys} keys" if self.text_keys else ""
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("sd2-64", 5, (64, 64), 64),
        Shape("sd2-32", 10, (32, 32), 64),
        Shape("sd2-16", 20, (16, 16), 64),
        Shape("sd2-96", 5, (96, 96), 64),
        Shape("sd15-64", 8, (64, 64), 40),
        Shape("sdxl-64", 10, (64, 64), 64),
        Shape("flux", 24, (64, 72), 128),  # 4096 tokens of an image and 512 of text
        Shape("wan", 12, (21 * 30, 52), 128),  # 21 frames of 30 x 52
        Shape("text", 5, (64, 64), 64, text_keys=77),
        Shape("tokens-4096", 1, (64, 64), 64),
        Shape("tokens-16384", 1, (128, 128), 64),
        Shape("tokens-65536", 1, (256, 256), 64),
    )
}


def qk(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normally distributed Q [1, H, N, d] and K [1, H, M, d]."""
    random = torch.Generator().manual_seed(seed)
    make = torch.float64 if dtype == torch.float64 else torch.float32
    query = torch.randn(1, shape.heads, shape.queries, shape.dim, generator=random, dtype=make)
    key = torch.randn(1, shape.heads, shape.keys, shape.dim, generator=random, dtype=make)
    return query.to(dtype), key.to(dtype)
