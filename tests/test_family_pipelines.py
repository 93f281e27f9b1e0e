"""Newer families as their pipelines run them: steps, guidance, words, frames."""

from __future__ import annotations

import pytest
import torch
from flashmaps import MapAttnProcessor, capture, word_maps
from tiny_families import CASES, HEIGHT, TEXT, TOKENS, WIDTH, random
from tiny_models import FAMILY

MODEL = {case.model: case.build for case in CASES}
SIZE = {"height": 16 * HEIGHT, "width": 16 * WIDTH}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def animate(tmp_path_factory):
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    parts = FAMILY["sd15"].build(tmp_path_factory.mktemp("sd15"))
    motion = MotionAdapter(
        block_out_channels=(64, 64, 128), motion_layers_per_block=1, motion_norm_num_groups=4,
        use_motion_mid_block=False, motion_num_attention_heads=2,
    )  # fmt: skip
    pipe = AnimateDiffPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=parts.unet,
        motion_adapter=motion, scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_animate(pipe, steps=1):
    return pipe(
        "a red cat", num_frames=3, num_inference_steps=steps, height=32, width=48,
        output_type="latent", generator=torch.Generator().manual_seed(0),
    )[0]  # fmt: skip


def test_animatediff_has_frames_as_rows_and_time_as_a_kind(animate):
    plain = run_animate(animate)
    with capture(animate, guidance="conditional") as record:
        assert torch.equal(plain, run_animate(animate))
    spatial = record.select("*.attentions.*")
    assert {entry.kind for entry in spatial} == {"self", "cross"}
    assert all(entry.rows == 3 and entry.frames == 1 and entry.grid for entry in spatial)
    assert spatial[0].grid == (8, 12)
    temporal = record.select(kind="temporal")
    assert len(temporal) + len(spatial) == len(record) and temporal
    for entry in temporal:
        assert entry.queries == entry.keys == {"frames": slice(0, 3)}
        assert (entry.grid, entry.rows) == (None, 1)
    assert len(temporal[0].query) == 8 * 12  # one sequence for each place


def test_words_of_animatediff_frame_by_frame(animate):
    keep = {"guidance": "conditional", "kind": "cross"}
    with capture(animate, reduce="image_to_text", **keep) as reduced:
        run_animate(animate)
    maps = word_maps(reduced, "a red cat", animate)
    assert maps.token_maps.shape == (77, 3, 8, 12)
    assert maps["cat"].shape == (3, 8, 12)
    torch.testing.assert_close(maps.token_maps.sum(0), torch.ones(3, 8, 12))
    # Each frame's are those of its own row of the batch.
    with capture(animate, "down_blocks.0.attentions.0.*", keep="qk", **keep) as record:
        run_animate(animate)
    one = word_maps(record, "a red cat", tokenizer=animate.tokenizer)
    dense = record[0].map("image->text").to_dense()
    for frame in range(3):
        expected = dense[frame].T.reshape(77, 8, 12)
        torch.testing.assert_close(one.token_maps[:, frame], expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"image=1 is out of range: layer .* saw 1"):
        word_maps(record, "a red cat", animate, image=1)


def test_flux2_with_its_pipeline():
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval().requires_grad_(False)  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        patch_size=(2, 2),
    )  # fmt: skip
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
        text_encoder=None, tokenizer=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    prompts = {
        "prompt_embeds": torch.randn(1, 7, 32),
        "negative_prompt_embeds": torch.randn(1, 7, 32),
    }

    def run(**more):
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 1, "height": 16, "width": 24, "output_type": "latent"}
        return pipe(**prompts, **call, generator=generator, **more)[0]

    plain = run()
    with capture(pipe, kind="joint", keep="qk") as record:
        assert torch.equal(plain, run())
    assert [entry.guidance for entry in record] == ["conditional"] * 2 + ["unconditional"] * 2
    for entry in record:
        assert (entry.grid, entry.kind) == ((8, 12), "joint")
        assert entry.queries == entry.keys == {"text": slice(0, 7), "image": slice(7, 103)}
    with capture(pipe, kind="joint", reduce="image_to_text") as record:
        run()
    assert len(record) == 4
    with pytest.raises(ValueError, match=r"Flux2KleinPipeline .* lays out its text is not known"):
        word_maps(record, "a red cat", pipe)


def bare(pipeline, model, **parts):
    """A pipeline of a transformer alone, which gets embeddings and gives latents."""
    import diffusers

    parts = {"vae": None, "text_encoder": None, "tokenizer": None, **parts}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = getattr(diffusers, pipeline)(scheduler=scheduler, transformer=MODEL[model](), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_z_image_guides_on_one_batch_with_the_prompt_first():
    pipe = bare("ZImagePipeline", "ZImageTransformer2DModel")

    def run():
        return pipe(
            prompt_embeds=[random(TEXT, 16, seed=1)], guidance_scale=4.0, output_type="latent",
            negative_prompt_embeds=[random(40, 16, seed=2)], num_inference_steps=2, **SIZE,
            generator=torch.Generator().manual_seed(0),
        )[0]  # fmt: skip

    plain = run()
    with capture(pipe, "layers.*") as record:
        assert torch.equal(plain, run())
    assert {(e.guidance, e.batch, e.step) for e in record} == {
        ("both", ("conditional", "unconditional"), step) for step in (0, 1)
    }
    assert "capture one part of guidance" in record[0].why
    with capture(pipe, "layers.*", guidance="conditional", reduce="image_to_text") as record:
        run()
    assert record[0].queries == {"image": slice(0, TOKENS), "text": slice(32, 32 + TEXT)}
    assert record[0].image_to_text.shape == (1, TOKENS, TEXT)


def test_lumina2_guides_in_two_passes_with_texts_of_their_own():
    pipe = bare("Lumina2Pipeline", "Lumina2Transformer2DModel")
    given = {}
    for name, length in (("prompt", TEXT), ("negative_prompt", 3)):
        given[f"{name}_embeds"] = random(1, 7, 16, seed=length)
        given[f"{name}_attention_mask"] = (torch.arange(7) < length)[None]
    options = {"guidance_scale": 4.0, "num_inference_steps": 2, "output_type": "latent", **SIZE}
    with capture(pipe, "layers.*") as record:
        pipe(**given, **options)
    assert [(e.step, e.guidance, e.queries["text"].stop, e.grid) for e in record] == [
        (step, which, length, (HEIGHT, WIDTH))
        for step in (0, 1)
        for which, length in (("conditional", TEXT), ("unconditional", 3))
    ]


def test_a_processor_that_records_knows_frames_too():
    """`MapAttnProcessor` on AnimateDiff's UNet: layers in time are no image."""
    case = next(case for case in CASES if case.model == "UNetMotionModel")
    model, inputs = case.build(), case.inputs()
    with torch.no_grad(), MapAttnProcessor.on(model, reduce=(), keep="qk") as record:
        model(**inputs, return_dict=False)
    kinds = {entry.kind: (entry.grid is None, entry.rows) for entry in record}
    assert kinds == {
        "self": (False, case.rows), "cross": (False, case.rows), "temporal": (True, 1)
    }  # fmt: skip
