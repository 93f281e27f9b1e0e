"""Pipelines of every family, small enough for a test, with random weights and no network.

``FAMILIES`` lists them. A family builds its pipeline, runs it, and says what is inside:

    family = FAMILY["flux"]
    pipe = family.build(tmp_path)
    latents = family.run(pipe, steps=2, guidance=True)
    model = getattr(pipe, family.denoiser)

Every pipeline's VAE divides height and width by four. The transformers cut latents into 2 x 2
patches, so at the default size (64 x 96 pixels; 32 x 48 for most UNets) the finest attention of
every family is on a grid of 8 x 12 tokens. Head dimensions are 8, 12 or 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_pipeline import tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae
from torch import Tensor, nn

T5_TOKENS = 16  # max_sequence_length of every pipeline with a T5; CLIP's is 77


# Text


def tiny_t5_tokenizer() -> Any:
    """A T5 tokenizer that spells words letter by letter; the first letter carries the space."""
    from transformers import T5Tokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["▁", *letters, *(f"▁{c}" for c in letters)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *((piece, -2.0) for piece in pieces)], extra_ids=0)


def tiny_t5(tokenizer: Any, width: int = 32, *, umt5: bool = False) -> Any:
    """T5EncoderModel of one layer, or UMT5EncoderModel, Wan's."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(3)
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    model = UMT5EncoderModel(UMT5Config(**config)) if umt5 else T5EncoderModel(T5Config(**config))
    return model.eval().requires_grad_(False)


# UNets. Self-attention of N = h * w tokens at each level, cross-attention on 77 tokens of CLIP.
# Each level of an up path has one layer more than its down path.


def build_sd15(folder: Path, **unet_changes: Any) -> Any:
    """SD1.5's layout: convolutions around the transformer blocks, eight heads on every level.

    Latents 8 x 12: attention on 8 x 12 (d = 8), 4 x 6 (d = 8) and, in the middle, 2 x 3 (d = 16).
    """
    layout: dict[str, Any] = {
        "block_out_channels": (64, 64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,  # in spite of its name, the number of heads
        "use_linear_projection": False,
    }
    return tiny_pipeline(folder, **{**layout, **unet_changes})


def build_sd2(folder: Path, **unet_changes: Any) -> Any:
    """SD2's layout: linear projections, head counts that grow, epsilon prediction.

    Latents 8 x 12: attention on 8 x 12, 4 x 6 and 2 x 3, with 1, 2 and 2 heads of 16.
    """
    return tiny_pipeline(folder, **unet_changes)


def build_sd21(folder: Path, **unet_changes: Any) -> Any:
    """SD2.1's at 768 pixels: as SD2, with v-prediction and ``upcast_attention``."""
    from diffusers import DDIMScheduler

    pipe = tiny_pipeline(folder, upcast_attention=True, **unet_changes)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction"
    )
    return pipe


def build_sdxl(folder: Path, **unet_changes: Any) -> Any:
    """SDXL's layout: no attention on the first level, several transformer layers in a block.

    Latents 16 x 24: attention on 8 x 12 (two heads of 16) and 4 x 6 (four heads of 16). The text's
    77 tokens are the features of two encoders side by side.
    """
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    tokenizer = tiny_tokenizer(folder)
    layout: dict[str, Any] = {
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 64,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        text_encoder_2=tiny_text_encoder(tokenizer, projected=True, seed=4),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(**{**layout, **unet_changes}),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )
    return _quiet(pipe)


def build_controlnet(folder: Path, **unet_changes: Any) -> Any:
    """The SD2 pipeline with a ControlNet beside it, whose layers have names of the UNet's.

    The ControlNet has the UNet's down path and middle. Its output convolutions, zero before any
    training, are random here, so that it matters.
    """
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipe = tiny_pipeline(folder, **unet_changes)
    torch.manual_seed(5)
    controlnet = ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(8, 8, 16)
    )
    for name, parameter in controlnet.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")):
            nn.init.normal_(parameter, std=0.1)
    return _quiet(
        StableDiffusionControlNetPipeline(
            **{name: part for name, part in pipe.components.items() if name != "controlnet"},
            controlnet=controlnet.eval().requires_grad_(False),
            requires_safety_checker=False,
        )
    )


# Transformers


def build_sd3(folder: Path, **transformer_changes: Any) -> Any:
    """SD3.5's layout: three joint blocks, the first with a second attention on the image alone.

    ``attn`` is joint: 8 x 12 image tokens, then the text's 77 + 16. ``attn2`` (dual attention)
    shares its processor object with ``attn``. The last block discards the text after its
    attention. Queries and keys are normalised; positions are added to the input once. To
    fuse projections pass ``dual_attention_layers=(), qk_norm=None``: diffusers' fused processor
    fails on ``attn2`` and leaves the normalisation out.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizer, t5_tokenizer = tiny_tokenizer(folder), tiny_t5_tokenizer()
    layout: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,  # the two CLIPs side by side, and the T5
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**layout, **transformer_changes}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.06),
        text_encoder=tiny_text_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=tiny_text_encoder(tokenizer, projected=True, seed=4),
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5(t5_tokenizer, width=64),
        tokenizer_3=t5_tokenizer,
    )
    return _quiet(pipe)


def build_flux(folder: Path, **transformer_changes: Any) -> Any:
    """Flux's layout: two double blocks, two single blocks, rotary positions, embedded guidance.

    Joint in both: the text's 16 tokens, then 8 x 12 image tokens. In single blocks the processor
    gets them already joined. The model sees packed latents, [B, 96, 16], and their positions as
    ``img_ids`` [96, 3] of (0, row, column).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, t5_tokenizer = tiny_tokenizer(folder), tiny_t5_tokenizer()
    layout: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    torch.manual_seed(0)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(**{**layout, **transformer_changes}),
    )
    return _quiet(pipe)


def build_pixart(folder: Path, **transformer_changes: Any) -> Any:
    """PixArt-Sigma's layout: two blocks of self-attention on 8 x 12 tokens and cross-attention.

    The text's 16 tokens come with a mask: cross-attention gets a bias of -10000 on the padding.
    Heads of 12, as the real one's 72 is no power of two.
    """
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    t5_tokenizer = tiny_t5_tokenizer()
    layout: dict[str, Any] = {
        "sample_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 32,
        "in_channels": 4,
        "out_channels": 8,
    }
    torch.manual_seed(0)
    pipe = PixArtSigmaPipeline(
        tokenizer=t5_tokenizer,
        text_encoder=tiny_t5(t5_tokenizer),
        vae=tiny_vae(),
        transformer=PixArtTransformer2DModel(**{**layout, **transformer_changes}),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    return _quiet(pipe)


def tiny_wan_vae() -> Any:
    """AutoencoderKLWan that halves time once, height and width twice."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    return (
        AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        )
        .eval()
        .requires_grad_(False)
    )


def tiny_wan(**changes: Any) -> Any:
    """WanTransformer3DModel of two blocks, two heads of 12; time, height and width have four."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    layout: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**layout, **changes}).eval().requires_grad_(False)


def build_wan(folder: Path, **transformer_changes: Any) -> Any:
    """Wan 2.1 text to video: two blocks of rotary self-attention and of cross-attention.

    Three frames of 64 x 96 pixels are latents [B, 4, 2, 16, 24] and 2 x 8 x 12 tokens, in that
    order. The text's 16 tokens are padded with zeros after the encoder, and not masked.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    tokenizer = tiny_t5_tokenizer()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(tokenizer, umt5=True),
        vae=tiny_wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan(**transformer_changes),
    )
    return _quiet(pipe)


def tiny_wan_image_to_video(**changes: Any) -> Any:
    """Wan 2.1's transformer for image to video, bare: cross-attention on text and on an image.

    ``attn2`` calls attention twice: first on the image's tokens, then on the text's, with the same
    queries. ``encoder_hidden_states`` reaches it as the image's tokens, then the text's, which must
    be 512. See :func:`run_wan_image_to_video`.
    """
    return tiny_wan(**{"in_channels": 8, "image_dim": 32, "added_kv_proj_dim": 24, **changes})


def run_wan_image_to_video(
    model: Any, *, batch: int = 1, frames: int = 2, height: int = 16, width: int = 24, seed: int = 0
) -> Tensor:
    """One forward on random latents, [B, 8, frames, height, width], 7 image and 512 text tokens."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return model(
        hidden_states=random(8, frames, height, width),
        timestep=torch.full((batch,), 500),
        encoder_hidden_states=random(512, 32),
        encoder_hidden_states_image=random(7, 32),
        return_dict=False,
    )[0]


def build_qwen(folder: Path, **transformer_changes: Any) -> Any:
    """Qwen-Image's transformer in its pipeline, without text encoder and VAE: run gives embeddings.

    Joint: the text, as many tokens as the longest prompt, then 8 x 12 image tokens. Prompts of
    different lengths come with a mask, [B, 1, 1, text + image], true where a key may be seen.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(0)
    layout: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=QwenImageTransformer2DModel(**{**layout, **transformer_changes}),
    )
    return _quiet(pipe)


def _quiet(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# How each pipeline is called


def _scaled(prompts: list[str], guidance: bool, **more: Any) -> dict[str, Any]:
    """Guidance as most pipelines take it: on when its scale is above one."""
    return {"prompt": prompts, "guidance_scale": 5.0 if guidance else 1.0, **more}


def _call_unet(prompts: list[str], guidance: bool, size: tuple[int, int]) -> dict[str, Any]:
    return _scaled(prompts, guidance)


def _call_controlnet(prompts: list[str], guidance: bool, size: tuple[int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(6)
    picture = torch.rand(1, 3, *size, generator=generator)
    return _scaled(prompts, guidance, image=picture.expand(len(prompts), -1, -1, -1))


def _call_sd3(prompts: list[str], guidance: bool, size: tuple[int, int]) -> dict[str, Any]:
    return _scaled(prompts, guidance, max_sequence_length=T5_TOKENS)


def _call_flux(prompts: list[str], guidance: bool, size: tuple[int, int]) -> dict[str, Any]:
    call = {"prompt": prompts, "guidance_scale": 3.5, "max_sequence_length": T5_TOKENS}
    if guidance:
        call |= {"true_cfg_scale": 4.0, "negative_prompt": ["blurry"] * len(prompts)}
    return call


def _call_pixart(prompts: list[str], guidance: bool, size: tuple[int, int]) -> dict[str, Any]:
    return _scaled(
        prompts,
        guidance,
        max_sequence_length=T5_TOKENS,
        use_resolution_binning=False,  # the size as asked for, not the nearest it was trained on
        clean_caption=False,
    )


def _call_wan(prompts: list[str], guidance: bool, size: tuple[int, int]) -> dict[str, Any]:
    return _scaled(prompts, guidance, max_sequence_length=T5_TOKENS, num_frames=3)


def _call_qwen(prompts: list[str], guidance: bool, size: tuple[int, int]) -> dict[str, Any]:
    embeds, mask = _spelled(prompts)
    call: dict[str, Any] = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
    if guidance:
        negative, negative_mask = _spelled(["blurry"] * len(prompts))
        call |= {
            "negative_prompt_embeds": negative,
            "negative_prompt_embeds_mask": negative_mask,
            "true_cfg_scale": 4.0,
        }
    else:
        call["true_cfg_scale"] = 1.0
    return call


def _spelled(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [B, longest, 32] with one token for each character, and their mask."""
    letters = torch.randn(128, 32, generator=torch.Generator().manual_seed(7))
    rows = [letters[[ord(c) for c in prompt]] for prompt in prompts]
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    return embeds, mask.long()


@dataclass(frozen=True)
class Family:
    """A pipeline, how to run it and what capture should find in its denoiser.

    Attributes:
        build: makes the pipeline; a folder for the tokenizer's files, and changes of the
            denoiser's configuration by name.
        denoiser: which of the pipeline's parts predicts the noise, "unet" or "transformer".
        layers: how many attention layers of each kind it has: "self", "cross", "joint".
        batched: guidance runs as one batch, [unconditional, conditional]; else as two forwards,
            in ``cache_context("cond")``, then ``cache_context("uncond")``.
        text_first: order of a joint layer's tokens; None without joint layers.
        text_tokens: of a cross or joint layer; None where it is the longest prompt's length.
        size: default (height, width) in pixels.
        patch: pixels per token, in each direction, at the finest attention.
        frames: the tokens' number of frames.
    """

    name: str
    build: Callable[..., Any]
    call: Callable[[list[str], bool, tuple[int, int]], dict[str, Any]]
    denoiser: str
    layers: dict[str, int]
    batched: bool = True
    text_first: bool | None = None
    text_tokens: int | None = 77
    size: tuple[int, int] = (64, 96)
    patch: int = 8
    frames: int = 1

    def run(
        self,
        pipe: Any,
        *,
        prompts: tuple[str, ...] | list[str] = ("a cat",),
        steps: int = 2,
        guidance: bool = True,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        **arguments: Any,
    ) -> Tensor:
        """The latents after ``steps`` steps. ``arguments`` go to the pipeline and win."""
        size = (height or self.size[0], width or self.size[1])
        call = {
            "height": size[0],
            "width": size[1],
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
        }
        for name, value in self.call(list(prompts), guidance, size).items():
            call[name] = value.to(pipe.device) if isinstance(value, Tensor) else value
            if isinstance(value, Tensor) and value.is_floating_point():
                call[name] = call[name].to(pipe.dtype)
        return pipe(**{**call, **arguments})[0]

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) of the tokens of one frame at the finest attention."""
        return (height or self.size[0]) // self.patch, (width or self.size[1]) // self.patch


_SMALL: dict[str, Any] = {"size": (32, 48), "patch": 4}

FAMILIES = [
    Family("sd15", build_sd15, _call_unet, "unet", {"self": 7, "cross": 7}, **_SMALL),
    Family("sd2", build_sd2, _call_unet, "unet", {"self": 10, "cross": 10}, **_SMALL),
    Family("sd21", build_sd21, _call_unet, "unet", {"self": 10, "cross": 10}, **_SMALL),
    Family("sdxl", build_sdxl, _call_unet, "unet", {"self": 11, "cross": 11}),
    Family(
        "controlnet",
        build_controlnet,
        _call_controlnet,
        "unet",
        {"self": 10, "cross": 10},
        **_SMALL,
    ),
    Family(
        "sd3",
        build_sd3,
        _call_sd3,
        "transformer",
        {"self": 1, "joint": 3},
        text_first=False,
        text_tokens=77 + T5_TOKENS,
    ),
    Family(
        "flux",
        build_flux,
        _call_flux,
        "transformer",
        {"joint": 4},
        batched=False,
        text_first=True,
        text_tokens=T5_TOKENS,
    ),
    Family(
        "pixart",
        build_pixart,
        _call_pixart,
        "transformer",
        {"self": 2, "cross": 2},
        text_tokens=T5_TOKENS,
    ),
    Family(
        "wan",
        build_wan,
        _call_wan,
        "transformer",
        {"self": 2, "cross": 2},
        batched=False,
        text_tokens=T5_TOKENS,
        frames=2,
    ),
    Family(
        "qwen",
        build_qwen,
        _call_qwen,
        "transformer",
        {"joint": 2},
        batched=False,
        text_first=True,
        text_tokens=None,
        size=(128, 192),  # without a VAE the pipeline takes its factor to be 8
        patch=16,
    ),
]
FAMILY = {family.name: family for family in FAMILIES}
