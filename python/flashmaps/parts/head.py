"""From attention to probabilities: a linear head, fitted to the masks of the collection itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DECAY = 1e-3  # of the weights, beside a mean loss of cells
_ROUNDS = 100


def fit_head(
    logs: Tensor, masks: Tensor, *, decay: float = _DECAY, rounds: int = _ROUNDS
) -> Tensor:  # [P + 1, layers W + 1]
    """The head of :func:`flashmaps.parts.reading.probabilities`.

    Multinomial logistic regression, by L-BFGS: cross-entropy between softmax(W [x, 1]) and what the
    masks say of a cell, each part's share of it and the rest, + decay |W|^2 without the bias.

    Args:
        logs: [n, layers, W, h, w], log relative attention. masks: [n, P, H, W] in 0..1.
    """
    shares = F.adaptive_avg_pool2d(masks, (logs.shape[3], logs.shape[4]))
    rest = (1 - shares.sum(1, keepdim=True)).clamp_min(0)
    wanted = torch.cat((shares, rest), 1).transpose(0, 1).flatten(1).T.double()
    wanted = wanted / wanted.sum(1, keepdim=True)
    x = logs.flatten(1, 2).transpose(0, 1).flatten(1).T.double()
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / spread
    head = torch.zeros(wanted.shape[1], x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([head], max_iter=rounds, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        found = F.cross_entropy(x @ head[:, :-1].T + head[:, -1], wanted)
        total = found + decay * head[:, :-1].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)
    weights = head.detach()[:, :-1] / spread
    return torch.cat((weights, (head.detach()[:, -1] - weights @ mean)[:, None]), 1).float()
