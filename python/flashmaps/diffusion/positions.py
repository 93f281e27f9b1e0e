"""Rotary embeddings of attention processors: by what q and k were turned, and how to turn back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Processors that rotate pairs of neighbouring channels (2i, 2i + 1) by the angles they are given.
_ROTATES_NEIGHBOURS = {"FluxAttnProcessor", "FluxIPAdapterAttnProcessor", "WanAttnProcessor"}


def rotary(
    processor: str, arguments: Mapping[str, Any], tokens: int, width: int
) -> tuple[Tensor, Tensor] | None:
    """(cos, sin), [tokens, width] each, by which a processor rotates q and k; None if it does not.

    Angles of channels 2i and 2i + 1 are equal. None, too, for a form that is not known here.
    """
    angles = arguments.get("image_rotary_emb", arguments.get("rotary_emb"))
    if processor not in _ROTATES_NEIGHBOURS or not isinstance(angles, (tuple, list)):
        return None
    cos, sin = (each.reshape(-1, each.shape[-1]) for each in angles)
    return (cos, sin) if cos.shape == sin.shape == (tokens, width) else None


def rotates(arguments: Mapping[str, Any]) -> bool:
    """Whether a processor was given a rotary embedding, in whatever form."""
    for name in ("image_rotary_emb", "rotary_emb", "freqs_cis", "query_rotary_emb"):
        if arguments.get(name) is not None:
            return True
    return False


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Q or K [B, H, N, d] before its rotary embedding: R(-angle) x, in float32, rounded as x is."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (each[:, 0::2].to(device=x.device, dtype=torch.float32) for each in (cos, sin))
    return torch.stack((even * cos + odd * sin, odd * cos - even * sin), -1).flatten(-2).to(x.dtype)
