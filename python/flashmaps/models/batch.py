"""What a step of the UNet's training shows: views, pairs and plain pictures, in this order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pictures import FIRST, SECOND

DROPPED = 0.2  # share of captions replaced by "", which guidance needs, and matching without one
STEPS = 1000  # of the scheduler
CLEAR = 300  # timesteps of views: beyond, there is more noise than picture
_BLIND = 0.25  # share of the steps in which the noisier picture of a pair sees the other one alone


@dataclass(frozen=True)
class Rows:
    """How many of each kind. The rows of a batch are

    ``triples`` first pictures, as many second ones, as many views; the noisier pictures of
    ``pairs`` pairs, then their cleaner ones; and ``plain`` pictures.
    """

    triples: int
    pairs: int
    plain: int

    @classmethod
    def of(cls, batch: int, *, views: float, mutual: float) -> Rows:
        """The rows of a batch: these shares of it in three views, and in pairs.

        Raises ValueError where a batch is too small to have one of each.
        """
        triples = max(1, int(views * batch / 3)) if views > 0 else 0
        pairs = max(1, int(mutual * batch / 2)) if mutual > 0 else 0
        plain = batch - 3 * triples - 2 * pairs
        if plain < 1:
            raise ValueError(
                f"a batch of {batch} has no room for {triples} pictures in three views, {pairs} "
                "pairs and a plain picture; give a larger --unet-batch, smaller --views or --mutual"
            )
        return cls(triples, pairs, plain)

    @property
    def views(self) -> slice:
        """The triples."""
        return slice(3 * self.triples)

    @property
    def plainly(self) -> slice:
        """The plain pictures."""
        return slice(3 * self.triples + 2 * self.pairs, None)

    def denoised(self, errors: Tensor) -> Tensor:
        """Those that teach denoising: all but the views, whose colours no picture has."""
        return torch.cat([errors[: 2 * self.triples], errors[3 * self.triples :]])


@dataclass(frozen=True)
class Shown:
    """A batch of b rows: whose example, captions' ids [b, 77], timesteps [b], latents and noise.

    ``triples``: the examples of the triples. ``blind``: whether the noisier pictures see only the
    cleaner ones.
    """

    example: Tensor
    ids: Tensor
    t: Tensor
    clean: Tensor
    noise: Tensor
    triples: Tensor
    blind: bool


def draw(
    rows: Rows,
    latents: Tensor,
    tokens: Tensor,
    empty: Tensor,
    generator: torch.Generator,
    *,
    only_first: bool = False,
) -> Shown:
    """A batch, by the generator's chance.

    Args:
        latents: [n, 3, 2, 4, h, w], means and deviations of each example's three pictures.
        tokens: [n, 2, 3, 77], captions of the first two; empty: [1, 77].
        only_first: plain pictures are the examples' first ones alone, the ones that have labels.
    """
    options: dict[str, Any] = {"generator": generator, "device": latents.device}
    chosen = torch.randint(len(latents), (rows.triples + rows.pairs + rows.plain,), **options)
    three, two, one = chosen.split((rows.triples, rows.pairs, rows.plain))
    example = torch.cat([three.repeat(3), two.repeat(2), one])
    turn = torch.randint(2, (rows.pairs,), **options)  # either picture may be the noisier one
    side = torch.randint(2, (rows.plain,), **options) * (not only_first)
    kinds = torch.arange(3, device=latents.device).repeat_interleave(rows.triples)
    view = torch.cat([kinds, turn, 1 - turn, side])
    count = len(example)
    caption = torch.randint(3, (count,), **options)
    dropped = torch.rand(count, 1, **options) < DROPPED
    dropped[rows.views] = True  # as images are matched
    ids = torch.where(dropped, empty, tokens[example, view.clamp(FIRST, SECOND), caption])
    mean, deviation = latents[example, view].float().unbind(1)
    clean = mean + deviation * torch.randn(mean.shape, **options)
    noise = torch.randn(mean.shape, **options)
    noisier = _spread(rows.pairs, options)
    shares = [
        torch.rand(3 * rows.triples, **options).square() * CLEAR / STEPS,
        noisier,
        noisier * torch.rand(rows.pairs, **options),
        _spread(rows.plain, options),
    ]
    t = (torch.cat(shares) * STEPS).long().clamp(max=STEPS - 1)
    blind = torch.rand(1, **options).item() < _BLIND
    return Shown(example, ids, t, clean, noise, three, blind)


def _spread(count: int, options: dict[str, Any]) -> Tensor:
    """``count`` numbers of [0, 1), one from each of equally many parts: less scatter, in order."""
    places = torch.arange(count, device=options["device"]) + torch.rand(count, **options)
    return places / max(count, 1)
