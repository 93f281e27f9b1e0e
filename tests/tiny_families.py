"""The models of each family that capture knows, small, with random weights, and how to call them.

Text has few tokens, image tokens lie on 4 x 6 (of one or two frames), which is not square, so that
neither order nor orientation can be right by chance. `CASES` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEIGHT, WIDTH, FRAMES, TEXT = 4, 6, 2, 5  # in tokens


def random(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers that depend on nothing but shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A model of one family.

    Attributes:
        family: its name in `flashmaps.diffusion.families.FAMILIES`.
        model: name of its class in diffusers.
        config: what it is made with.
        inputs: what it is called with.
        layers: what its layers attend with, in the order of the documentation: pattern to order;
            "": not known.
        text: names of inputs that are text, and the names of the parts that come of them.
        latents: name of the input that is the image.
        place: where in the latents the token (frame, row, column) comes from; None: not exactly.
        frames, rows: as of an entry.
        mute: names of modules, beside those after attention, by which text would reach the image.
    """

    family: str
    model: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    layers: dict[str, str]
    text: dict[str, tuple[str, ...]]
    latents: str = "hidden_states"
    place: Callable[[int, int, int], tuple[Any, ...]] | None = None
    frames: int = 1
    rows: int = 1
    mute: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The model; every parameter is random, also those that begin at zero."""
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, self.model)(**self.config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model


def _plane(patch: int = 2) -> Callable[[int, int, int], tuple[Any, ...]]:
    return lambda f, r, c: (..., r * patch, c * patch)


def _video(patch: int = 2, frames_at: int = 2) -> Callable[[int, int, int], tuple[Any, ...]]:
    if frames_at == 1:
        return lambda f, r, c: (slice(None), f, slice(None), r * patch, c * patch)
    return lambda f, r, c: (slice(None), slice(None), f, r * patch, c * patch)


def _packed(f: int, r: int, c: int) -> tuple[Any, ...]:
    return slice(None), (f * HEIGHT + r) * WIDTH + c


def _ids(columns: int, reference: bool = False) -> Tensor:
    """Where each token lies, as Flux's pipelines say it; with a reference image of 2 x 3."""
    sizes = [(HEIGHT, WIDTH), (2, 3)] if reference else [(HEIGHT, WIDTH)]
    found = []
    for image, (height, width) in enumerate(sizes):
        ids = torch.zeros(height, width, columns)
        ids[..., 0] = 10 * image
        ids[..., 1] = torch.arange(height)[:, None]
        ids[..., 2] = torch.arange(width)[None]
        found.append(ids.flatten(0, 1))
    return torch.cat(found)


TOKENS = HEIGHT * WIDTH
_LATENT = (2 * HEIGHT, 2 * WIDTH)


def _flux(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(1, TOKENS, 8),
        "encoder_hidden_states": random(1, TEXT, 16, seed=1),
        "timestep": torch.tensor([0.5]),
        "img_ids": _ids(3),
        "txt_ids": torch.zeros(TEXT, 3),
        **more,
    }


def _flux2(**more: Any) -> dict[str, Any]:
    return _flux(img_ids=_ids(4)[None], txt_ids=torch.zeros(1, TEXT, 4), **more)


def _planar(text: int = TEXT, width: int = 16, channels: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(1, channels, *_LATENT),
        "encoder_hidden_states": random(1, text, width, seed=1),
        "timestep": torch.tensor([5]),
        **more,
    }


def _volume(width: int = 16, **more: Any) -> dict[str, Any]:
    return _planar(width=width, **{"hidden_states": random(1, 4, FRAMES, *_LATENT), **more})


_SMALL = {"num_attention_heads": 2, "attention_head_dim": 8}
_FLUX_CONFIG = {
    "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, **_SMALL,
    "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
_FLUX2_CONFIG = {
    **_FLUX_CONFIG, "timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2),
    "guidance_embeds": False,
}  # fmt: skip
_EHS = {"encoder_hidden_states": ("text",)}

_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
    "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16,
    "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip
_CROSS = {"*.attn1": "image", "*.attn2": "image -> text"}
_UNET = {
    "in_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16,
    "attention_head_dim": 4,
}  # fmt: skip
_SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, **_SMALL,
    "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 8,
    "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip


def _unet(**more: Any) -> dict[str, Any]:
    return {
        "sample": random(1, 4, HEIGHT, WIDTH),
        "timestep": 5,
        "encoder_hidden_states": random(1, TEXT, 16, seed=1),
        **more,
    }


CASES = [
    Case(
        "Stable Diffusion 1, 2, XL and other UNets", "UNet2DConditionModel",
        {**_UNET, "out_channels": 4, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        _unet, _CROSS, _EHS, "sample",
    ),
    Case(
        "Stable Diffusion 1, 2, XL and other UNets", "ControlNetModel",
        {**_UNET, "conditioning_embedding_out_channels": (4, 4)},
        lambda: _unet(controlnet_cond=random(1, 3, 2 * HEIGHT, 2 * WIDTH)),
        _CROSS, _EHS, "sample",
    ),
    Case(
        "Stable Diffusion 1, 2, XL and other UNets", "UNet2DModel",
        {
            "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16),
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1,
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D"), "norm_num_groups": 4,
            "attention_head_dim": 4,
        },
        lambda: {"sample": random(1, 4, HEIGHT, WIDTH), "timestep": 5},
        {"*.attentions.*": "image"}, {}, "sample",
    ),
    Case(
        "Stable Diffusion 3", "SD3Transformer2DModel", {**_SD3, "num_layers": 2},
        lambda: _planar(pooled_projections=random(1, 8)),
        {"*.attn": "image + text", "*.attn2": "image"}, _EHS, place=_plane(),
    ),
    Case(
        "Stable Diffusion 3", "SD3ControlNetModel",
        {**_SD3, "num_layers": 1, "extra_conditioning_channels": 0},
        lambda: _planar(
            pooled_projections=random(1, 8), controlnet_cond=random(1, 4, *_LATENT, seed=4)
        ),
        {"*.attn": "image + text", "*.attn2": "image"}, _EHS, place=_plane(),
    ),
    Case(
        "Wan", "WanTransformer3DModel", _WAN, _volume, _CROSS, _EHS, place=_video(),
        frames=FRAMES,
    ),
    Case(
        "Wan", "WanVACETransformer3DModel", {**_WAN, "vace_layers": [0], "vace_in_channels": 4},
        lambda: _volume(control_hidden_states=random(1, 4, FRAMES, *_LATENT, seed=4)),
        _CROSS, _EHS, place=_video(), frames=FRAMES,
    ),
    Case(
        "Wan", "SkyReelsV2Transformer3DModel", _WAN, _volume, _CROSS, _EHS, place=_video(),
        frames=FRAMES,
    ),
    Case(
        "Wan", "ChronoEditTransformer3DModel", _WAN, _volume, _CROSS, _EHS, place=_video(),
        frames=FRAMES,
    ),
    Case(
        "PixArt, Sana", "PixArtTransformer2DModel",
        {
            **_SMALL, "sample_size": 8, "num_layers": 1, "cross_attention_dim": 16,
            "caption_channels": 16, "in_channels": 4, "out_channels": 8,
        },
        lambda: _planar(
            encoder_attention_mask=torch.tensor([[1] * (TEXT - 1) + [0]]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
        {"*.attn1": "image", "*.attn2": "image -> text"}, _EHS, place=_plane(),
    ),
    Case(
        "Flux.2", "Flux2Transformer2DModel", _FLUX2_CONFIG, _flux2,
        {"transformer_blocks.*": "text + image", "single_transformer_blocks.*": "text + image"},
        _EHS, place=_packed,
    ),
    Case(
        "Z-Image", "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32,
            "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32],
        },
        lambda: {
            "x": [random(4, 1, *_LATENT)], "t": torch.tensor([0.5]),
            "cap_feats": [random(TEXT, 16, seed=1)],
        },
        {"noise_refiner.*": "image", "context_refiner.*": "text", "layers.*": "image + text"},
        {"cap_feats": ("text",)}, "x", _plane(),
    ),
    Case(
        "Qwen-Image", "QwenImageTransformer2DModel",
        {
            "in_channels": 8, "out_channels": 2, "num_layers": 1, **_SMALL,
            "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4),
        },
        lambda: {
            "hidden_states": random(1, TOKENS + 6, 8), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": random(1, TEXT, 16, seed=1),
            "img_shapes": [[(1, HEIGHT, WIDTH), (1, 2, 3)]],  # Qwen-Image-Edit: a reference
        },
        {"*": "text + image + reference"}, _EHS, place=_packed,
    ),
    Case(
        "HunyuanVideo", "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, **_SMALL, "num_layers": 1, "num_single_layers": 1,
            "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": False,
            "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 2, 4),
        },
        lambda: _volume(
            encoder_attention_mask=torch.tensor([[1] * (TEXT - 1) + [0]]),
            pooled_projections=random(1, 8),
        ),
        {
            "context_embedder.*": "text", "transformer_blocks.*": "image + text",
            "single_transformer_blocks.*": "image + text",
        },
        _EHS, place=_video(), frames=FRAMES,
    ),
    Case(
        "CogVideoX", "CogVideoXTransformer3DModel",
        {
            **_SMALL, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
            "text_embed_dim": 16, "num_layers": 1, "sample_width": 2 * WIDTH,
            "sample_height": 2 * HEIGHT, "sample_frames": 5, "patch_size": 2,
            "temporal_compression_ratio": 4, "max_text_seq_length": TEXT,
        },
        lambda: _planar(hidden_states=random(1, FRAMES, 4, *_LATENT)),
        {"*": "text + image"}, _EHS, place=_video(frames_at=1), frames=FRAMES,
    ),
    Case(
        "LTX-Video", "LTXVideoTransformer3DModel",
        {
            "in_channels": 8, "out_channels": 8, **_SMALL, "cross_attention_dim": 16,
            "num_layers": 1, "caption_channels": 16,
        },
        lambda: {
            "hidden_states": random(1, FRAMES * TOKENS, 8), "timestep": torch.tensor([5]),
            "encoder_hidden_states": random(1, TEXT, 16, seed=1),
            "encoder_attention_mask": torch.tensor([[1] * (TEXT - 1) + [0]]),
            "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH,
        },
        {"*.attn1": "image", "*.attn2": "image -> text"}, _EHS, place=_packed, frames=FRAMES,
    ),
    Case(
        "Chroma", "ChromaTransformer2DModel",
        {
            **_FLUX_CONFIG, "approximator_num_channels": 8, "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        _flux,
        {"transformer_blocks.*": "text + image", "single_transformer_blocks.*": "text + image"},
        _EHS, place=_packed,
    ),
    Case(
        "Flux", "FluxTransformer2DModel", {**_FLUX_CONFIG, "pooled_projection_dim": 8},
        lambda: _flux(
            pooled_projections=random(1, 8), hidden_states=random(1, TOKENS + 6, 8),
            img_ids=_ids(3, reference=True),  # Kontext: a reference
        ),
        {
            "transformer_blocks.*": "text + image + reference",
            "single_transformer_blocks.*": "text + image + reference",
        },
        _EHS, place=_packed,
    ),
    Case(
        "Flux", "FluxControlNetModel", {**_FLUX_CONFIG, "pooled_projection_dim": 8},
        lambda: _flux(pooled_projections=random(1, 8), controlnet_cond=random(1, TOKENS, 8)),
        {
            "transformer_blocks.*": "text + image",
            "single_transformer_blocks.*": "text + image",
        },
        _EHS, place=_packed,
    ),
    Case(
        "Krea 2", "Krea2Transformer2DModel",
        {
            "in_channels": 8, "num_layers": 1, **_SMALL, "num_key_value_heads": 1,
            "intermediate_size": 16, "timestep_embed_dim": 8, "text_hidden_dim": 16,
            "num_text_layers": 2, "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2, "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (2, 2, 4),
        },
        lambda: {
            "hidden_states": random(1, TOKENS, 8), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": random(1, TEXT, 2, 16, seed=1),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), _ids(3)]),
        },
        {
            "transformer_blocks.*": "text + image", "text_fusion.refiner_blocks.*": "text",
            "text_fusion.layerwise_blocks.*": "",  # over the layers of the text encoder
        },
        _EHS, place=_packed,
    ),
    Case(
        "ERNIE-Image", "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 1,
            "ffn_hidden_size": 32, "in_channels": 4, "out_channels": 4, "patch_size": 2,
            "text_in_dim": 16, "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": random(1, 4, *_LATENT), "timestep": torch.tensor([5.0]),
            "text_bth": random(1, TEXT, 16, seed=1), "text_lens": torch.tensor([TEXT - 1]),
        },
        {"*": "image + text"}, {"text_bth": ("text",)}, place=_plane(),
    ),
    Case(
        "Ovis-Image", "OvisImageTransformer2DModel", {**_FLUX_CONFIG, "out_channels": 8}, _flux,
        {"transformer_blocks.*": "text + image", "single_transformer_blocks.*": "text + image"},
        _EHS, place=_packed,
    ),
    Case(
        "LongCat-Image", "LongCatImageTransformer2DModel",
        {**_FLUX_CONFIG, "pooled_projection_dim": 8}, _flux,
        {"transformer_blocks.*": "text + image", "single_transformer_blocks.*": "text + image"},
        _EHS, place=_packed,
    ),
    Case(
        "Bria", "BriaTransformer2DModel", _FLUX_CONFIG, _flux,
        {"transformer_blocks.*": "text + image", "single_transformer_blocks.*": "text + image"},
        _EHS, place=_packed,
    ),
    Case(
        "PRX", "PRXTransformer2DModel",
        {
            "in_channels": 4, "patch_size": 2, "context_in_dim": 16, "hidden_size": 16,
            "num_heads": 2, "depth": 1, "axes_dim": [4, 4],
        },
        lambda: _planar(timestep=torch.tensor([0.5])),
        {"*": "image -> text + image"}, _EHS, place=_plane(),
    ),
    Case(
        "GLM-Image", "GlmImageTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 2, "text_embed_dim": 16, "time_embed_dim": 8,
            "condition_dim": 4, "prior_vq_quantizer_codebook_size": 16,
        },
        lambda: _planar(
            prior_token_id=torch.zeros(1, TOKENS, dtype=torch.long),
            prior_token_drop=torch.zeros(1, TOKENS, dtype=torch.bool),
            target_size=torch.tensor([[64.0, 96.0]]), crop_coords=torch.zeros(1, 2),
        ),
        {"*": "text + image"}, _EHS, place=_plane(),
    ),
    Case(
        "LTX-2", "LTX2VideoTransformer3DModel",
        {
            "in_channels": 8, "out_channels": 8, **_SMALL, "cross_attention_dim": 16,
            "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 1,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": random(1, FRAMES * TOKENS, 8),
            "audio_hidden_states": random(1, 3, 8, seed=2), "timestep": torch.tensor([5]),
            "encoder_hidden_states": random(1, TEXT, 16, seed=1),
            "audio_encoder_hidden_states": random(1, TEXT + 1, 16, seed=3),
            "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "audio_num_frames": 3,
        },
        {
            "*.attn1": "image", "*.attn2": "image -> text", "*.audio_attn1": "audio",
            "*.audio_attn2": "audio -> text", "*.audio_to_video_attn": "image -> audio",
            "*.video_to_audio_attn": "audio -> image",
        },
        {
            "encoder_hidden_states": ("text",), "audio_encoder_hidden_states": ("text",),
            "audio_hidden_states": ("audio",),
        },
        place=_packed, frames=FRAMES,
    ),
    Case(
        "Sana-Video", "SanaVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 12, "num_layers": 1, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16,
        },
        _volume, {"*.attn2": "image -> text"}, _EHS, place=_video(), frames=FRAMES,
    ),
    Case(
        "Lumina 2", "Lumina2Transformer2DModel",
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 32,
            "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
            "multiple_of": 16, "axes_dim_rope": (4, 6, 6), "axes_lens": (32, 32, 32),
            "cap_feat_dim": 16,
        },
        lambda: _planar(
            timestep=torch.tensor([0.5]), text=TEXT + 2,
            encoder_attention_mask=torch.tensor([[True] * TEXT + [False] * 2]),
        ),
        {"noise_refiner.*": "image", "context_refiner.*": "text", "layers.*": "text + image"},
        _EHS, place=_plane(),
    ),
    Case(
        "AuraFlow", "AuraFlowTransformer2DModel",
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
            "num_single_dit_layers": 1, **_SMALL, "joint_attention_dim": 16,
            "caption_projection_dim": 16, "out_channels": 4, "pos_embed_max_size": 64,
        },
        _planar, {"*": "register + text + image"}, _EHS, place=_plane(),
    ),
    Case(
        "AnimateDiff", "UNetMotionModel",
        {
            "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
            "up_block_types": ("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
            "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16,
            "num_attention_heads": 2, "motion_num_attention_heads": 2,
            "motion_max_seq_length": 8,
        },
        lambda: {
            "sample": random(1, 4, FRAMES, HEIGHT, WIDTH), "timestep": 5,
            "encoder_hidden_states": random(1, TEXT, 16, seed=1).repeat_interleave(FRAMES, 0),
        },
        {
            "*motion_modules.*": "frames", "*attentions.*.attn1": "image",
            "*attentions.*.attn2": "image -> text",
        },
        _EHS, "sample", rows=FRAMES,
    ),
    Case(
        "Stable Video Diffusion", "UNetSpatioTemporalConditionModel",
        {
            "in_channels": 8, "out_channels": 4, "block_out_channels": (32, 32),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 2,
            "up_block_types": ("CrossAttnUpBlockSpatioTemporal",) * 2, "layers_per_block": 1,
            "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12,
            "cross_attention_dim": 16, "num_attention_heads": 2, "num_frames": FRAMES,
        },
        lambda: {
            "sample": random(1, FRAMES, 8, HEIGHT, WIDTH), "timestep": 5.0,
            "encoder_hidden_states": random(1, 1, 16, seed=1),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
        },
        {
            "*.temporal_transformer_blocks.*.attn1": "frames",
            "*.temporal_transformer_blocks.*.attn2": "frames -> image_prompt",
            "*.transformer_blocks.*.attn1": "image",
            "*.transformer_blocks.*.attn2": "image -> image_prompt",
        },
        {"encoder_hidden_states": ("image_prompt",)}, "sample", rows=FRAMES,
    ),
    Case(
        "PixArt, Sana", "SanaTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, **_SMALL, "num_layers": 1,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
            "cross_attention_dim": 16, "caption_channels": 16, "sample_size": 8,
        },
        lambda: _planar(hidden_states=random(1, 4, HEIGHT, WIDTH)),
        {"*.attn2": "image -> text"}, _EHS, place=_plane(1),
    ),
    Case(
        "CogView 4", "CogView4Transformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 1, **_SMALL, "text_embed_dim": 16,
            "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        lambda: _planar(
            original_size=torch.tensor([[64.0, 96.0]]), target_size=torch.tensor([[64.0, 96.0]]),
            crop_coords=torch.zeros(1, 2),
        ),
        {"*": "text + image"}, _EHS, place=_plane(),
    ),
    Case(
        "HiDream", "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1,
            "num_single_layers": 1, **_SMALL, "caption_channels": [16, 16], "text_emb_dim": 8,
            "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2),
            "max_resolution": (16, 16), "llama_layers": [0, 1], "force_inference_output": True,
        },
        lambda: {
            "hidden_states": random(1, 4, *_LATENT), "timesteps": torch.tensor([5]),
            "encoder_hidden_states_t5": random(1, TEXT, 16, seed=1),
            "encoder_hidden_states_llama3": random(2, 1, TEXT, 16, seed=2),
            "pooled_embeds": random(1, 8),
        },
        {"*": "image + text"},
        {"encoder_hidden_states_t5": ("text",), "encoder_hidden_states_llama3": ("text",)},
        place=_plane(),
    ),
    Case(
        "OmniGen", "OmniGenTransformer2DModel",
        {
            "in_channels": 4, "patch_size": 2, "hidden_size": 16, "num_attention_heads": 2,
            "num_key_value_heads": 2, "intermediate_size": 32, "num_layers": 1,
            "pad_token_id": 0, "vocab_size": 100, "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1] * 4, "short_factor": [1] * 4},
            "pos_embed_max_size": 16,
        },
        lambda: {
            "hidden_states": random(1, 4, *_LATENT), "timestep": torch.tensor([0.5]),
            "input_ids": torch.arange(1, TEXT + 1)[None], "input_img_latents": [],
            "input_image_sizes": {}, "attention_mask": torch.ones(1, *[TEXT + 1 + TOKENS] * 2),
            "position_ids": torch.arange(TEXT + 1 + TOKENS)[None],
        },
        {"*": "text + image"}, {"input_ids": ("text",)}, place=_plane(),
    ),
    Case(
        "Mochi", "MochiTransformer3DModel",
        {
            "patch_size": 2, **_SMALL, "num_layers": 2, "pooled_projection_dim": 8,
            "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 8,
        },
        lambda: _volume(encoder_attention_mask=torch.tensor([[True] * TEXT + [False] * 2]))
        | {"encoder_hidden_states": random(1, TEXT + 2, 16, seed=1)},
        {"*": "image + text"}, _EHS, place=_video(), frames=FRAMES,
        mute=("time_embed.pooler.to_out",),
    ),
    Case(
        "Hunyuan-DiT", "HunyuanDiT2DModel",
        {
            **_SMALL, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16,
            "num_layers": 2, "cross_attention_dim": 16, "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8, "text_len": TEXT, "text_len_t5": TEXT + 1,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: _planar(
            timestep=torch.tensor([5.0]),
            text_embedding_mask=torch.ones(1, TEXT),
            encoder_hidden_states_t5=random(1, TEXT + 1, 16, seed=2),
            text_embedding_mask_t5=torch.ones(1, TEXT + 1),
            image_rotary_emb=(torch.ones(TOKENS, 8), torch.zeros(TOKENS, 8)),
        ),
        {"*.attn1": "image", "*.attn2": "image -> text"},
        {"encoder_hidden_states": ("text",), "encoder_hidden_states_t5": ("text",)},
        place=_plane(), mute=("time_extra_emb.pooler.c_proj",),
    ),
    Case(
        "Stable Cascade", "StableCascadeUNet",
        {
            "in_channels": 4, "out_channels": 4, "conditioning_dim": 16,
            "block_out_channels": (16, 16), "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 16, "clip_text_pooled_in_channels": 8,
            "clip_image_in_channels": 8, "timestep_ratio_embedding_dim": 8,
        },
        lambda: {
            "sample": random(1, 4, HEIGHT, WIDTH), "timestep_ratio": torch.tensor([0.5]),
            "clip_text_pooled": random(1, 1, 8, seed=2), "clip_text": random(1, TEXT, 16, seed=1),
            "clip_img": random(1, 1, 8, seed=3),
        },
        {"*": "image -> image + text + pooled_text + image_prompt"},
        {
            "clip_text": ("text",), "clip_text_pooled": ("pooled_text",),
            "clip_img": ("image_prompt",),
        },
        "sample",
    ),
    Case(
        "Kandinsky 5", "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8,
            "time_dim": 16, "model_dim": 16, "ff_dim": 16, "num_text_blocks": 1,
            "num_visual_blocks": 1, "axes_dims": (2, 2, 4),
        },
        lambda: {
            "hidden_states": random(1, FRAMES, *_LATENT, 4), "timestep": torch.tensor([5.0]),
            "encoder_hidden_states": random(1, TEXT, 16, seed=1),
            "pooled_projections": random(1, 8),
            "visual_rope_pos": [torch.arange(n) for n in (FRAMES, HEIGHT, WIDTH)],
            "text_rope_pos": torch.arange(TEXT),
        },
        {
            "text_transformer_blocks.*": "text", "*.self_attention": "image",
            "*.cross_attention": "image -> text",
        },
        _EHS, place=lambda f, r, c: (slice(None), f, 2 * r, 2 * c), frames=FRAMES,
    ),
    Case(
        "HunyuanVideo 1.5", "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, **_SMALL, "num_layers": 1,
            "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 16,
            "text_embed_2_dim": 12, "image_embed_dim": 10, "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
        },
        lambda: _volume(
            timestep=torch.tensor([5.0]),
            encoder_attention_mask=torch.tensor([[1] * (TEXT - 1) + [0]]),
            encoder_hidden_states_2=random(1, 4, 12, seed=2),
            encoder_attention_mask_2=torch.tensor([[1, 1, 0, 0]]),
            image_embeds=random(1, 3, 10, seed=3),
        ),
        {"context_embedder.*": "text", "*": "image + image_prompt + text"},
        {
            "encoder_hidden_states": ("text",), "encoder_hidden_states_2": ("text",),
            "image_embeds": ("image_prompt",),
        },
        place=_video(), frames=FRAMES,
    ),
    Case(
        "HunyuanImage", "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, **_SMALL, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (2, 2),
            "text_embed_dim": 16, "text_embed_2_dim": 12, "rope_axes_dim": (4, 4),
        },
        lambda: _planar(
            timestep=torch.tensor([5.0]),
            encoder_attention_mask=torch.tensor([[1] * (TEXT - 1) + [0]]),
            encoder_hidden_states_2=random(1, 4, 12, seed=2),
            encoder_attention_mask_2=torch.tensor([[1, 1, 0, 0]]),
        ),
        {
            "context_embedder.*": "text", "transformer_blocks.*": "image + text",
            "single_transformer_blocks.*": "image + text",
        },
        {"encoder_hidden_states": ("text",), "encoder_hidden_states_2": ("text",)},
        place=_plane(),
    ),
    Case(
        "CogView 3 Plus", "CogView3PlusTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 1, **_SMALL, "text_embed_dim": 16,
            "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
        },
        lambda: _planar(
            original_size=torch.tensor([[64.0, 96.0]]), target_size=torch.tensor([[64.0, 96.0]]),
            crop_coords=torch.zeros(1, 2),
        ),
        {"*": "text + image"}, _EHS, place=_plane(),
    ),
    Case(
        "Text-to-video UNets", "UNet3DConditionModel",
        {
            "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "layers_per_block": 1,
            "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 8,
        },
        lambda: {
            "sample": random(1, 4, FRAMES, HEIGHT, WIDTH), "timestep": 5,
            "encoder_hidden_states": random(1, TEXT, 16, seed=1),
        },
        {
            "transformer_in.*": "frames", "*temp_attentions.*": "frames",
            "*.attentions.*.attn1": "image", "*.attentions.*.attn2": "image -> text",
        },
        _EHS, "sample", rows=FRAMES,
    ),
    Case(
        "Latte", "LatteTransformer3DModel",
        {
            **_SMALL, "in_channels": 4, "out_channels": 4, "num_layers": 1, "patch_size": 2,
            "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 16,
            "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
            "activation_fn": "gelu-approximate", "video_length": FRAMES,
        },
        lambda: _volume(hidden_states=random(1, 4, FRAMES, 8, 8)),
        {
            "temporal_transformer_blocks.*": "frames", "*.attn1": "image",
            "*.attn2": "image -> text",
        },
        _EHS, rows=FRAMES,
    ),
    Case(
        "Allegro", "AllegroTransformer3DModel",
        {
            **_SMALL, "in_channels": 4, "out_channels": 4, "num_layers": 1,
            "cross_attention_dim": 16, "sample_height": 8, "sample_width": 8, "sample_frames": 2,
            "caption_channels": 16,
        },
        lambda: _volume(),
        {"*.attn1": "image", "*.attn2": "image -> text"}, _EHS, place=_video(), frames=FRAMES,
    ),
    Case(
        "Cosmos", "CosmosTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 16, "num_layers": 1, "mlp_ratio": 2,
            "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 16, 16),
            "concat_padding_mask": False, "extra_pos_embed_type": None,
        },
        lambda: _volume(fps=24),
        {"*.attn1": "image", "*.attn2": "image -> text"}, _EHS, place=_video(), frames=FRAMES,
    ),
    Case(
        "DiT", "DiTTransformer2DModel",
        {
            **_SMALL, "in_channels": 4, "num_layers": 1, "sample_size": 8, "norm_num_groups": 4,
            "num_embeds_ada_norm": 10,
        },
        lambda: {
            "hidden_states": random(1, 4, 8, 8), "timestep": torch.tensor([5]),
            "class_labels": torch.tensor([1]),
        },
        {"*": "image"}, {},
    ),
]  # fmt: skip
