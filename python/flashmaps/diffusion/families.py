"""Diffusers' models whose layers are known: the order of their tokens, and their grids.

Each order was read in the processor or the model that concatenates, and is proven by
``tests/test_families.py``: changing only the text changes exactly the rows that are called text.
A class that is not listed here is not known, nor is a subclass that has a ``forward`` (of a model)
or a ``__call__`` (of a processor) of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashmaps.diffusion import counts
from flashmaps.diffusion.layouts import Rule, Tokens


@dataclass(frozen=True)
class Family:
    """Models whose layers attend alike.

    Attributes:
        name: as people say it.
        models: names of the classes of diffusers.
        rules: of the layers, the first whose pattern matches.
        tokens: from a model and what it is called with.
        passes: whether its pipelines guide in two forward passes a step, first with the prompt.
        level: of a layer by name: how many times its grid is halved; None: not known.
    """

    name: str
    models: tuple[str, ...]
    rules: tuple[Rule, ...]
    tokens: Callable[[Any, counts.Given], Tokens]
    passes: bool = False
    level: Callable[[Any, str], int | None] = lambda model, layer: None


def _by(*names: str) -> frozenset[str]:
    return frozenset(names)


_PROMPTED = ("image -> image_prompt*",)  # a further attention of an IP-Adapter
_SELF = Rule("*.attn1", ("image",))
_CROSS = Rule("*.attn2", ("image -> text",))
_TIME = ("frames",)
_UNET = (
    Rule(
        "*",
        (
            "image -> text + image",
            "image -> image_prompt + image",
            "image -> image_prompt + text + image",
            "image -> text",
        ),
        processors=_by("AttnAddedKVProcessor2_0"),
    ),
    Rule(
        "*.attn[12]",
        ("image -> text", "image -> image_prompt", "image -> image_prompt + text"),
        alone=("image",),
        later=_PROMPTED,
    ),
    Rule("*.attentions.*", (), alone=("image",)),
)
_TEXT_IMAGE = ("text + image + reference",)
_FLUX = (
    Rule(
        "*",
        _TEXT_IMAGE,
        later=("image + reference -> image_prompt*",),
        processors=_by("FluxIPAdapterAttnProcessor"),
    ),
    Rule("*", _TEXT_IMAGE, processors=_by("FluxAttnProcessor", "FusedFluxAttnProcessor2_0")),
)

FAMILIES = (
    Family(
        "Stable Diffusion 1, 2, XL and other UNets",
        ("UNet2DConditionModel", "UNet2DModel", "ControlNetModel"),
        _UNET,
        counts.unet,
        level=counts.unet_level,
    ),
    Family(
        "PixArt, Sana",
        ("PixArtTransformer2DModel", "SanaTransformer2DModel"),
        (_SELF, _CROSS),
        counts.patched,
    ),
    Family("DiT", ("DiTTransformer2DModel",), (_SELF,), counts.patched),
    Family(
        "Stable Diffusion 3",
        ("SD3Transformer2DModel", "SD3ControlNetModel"),
        (
            Rule(
                "*",
                ("image + text",),
                alone=("image",),
                later=("image -> image + image_prompt*",),
                processors=_by(
                    "JointAttnProcessor2_0",
                    "FusedJointAttnProcessor2_0",
                    "SD3IPAdapterJointAttnProcessor2_0",
                ),
            ),
        ),
        counts.patched,
    ),
    Family(
        "Flux",
        ("FluxTransformer2DModel", "FluxControlNetModel"),
        _FLUX,
        counts.packed,
        passes=True,
    ),
    *(
        Family(
            name,
            (model,),
            (Rule("*", _TEXT_IMAGE, processors=_by(processor)),),
            counts.packed,
            passes=True,
        )
        for name, model, processor in (
            ("Ovis-Image", "OvisImageTransformer2DModel", "OvisImageAttnProcessor"),
            ("LongCat-Image", "LongCatImageTransformer2DModel", "LongCatImageAttnProcessor"),
        )
    ),
    Family(
        "Bria",
        ("BriaTransformer2DModel",),
        (Rule("*", _TEXT_IMAGE, processors=_by("BriaAttnProcessor")),),
        counts.packed,
    ),
    Family(
        "Krea 2",
        ("Krea2Transformer2DModel",),
        (
            Rule("transformer_blocks.*", ("text + image",), processors=_by("Krea2AttnProcessor")),
            Rule("text_fusion.refiner_blocks.*", ("text",)),
        ),
        counts.krea,
        passes=True,
    ),
    Family(
        "ERNIE-Image",
        ("ErnieImageTransformer2DModel",),
        (Rule("*", ("image + text",), processors=_by("ErnieImageSingleStreamAttnProcessor")),),
        counts.ernie,
    ),
    Family(
        "PRX",
        ("PRXTransformer2DModel",),
        (Rule("*", ("image -> text + image",), processors=_by("PRXAttnProcessor2_0")),),
        counts.patched,
    ),
    Family(
        "GLM-Image",
        ("GlmImageTransformer2DModel",),
        (Rule("*", ("text + image",), processors=_by("GlmImageAttnProcessor")),),
        counts.patched,
        passes=True,
    ),
    Family(
        "LTX-2",
        ("LTX2VideoTransformer3DModel",),
        (
            Rule("*.attn1", ("image",)),
            Rule("*.attn2", ("image -> text",)),
            Rule("*.audio_attn1", ("audio",)),
            Rule("*.audio_attn2", ("audio -> text:audio_text",)),
            Rule("*.audio_to_video_attn", ("image -> audio",)),
            Rule("*.video_to_audio_attn", ("audio -> image",)),
        ),
        counts.ltx2,
    ),
    Family("Sana-Video", ("SanaVideoTransformer3DModel",), (_CROSS,), counts.wan),
    Family("Chroma", ("ChromaTransformer2DModel",), _FLUX, counts.packed, passes=True),
    Family(
        "Flux.2",
        ("Flux2Transformer2DModel",),
        (
            Rule(
                "*",
                _TEXT_IMAGE,
                processors=_by("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
            ),
            Rule(
                "*",
                (*_TEXT_IMAGE, "text + image -> text + reference:cached + image"),
                later=("reference:cached",),
                processors=_by("Flux2KVAttnProcessor", "Flux2KVParallelSelfAttnProcessor"),
            ),
        ),
        counts.packed,
        passes=True,
    ),
    Family(
        "Qwen-Image",
        ("QwenImageTransformer2DModel",),
        (Rule("*", _TEXT_IMAGE, processors=_by("QwenDoubleStreamAttnProcessor2_0")),),
        counts.qwen,
        passes=True,
    ),
    Family(
        "Z-Image",
        ("ZImageTransformer2DModel",),
        (
            Rule(
                "noise_refiner.*",
                ("image + __:fill",),
                processors=_by("ZSingleStreamAttnProcessor"),
            ),
            Rule(
                "context_refiner.*",
                ("text + __:text_fill + __pad*", "_text*"),
                processors=_by("ZSingleStreamAttnProcessor"),
            ),
            Rule(
                "layers.*",
                ("image + __:fill + text + __text:text_fill + __pad*", "image + __:fill + _text*"),
                processors=_by("ZSingleStreamAttnProcessor"),
            ),
        ),
        counts.z_image,
    ),
    Family(
        "Lumina 2",
        ("Lumina2Transformer2DModel",),
        (
            Rule("noise_refiner.*", ("image",), processors=_by("Lumina2AttnProcessor2_0")),
            Rule(
                "context_refiner.*",
                ("text + __*",),
                processors=_by("Lumina2AttnProcessor2_0"),
            ),
            Rule("layers.*", ("text + image",), processors=_by("Lumina2AttnProcessor2_0")),
        ),
        counts.lumina,
        passes=True,
    ),
    Family(
        "AuraFlow",
        ("AuraFlowTransformer2DModel",),
        (
            Rule(
                "*",
                ("register + text + image",),
                processors=_by("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0"),
            ),
        ),
        counts.aura_flow,
    ),
    Family(
        "CogVideoX",
        ("CogVideoXTransformer3DModel",),
        (
            Rule(
                "*",
                ("text + image",),
                processors=_by("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
            ),
        ),
        counts.cogvideox,
    ),
    Family(
        "CogView 3 Plus",
        ("CogView3PlusTransformer2DModel",),
        (Rule("*", ("text + image",), processors=_by("CogVideoXAttnProcessor2_0")),),
        counts.patched,
    ),
    Family(
        "CogView 4",
        ("CogView4Transformer2DModel",),
        (Rule("*", ("text + image",), processors=_by("CogView4AttnProcessor")),),
        counts.patched,
        passes=True,
    ),
    Family(
        "HunyuanVideo",
        ("HunyuanVideoTransformer3DModel",),
        (
            Rule("context_embedder.*", ("text",), alone=("text",)),
            Rule("*", ("image + text",), processors=_by("HunyuanVideoAttnProcessor2_0")),
        ),
        counts.hunyuan_video,
        passes=True,
    ),
    Family(
        "HunyuanVideo 1.5",
        ("HunyuanVideo15Transformer3DModel",),
        (
            Rule("context_embedder.*", ("text:padded_text",)),
            Rule(
                "*",
                ("image + image_prompt + text + __*", "image + _text*"),
                processors=_by("HunyuanVideo15AttnProcessor2_0"),
            ),
        ),
        counts.hunyuan_video15,
        passes=True,
    ),
    Family(
        "HunyuanImage",
        ("HunyuanImageTransformer2DModel",),
        (
            Rule("context_embedder.*", ("text:first_text",)),
            Rule("*", ("image + text",), processors=_by("HunyuanImageAttnProcessor")),
        ),
        counts.hunyuan_image,
        passes=True,
    ),
    Family(
        "HiDream",
        ("HiDreamImageTransformer2DModel",),
        (Rule("*", ("image + __:fill + text",), processors=_by("HiDreamAttnProcessor")),),
        counts.hidream,
    ),
    Family(
        "OmniGen",
        ("OmniGenTransformer2DModel",),
        (
            Rule(
                "*",
                ("_text:before + text + __:time + image",),
                processors=_by("OmniGenAttnProcessor2_0"),
            ),
        ),
        counts.omnigen,
    ),
    Family("LTX-Video", ("LTXVideoTransformer3DModel",), (_SELF, _CROSS), counts.ltx),
    Family(
        "Mochi",
        ("MochiTransformer3DModel",),
        (Rule("*", ("image + text*",), processors=_by("MochiAttnProcessor2_0"), each=True),),
        counts.mochi,
    ),
    Family(
        "Kandinsky 5",
        ("Kandinsky5Transformer3DModel",),
        (
            Rule("text_transformer_blocks.*", ("text",)),
            Rule("*.cross_attention", ("image -> text",)),
            Rule("*.self_attention", ("image",)),
        ),
        counts.kandinsky5,
        passes=True,
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
                processors=_by("AttnProcessor2_0"),
            ),
        ),
        counts.cascade,
        level=counts.cascade_level,
    ),
    Family("Hunyuan-DiT", ("HunyuanDiT2DModel",), (_SELF, _CROSS), counts.hunyuan_dit),
    Family(
        "Stable Video Diffusion",
        ("UNetSpatioTemporalConditionModel",),
        (
            Rule("*.temporal_transformer_blocks.*.attn1", _TIME),
            Rule("*.temporal_transformer_blocks.*.attn2", ("frames -> image_prompt",)),
            Rule("*.attn1", ("image",)),
            Rule("*.attn2", ("image -> image_prompt",)),
        ),
        counts.video_unet(1, "image_prompt"),
        level=counts.unet_level,
    ),
    Family(
        "AnimateDiff",
        ("UNetMotionModel",),
        (Rule("*motion_modules.*", _TIME), *_UNET),
        counts.video_unet(2),
        level=counts.unet_level,
    ),
    Family(
        "Text-to-video UNets",
        ("UNet3DConditionModel",),
        (Rule("*temp_attentions.*", _TIME), Rule("transformer_in.*", _TIME), *_UNET),
        counts.video_unet(2),
        level=counts.unet_level,
    ),
    Family(
        "Latte",
        ("LatteTransformer3DModel",),
        (Rule("temporal_transformer_blocks.*", _TIME), _SELF, _CROSS),
        counts.latte,
    ),
    Family("Allegro", ("AllegroTransformer3DModel",), (_SELF, _CROSS), counts.allegro),
    Family(
        "Wan",
        (
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        (
            _SELF,
            Rule(
                "*.attn2",
                ("image -> image_prompt*",),
                later=("image -> text:told_text",),
                processors=_by(
                    "WanAttnProcessor", "WanAttnProcessor2_0", "SkyReelsV2AttnProcessor"
                ),
                only_if="add_k_proj",
            ),
            _CROSS,
        ),
        counts.wan,
        passes=True,
    ),
    Family(
        "Cosmos",
        ("CosmosTransformer3DModel",),
        (
            Rule("*.attn1", ("image",), processors=_by("CosmosAttnProcessor2_0")),
            Rule("*.attn2", ("image -> text",), processors=_by("CosmosAttnProcessor2_0")),
        ),
        counts.wan,
        passes=True,
    ),
)
