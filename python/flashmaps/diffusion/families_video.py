"""Transformers of diffusers that make videos, whose layers are known; see families.py."""

from __future__ import annotations

from flashmaps.diffusion import counts
from flashmaps.diffusion.family import CROSS, SELF, TIME, Family, by
from flashmaps.diffusion.layouts import Rule

VIDEOS = (
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
    Family("Sana-Video", ("SanaVideoTransformer3DModel",), (CROSS,), counts.wan),
    Family(
        "CogVideoX",
        ("CogVideoXTransformer3DModel",),
        (
            Rule(
                "*",
                ("text + image",),
                processors=by("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
            ),
        ),
        counts.cogvideox,
    ),
    Family(
        "HunyuanVideo",
        ("HunyuanVideoTransformer3DModel",),
        (
            Rule("context_embedder.*", ("text",), alone=("text",)),
            Rule("*", ("image + text",), processors=by("HunyuanVideoAttnProcessor2_0")),
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
                processors=by("HunyuanVideo15AttnProcessor2_0"),
            ),
        ),
        counts.hunyuan_video15,
        passes=True,
    ),
    Family("LTX-Video", ("LTXVideoTransformer3DModel",), (SELF, CROSS), counts.ltx),
    Family(
        "Mochi",
        ("MochiTransformer3DModel",),
        (Rule("*", ("image + text*",), processors=by("MochiAttnProcessor2_0"), each=True),),
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
        "Latte",
        ("LatteTransformer3DModel",),
        (Rule("temporal_transformer_blocks.*", TIME), SELF, CROSS),
        counts.latte,
    ),
    Family("Allegro", ("AllegroTransformer3DModel",), (SELF, CROSS), counts.allegro),
    Family(
        "Wan",
        (
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        (
            SELF,
            Rule(
                "*.attn2",
                ("image -> image_prompt*",),
                later=("image -> text:told_text",),
                processors=by("WanAttnProcessor", "WanAttnProcessor2_0", "SkyReelsV2AttnProcessor"),
                only_if="add_k_proj",
            ),
            CROSS,
        ),
        counts.wan,
        passes=True,
    ),
    Family(
        "Cosmos",
        ("CosmosTransformer3DModel",),
        (
            Rule("*.attn1", ("image",), processors=by("CosmosAttnProcessor2_0")),
            Rule("*.attn2", ("image -> text",), processors=by("CosmosAttnProcessor2_0")),
        ),
        counts.wan,
        passes=True,
    ),
)
