"""UNets of diffusers whose layers are known; see families.py."""

from __future__ import annotations

from flashmaps.diffusion import counts_unet
from flashmaps.diffusion.family import PROMPTED, TIME, Family, by
from flashmaps.diffusion.layouts import Rule

_UNET = (
    Rule(
        "*",
        (
            "image -> text + image",
            "image -> image_prompt + image",
            "image -> image_prompt + text + image",
            "image -> text",
        ),
        processors=by("AttnAddedKVProcessor2_0"),
    ),
    Rule(
        "*.attn[12]",
        ("image -> text", "image -> image_prompt", "image -> image_prompt + text"),
        alone=("image",),
        later=PROMPTED,
    ),
    Rule("*.attentions.*", (), alone=("image",)),
)

UNETS = (
    Family(
        "Stable Diffusion 1, 2, XL and other UNets",
        ("UNet2DConditionModel", "UNet2DModel", "ControlNetModel"),
        _UNET,
        counts_unet.unet,
        level=counts_unet.unet_level,
    ),
    Family(
        "Stable Cascade",
        ("StableCascadeUNet",),
        (
            Rule(
                "*",
                (
                    "image -> image + text + pooled_text + image_prompt",
                    "image -> text + pooled_text + image_prompt",
                ),
                processors=by("AttnProcessor2_0"),
            ),
        ),
        counts_unet.cascade,
        level=counts_unet.cascade_level,
    ),
    Family(
        "Stable Video Diffusion",
        ("UNetSpatioTemporalConditionModel",),
        (
            Rule("*.temporal_transformer_blocks.*.attn1", TIME),
            Rule("*.temporal_transformer_blocks.*.attn2", ("frames -> image_prompt",)),
            Rule("*.attn1", ("image",)),
            Rule("*.attn2", ("image -> image_prompt",)),
        ),
        counts_unet.video_unet(1, "image_prompt"),
        level=counts_unet.unet_level,
    ),
    Family(
        "AnimateDiff",
        ("UNetMotionModel",),
        (Rule("*motion_modules.*", TIME), *_UNET),
        counts_unet.video_unet(2),
        level=counts_unet.unet_level,
    ),
    Family(
        "Text-to-video UNets",
        ("UNet3DConditionModel",),
        (Rule("*temp_attentions.*", TIME), Rule("transformer_in.*", TIME), *_UNET),
        counts_unet.video_unet(2),
        level=counts_unet.unet_level,
    ),
)
