"""What a step of the UNet's training shows: views, pairs and plain pictures, in this order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pictures import FIRST, SECOND
from .store import Store

DROPPED = 0.2  # share of captions replaced by "", which guidance needs, and matching without one
STEPS = 1000  # of the scheduler
CLEAR = 300  # timesteps of views: beyond, there is more noise than picture
BLIND = 0.25  # share of the steps in which the noisier picture of a pair sees the other one alone


@dataclass(frozen=True)
class Rows:
    """How many of each kind. The rows of a batch are

    ``examples`` first pictures, as many second ones unless ``kinds`` is 2, as many views; the
    noisier pictures of ``pairs`` pairs, then their cleaner ones; and ``plain`` pictures.
    """

    examples: int
    pairs: int
    plain: int
    kinds: int = 3

    @classmethod
    def of(cls, batch: int, *, views: float, mutual: float, kinds: int = 3) -> Rows:
        """The rows of a batch: these shares of it in two or three views, and in pairs.

        Raises ValueError where a batch is too small to have one of each.
        """
        examples = max(1, int(views * batch / kinds)) if views > 0 else 0
        pairs = max(1, int(mutual * batch / 2)) if mutual > 0 else 0
        plain = batch - kinds * examples - 2 * pairs
        if plain < 1:
            raise ValueError(
                f"a batch of {batch} has no room for {examples} pictures in {kinds} views, {pairs} "
                "pairs and a plain picture; give a larger --unet-batch, smaller --views or --mutual"
            )
        return cls(examples, pairs, plain, kinds)

    @property
    def views(self) -> slice:
        """The examples that are seen in views."""
        return slice(self.kinds * self.examples)

    @property
    def denoised(self) -> slice:
        """The pairs and the plain pictures, which teach denoising."""
        return slice(self.views.stop, None)

    @property
    def plainly(self) -> slice:
        """The plain pictures."""
        return slice(self.views.stop + 2 * self.pairs, None)


@dataclass(frozen=True)
class Shown:
    """A batch of b rows: whose example, captions' ids [b, 77], timesteps [b], latents and noise."""

    example: Tensor
    ids: Tensor
    t: Tensor
    clean: Tensor
    noise: Tensor


def draw(
    rows: Rows,
    store: Store,
    empty: Tensor,
    generator: torch.Generator,
    see: Callable[[Tensor], Tensor],
    *,
    only_first: bool = False,
) -> Shown:
    """A batch, by the generator's chance.

    Args:
        empty: [1, 77], the tokens of no caption.
        see: views of these examples, [k] to means and deviations [k, 2, 4, h, w].
        only_first: plain pictures are the examples' first ones alone, the ones that have labels.
    """
    latents, tokens = store.latents, store.tokens
    options: dict[str, Any] = {"generator": generator, "device": latents.device}
    chosen = torch.randint(len(store), (rows.examples + rows.pairs + rows.plain,), **options)
    viewed, two, one = chosen.split((rows.examples, rows.pairs, rows.plain))
    example = torch.cat([viewed.repeat(rows.kinds), two.repeat(2), one])
    turn = torch.randint(2, (rows.pairs,), **options)  # either picture may be the noisier one
    side = torch.randint(2, (rows.plain,), **options) * (not only_first)
    # Views take their example's first picture here, and are put in its place below.
    shown = (FIRST, SECOND, FIRST) if rows.kinds == 3 else (FIRST, FIRST)
    kinds = torch.tensor(shown, device=latents.device).repeat_interleave(rows.examples)
    picture = torch.cat([kinds, turn, 1 - turn, side])
    count = len(example)
    caption = torch.randint(3, (count,), **options)
    dropped = torch.rand(count, 1, **options) < DROPPED
    dropped[rows.views] = True  # as images are matched
    ids = torch.where(dropped, empty, tokens[example, picture, caption].long())
    found = latents[example, picture]
    if rows.examples:
        found[rows.views.stop - rows.examples : rows.views.stop] = see(viewed)
    mean, deviation = found.float().unbind(1)
    clean = mean + deviation * torch.randn(mean.shape, **options)
    noise = torch.randn(mean.shape, **options)
    noisier = _spread(rows.pairs, options)
    shares = [
        torch.rand(rows.views.stop, **options).square() * CLEAR / STEPS,
        noisier,
        noisier * torch.rand(rows.pairs, **options),
        _spread(rows.plain, options),
    ]
    t = (torch.cat(shares) * STEPS).long().clamp(max=STEPS - 1)
    return Shown(example, ids, t, clean, noise)


def _spread(count: int, options: dict[str, Any]) -> Tensor:
    """``count`` numbers of [0, 1), one from each of equally many parts: less scatter, in order."""
    places = torch.arange(count, device=options["device"]) + torch.rand(count, **options)
    return places / max(count, 1)
