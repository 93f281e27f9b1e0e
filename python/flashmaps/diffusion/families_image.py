"""Transformers of diffusers that make images, whose layers are known; see families.py."""

from __future__ import annotations

from flashmaps.diffusion import counts
from flashmaps.diffusion.family import CROSS, SELF, Family, by
from flashmaps.diffusion.layouts import Rule

_TEXT_IMAGE = ("text + image + reference",)
_FLUX = (
    Rule(
        "*",
        _TEXT_IMAGE,
        later=("image + reference -> image_prompt*",),
        processors=by("FluxIPAdapterAttnProcessor"),
    ),
    Rule("*", _TEXT_IMAGE, processors=by("FluxAttnProcessor", "FusedFluxAttnProcessor2_0")),
)

IMAGES = (
    Family(
        "PixArt, Sana",
        ("PixArtTransformer2DModel", "SanaTransformer2DModel"),
        (SELF, CROSS),
        counts.patched,
    ),
    Family("DiT", ("DiTTransformer2DModel",), (SELF,), counts.patched),
    Family(
        "Stable Diffusion 3",
        ("SD3Transformer2DModel", "SD3ControlNetModel"),
        (
            Rule(
                "*",
                ("image + text",),
                alone=("image",),
                later=("image -> image + image_prompt*",),
                processors=by(
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
            (Rule("*", _TEXT_IMAGE, processors=by(processor)),),
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
        (Rule("*", _TEXT_IMAGE, processors=by("BriaAttnProcessor")),),
        counts.packed,
    ),
    Family(
        "Krea 2",
        ("Krea2Transformer2DModel",),
        (
            Rule("transformer_blocks.*", ("text + image",), processors=by("Krea2AttnProcessor")),
            Rule("text_fusion.refiner_blocks.*", ("text",)),
        ),
        counts.krea,
        passes=True,
    ),
    Family(
        "ERNIE-Image",
        ("ErnieImageTransformer2DModel",),
        (Rule("*", ("image + text",), processors=by("ErnieImageSingleStreamAttnProcessor")),),
        counts.ernie,
    ),
    Family(
        "PRX",
        ("PRXTransformer2DModel",),
        (Rule("*", ("image -> text + image",), processors=by("PRXAttnProcessor2_0")),),
        counts.patched,
    ),
    Family(
        "GLM-Image",
        ("GlmImageTransformer2DModel",),
        (Rule("*", ("text + image",), processors=by("GlmImageAttnProcessor")),),
        counts.patched,
        passes=True,
    ),
    Family("Chroma", ("ChromaTransformer2DModel",), _FLUX, counts.packed, passes=True),
    Family(
        "Flux.2",
        ("Flux2Transformer2DModel",),
        (
            Rule(
                "*",
                _TEXT_IMAGE,
                processors=by("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
            ),
            Rule(
                "*",
                (*_TEXT_IMAGE, "text + image -> text + reference:cached + image"),
                later=("reference:cached",),
                processors=by("Flux2KVAttnProcessor", "Flux2KVParallelSelfAttnProcessor"),
            ),
        ),
        counts.packed,
        passes=True,
    ),
    Family(
        "Qwen-Image",
        ("QwenImageTransformer2DModel",),
        (Rule("*", _TEXT_IMAGE, processors=by("QwenDoubleStreamAttnProcessor2_0")),),
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
                processors=by("ZSingleStreamAttnProcessor"),
            ),
            Rule(
                "context_refiner.*",
                ("text + __:text_fill + __pad*", "_text*"),
                processors=by("ZSingleStreamAttnProcessor"),
            ),
            Rule(
                "layers.*",
                ("image + __:fill + text + __text:text_fill + __pad*", "image + __:fill + _text*"),
                processors=by("ZSingleStreamAttnProcessor"),
            ),
        ),
        counts.z_image,
    ),
    Family(
        "Lumina 2",
        ("Lumina2Transformer2DModel",),
        (
            Rule("noise_refiner.*", ("image",), processors=by("Lumina2AttnProcessor2_0")),
            Rule(
                "context_refiner.*",
                ("text + __*",),
                processors=by("Lumina2AttnProcessor2_0"),
            ),
            Rule("layers.*", ("text + image",), processors=by("Lumina2AttnProcessor2_0")),
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
                processors=by("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0"),
            ),
        ),
        counts.aura_flow,
    ),
    Family(
        "CogView 3 Plus",
        ("CogView3PlusTransformer2DModel",),
        (Rule("*", ("text + image",), processors=by("CogVideoXAttnProcessor2_0")),),
        counts.patched,
    ),
    Family(
        "CogView 4",
        ("CogView4Transformer2DModel",),
        (Rule("*", ("text + image",), processors=by("CogView4AttnProcessor")),),
        counts.patched,
        passes=True,
    ),
    Family(
        "HunyuanImage",
        ("HunyuanImageTransformer2DModel",),
        (
            Rule("context_embedder.*", ("text:first_text",)),
            Rule("*", ("image + text",), processors=by("HunyuanImageAttnProcessor")),
        ),
        counts.hunyuan_image,
        passes=True,
    ),
    Family(
        "HiDream",
        ("HiDreamImageTransformer2DModel",),
        (Rule("*", ("image + __:fill + text",), processors=by("HiDreamAttnProcessor")),),
        counts.hidream,
    ),
    Family(
        "OmniGen",
        ("OmniGenTransformer2DModel",),
        (
            Rule(
                "*",
                ("_text:before + text + __:time + image",),
                processors=by("OmniGenAttnProcessor2_0"),
            ),
        ),
        counts.omnigen,
    ),
    Family("Hunyuan-DiT", ("HunyuanDiT2DModel",), (SELF, CROSS), counts.hunyuan_dit),
)
