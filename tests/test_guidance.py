"""Which part of guidance a pass is: guiders, three parts, orders of a batch, means over steps."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.guidance import ORDERS, Passes
from tiny_adapters import add_ip_adapter, image_prompts
from tiny_models import FAMILY

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return FAMILY["sdxl"].build(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    return FAMILY["sd2"].build(tmp_path_factory.mktemp("sd2"))


def modular(sdxl, guider):
    """SDXL's parts in a modular pipeline, and what runs it."""
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
    parts = {name: getattr(sdxl, name) for name in (*names, "scheduler")}
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(guider=guider, **parts)
    pipe.set_progress_bar_config(disable=True)

    def run(steps=3):
        return pipe(
            prompt="a red cat",
            negative_prompt="ugly old dog",
            num_inference_steps=steps,
            height=64,
            width=96,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).get("images")

    return pipe, run


def dense(entry):  # [N, M]
    return (entry.query @ entry.key.mT * entry.scale).softmax(-1).mean(1)[0]


# -- guiders ---------------------------------------------------------------------------------------


def test_the_passes_of_a_guider_are_one_step_and_have_their_names(sdxl):
    from diffusers import ClassifierFreeGuidance

    pipe, run = modular(sdxl, ClassifierFreeGuidance(guidance_scale=5.0))
    plain = run()
    with capture(pipe, kind="cross", keep="qk") as record:
        captured = run()
    with capture(pipe, kind="cross", reduce="image_to_text", guidance="conditional") as mean:
        run()
    assert torch.equal(plain, captured)
    layer = record.layers[0]
    passes = [(entry.step, entry.guidance) for entry in record.select(layer)]
    assert passes == [(n, part) for n in range(3) for part in ("conditional", "unconditional")]
    (got,) = mean.select(layer)
    maps = [dense(entry) for entry in record.select(layer, guidance="conditional")]
    assert got.count == len(maps) == 3
    # Float32 sums of 16 products, softmax, and a mean of three.
    torch.testing.assert_close(
        got.image_to_text[0], torch.stack(maps).mean(0), atol=1e-6, rtol=1e-5
    )


def test_a_third_pass_of_a_guider_is_neither_half(sdxl):
    from diffusers import LayerSkipConfig, PerturbedAttentionGuidance

    config = LayerSkipConfig(
        indices=[0], fqn="mid_block.attentions.0.transformer_blocks", skip_attention=False,
        skip_attention_scores=True, skip_ff=False,
    )  # fmt: skip
    guider = PerturbedAttentionGuidance(
        guidance_scale=5.0, perturbed_guidance_scale=2.0, perturbed_guidance_config=config,
        perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0,
    )  # fmt: skip
    pipe, run = modular(sdxl, guider)
    with capture(pipe, "down_blocks.1.*.attn2", keep="qk") as record:
        run(steps=2)
    passes = [(entry.step, entry.guidance) for entry in record.select(record.layers[0])]
    halves = ["conditional", "unconditional"]  # it perturbs after its start, not at it
    assert passes == [(0, part) for part in halves] + [(1, part) for part in [*halves, "other"]]
    assert {e.guidance for e in record.select(guidance="conditional")} == {"conditional"}


def test_a_guider_that_does_not_guide_runs_the_prompt_alone(sdxl):
    from diffusers import ClassifierFreeGuidance

    pipe, run = modular(sdxl, ClassifierFreeGuidance(guidance_scale=1.0))
    with capture(pipe, "mid_block.*.attn2", keep="qk") as record:
        run(steps=2)
    layer = record.layers[0]
    assert [(e.step, e.guidance) for e in record.select(layer)] == [
        (0, "conditional"),
        (1, "conditional"),
    ]


def test_guiders_are_as_they_were_also_after_nested_captures(sdxl):
    from diffusers import ClassifierFreeGuidance

    guider = ClassifierFreeGuidance(guidance_scale=5.0)
    pipe, run = modular(sdxl, guider)
    before = set(vars(pipe.guider))
    with capture(pipe, "mid_block.*.attn2") as outer:
        with capture(pipe, "mid_block.*.attn2") as inner:
            run(steps=1)
        run(steps=1)
    halves = ["conditional", "unconditional"]
    assert [e.guidance for e in inner.select(inner.layers[0])] == halves
    assert [e.guidance for e in outer.select(outer.layers[0])] == halves * 2
    assert set(vars(pipe.guider)) <= before | {"_input_fields"}


# -- batches of several parts ----------------------------------------------------------------------


def as_pipeline(kind, pipe, **more):
    wanted = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in wanted}
    made = kind(**parts, requires_safety_checker=False, **more)
    made.set_progress_bar_config(disable=True)
    return made


def test_perturbed_attention_has_its_three_parts(tmp_path):
    from diffusers import StableDiffusionPAGPipeline

    family = FAMILY["sd2"]
    pipe = family.build(tmp_path)
    with capture(pipe, "up_blocks.*.attn2", steps=0) as guided:
        family.run(pipe, prompts=["a cat", "a dog"])
    pag = as_pipeline(StableDiffusionPAGPipeline, pipe, pag_applied_layers=["mid"])
    with capture(pag, "up_blocks.*.attn2", steps=0) as record:
        family.run(pag, prompts=["a cat", "a dog"], pag_scale=3.0)
    parts = ("unconditional", "conditional", "perturbed")
    assert {(e.guidance, e.batch, len(e.query)) for e in record} == {("several", parts, 6)}
    for one, other in zip(record, guided, strict=True):
        assert torch.equal(one.conditional.key, other.conditional.key)  # of the text alone
        assert torch.equal(one.unconditional.key, other.unconditional.key)
        assert torch.equal(one.part("perturbed").key, one.conditional.key)
    with capture(pag, "up_blocks.*.attn2", guidance="conditional") as half:
        family.run(pag, prompts=["a cat", "a dog"], pag_scale=3.0)
    assert {(e.guidance, len(e.query)) for e in half} == {("conditional", 2)}
    # Without classifier-free guidance: two parts; without perturbation: the usual two.
    with capture(pag, "up_blocks.*.attn2", steps=0) as record:
        family.run(pag, guidance=False, pag_scale=3.0)
    assert {e.batch for e in record} == {("conditional", "perturbed")}
    with capture(pag, "up_blocks.*.attn2", steps=0) as record:
        family.run(pag, pag_scale=0.0)
    assert {(e.guidance, e.batch) for e in record} == {("both", ("unconditional", "conditional"))}


def test_editing_by_instruction_has_its_three_parts(tmp_path):
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    pipe = FAMILY["sd2"].build(tmp_path, in_channels=8)
    edit = as_pipeline(StableDiffusionInstructPix2PixPipeline, pipe)
    image = Image.new("RGB", (48, 32), (200, 30, 30))
    with capture(edit, "down_blocks.0.*") as record:
        edit("a cat", image=image, num_inference_steps=1, output_type="latent")
    assert {e.batch for e in record} == {("conditional", "image", "unconditional")}
    for entry in record.select(kind="cross"):  # keys are of the text alone
        image_key, negative = entry.part("image").key, entry.unconditional.key
        assert torch.equal(image_key, negative)
        assert not torch.equal(entry.conditional.key, negative)
    first = record.select(kind="self")[0]  # queries are of the picture: the last part sees none
    assert torch.equal(first.conditional.query, first.part("image").query)
    assert not torch.equal(first.conditional.query, first.unconditional.query)


def test_orders_of_diffusers_own_pipelines_are_known():
    """Its sources unpack what guidance predicts; every order but the usual one is in the table."""
    import diffusers

    usual = re.compile(r"uncond|neg")
    unpacked = re.compile(r"^ +([\w, ]+?) = (?!variance)(?:\w*pred\w*)\.chunk\(([2-9])\)", re.M)
    found = set()
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = path.read_text()
        for names, count in unpacked.findall(text):
            if int(count) > 2 or ("," in names and not usual.search(names.split(",")[0])):
                found |= set(re.findall(r"^class (\w+Pipeline\w*)\((?!BaseOutput)", text, re.M))
    found -= {  # they diffuse embeddings or run no attention that a capture sees of a denoiser
        "ShapEPipeline",
        "ShapEImg2ImgPipeline",
    }
    assert found, "the sources no longer look as this test expects"
    assert found <= set(ORDERS), found - set(ORDERS)


def test_pipelines_that_run_the_model_twice_run_it_with_the_prompt_first():
    """In diffusers' sources, of those that name neither pass; their models are listed."""
    import diffusers
    from flashmaps.diffusion.families import FAMILIES
    from flashmaps.diffusion.guidance import _TWO_PASSES

    listed = {name for family in FAMILIES if family.passes for name in family.models} | _TWO_PASSES
    second = re.compile(r"(\w*(?:uncond|neg)\w*) = self\.transformer\(")
    found = set()
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = path.read_text()
        if "cache_context" in text or not second.search(text):
            continue
        first = re.search(r"(\w+) = self\.transformer\(", text)[1]
        assert not re.search("uncond|neg", first), path
        found |= set(re.findall(r"^ +transformer: (\w+)", text, re.M)[:1])
    assert len(found) > 8, "the sources no longer look as this test expects"
    # GLM-Image's first call of all is of a picture alone.
    assert found - {"GlmImageTransformer2DModel"} <= listed, found - listed


def test_latents_that_are_converted_for_each_pass_are_one_step_where_it_guides():
    class HunyuanVideoFramepackTransformer3DModel(torch.nn.Linear):
        pass

    class HunyuanVideoFramepackPipeline(_Untold):
        guidance_scale = 5.0

    packed = HunyuanVideoFramepackTransformer3DModel(1, 1)
    listed = type("KreaModel", (torch.nn.Linear,), {})
    for pipe, model, again in (
        (HunyuanVideoFramepackPipeline(), packed, True),
        (_Told(), listed(1, 1), True),
        (_Untold(), listed(1, 1), False),
    ):
        passes = Passes(pipe, [model], asked=True)
        passes._contexts[model] = None
        steps = []
        for number in range(2):
            latent = torch.full((1, 4, 3, 3), float(number))
            for _ in range(2):
                passes.begin(model, {"hidden_states": latent.clone(), "timestep": number})
                steps.append(passes.step)
        assert steps == ([0, 0, 1, 1] if again else [0, 1, 2, 3])


class _Told:
    """A pipeline of someone's own that says it guides."""

    do_classifier_free_guidance = True


class _Untold:
    pass


class LuminaPipeline:  # by its name; the real one takes text models of billions
    pass


def begin(pipe, latent, **options):
    model = torch.nn.Linear(1, 1)
    passes = Passes(pipe, [model], asked=True, **options)
    passes._contexts[model] = None
    return passes.begin(model, {"hidden_states": latent, "timestep": 1})


def test_a_half_is_named_only_where_its_order_is_known():
    once, twice = torch.randn(2, 4, 3, 3), torch.randn(1, 4, 3, 3).expand(2, -1, -1, -1)
    assert begin(_Told(), twice) == ("unknown", ())
    assert begin(_Told(), once) == ("unknown", ())
    assert begin(_Untold(), once) == (None, ())
    assert begin(_Untold(), twice) == ("unknown", ())
    reversed_halves = ("conditional", "unconditional")
    assert begin(LuminaPipeline(), twice) == ("both", reversed_halves)
    assert begin(_Told(), once, batch=reversed_halves) == ("both", reversed_halves)
    assert begin(_Told(), once, batch=("conditional",)) == ("conditional", ())
    with pytest.raises(ValueError, match="a batch of 2 does not divide into 3 parts"):
        begin(_Told(), once, batch=("a", "b", "c"))


def test_channels_of_a_picture_beside_the_latents_do_not_hide_the_halves():
    """As image-to-video pipelines have it: the unconditional half gets an empty picture."""
    from types import SimpleNamespace

    class UNetSpatioTemporalConditionModel(torch.nn.Linear):
        pass

    class StableVideoDiffusionPipeline(_Told):
        __module__ = "diffusers.pipelines.stable_video_diffusion"
        vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4))

    latents = torch.randn(1, 3, 4, 5, 5).expand(2, -1, -1, -1, -1)
    picture = torch.stack([torch.zeros(3, 4, 5, 5), torch.randn(3, 4, 5, 5)])
    model = UNetSpatioTemporalConditionModel(1, 1)
    passes = Passes(StableVideoDiffusionPipeline(), [model], asked=True)
    passes._contexts[model] = None
    given = {"sample": torch.cat([latents, picture], 2), "timestep": 1}
    assert passes.begin(model, given) == ("both", ("unconditional", "conditional"))


def test_where_the_prompts_part_cannot_be_told_one_sentence_says_so(sd2):
    own = _Told()
    own.unet = sd2.unet
    with pytest.warns(UserWarning, match=r"cannot be told; say the order with batch=") as caught:
        with capture(own, "mid_block.*", guidance="conditional"):
            FAMILY["sd2"].run(sd2, steps=1)
    assert len(caught) == 1
    order = ("unconditional", "conditional")
    with capture(own, "mid_block.*", guidance="conditional", batch=order) as record:
        FAMILY["sd2"].run(sd2, steps=1)
    assert {(e.guidance, len(e.query)) for e in record} == {("conditional", 1)}
    with capture(own, "mid_block.*") as record:
        FAMILY["sd2"].run(sd2, steps=1)
    assert {e.guidance for e in record} == {"unknown"}
    with pytest.raises(ValueError, match="which part is which cannot be told; capture with batch="):
        _ = record[0].conditional


@pytest.mark.parametrize("batch", [(), ("a", "a"), (1,)])
def test_parts_need_names(sd2, batch):
    with pytest.raises(ValueError, match=r"batch=.*wanted the names of the batch's equal parts"):
        capture(sd2, batch=batch)


# -- means over steps ------------------------------------------------------------------------------


def test_a_mean_over_steps_has_no_step(sd2):
    options = {"kind": "cross", "reduce": "image_to_text", "guidance": "conditional"}
    with capture(sd2, **options) as mean:
        FAMILY["sd2"].run(sd2, steps=3)
    assert {(e.step, e.timestep, e.count) for e in mean} == {(None, None, 3)}
    assert "step" not in repr(mean[0])
    message = r"mean over 3 passes, which has no step; .*keep='statistics'.*keep='qk'"
    with pytest.raises(ValueError, match=message):
        mean.select(step=2)
    assert len(mean.select("no such layer", step=2)) == 0
    with capture(sd2, **options, keep="statistics") as each:
        FAMILY["sd2"].run(sd2, steps=3)
    assert [len(each.select(step=n)) for n in range(3)] == [10, 10, 10]


# -- image prompts of several adapters -------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_adapters_have_an_entry_each(name, tmp_path):
    family = FAMILY[name]
    pipe = family.build(tmp_path)
    model = getattr(pipe, family.denoiser)
    add_ip_adapter(model, adapters=2)
    prompts = image_prompts(model, adapters=2)
    options = {"kind": "image_prompt", "guidance": "conditional"}
    with capture(pipe, keep="qk", **options) as full:
        family.run(pipe, steps=2, **prompts)
    with capture(pipe, reduce="entropy", **options) as mean:
        family.run(pipe, steps=2, **prompts)
    layer = full.layers[0]
    assert [e.adapter for e in full.select(layer)] == [0, 1, 0, 1]
    for adapter in (0, 1):
        (got,) = mean.select(layer, adapter=adapter)
        passes = full.select(layer, adapter=adapter)
        wanted = torch.stack([e.map().entropy() for e in passes]).mean(0)
        assert got.count == 2 and f"adapter={adapter}" in repr(got)
        torch.testing.assert_close(got.entropy, wanted, atol=1e-6, rtol=1e-6)


def test_an_adapter_of_scale_zero_is_not_attended_to(tmp_path):
    family = FAMILY["sd15"]
    pipe = family.build(tmp_path)
    add_ip_adapter(pipe.unet, adapters=2)
    prompts = image_prompts(pipe.unet, adapters=2)
    with capture(pipe, kind="image_prompt", steps=0) as both:
        family.run(pipe, steps=1, **prompts)
    pipe.set_ip_adapter_scale([0.0, 1.0])
    with capture(pipe, kind="image_prompt", steps=0) as second:
        family.run(pipe, steps=1, **prompts)
    assert {e.adapter for e in second} == {1}
    layer = second.layers[0]
    (one,), (other,) = second.select(layer), both.select(layer, adapter=1)
    assert torch.equal(one.key, other.key)
