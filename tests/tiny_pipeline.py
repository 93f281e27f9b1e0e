"""A Stable Diffusion 2 pipeline small enough for a test, with random weights and no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def tiny_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that spells words letter by letter, from files written here."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def tiny_unet(**changes: Any) -> Any:
    """SD2's layout in small: three levels, head counts that grow, attention on every level."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": (1, 2, 2),  # head counts, as in SD2
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval().requires_grad_(False)


def tiny_vae(latent_channels: int = 4, **changes: Any) -> Any:
    """AutoencoderKL that halves an image twice: a latent has a quarter of the image's height."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    config: dict[str, Any] = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return AutoencoderKL(**{**config, **changes}).eval().requires_grad_(False)


def tiny_text_encoder(tokenizer: Any, *, projected: bool = False, seed: int = 2) -> Any:
    """CLIP text model of width 32; ``projected``: CLIPTextModelWithProjection, to 32 as well."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=2,  # SDXL and SD3 read the last but one
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)
    return model.eval().requires_grad_(False)


def tiny_pipeline(folder: Path, **unet_changes: Any) -> Any:
    """StableDiffusionPipeline: VAE factor 4, latent 16 x 16 at 64 pixels, levels 16, 8 and 4."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = tiny_tokenizer(folder)
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(**unet_changes),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
