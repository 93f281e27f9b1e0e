"""Newer families as their pipelines run them: steps, guidance, words, frames."""

from __future__ import annotations

import pytest
import torch
from flashmaps import capture, word_maps
from tiny_models import FAMILY

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
