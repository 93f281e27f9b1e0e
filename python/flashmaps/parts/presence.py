"""Evidence that a part is seen in an image: what its word says of it.

Three numbers for each part p, of one image:

    area   log of the share of the image that is probably p, over its mean share in the collection
    peak   log-odds of p where it is most probable, the mean of its best cells
    gain   how much better the noise is explained with p in the prompt, over the mean of that in
           the collection: (L(prompt without p) - L(prompt)) / mean

They are told beside the fourth, the peak that is read from features
(:mod:`flashmaps.parts.sight`), by which it is decided: docs/parts.md has what each of them knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.latents import encode
from flashmaps.diffusion.learned_words import Words
from flashmaps.parts.losses import noise_errors
from flashmaps.parts.reading import probabilities, seen

EVIDENCE = ("area", "peak", "gain", "sight")
MISSING, SEEN = 0.25, 0.5  # shares of a part that count as missing below, and as seen above
_LEAST = 1e-5  # share of an image, where a part's area is nothing
_BEST = 0.005  # of the cells, whose mean is the peak
_TIMESTEPS = (600,)  # of the gain
_IMAGES = 6  # of the collection, that norms are the mean of
_DECAY = 0.05


@torch.no_grad()
def raw_evidence(
    pipe: Any, latents: Tensor, words: Words, names: Sequence[str], layers: Sequence[str],
    timestep: int, head: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """([B, P, 3] area, peak and gain before they are set beside the collection's, [B, P + 1, h, w])

    ``names``: all words, the category's first.
    """
    prompt = " ".join(("a", *names))
    logs = seen(pipe, latents, [prompt] * len(latents), words, names, layers=layers,
                timestep=timestep, seeds=(0,))  # fmt: skip
    found = probabilities(logs, head).float().cpu()
    areas = found[:, :-1].mean((2, 3)).clamp_min(_LEAST).log()
    whole, gains = _noise(pipe, latents, prompt, words), torch.zeros_like(areas)
    for p in range(len(names) - 1):
        less = " ".join(("a", *(name for k, name in enumerate(names) if k != p + 1)))
        gains[:, p] = _noise(pipe, latents, less, words) - whole
    return torch.stack((areas, peaks(found[:, :-1]), gains), 2), found


def peaks(planes: Tensor) -> Tensor:
    """[B, P] log-odds of each part, of the mean of its most probable cells; [B, P, h, w]."""
    flat = planes.flatten(2)
    best = flat.topk(max(1, int(_BEST * flat.shape[2])), 2).values.mean(2)
    return torch.logit(best.clamp(1e-4, 1 - 1e-4))


def _noise(pipe: Any, latents: Tensor, prompt: str, words: Words) -> Tensor:  # [B]
    total = torch.zeros(len(latents))
    for t in _TIMESTEPS:
        drawn = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(t))
        noise = drawn.to(latents).expand_as(latents)
        count = len(latents)
        total += noise_errors(pipe, latents, noise, [t] * count, [prompt] * count, words).mean(
            (1, 2)
        ).cpu()  # fmt: skip
    return total / len(_TIMESTEPS)


def beside(raw: Tensor, norms: Tensor) -> Tensor:
    """Evidence set beside the collection's: ``norms`` [P, 2] are log areas and gains."""
    area = raw[..., 0] - norms[:, 0]
    gain = (raw[..., 2] / norms[:, 1].clamp_min(1e-8)).clamp(-3, 3)
    return torch.stack((area, raw[..., 1], gain), -1)


@torch.no_grad()
def fit_norms(
    pipe: Any, images: Sequence[np.ndarray], masks: Tensor, words: Words, names: Sequence[str],
    layers: Sequence[str], timestep: int, head: Tensor, *, batch: int = 4,
) -> Tensor:  # fmt: skip
    """[P, 2], the norms of :func:`beside`, from the first images of the collection."""
    images, masks = images[:_IMAGES], masks[:_IMAGES]
    gains = torch.cat([
        raw_evidence(
            pipe, encode(pipe, list(images[i : i + batch])), words, names, layers, timestep, head,
        )[0][..., 2]
        for i in range(0, len(images), batch)
    ])  # fmt: skip
    areas = masks.mean((2, 3))
    there = areas > 0
    counted = there.sum(0).clamp_min(1)
    shares, means = areas.sum(0) / counted, (gains * there).sum(0) / counted
    return torch.stack((shares.clamp_min(_LEAST).log(), means.clamp_min(1e-6)), 1)


def logistic(x: Tensor, y: Tensor) -> Tensor:  # [features + 1]
    """Weights and bias of a logistic regression; both answers count alike."""
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    z = ((x - mean) / spread).double()
    share = y.mean().clamp(0.02, 0.98).double()
    weight = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share)).double()
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        found = torch.nn.functional.binary_cross_entropy_with_logits(
            z @ w[:-1] + w[-1], y.double(), weight
        )
        total = found + _DECAY * w[:-1].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)
    slope = w.detach()[:-1] / spread
    return torch.cat((slope, (w.detach()[-1] - slope @ mean.double())[None])).float()
