"""What users attach to a model's attention, in small: LoRA, IP-Adapters, processors of their own.

    add_lora(pipe.unet)

    add_ip_adapter(pipe.unet, adapters=2)
    family.run(pipe, **image_prompts(pipe.unet, adapters=2, images=3))

Weights are random and large enough to change the output.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

IMAGE_WIDTH = 16  # features of an image prompt
IMAGE_TOKENS = 4  # tokens an adapter makes of one image prompt


# LoRA


def add_lora(model: Any, rank: int = 2) -> None:
    """Put a random LoRA on every projection of every attention layer, the text's ones included."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(8)
    projections = [
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=4 * rank,
        target_modules=projections,
        init_lora_weights=False,  # the second matrix is random too, not zero
    )
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
    else:  # PixArt's transformer has no diffusers way to do it
        inject_adapter_in_model(config, model)
    model.requires_grad_(False)


# IP-Adapters


def add_ip_adapter(model: Any, adapters: int = 1) -> None:
    """Load made-up IP-Adapters as diffusers loads real ones: into a UNet, a Flux or an SD3.

    - UNet: ``attn2`` layers get ``IPAdapterAttnProcessor2_0``, others a new processor of their own
      class. Attention is called on the text, then once for each adapter, on ``images`` times
      ``IMAGE_TOKENS`` keys. The call is left out where the adapter's scale is zero.
    - Flux: double blocks get ``FluxIPAdapterAttnProcessor``. First the joint call; then one for
      each adapter, with the image's queries before their rotary embedding.
    - SD3: every layer gets ``SD3IPAdapterJointAttnProcessor2_0``, one each for ``attn`` and
      ``attn2``. First the usual call; then one with the image's queries on the image's keys
      followed by the adapter's. There is one adapter at most. Its projection of image features
      has attention layers too, ``image_proj.layers.*.attn``, and they call attention.
    """
    torch.manual_seed(9)
    load = {
        "UNet2DConditionModel": _unet_ip_adapter,
        "FluxTransformer2DModel": _flux_ip_adapter,
        "SD3Transformer2DModel": _sd3_ip_adapter,
    }[type(model).__name__]
    states = [load(model) for _ in range(adapters)]
    if type(model).__name__ == "SD3Transformer2DModel":
        (state,) = states
        model._load_ip_adapter_weights(state, low_cpu_mem_usage=False)
    else:
        model._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    model.eval().requires_grad_(False)


def image_prompts(
    model: Any, *, adapters: int = 1, images: int = 1, guidance: bool = True
) -> dict[str, Any]:
    """Arguments for the pipeline that give each adapter ``images`` image prompts, as features."""
    generator = torch.Generator().manual_seed(10)

    def features(rows: int) -> Tensor:
        return torch.randn(rows, images, IMAGE_WIDTH, generator=generator)

    kind = type(model).__name__
    if kind == "FluxTransformer2DModel":
        return {  # without the negative ones the pipeline looks for an image encoder
            "ip_adapter_image_embeds": [features(1) for _ in range(adapters)],
            "negative_ip_adapter_image_embeds": [features(1) for _ in range(adapters)],
        }
    rows = 2 if guidance else 1  # unconditional, conditional
    if kind == "SD3Transformer2DModel":
        return {"ip_adapter_image_embeds": features(rows)}
    return {"ip_adapter_image_embeds": [features(rows) for _ in range(adapters)]}


def _image_projection(width: int) -> dict[str, Tensor]:
    return {
        "proj.weight": torch.randn(IMAGE_TOKENS * width, IMAGE_WIDTH) / 4,
        "proj.bias": torch.zeros(IMAGE_TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def _unet_ip_adapter(unet: Any) -> dict[str, dict[str, Tensor]]:
    width = unet.config.cross_attention_dim
    layers = [name.removesuffix(".processor") for name in unet.attn_processors]
    weights = {}
    for index, name in enumerate(layers):
        if name.endswith("attn2"):  # these have odd numbers: they alternate with attn1
            inner = unet.get_submodule(name).to_k.out_features
            weights[f"{index}.to_k_ip.weight"] = torch.randn(inner, width) / width**0.5
            weights[f"{index}.to_v_ip.weight"] = torch.randn(inner, width) / width**0.5
    return {"image_proj": _image_projection(width), "ip_adapter": weights}


def _flux_ip_adapter(transformer: Any) -> dict[str, dict[str, Tensor]]:
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    weights = {}
    for index in range(len(transformer.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            weights[f"{index}.{name}.weight"] = torch.randn(inner, width) / width**0.5
            weights[f"{index}.{name}.bias"] = torch.zeros(inner)
    return {"image_proj": _image_projection(width), "ip_adapter": weights}


def _sd3_ip_adapter(transformer: Any) -> dict[str, dict[str, Tensor]]:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    hidden = 64  # of the projection, whose heads are of 64
    projection = IPAdapterTimeImageProjection(
        embed_dim=IMAGE_WIDTH,
        output_dim=transformer.inner_dim,
        hidden_dim=hidden,
        heads=1,
        num_queries=IMAGE_TOKENS,
        timestep_in_dim=32,
    )
    weights = {}
    for index, _ in enumerate(transformer.attn_processors):
        processor = SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=transformer.inner_dim,
            ip_hidden_states_dim=transformer.inner_dim,
            head_dim=transformer.config.attention_head_dim,
            timesteps_emb_dim=hidden,
        )
        weights |= {f"{index}.{name}": value for name, value in processor.state_dict().items()}
    return {"image_proj": projection.state_dict(), "ip_adapter": weights}


# Processors that are not stock, for models with ``Attention`` layers (UNets, PixArt)


class GainProcessor(AttnProcessor2_0):
    """Takes ``gain``, a keyword of its own, through the pipeline's ``cross_attention_kwargs``.

    diffusers drops keywords that the signature of ``__call__`` does not name.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        gain: float = 1.0,
    ) -> Tensor:
        output = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return gain * output


class ModuleProcessor(nn.Module):
    """A module with a buffer, that defines ``forward`` only: ``__call__`` has (*args, **kwargs).

    Set on a model, its buffer is in the model's ``state_dict``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(1.5))

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        stock = AttnProcessor2_0()
        return self.gain * stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class MatmulProcessor(AttnProcessor):
    """Attention from matrix products and a softmax, under a name that nobody has a list of."""


def set_processors(model: Any, make: Any) -> None:
    """Give each attention layer a processor of its own, ``make()``."""
    model.set_attn_processor({name: make() for name in model.attn_processors})
