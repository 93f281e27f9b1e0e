"""Where learned words are attended to in an image, and what that says of the part at each place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.latents import noised
from flashmaps.diffusion.learned_words import Places, Words, prompt_states
from flashmaps.diffusion.record import Record

Grid = tuple[int, int]
# Tokens that every prompt has are read too: what looks at none of the words looks at them.
FIXED = ("start", "first word", "end", "padding")


def word_attention(
    record: Record, places: Sequence[Places], names: Sequence[str]
) -> Iterable[tuple[Tensor, Grid]]:
    """Of each layer, what share of every cell's attention goes to each word: [B, N, words], grid.

    A word of several tokens has their sum, one that a prompt does not hold zeros.
    """
    for entry in record:
        A = entry.map()
        if entry.grid is None:
            raise ValueError(f"layer {entry.layer!r} has no grid; choose others by layers=")
        hot = torch.zeros(len(places), A.shape[2], len(names), dtype=A.dtype, device=A.device)
        for row, found in enumerate(places):
            for k, name in enumerate(names):
                hot[row, list(found.get(name, ())), k] = 1
        yield A @ hot, entry.grid


def relative(attention: Tensor) -> Tensor:
    """[B, N, words] over its mean over the image's cells: 1 everywhere for what looks nowhere."""
    tiny = torch.finfo(attention.dtype).tiny
    return attention.clamp_min(tiny) / attention.clamp_min(tiny).mean(1, keepdim=True)


@torch.no_grad()
def seen(
    pipe: Any,
    latents: Tensor,  # [B, c, h, w]
    prompts: Sequence[str],
    words: Words,
    names: Sequence[str],
    *,
    layers: Iterable[str],
    timestep: int,
    seeds: Sequence[int],
) -> Tensor:
    """[B, layers, words + 4, h, w]: log of the relative attention to words, on the finest grid.

    The given words, then ``FIXED``. float32, the mean over ``seeds`` of the noise. A cell
    that looks at a word as much as the mean cell has 0.
    """
    dtype = pipe.unet.dtype
    states, plain = prompt_states(pipe, prompts, words)
    places = [_with_fixed(each, states.shape[1]) for each in plain]
    found: list[list[Tensor]] = []
    finest: Grid = (0, 0)
    for t, x in noised(pipe, latents, [timestep], [list(seeds)] * len(latents)):
        with capture(pipe.unet, layers, kind="cross", keep="qk") as record:
            pipe.unet(x.to(dtype), t, encoder_hidden_states=states.to(dtype))
        found.append([])
        for attention, grid in word_attention(record, places, (*names, *FIXED)):
            logs = relative(attention.float()).log()
            found[-1].append(logs.transpose(1, 2).unflatten(2, grid))
            finest = max(finest, grid)
    means = [torch.stack(each).mean(0) for each in zip(*found, strict=True)]
    planes = [F.interpolate(x, finest, mode="bilinear", align_corners=False) for x in means]
    return torch.stack(planes, 1)


def _with_fixed(places: Places, count: int) -> Places:
    """The places with those of the tokens that every prompt has."""
    end = max(max(at) for at in places.values()) + 1
    padding = tuple(range(min(end + 1, count - 1), count))
    return {**places, **dict(zip(FIXED, ((0,), (1,), (end,), padding), strict=True))}


def probabilities(logs: Tensor, head: Tensor) -> Tensor:
    """[B, P + 1, h, w]: of each part, and at last of no part, by a linear head.

    softmax(head [logs, 1]) with logs [B, layers, W, h, w] of :func:`seen` and head
    [P + 1, layers W + 1].
    """
    weights, bias = head[:, :-1].to(logs), head[:, -1].to(logs)
    scores = torch.einsum("kw,bwij->bkij", weights, logs.flatten(1, 2)) + bias[:, None, None]
    return scores.softmax(1)
