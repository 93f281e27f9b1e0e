"""Alignment: what the decoder's tokens are taught to say about the object that they show.

Beside the diffusion loss a linear layer reads from the output of some transformer blocks, at every
token, which part the token shows and where on the object at rest it lies: the world knows both. It
is the representation alignment of Yu et al. (ICLR 2025, "Representation Alignment for Generation")
with the drawn world's truth in the place of a pretrained encoder's features, which a miniature that
is trained from nothing does not have. The linear layers are used in training alone and thrown away.

It is supervision: how well a model trained with it matches scenes of the world says what maps can
do where features mean something, and nothing of what diffusion alone teaches. The built-in model
was trained without it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashmaps.world import Scene
from flashmaps.world.categories import CATEGORIES

# The decoder's blocks that are read: at half the latents' side, and at the full one.
LAYERS = (
    "up_blocks.1.attentions.1.transformer_blocks.0",
    "up_blocks.2.attentions.0.transformer_blocks.0",
)
UNKNOWN = -1  # photos: nobody says what they show
SQUARES = 8  # a side; an object at rest is cut into so many by so many places
_FIRST_PART = dict(
    zip(
        CATEGORIES,
        np.cumsum([0, *(len(category.parts) for category in CATEGORIES.values())]),
        strict=False,
    )
)
PARTS = sum(len(category.parts) for category in CATEGORIES.values())  # PARTS itself: no object
PLACES = len(CATEGORIES) * SQUARES**2  # PLACES itself: no object
_NOTHING = 0.3  # weight of a token that shows no object: most do


def unknown(side: int) -> np.ndarray:
    """The labels of a picture of which nothing is known, int16 [side, side, 2]."""
    return np.full((side, side, 2), UNKNOWN, np.int16)


def labels(scene: Scene, side: int) -> np.ndarray:
    """Part and place shown at the centres of side x side cells, int16 [side, side, 2]."""
    centres = (np.arange(side) + 0.5) / side * scene.size - 0.5
    points = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)
    instance, part, drawing = scene.at(points)
    found = np.tile(np.array([PARTS, PLACES], np.int16), (side * side, 1))
    names = list(CATEGORIES)
    for each in scene.instances:
        here = instance == each.index
        column, row = (drawing[here] / 100 * SQUARES).astype(int).clip(0, SQUARES - 1).T
        found[here, 0] = _FIRST_PART[each.category] + part[here]
        found[here, 1] = names.index(each.category) * SQUARES**2 + row * SQUARES + column
    return found.reshape(side, side, 2)


class Alignment(nn.Module):
    """The linear layers, one for each of ``LAYERS``, with these numbers of channels."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(n, elementwise_affine=False) for n in channels)
        heads = [nn.Linear(n, PARTS + 1 + PLACES + 1) for n in channels]
        for head in heads:  # nothing is drawn that a resumed run could draw anew
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, outputs: list[Tensor], truth: Tensor, weights: Tensor) -> Tensor:
        """Mean cross-entropy of part and place, over layers and known tokens, [].

        Args:
            outputs: of the blocks ``LAYERS``, [b, N, c] each.
            truth: what `labels` gives, [b, side, side, 2]; a token that covers several of its
                cells answers for each of them.
            weights: of the pictures, [b].
        """
        losses = []
        for norm, head, output in zip(self.norms, self.heads, outputs, strict=True):
            cells = _cells(truth, output.shape[1])
            found = head(norm(output)).float().split((PARTS + 1, PLACES + 1), dim=-1)
            for logits, wanted, nothing in zip(
                found, cells.unbind(-1), (PARTS, PLACES), strict=True
            ):
                surprise = -F.log_softmax(logits, dim=-1).gather(-1, wanted.clamp(min=0))
                weight = torch.where(wanted == nothing, _NOTHING, 1.0) * (wanted != UNKNOWN)
                weight = weight * weights[:, None, None]
                losses.append((surprise * weight).sum() / weight.sum().clamp(min=1e-6))
        return torch.stack(losses).mean()


def _cells(truth: Tensor, tokens: int) -> Tensor:
    """[b, tokens, cells of a token, 2] int64."""
    count, side = truth.shape[:2]
    grid = round(tokens**0.5)
    each = side // grid
    cut = truth.view(count, grid, each, grid, each, 2).transpose(2, 3)
    return cut.reshape(count, tokens, each * each, 2).long()
