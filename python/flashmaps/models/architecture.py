"""The parts of the miniature, each with its Stable Diffusion 2 class and block structure.

| part | Stable Diffusion 2 | here |
| --- | --- | --- |
| picture, latent | 512 px, 4 x 64 x 64 (f = 8) | 128 px, 4 x 32 x 32 (f = 4) |
| UNet levels | 320, 640, 1280, 1280 channels | 64, 96, 128 |
| self-attention (tokens: heads x d) | 4096: 5x64 ... 64: 20x64 | 1024: 2x32, 256: 3x32, 64: 4x32 |
| text encoder | 23 layers, width 1024, 49408 tokens | 2 layers, width 64, about 900 tokens |

As in Stable Diffusion 2 the last level has no attention and the middle block has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .vocabulary import build_tokenizer


@dataclass(frozen=True)
class Sizes:
    """Widths of the miniature; `heads` are head counts per UNet level."""

    vae: tuple[int, ...] = (32, 64, 64)
    unet: tuple[int, ...] = (64, 96, 128)
    heads: tuple[int, ...] = (2, 3, 4)
    text: int = 64
    text_layers: int = 2
    groups: int = 16
    image: int = 128


TINY = Sizes(
    vae=(8, 8, 8), unet=(8, 8, 16), heads=(1, 1, 2), text=8, text_layers=1, groups=4, image=32
)


@dataclass
class Parts:
    """Everything a `StableDiffusionPipeline` is made of."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler


def build(sizes: Sizes = Sizes(), seed: int = 0, prediction: str = "v_prediction") -> Parts:
    """Freshly initialised parts; the same seed gives the same weights.

    ``prediction``: what the UNet predicts, "v_prediction" (Stable Diffusion 2 at 768 pixels) or
    "epsilon" (at 512).
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return Parts(
        _vae(sizes),
        _unet(sizes),
        _text_encoder(sizes, tokenizer),
        tokenizer,
        _scheduler(prediction),
    )


def _vae(sizes: Sizes) -> AutoencoderKL:
    levels = len(sizes.vae)
    vae = AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=sizes.groups,
        sample_size=sizes.image,
    )
    # Latents would start with a noise of deviation one and some channels would never recover from
    # being useless; with e^-3 all four carry information from the first step.
    with torch.no_grad():
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-6.0)
    return vae


def _unet(sizes: Sizes) -> UNet2DConditionModel:
    with_attention = len(sizes.unet) - 1
    return UNet2DConditionModel(
        sample_size=sizes.image // 4,
        block_out_channels=sizes.unet,
        down_block_types=("CrossAttnDownBlock2D",) * with_attention + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * with_attention,
        layers_per_block=1,
        attention_head_dim=list(sizes.heads),  # diffusers reads these as head counts, as in SD2
        cross_attention_dim=sizes.text,
        use_linear_projection=True,
        norm_num_groups=sizes.groups,
    )


def _text_encoder(sizes: Sizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text,
            intermediate_size=4 * sizes.text,
            projection_dim=sizes.text,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=max(1, sizes.text // 16),
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act="gelu",
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _scheduler(prediction: str) -> DDIMScheduler:
    """Stable Diffusion 2's 1000 scaled-linear steps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
