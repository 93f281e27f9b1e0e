"""Evidence that a part is seen in an image, and how probable that makes it.

Three numbers for each part p, of one image:

    area   log of the share of the image that is probably p, over its mean share in the collection
    peak   log-odds of p where it is most probable, the mean of its best cells
    gain   how much better the noise is explained with p in the prompt, over the mean of that in
           the collection: (L(prompt without p) - L(prompt)) / mean

and a logistic regression of them, one for all parts. It is fitted without labels: the images of the
collection are shown again with patches, plain or striped, pasted over them, and what the patches
cover is known from the collection's own masks.
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

EVIDENCE = ("area", "peak", "gain")
MISSING, SEEN = 0.25, 0.5  # shares of a part that count as missing below, and as seen above
_LEAST = 1e-5  # share of an image, where a part's area is nothing
_BEST = 0.005  # of the cells, whose mean is the peak
_TIMESTEPS = (600,)  # of the gain
_IMAGES = 6  # of the collection, plain and covered, that the regression is fitted to
_DECAY = 0.05


@torch.no_grad()
def raw_evidence(
    pipe: Any, latents: Tensor, words: Words, names: Sequence[str], layers: Sequence[str],
    timestep: int, head: Tensor, *, gain: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """([B, P, 3] area, peak and gain before they are set beside the collection's, [B, P + 1, h, w])

    ``names``: all words, the category's first. Without ``gain`` its column is 0.
    """
    prompt = " ".join(("a", *names))
    logs = seen(pipe, latents, [prompt] * len(latents), words, names, layers=layers,
                timestep=timestep, seeds=(0,))  # fmt: skip
    found = probabilities(logs, head).float().cpu()
    flat = found[:, :-1].flatten(2)
    best = flat.topk(max(1, int(_BEST * flat.shape[2])), 2).values.mean(2).clamp(1e-4, 1 - 1e-4)
    columns = [flat.mean(2).clamp_min(_LEAST).log(), torch.logit(best), torch.zeros_like(best)]
    if gain:
        whole = _noise(pipe, latents, prompt, words)
        for p in range(len(names) - 1):
            less = " ".join(("a", *(name for k, name in enumerate(names) if k != p + 1)))
            columns[2][:, p] = _noise(pipe, latents, less, words) - whole
    return torch.stack(columns, 2), found


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


def occluded(
    images: Sequence[np.ndarray], masks: Tensor, seed: int
) -> tuple[list[np.ndarray], Tensor, Tensor]:
    """Images [h, w, 3] with patches over them; the share of each part still seen, [n, P]; masks.

    Two to four ellipses or rectangles, plain or striped, about parts drawn by chance. The share is
    NaN for parts that the image did not show before. The masks are what is left of the given ones.
    """
    rng = np.random.default_rng(seed)
    changed, shares, rest = [], [], []
    for image, mask in zip(images, masks.numpy(), strict=True):
        height, width = image.shape[:2]
        y, x = np.mgrid[:height, :width]
        covered = np.zeros((height, width), dtype=bool)
        picture = image.copy()
        areas = mask.sum((1, 2))
        there = np.flatnonzero(areas > 0)
        for _ in range(int(rng.integers(2, 5))):
            if not len(there):
                break
            part = mask[rng.choice(there)].ravel()
            cell = int(rng.choice(len(part), p=part / part.sum()))
            cy, cx = cell // width, cell % width
            a, b = (rng.uniform(0.08, 0.22, 2) * (width, height)).tolist()
            u, v = (x - cx) / a, (y - cy) / b
            patch = (u * u + v * v < 1) if rng.random() < 0.5 else (abs(u) < 1) & (abs(v) < 1)
            colours, wave = rng.random((2, 3)), rng.normal(0, 0.6, 2)
            stripes = (np.sin(wave[0] * x + wave[1] * y) > 0) & (rng.random() < 0.6)
            picture[patch] = np.where(stripes[..., None], colours[0], colours[1])[patch]
            covered |= patch
        left = (mask * ~covered).sum((1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            shares.append(np.where(areas > 0, left / areas, np.nan))
        changed.append(picture)
        rest.append(mask * ~covered)
    return changed, torch.from_numpy(np.stack(shares)).float(), torch.from_numpy(np.stack(rest))


def beside(raw: Tensor, norms: Tensor) -> Tensor:
    """Evidence set beside the collection's: ``norms`` [P, 2] are log areas and gains."""
    area = raw[..., 0] - norms[:, 0]
    gain = (raw[..., 2] / norms[:, 1].clamp_min(1e-8)).clamp(-3, 3)
    return torch.stack((area, raw[..., 1], gain), -1)


def fit_presence(
    pipe: Any, images: Sequence[np.ndarray], masks: Tensor, words: Words, names: Sequence[str],
    layers: Sequence[str], timestep: int, head: Tensor, *, gain: bool, seed: int, batch: int = 4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(norms [P, 2], weights [4]) of `beside` and `presence`, from the collection itself."""

    images, masks = images[:_IMAGES], masks[:_IMAGES]

    def of(pictures: Sequence[np.ndarray]) -> Tensor:
        parts = [
            raw_evidence(
                pipe, encode(pipe, list(pictures[i : i + batch])), words, names, layers, timestep,
                head, gain=gain,
            )[0]
            for i in range(0, len(pictures), batch)
        ]  # fmt: skip
        return torch.cat(parts)

    plain = of(images)
    there = masks.mean((2, 3)) > 0
    counted = there.sum(0).clamp_min(1)
    shares = masks.mean((2, 3)).sum(0) / counted
    gains = (plain[..., 2] * there).sum(0) / counted
    norms = torch.stack((shares.clamp_min(_LEAST).log(), gains.clamp_min(1e-6)), 1)
    changed, left, _ = occluded(images, masks, seed)
    evidence = torch.cat((beside(plain, norms)[there], beside(of(changed), norms).flatten(0, 1)))
    seen_share = torch.cat((torch.ones(int(there.sum())), left.flatten()))
    kept = torch.isfinite(seen_share) & ((seen_share < MISSING) | (seen_share >= SEEN))
    return norms, _logistic(evidence[kept], (seen_share[kept] >= SEEN).float())


def _logistic(x: Tensor, y: Tensor) -> Tensor:  # [features + 1]
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


def presence(evidence: Tensor, weights: Tensor) -> Tensor:
    """[..., P] probability that each part is seen, from evidence [..., P, 3]."""
    return torch.sigmoid(evidence @ weights[:-1] + weights[-1])
