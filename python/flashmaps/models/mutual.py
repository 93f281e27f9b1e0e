"""Self-attention in which the pictures of a pair see each other, for training.

What :class:`flashmaps.CrossSelfAttnProcessor` does with a trained model (Cao et al., MasaCtrl,
2023) is done here while it learns: to take the noise from one picture of an object a layer may look
it up in another, cleaner one. Queries of one picture on keys of the other mean something then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PLAIN = 256  # keys up to which matrix products and a softmax are faster on CPU: see unet.py


class Mutual:
    """Which rows of a batch are pairs just now; every processor of a model asks the same one.

    Rows ``start`` to ``start + pairs`` are the pairs' first pictures, the next ``pairs`` rows the
    second ones.
    """

    def __init__(self) -> None:
        self.start, self.pairs, self.blind = 0, 0, False

    @contextlib.contextmanager
    def among(self, start: int, pairs: int, blind: bool = False) -> Iterator[None]:
        """While it lasts, pairs see each other; ``blind``: the first ones not themselves."""
        self.start, self.pairs, self.blind = start, pairs, blind
        try:
            yield
        finally:
            self.start, self.pairs, self.blind = 0, 0, False


class MutualAttention:
    """An attention processor for self-attention over sequences, as diffusers calls it.

    Rows outside of pairs see their own keys and values alone, as with ``AttnProcessor2_0``. A
    picture of a pair sees its own and then its partner's in one softmax.
    """

    def __init__(self, mutual: Mutual) -> None:
        self._mutual = mutual

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [b, N, c]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("MutualAttention is for self-attention without a mask")
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )  # [b, H, N, d]
        mutual = self._mutual
        if not mutual.pairs:
            mixed = _attend(query, key, value, attn.scale)
        else:
            start, count = mutual.start, mutual.pairs
            middle, end = start + count, start + 2 * count
            first, second = slice(start, middle), slice(middle, end)

            def both(x: Tensor) -> tuple[Tensor, Tensor]:
                one = x[second] if mutual.blind else torch.cat([x[first], x[second]], 2)
                return one, torch.cat([x[second], x[first]], 2)

            (key_1, key_2), (value_1, value_2) = both(key), both(value)
            seen = (
                (query[:start], key[:start], value[:start]),
                (query[first], key_1, value_1),
                (query[second], key_2, value_2),
                (query[end:], key[end:], value[end:]),
            )
            # torch 2.11 on a GPU gives None for an attention of no rows.
            mixed = torch.cat([_attend(q, k, v, attn.scale) for q, k, v in seen if len(q)])
        mixed = mixed.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))


def share_attention(unet: Any, mutual: Mutual) -> None:
    """Let the self-attention of the UNet's decoder ask ``mutual`` who sees whom."""
    unet.set_attn_processor(
        {
            name: MutualAttention(mutual)
            if name.startswith("up_blocks.") and ".attn1." in name
            else processor
            for name, processor in unet.attn_processors.items()
        }
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if query.device.type == "cpu" and key.shape[2] <= 2 * _PLAIN:
        scores = (query * scale) @ key.transpose(-1, -2)
        return scores.float().softmax(-1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=scale)
