"""What learned words are trained by: how well they explain the noise, and where they look.

With x_t = sqrt(a_t) z + sqrt(1 - a_t) e and y what the model should predict (e, or the velocity),

    noise      L_n = mean (y - model(x_t, t, prompt))^2, over the whole image;
    attention  L_a = mean over layers of C + R;
               C = mean over words w of KL(T_w || A_w), A_w(i) = A_iw / sum_k A_kw the word's column
               of the head-averaged map over the cells, T_w its mask, both summing to 1;
               R = mean over cells i of parts of KL(S_i || B_i), B_i(p) = A_ip / sum_q A_iq which of
               the parts a cell looks at, S_i(p) which it is of;
    both       L_n + weight L_a.

L_n is textual inversion (Gal et al. 2023). C is what keypoints are learned by (Hedlin et al. 2024),
R what SLiMe (Khani et al. 2024) is. Gradients go through the lazy maps: none is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.latents import prediction_target, to_levels
from flashmaps.diffusion.learned_words import Words, prompt_states
from flashmaps.parts.reading import word_attention

LOSSES = ("noise", "attention", "both")


def step_losses(
    pipe: Any,
    latents: Tensor,  # [B, c, h, w]
    noise: Tensor,  # [B, c, h, w]
    timesteps: Sequence[int],
    prompts: Sequence[str],
    words: Words,
    masks: Tensor,  # [B, names, h, w]
    names: Sequence[str],  # words that are told where to look
    layers: Iterable[str],
) -> tuple[Tensor, Tensor]:
    """(L_n, L_a) of one forward pass. The first of ``names`` is the object's, others are parts'."""
    states, places = prompt_states(pipe, prompts, words)
    grad = torch.is_grad_enabled()
    with capture(pipe.unet, layers, kind="cross", keep="qk", grad=grad) as record:
        errors = _errors(pipe, latents, noise, timesteps, states)
    here = torch.tensor([[name in each for name in names] for each in places]).to(masks.device)
    losses = []
    for attention, grid in word_attention(record, places, names):
        target = F.adaptive_avg_pool2d(masks, grid).flatten(2).transpose(1, 2)  # [B, N, words]
        found = attention.float()
        among = row_divergence(found[..., 1:], target[..., 1:], here[:, 1:])
        losses.append(column_divergence(found, target, here) + among)
    if not losses:
        raise ValueError("no cross-attention layer was recorded; choose by layers=")
    return errors.mean(), torch.stack(losses).mean()


def noise_errors(
    pipe: Any,
    latents: Tensor,
    noise: Tensor,
    timesteps: Sequence[int],
    prompts: Sequence[str],
    words: Words,
) -> Tensor:  # [B, h, w]
    """(y - model(x_t, t, prompt))^2 of each cell, the mean over channels."""
    states, _ = prompt_states(pipe, prompts, words)
    return _errors(pipe, latents, noise, timesteps, states)


def _errors(
    pipe: Any, latents: Tensor, noise: Tensor, timesteps: Sequence[int], states: Tensor
) -> Tensor:
    dtype = pipe.unet.dtype
    x = to_levels(pipe, latents, noise, timesteps).to(dtype)
    t = torch.tensor(timesteps, device=x.device)
    found = pipe.unet(x, t, encoder_hidden_states=states.to(dtype)).sample
    return (found.float() - prediction_target(pipe, latents, noise, timesteps)).square().mean(1)


def column_divergence(attention: Tensor, target: Tensor, here: Tensor) -> Tensor:
    """Mean KL(T_w || A_w) of the words that are ``here`` [B, words] and have a mask.

    attention, target: [B, N, words], not yet normalised over the N cells.
    """
    tiny = torch.finfo(attention.dtype).tiny
    mass = target.sum(1)
    wanted = target / mass.clamp_min(tiny)[:, None]
    log_of = attention.clamp_min(tiny).log() - attention.sum(1, keepdim=True).clamp_min(tiny).log()
    each = (torch.xlogy(wanted, wanted) - wanted * log_of).sum(1)  # [B, words]
    counted = (here & (mass > 0)).to(each)
    return (each * counted).sum() / counted.sum().clamp_min(1)


def row_divergence(attention: Tensor, target: Tensor, here: Tensor) -> Tensor:
    """Mean KL(S_i || B_i) of the cells i that are of parts that are ``here`` [B, parts].

    attention, target: [B, N, parts]; a cell counts as much as it is of parts.
    """
    tiny = torch.finfo(attention.dtype).tiny
    wanted, found = target * here[:, None].to(target), attention * here[:, None].to(attention)
    mass = wanted.sum(-1)
    shares = wanted / mass.clamp_min(tiny)[..., None]
    log_of = found.clamp_min(tiny).log() - found.sum(-1, keepdim=True).clamp_min(tiny).log()
    each = (torch.xlogy(shares, shares) - shares * log_of).sum(-1)
    counted = mass.clamp_max(1)
    return (each * counted).sum() / counted.sum().clamp_min(tiny)
