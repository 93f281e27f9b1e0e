"""What a step of learning takes, told by shapes alone, before anything large is loaded or run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashmaps.arguments import whole
from flashmaps.diffusion.features import default_size, size_multiple, vae_factor
from flashmaps.diffusion.images import fit_size
from flashmaps.parts.learn import LARGE


@dataclass(frozen=True)
class PartsPlan:
    """Bytes of one step of :func:`flashmaps.learn_parts`, estimated.

    Attributes:
        weights: of UNet, VAE and text encoder.
        kept: activations that wait for the way back, with gradients checkpointed or not.
        again: what the largest checkpointed block computes again; 0 without.
        total: all of it, and a tenth more of activations, for what kernels use.
    """

    weights: int
    kept: int
    again: int
    checkpointing: bool

    @property
    def total(self) -> int:
        return self.weights + int(1.1 * (self.kept + self.again))

    def __str__(self) -> str:
        how = "with" if self.checkpointing else "without"
        return (
            f"{self.total / 1e9:.1f} GB: weights {self.weights / 1e9:.1f}, activations "
            f"{(self.kept + self.again) / 1e9:.1f}, {how} checkpointing (estimated)"
        )


class _Fused(torch.autograd.Function):
    """Attention as fused kernels keep it: q, k, v and the result."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, None


class _Attention(TorchFunctionMode):
    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Fused.apply(named["query"], named["key"], named["value"])
        return f(*args, **(kwargs or {}))


def plan_parts(
    pipe: Any,
    *,
    batch: int = 2,
    size: int | tuple[int, int] | None = None,
    checkpointing: bool | None = None,
) -> PartsPlan:
    """What a step of :func:`flashmaps.learn_parts` takes, from shapes: nothing is computed.

    A copy of the UNet without numbers is run forwards on torch's "meta" device, and what autograd
    would keep is added up; with checkpointing that is the blocks' inputs, and the most that one
    block keeps when it is run again. Attention is taken as fused kernels keep it. Estimated: what
    an allocator wastes and kernels use besides is a tenth at a guess.

    Args:
        pipe: a loaded pipeline, in the precision that it is to be trained in.
        batch, size, checkpointing: as :func:`flashmaps.learn_parts` has them.
    """
    whole("batch", batch, 1)
    shape = fit_size(1, 1, default_size(pipe) if size is None else size, size_multiple(pipe))
    unet = pipe.unet
    large = sum(p.numel() for p in unet.parameters()) > LARGE
    checkpointing = large if checkpointing is None else checkpointing
    parts = (unet, pipe.vae, pipe.text_encoder)
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    with torch.device("meta"):
        blank = type(unet).from_config(unet.config)
    blank = nn.Module.to(blank, unet.dtype).requires_grad_(False).eval()
    factor = vae_factor(pipe)
    latent = torch.empty(
        (batch, unet.config.in_channels, shape[0] // factor, shape[1] // factor),
        dtype=unet.dtype, device="meta",
    )  # fmt: skip
    width = unet.config.cross_attention_dim
    states = torch.empty((batch, 77, width), dtype=unet.dtype, device="meta", requires_grad=True)
    kept, inside, inputs = _kept(blank, latent, states)
    if not checkpointing:
        return PartsPlan(weights, kept, 0, False)
    outside = kept - sum(inside)
    return PartsPlan(weights, outside + sum(inputs), max(inside), True)


def _kept(unet: nn.Module, latent: Tensor, states: Tensor) -> tuple[int, list[int], list[int]]:
    """(bytes that autograd keeps, of each block, of each block's input) of one forward pass."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    weights = {id(p) for p in unet.parameters()}
    seen: set[int] = set()
    alive: list[Any] = []  # storages, so that none has the number of one that is gone
    total, inside, inputs, block = 0, [0], [0], 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total, block
        place = x.untyped_storage()
        if id(x) not in weights and place._cdata not in seen:
            seen.add(place._cdata)
            alive.append(place)
            total += place.nbytes()
            block += place.nbytes()
        return x

    def before(module: nn.Module, args: Any) -> None:
        nonlocal block
        block = 0
        inputs.append(sum(x.nbytes for x in args if isinstance(x, Tensor)))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        inside.append(block)

    undo: list[Callable[[], None]] = []
    for module in unet.modules():
        if isinstance(module, (BasicTransformerBlock, ResnetBlock2D)):
            undo.append(module.register_forward_pre_hook(before).remove)
            undo.append(module.register_forward_hook(after).remove)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _Attention():
            unet(latent, torch.zeros((), dtype=torch.long, device="meta"),
                 encoder_hidden_states=states)  # fmt: skip
    finally:
        for each in undo:
            each()
    return total, inside, inputs
