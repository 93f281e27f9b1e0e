"""How good learned words are: noise explained, the nearest word, parts told apart, attention.

The noise loss of a prompt is the mean of (y - model(x_t, t, prompt))^2 over held-out images and the
timesteps ``TIMESTEPS``, each image with the same noise whatever the prompt. The gap closed by
learned words is

    gap = (L(empty prompt) - L(learned)) / (L(empty prompt) - L("a cat")),

1 for what explains images as well as the true word does, 0 for what says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashmaps.diffusion.images import load_image
from flashmaps.diffusion.latents import encode
from flashmaps.diffusion.learned_words import Words
from flashmaps.evaluation.part_scenes import PartImages
from flashmaps.parts.losses import noise_errors
from flashmaps.parts.reading import probabilities, seen
from flashmaps.parts.result import Parts
from flashmaps.parts.sight import sight_of
from flashmaps.segmentation.segment import see
from flashmaps.world import CATEGORIES

TIMESTEPS = (300, 500, 700, 900)
_BATCH = 8


@torch.no_grad()
def noise_loss(
    pipe: Any, latents: Tensor, masks: Tensor, prompt: str, words: Words
) -> dict[str, list[float]]:  # each [n]
    """Of each image the noise loss: whole, and inside ``masks`` [n, h, w], shares of cells."""
    grid = (latents.shape[2], latents.shape[3])
    inside = F.adaptive_avg_pool2d(masks[:, None], grid)[:, 0]
    whole, within = [], []
    for start in range(0, len(latents), _BATCH):
        some = latents[start : start + _BATCH]
        shares = inside[start : start + _BATCH].to(some)
        errors = torch.zeros_like(some[:, 0])
        for t in TIMESTEPS:
            noise = torch.stack([
                torch.randn(some.shape[1:], generator=torch.Generator().manual_seed(1009 * i + t))
                for i in range(start, start + len(some))
            ]).to(some)  # fmt: skip
            errors += noise_errors(pipe, some, noise, [t] * len(some), [prompt] * len(some), words)
        errors = errors / len(TIMESTEPS)
        whole.append(errors.mean((1, 2)))
        within.append((errors * shares).sum((1, 2)) / shares.sum((1, 2)).clamp_min(1e-6))
    return {"whole": torch.cat(whole).tolist(), "inside": torch.cat(within).tolist()}


def nearest_category(pipe: Any, embedding: Tensor) -> tuple[str, int]:
    """(the category whose word's embedding is nearest by cosine, its rank among all tokens from 1).

    ``embedding`` [n, c]: the mean of the tokens counts.
    """
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float().cpu()
    likeness = F.normalize(table, dim=1) @ F.normalize(embedding.mean(0), dim=0)
    of = {name: pipe.tokenizer(name, add_special_tokens=False).input_ids[0] for name in CATEGORIES}
    best = max(of, key=lambda name: float(likeness[of[name]]))
    return best, int((likeness > likeness[of[best]]).sum()) + 1


@torch.no_grad()
def part_scores(
    pipe: Any, parts: Parts, held: PartImages, pairs: Mapping[int, int]
) -> dict[str, Any]:
    """How parts are told apart in held-out images.

    Args:
        pairs: which true part each learned one is; those that are not in it are none.

    For each image: ``pixels`` of the object, and of them ``right``: whose most probable part by
    :meth:`Parts.masks` is the true one; ``attention_right``: by the words' attention alone, each
    relative to its mean; ``majority_right``: if the most frequent part were everywhere. And of all
    images ``attention_iou``: of as many cells as a true part has, those that look at its word most,
    the mean over parts and images that show them; ``object_iou``: of the pixels that are probably
    of a part.
    """
    images = [load_image(each) for each in held.images]
    truth = torch.from_numpy(np.stack(held.labels)).long()
    size = truth.shape[1:]
    logs, found = [], []
    for start in range(0, len(images), _BATCH):
        some = encode(pipe, images[start : start + _BATCH])
        logs.append(
            seen(pipe, some, [parts.prompt()] * len(some), parts.words, tuple(parts.words),
                 layers=parts.layers, timestep=parts.timestep, seeds=(0,))
        )  # fmt: skip
        found.append(probabilities(logs[-1], parts.head))
    attention = torch.cat(logs).mean(1)[:, 1 : 1 + parts.count].cpu()
    probable = torch.cat(found).cpu()
    on = truth >= 0
    thing = F.interpolate(1 - probable[:, -1:], size, mode="bilinear", align_corners=False)[:, 0]
    mine, most = thing > 0.5, int(truth[on].bincount().argmax())
    return {
        "pixels": on.sum((1, 2)).tolist(),
        "right": _right(probable[:, :-1], truth, pairs),
        "attention_right": _right(attention, truth, pairs),
        "majority_right": (truth == most).sum((1, 2)).tolist(),
        "attention_iou": _attention_iou(attention, truth, pairs),
        "object_iou": float((on & mine).sum() / (on | mine).sum()),
    }


@torch.no_grad()
def sight_scores(
    pipe: Any, parts: Parts, held: PartImages, pairs: Mapping[int, int]
) -> dict[str, list[int]]:
    """``pixels`` and ``right`` of :func:`part_scores`, by the masks of ``fm.find_parts``."""
    truth = torch.from_numpy(np.stack(held.labels)).long()
    sight = sight_of(parts, pipe)
    found = see(pipe, [load_image(each) for each in held.images])
    planes = torch.stack([sight.read(pipe, each)[:-2] for each in found])
    pixels = (truth >= 0).sum((1, 2)).tolist()
    return {"pixels": pixels, "right": _right(planes, truth, pairs)}


def _right(planes: Tensor, truth: Tensor, pairs: Mapping[int, int]) -> list[int]:
    """Of each image the object's pixels whose largest of ``planes`` [n, P, h, w] is the truth."""
    known = torch.tensor([pairs.get(p, -2) for p in range(planes.shape[1])])
    full = F.interpolate(planes, truth.shape[1:], mode="bilinear", align_corners=False)
    hit: Tensor = (known[full.argmax(1)] == truth) & (truth >= 0)
    return hit.sum((1, 2)).tolist()


def _attention_iou(attention: Tensor, truth: Tensor, pairs: Mapping[int, int]) -> float:
    grid = (attention.shape[2], attention.shape[3])
    scores = []
    for learned, true in pairs.items():
        cells = F.adaptive_avg_pool2d((truth == true)[:, None].float(), grid)[:, 0] >= 0.5
        for plane, own in zip(attention[:, learned], cells, strict=True):
            count = int(own.sum())
            if count:
                chosen = torch.zeros_like(own).flatten()
                chosen[plane.flatten().topk(count).indices] = True
                chosen = chosen.view_as(own)
                scores.append(float((chosen & own).sum() / (chosen | own).sum()))
    return float(np.mean(scores)) if scores else float("nan")


def pair_up(labels: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[int, int]:
    """Which true part each learned one is most of, by the pixels of the images learned from."""
    pairs = {}
    mine, theirs = (
        np.concatenate([x.ravel() for x in labels]),
        np.concatenate([x.ravel() for x in truth]),
    )
    for part in np.unique(mine[mine >= 0]):
        own = theirs[(mine == part) & (theirs >= 0)]
        if len(own):
            pairs[int(part)] = int(np.bincount(own).argmax())
    return pairs
