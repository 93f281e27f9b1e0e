"""Agreement: what two views of a picture must say about the same place, and nobody has to tell.

A view is the picture warped and recoloured, so which of its tokens shows what is known
(:mod:`flashmaps.models.views`). Three losses of the decoder's maps ask for it, each a cross-entropy
of the row of a map against the known place:

- features: cosines of what a transformer block puts out, as ``compare="features"`` matches them;
- queries on keys: the layer's own attention from one view to the other, A_st of note eq. 2.4, mean
  over heads, as ``compare="qk"`` does;
- walks: from the view to another picture of the same object, and back to the first picture, by both
  kinds of map: the row of A_st A_ts (note, "inverse mapping") must end where the walk began
  (Jabri, Owens, Efros, "Space-time correspondence as a contrastive random walk", 2020). Where the
  walk passes through the other picture nobody says; to come back right, it must pass where it can
  be told again.

No label takes part. ``van den Oord et al., 2018`` is the cross-entropy over tokens (InfoNCE).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07  # of cosines
_LEAST = 1e-6  # probability below which a map's entry counts as that


@dataclass
class Seen:
    """What one layer showed: its block's output and its queries and keys, each [b, N, c]."""

    output: Tensor
    query: Tensor
    key: Tensor


class _Enough(Exception):
    """The last layer was seen."""


class Reader:
    """What the named transformer blocks of a UNet put out, and their queries and keys."""

    def __init__(self, unet: Any, layers: tuple[str, ...]) -> None:
        self._looking = False
        self._last = layers[-1], "output"
        self._parts: dict[tuple[str, str], Tensor] = {}
        self._blocks = {name: unet.get_submodule(name) for name in layers}
        for name, block in self._blocks.items():
            for part, module in (
                ("output", block),
                ("query", block.attn1.to_q),
                ("key", block.attn1.to_k),
            ):
                module.register_forward_hook(partial(self._keep, (name, part)))

    def _keep(self, place: tuple[str, str], module: Any, _given: Any, output: Tensor) -> None:
        if self._looking:
            self._parts[place] = output
            if place == self._last:
                raise _Enough

    def look(self, unet: Any, *inputs: Tensor) -> list[tuple[Seen, int]]:
        """What each layer shows of these inputs, float32, and its number of heads.

        The pass ends with the last layer: what comes behind it, a fifth of a step, says nothing of
        it.
        """
        self._looking = True
        try:
            unet(*inputs)
        except _Enough:
            pass
        finally:
            self._looking = False
        found = []
        for name, block in self._blocks.items():
            parts = [self._parts.pop((name, part)).float() for part in ("output", "query", "key")]
            found.append((Seen(*parts), block.attn1.heads))
        return found


def targets(where: Tensor, grid: int) -> Tensor:
    """The place of each token of a view among the tokens of the picture, [n, grid^2, grid^2].

    Args:
        where: [n, side, side, 2], see :func:`flashmaps.models.views.warped`; grid divides side.

    A row has the bilinear weights of the four tokens around the place, and sums to 1; or it is zero
    where the place lies outside of the frame.
    """
    count, side = where.shape[:2]
    places = F.avg_pool2d(where.float().permute(0, 3, 1, 2), side // grid).flatten(2)  # [n, 2, N]
    inside = ((places >= 0) & (places <= 1)).all(1)
    x, y = (places * grid - 0.5).clamp(0, grid - 1).unbind(1)
    left, top = x.floor().clamp(max=max(grid - 2, 0)), y.floor().clamp(max=max(grid - 2, 0))
    weights = torch.zeros(count, grid * grid, grid * grid, device=where.device)
    for dx in (0, 1) if grid > 1 else (0,):
        for dy in (0, 1) if grid > 1 else (0,):
            share = (1 - (x - left - dx).abs()) * (1 - (y - top - dy).abs()) if grid > 1 else 1.0
            place = ((top + dy) * grid + left + dx).long()
            weights.scatter_add_(2, place[..., None], (share * inside)[..., None])
    return weights


def _cross_entropy(log_map: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the rows that have a place: log_map, wanted [n, N, M] to []."""
    return -(wanted * log_map).sum() / wanted.sum().clamp(min=1e-6)


def _rows(asked: Tensor | None, x: Tensor) -> Tensor:
    """Those rows of [n, N, ...], or all where there are no more."""
    return x if asked is None or len(asked) >= x.shape[1] else x.index_select(1, asked)


def _log(shares: Tensor) -> Tensor:
    return shares.clamp(min=_LEAST).log()


def _back(wanted: Tensor) -> Tensor:
    """Where each token of the picture lies in the view: rows sum to 1, or to 0 if nowhere."""
    turned = wanted.transpose(1, 2)
    mass = turned.sum(-1, keepdim=True)
    return torch.where(mass > 0.25, turned / mass.clamp(min=1e-6), 0)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2) / TEMPERATURE


def _attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """The map, mean over heads: note eq. 2.1 and 2.2, [n, N, M]."""
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)


def disagreement(
    seen: list[tuple[Seen, int]], where: Tensor, asked: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The losses, mean over layers, and the share of views' tokens that are found.

    Args:
        seen: what `Reader.look` gives for a batch of the first pictures, the second ones (or none
            of these) and the views, one behind the other.
        where: of the views.
        asked: numbers of tokens, int64 [k], at whose rows alone a layer of more than k tokens is
            looked: the same of each picture. A map of every row is what a step spends most on, and
            chance rows say on average what all of them do. Every layer of more than k tokens has to
            have those of these numbers.

    Returns "features", "attention" and, with second pictures, "walks", [] each; and how often the
    largest cosine is the token with the largest weight (no gradient).
    """
    sums: dict[str, list[Tensor]] = {"features": [], "attention": [], "walks": []}
    hits = []
    with torch.autocast(where.device.type, enabled=False):
        for layer, heads in seen:
            first, *second, view = layer.output.split(len(where))
            q_first, *q_second, q_view = layer.query.split(len(where))
            k_first, *k_second, k_view = layer.key.split(len(where))
            wanted = targets(where, round(first.shape[1] ** 0.5))
            back = _back(wanted)
            looked = partial(_rows, asked)
            wanted, back = looked(wanted), looked(back)
            cosines = _cosines(looked(view), first)
            sums["features"] += [
                _cross_entropy(cosines.log_softmax(-1), wanted),
                _cross_entropy(_cosines(looked(first), view).log_softmax(-1), back),
            ]
            sums["attention"] += [
                _cross_entropy(_log(_attention(looked(q_view), k_first, heads)), wanted),
                _cross_entropy(_log(_attention(looked(q_first), k_view, heads)), back),
            ]
            for other, query, key in zip(second, q_second, k_second, strict=True):
                begun, again = looked(view), _cosines(other, first).softmax(-1)
                walks = [
                    _cosines(begun, other).softmax(-1) @ again,
                    _attention(looked(q_view), key, heads) @ _attention(query, k_first, heads),
                ]
                sums["walks"] += [_cross_entropy(_log(walk), wanted) for walk in walks]
            known = wanted.sum(-1) > 0.5
            right = cosines.argmax(-1) == wanted.argmax(-1)
            hits.append((right & known).sum() / known.sum().clamp(min=1))
    losses = {name: torch.stack(values).mean() for name, values in sums.items() if values}
    return losses, torch.stack(hits).mean().detach()
