"""Models in, features out: every family, however its pipeline is placed, and left as it was."""

from __future__ import annotations

import copy

import diffusers
import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.diffusion import features as pipelines
from flashmaps.diffusion.features import features, load_model
from flashmaps.diffusion.latents import plan_inversion
from tiny_adapters import add_ip_adapter
from tiny_models import FAMILY
from tiny_pipeline import tiny_pipeline, tiny_unet
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTO = np.random.default_rng(0).random((60, 90, 3), dtype=np.float32)
OTHER = np.random.default_rng(1).random((60, 90, 3), dtype=np.float32)
TALL = np.random.default_rng(2).random((90, 60, 3), dtype=np.float32)
LAYERS = "up_blocks.1.*.attn1"  # 8 x 8 tokens at 64 pixels
FAMILIES = ["sd15", "sd2", "sd21", "sdxl"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(path)
    return path


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    return FAMILY[request.param].build(tmp_path)


def dense(found):
    return fm.AttentionMap(
        found.query, found.key, scale=found.scale, head_weights=found.head_weights,
        backend="reference",
    ).to_dense()  # fmt: skip


def assert_near(found, expected, roundings=100):
    """Equal but for the rounding of some hundred operations in a row."""
    for ours, theirs in ((found.query, expected.query), (found.key, expected.key)):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < roundings * torch.finfo(ours.dtype).eps


class Spy:
    """What a module was called with, as often as it was."""

    def __init__(self, module):
        self.calls = []
        self._hook = module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.calls.append((args, kwargs))

    def __enter__(self):
        return self.calls

    def __exit__(self, *_):
        self._hook.remove()


# -- what features are -----------------------------------------------------------------------------


def test_features_know_their_grid_and_settings(pipe):
    (found,) = features(pipe, PHOTO, layers=LAYERS, size=64, seeds=(0, 1), timestep=100)
    assert found.input_size == (48, 64) and found.grid == (6, 8)
    assert found.query.shape == (1, 8, 48, 16)  # 2 layers x 2 seeds x 2 heads
    assert len(found.layers) == 2 and found.timestep == 100 and found.inversion_steps is None
    assert found.head_weights.sum() == pytest.approx(1)


def test_layers_seeds_and_timesteps_are_averaged(pipe):
    parts = [
        features(pipe, PHOTO, layers=layer, size=64, seeds=seed, timestep=t)[0]
        for layer in ("up_blocks.1.attentions.0.*.attn1", "up_blocks.1.attentions.1.*.attn1")
        for seed in (4, 5)
        for t in (1, 300)
    ]
    (all_of,) = features(pipe, PHOTO, layers=LAYERS, size=64, seeds=(4, 5), timestep=(1, 300))
    assert all_of.timestep == (1, 300)
    mean = torch.stack([dense(part) for part in parts]).mean(0)
    torch.testing.assert_close(dense(all_of), mean, atol=1e-6, rtol=1e-4)


def test_equal_images_have_equal_features_unless_their_noise_differs(pipe):
    alone = {"layers": LAYERS, "size": 64, "batch_size": 1}
    first, second = features(pipe, [PHOTO, PHOTO], **alone)
    assert torch.equal(first.query, second.query) and torch.equal(first.key, second.key)
    (other,) = features(pipe, PHOTO, seeds=1, **alone)
    assert not torch.equal(first.query, other.query)
    first, second = features(pipe, [PHOTO, PHOTO], same_noise=False, **alone)
    assert first.seeds != second.seeds and not torch.equal(first.query, second.query)


def test_the_unet_sees_what_its_own_pipeline_shows_it(family):
    """Text, and SDXL's pooled text and sizes; and for an empty prompt the unconditional half."""
    if family.unet.config.addition_embed_type:  # as in the released SDXL
        assert family.config.force_zeros_for_empty_prompt
    call = {"height": 64, "width": 96, "num_inference_steps": 1, "output_type": "latent"}
    with Spy(family.unet) as theirs:
        family("a cat", guidance_scale=5.0, **call)
    layers = pipelines.default_layers(family)
    for half, prompt in enumerate(("", "a cat")):
        with Spy(family.unet) as ours:
            features(family, PHOTO, size=(64, 96), prompt=prompt, layers=layers)
        (((latent, timestep), given),) = ours
        assert latent.shape == (1, 4, 16, 24) and timestep == 1
        (_, wanted), *_ = theirs
        expected = wanted["encoder_hidden_states"].chunk(2)[half]
        torch.testing.assert_close(given["encoder_hidden_states"], expected)
        added = wanted.get("added_cond_kwargs") or {}
        assert set(added) == set(given.get("added_cond_kwargs", {}))
        for name in added:
            torch.testing.assert_close(given["added_cond_kwargs"][name], added[name].chunk(2)[half])


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_any_scheduler_gives_the_same_features(pipe, scheduler):
    other = copy.copy(pipe)
    other.scheduler = getattr(diffusers, scheduler).from_config(
        pipe.scheduler.config, prediction_type="v_prediction"
    )
    (a,) = features(pipe, PHOTO, layers=LAYERS, size=64)
    (b,) = features(other, PHOTO, layers=LAYERS, size=64)
    assert_near(a, b)


def test_defaults_come_from_the_model(pipe, tmp_path):
    assert pipelines.default_size(pipe) == 64
    assert pipelines.default_layers(pipe) == "up_blocks.2.*.attn1"
    sdxl = FAMILY["sdxl"].build(tmp_path)
    assert pipelines.default_layers(sdxl) == "up_blocks.1.*.attn1"
    (found,) = features(sdxl, PHOTO)
    assert found.input_size == (48, 64) and found.grid == (6, 8)  # of 12 x 16 latent cells


# -- batches ---------------------------------------------------------------------------------------


def test_a_batch_gives_what_one_at_a_time_gives(family):
    """Images of two sizes, each with its prompt and noise; the order is that of the images."""
    options = {
        "layers": pipelines.default_layers(family), "size": 64, "same_noise": False,
        "prompt": ["a cat", "", "two dogs", "a cat"], "timestep": 300,
    }  # fmt: skip
    images = [PHOTO, TALL, OTHER, PHOTO]
    alone = features(family, images, batch_size=1, **options)
    with Spy(family.unet) as calls:
        together = features(family, images, batch_size=3, **options)
    assert [len(args[0]) for args, _ in calls] == [3, 1]
    for found, expected, image, prompt in zip(
        together, alone, images, options["prompt"], strict=True
    ):
        assert (
            np.array_equal(found.image, image)
            and found.prompt == prompt
            and found.seeds == expected.seeds
        )
        assert_near(found, expected)
    assert not torch.allclose(together[0].key, together[2].key, atol=1e-2)


def test_all_pairs_of_a_batch_cost_one_pass_per_seed(pipe):
    with Spy(pipe.unet) as calls:
        found = features(
            pipe, [PHOTO, OTHER, PHOTO[::-1].copy()], layers=LAYERS, size=64, seeds=(0, 1),
            batch_size=3,
        )  # fmt: skip
    assert len(calls) == 2 and len(found) == 3


def test_the_images_of_a_match_are_one_batch(pipe):
    with Spy(pipe.unet) as calls:
        fm.match(PHOTO, OTHER, model=pipe, layers=LAYERS, size=64)
        fm.match(PHOTO, TALL, model=pipe, layers=LAYERS, size=64)
        fm.match(PHOTO, OTHER, model=pipe, layers=LAYERS, size=64, batch_size=1)
    assert [len(args[0]) for args, _ in calls] == [2, 1, 1, 1, 1]


# -- inversion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd2", "sd21", "sdxl"])
def test_inversion_shows_the_inverted_latent_at_its_own_timestep(name, tmp_path):
    family = FAMILY[name].build(tmp_path)
    layers = pipelines.default_layers(family)
    options = {"layers": layers, "size": 64, "prompt": ["a cat", ""], "inversion_steps": 50}
    with Spy(family.unet) as calls:
        first, second = features(family, [PHOTO, OTHER], timestep=100, **options)
    steps = [timestep for (_, timestep), _ in calls]
    assert steps == [1, 21, 41, 61, 81, 101, 101]  # five steps between 1 and 101; then the capture
    assert first.timestep == 101 and first.seeds == () and first.inversion_steps == 50
    # The capture's latent is where the last step led, which has the noise level of timestep 101.
    scheduler = plan_inversion(family, (100,), 50).scheduler
    before, after = (call[0][0] for call in calls[-2:])
    conditions = calls[-2][1]
    with torch.no_grad():
        predicted = family.unet(before, 101, **conditions).sample
    torch.testing.assert_close(after, scheduler.step(predicted, 101, before).prev_sample)
    for found, image, prompt in ((first, PHOTO, "a cat"), (second, OTHER, "")):
        (alone,) = features(family, image, timestep=100, **{**options, "prompt": prompt})
        assert_near(found, alone, roundings=7 * 100)  # seven passes


def test_one_inversion_passes_several_timesteps(pipe):
    options = {"layers": LAYERS, "size": 64, "inversion_steps": 10}
    with Spy(pipe.unet) as calls:
        (both,) = features(pipe, PHOTO, timestep=[401, 201], **options)
    assert [t for (_, t), _ in calls] == [1, 101, 201, 201, 301, 401, 401]
    assert both.timestep == (201, 401)
    parts = [features(pipe, PHOTO, timestep=t, **options)[0] for t in both.timestep]
    mean = torch.stack([dense(part) for part in parts]).mean(0)
    torch.testing.assert_close(dense(both), mean, atol=1e-6, rtol=1e-4)


def test_a_match_may_be_inverted_and_says_so(pipe):
    match = fm.match(
        PHOTO, OTHER, model=pipe, layers=LAYERS, size=64, timestep=100, inversion_steps=50,
        prompt=("a cat", "two dogs"),
    )  # fmt: skip
    numbers = match.summary()
    assert numbers["timestep"] == 101 and numbers["inversion_steps"] == 50
    assert (numbers["prompt"], numbers["target_prompt"]) == ("a cat", "two dogs")
    assert numbers["seeds"] == []


# -- placement -------------------------------------------------------------------------------------
# Without a GPU: the device to compute on is the CPU, and weights wait elsewhere (on meta, for one).


def parts(pipe):
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def offload_whole_models(pipe):
    """What enable_model_cpu_offload does, which itself wants a GPU."""
    from accelerate import cpu_offload_with_hook

    hook = None
    pipe._all_hooks = []
    for part in parts(pipe):
        _, hook = cpu_offload_with_hook(part, execution_device="cpu", prev_module_hook=hook)


def offload_sequentially(pipe):
    """What enable_sequential_cpu_offload does: weights come for the call of one small module."""
    from accelerate import cpu_offload

    for part in parts(pipe):
        cpu_offload(part, execution_device="cpu", offload_buffers=len(part._parameters) > 0)
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}


def offload_groups(pipe):
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def offload_leaves(pipe):
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


OFFLOADS = pytest.mark.parametrize(
    "offload", [offload_whole_models, offload_sequentially, offload_groups, offload_leaves]
)


@OFFLOADS
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sd2", torch.float32), ("sdxl", torch.bfloat16)],  # the latter's VAE changes its dtype
    ids=["sd2-float32", "sdxl-bfloat16"],
)
def test_offloading_changes_no_features(name, offload, dtype, tmp_path):
    pipe = FAMILY[name].build(tmp_path).to(dtype)
    options = {"layers": pipelines.default_layers(pipe), "size": 64, "prompt": "a cat"}
    moved = copy.deepcopy(pipe)
    offload(moved)
    places = [parameter.device for part in parts(moved) for parameter in part.parameters()]
    for more in ({}, {"timestep": 41, "inversion_steps": 50}):
        expected = features(pipe, [PHOTO, OTHER], **options, **more)
        found = features(moved, [PHOTO, OTHER], **options, **more)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.query, theirs.query)
            assert torch.equal(ours.key, theirs.key)
        assert places == [each.device for part in parts(moved) for each in part.parameters()]


@OFFLOADS
def test_offloading_changes_nothing_that_is_captured(pipe, offload):
    moved = copy.deepcopy(pipe)
    offload(moved)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    with fm.capture(pipe, LAYERS) as expected:
        wanted = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images
    with fm.capture(moved, LAYERS) as found:
        shown = moved("a cat", generator=torch.Generator().manual_seed(0), **options).images
    assert torch.equal(shown, wanted) and len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.query, theirs.query) and torch.equal(ours.key, theirs.key)


def test_what_model_offload_brought_is_sent_home(pipe, monkeypatch):
    calls = []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: calls.append(self))
    features(pipe, PHOTO, layers=LAYERS, size=64)
    with pytest.raises(ValueError, match="different sizes"):
        features(pipe, PHOTO, layers="up_blocks.*.attn1", size=64)
    assert calls == [pipe, pipe]


def test_a_pipeline_with_a_device_map(folder, pipe):
    mapped = diffusers.StableDiffusionPipeline.from_pretrained(folder, device_map="cpu")
    (found,) = features(mapped, PHOTO, layers=LAYERS, size=64)
    (expected,) = features(pipe, PHOTO, layers=LAYERS, size=64)
    assert torch.equal(found.key, expected.key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_half_precision_is_near_full_precision(name, dtype, tmp_path):
    """Sums are kept in float32 inside, so some ten roundings matter, inversion's included."""
    family = FAMILY[name].build(tmp_path)
    layers = pipelines.default_layers(family)
    options = {"layers": layers, "size": 64, "prompt": "a cat", "timestep": 300}
    (full,) = features(family, PHOTO, **options)
    (inverted,) = features(family, PHOTO, inversion_steps=20, **options)
    half = family.to(dtype)
    for expected, more in ((full, {}), (inverted, {"inversion_steps": 20})):
        (found,) = features(half, PHOTO, **options, **more)
        assert found.key.dtype == dtype
        assert_near(found, expected, roundings=10)
    for compare in ("qk", "kk"):
        match = fm.match(PHOTO, PHOTO, model=half, compare=compare, **options)
        assert len(match.forward) == found.key.shape[2]
        assert np.isfinite(match.summary()["soft_ims"])


def test_cosines_of_half_precision_are_computed_in_full(pipe):
    """1 / TEMPERATURE times the rounding of a bfloat16 norm would change a map by a third."""
    from dataclasses import replace

    from flashmaps.matching.cross_map import cross_map

    (found,) = features(pipe, PHOTO, layers=LAYERS, size=64)
    half = replace(found, query=found.query.bfloat16(), key=found.key.bfloat16())
    same = replace(half, query=half.query.float(), key=half.key.float())
    assert torch.equal(cross_map(half, half).to_dense(), cross_map(same, same).to_dense())


# -- nothing else changes --------------------------------------------------------------------------


def state(pipe):
    """What a caller could tell the pipeline by, but for the weights."""
    scheduler = {
        name: value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)
        for name, value in vars(pipe.scheduler).items()
    }
    own = {name: value for name, value in vars(pipe).items() if name not in pipe.components}
    modules = {
        (name, inner): (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
        for inner, module in part.named_modules()
    }
    processors = dict(pipe.unet.attn_processors)
    return scheduler, own, modules, processors, dict(pipe.config)


def assert_equal_state(after, before):
    assert after[0].keys() == before[0].keys()
    for name, value in before[0].items():
        same = torch.equal(value, after[0][name]) if isinstance(value, torch.Tensor) else None
        assert value == after[0][name] if same is None else same, name
    assert after[1:] == before[1:]


@pytest.mark.parametrize("more", [{}, {"inversion_steps": 20}], ids=["noise", "inversion"])
def test_the_pipeline_is_left_as_it_was(family, more):
    options = {"layers": pipelines.default_layers(family), "size": 64, "timestep": 51}
    family("a cat", num_inference_steps=2, guidance_scale=5.0, output_type="latent")
    family.scheduler.set_timesteps(7)
    family.unet.train()
    family.text_encoder.train()
    family.vae.encoder.train()
    weights = {name: tensor.clone() for name, tensor in family.unet.state_dict().items()}
    before = state(family)
    (first,) = features(family, PHOTO, **options, **more)
    assert_equal_state(state(family), before)
    assert first.key.grad_fn is None and torch.is_grad_enabled()
    assert all(torch.equal(each, weights[name]) for name, each in family.unet.state_dict().items())
    with pytest.raises(ZeroDivisionError):
        with monkeypatched_forward(family.unet):
            features(family, PHOTO, **options, **more)
    assert_equal_state(state(family), before)


class monkeypatched_forward:
    """A UNet that fails in its middle."""

    def __init__(self, unet):
        self._hook = unet.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)

    def __enter__(self):
        pass

    def __exit__(self, *_):
        self._hook.remove()


def test_no_random_number_of_anybody_else_is_drawn(pipe):
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    theirs = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    shaky = copy.copy(pipe)
    shaky.unet = tiny_unet(dropout=0.5).train()
    torch.set_rng_state(theirs[0])
    (first,) = features(shaky, PHOTO, layers=LAYERS, size=64)
    (second,) = features(shaky, PHOTO, layers=LAYERS, size=64)
    assert torch.equal(first.query, second.query)  # no dropout
    assert torch.equal(torch.get_rng_state(), theirs[0])
    assert (np.random.get_state()[1] == theirs[1]).all()  # noqa: NPY002


def test_features_inside_a_capture_of_the_users(pipe):
    with fm.capture(pipe.unet, LAYERS) as record:
        (found,) = features(pipe, PHOTO, layers=LAYERS, size=64)
    assert torch.equal(torch.cat([entry.key for entry in record], dim=1), found.key)


# -- what cannot be done ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"timestep": 1000}, r"timestep=1000 is out of range; it takes 0 to 999"),
        ({"timestep": 0.5}, r"timestep=0\.5 must be a whole number; it takes 0 to 999"),
        ({"timestep": True}, "timestep=True must be a whole number"),
        ({"timestep": (1, -1)}, "timestep=-1 is out of range"),
        ({"timestep": ()}, "timestep is empty"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": "12"}, "seeds='12' must be a whole number"),
        ({"seeds": [0, 1.0]}, r"seeds=1\.0 must be a whole number"),
        ({"seeds": False}, "seeds=False must be a whole number"),
        ({"seeds": -1}, "seeds=-1 is out of range"),
        ({"inversion_steps": 0}, "inversion_steps=0 is out of range; it takes 1 to 1000"),
        ({"inversion_steps": 2.5}, r"inversion_steps=2\.5 must be a whole number"),
        ({"inversion_steps": 50, "seeds": (0, 1)}, r"seeds=\(0, 1\) with inversion_steps=50"),
        ({"inversion_steps": 700, "timestep": 900}, "schedule ends at timestep 700"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"batch_size": "all"}, "batch_size='all' must be a whole number"),
        ({"prompt": 3}, "prompt=3 must be a string, or a list of one for each image"),
        ({"prompt": ["a", "b"]}, "prompt has 2 strings for 1 images"),
        ({"size": 7}, "size=7 is too small; this model needs at least 16"),
        ({"size": True}, "size=True must be a whole number of pixels"),
        ({"layers": 5}, "layers=5 must be a pattern of layer names such as 'up_blocks"),
        ({"layers": [LAYERS, 5]}, "must be a pattern of layer names"),
        (
            {"layers": "up_blocks.*.attn1"},
            r"layers of different sizes cannot be averaged.*\n.*grid",
        ),
        ({"layers": "up_blocks.1.*.attn2"}, r"attn2' is cross-attention.*needs self-attention"),
        ({"layers": "nothing"}, "layers='nothing' matches no attention layer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(pipe, options, text):
    with pytest.raises(ValueError, match=text):
        features(pipe, PHOTO, **{"layers": LAYERS, **options})


def test_integers_of_every_type_are_whole_numbers(pipe):
    (plain,) = features(pipe, PHOTO, layers=LAYERS, size=64, timestep=3, seeds=(1, 2))
    (found,) = features(
        pipe, PHOTO, layers=iter([LAYERS]), size=np.int32(64), timestep=np.int64(3),
        seeds=np.array([1, 2]), batch_size=np.int64(1),
    )  # fmt: skip
    assert torch.equal(plain.key, found.key)
    assert found.seeds == (1, 2) and found.timestep == 3
    assert {type(each) for each in (*found.seeds, found.timestep)} == {int}


def with_unet(pipe, **changes):
    other = copy.copy(pipe)
    other.unet = tiny_unet(**changes)
    return other


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "wan", "qwen"])
def test_other_families_are_refused_by_name_with_the_remedy(name, tmp_path):
    other = FAMILY[name].build(tmp_path)
    with pytest.raises(ValueError, match=rf"{type(other).__name__} without unet.*`fm\.capture`"):
        features(other, PHOTO)


def test_other_unets_and_schedulers_are_refused_by_name(pipe, tmp_path):
    def refused(other, text):
        with pytest.raises(ValueError, match=rf"StableDiffusion\w*Pipeline {text}.*`fm\.capture`"):
            features(other, PHOTO)

    refused(with_unet(pipe, in_channels=9), "whose unet takes 9 channels where .* has 4")
    refused(with_unet(pipe, num_class_embeds=10), "whose unet is conditioned on a class")
    refused(with_unet(pipe, time_cond_proj_dim=8), "whose unet is conditioned on a guidance scale")
    refused(
        with_unet(pipe, encoder_hid_dim=16, encoder_hid_dim_type="text_proj"),
        "whose unet is conditioned on more than",
    )
    flow = copy.copy(pipe)
    flow.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    refused(flow, "whose FlowMatchEulerDiscreteScheduler has no alphas_cumprod")
    prompted = with_unet(pipe)
    add_ip_adapter(prompted.unet)
    refused(prompted, r"with an IP-Adapter.*unload_ip_adapter\(\) first")
    sdxl = FAMILY["sdxl"].build(tmp_path)
    half = copy.copy(sdxl)
    half.text_encoder_2 = None
    refused(half, "whose unet is SDXL's, without text_encoder_2")
    sdxl.register_to_config(requires_aesthetics_score=True)
    refused(sdxl, "that wants an aesthetics score")


@pytest.mark.slow
def test_a_compiled_unet_gives_the_same_features(pipe):
    other = copy.copy(pipe)
    other.unet = torch.compile(tiny_unet(), backend="eager")
    (found,) = features(other, PHOTO, layers=LAYERS, size=64)
    (expected,) = features(pipe, PHOTO, layers=LAYERS, size=64)
    assert torch.equal(found.key, expected.key)


def test_controlnet_pipelines_are_their_unet(tmp_path):
    """The ControlNet plays no part: features are those of the UNet alone."""
    (found,) = features(FAMILY["controlnet"].build(tmp_path), PHOTO, layers=LAYERS, size=64)
    (expected,) = features(FAMILY["sd2"].build(tmp_path), PHOTO, layers=LAYERS, size=64)
    assert torch.equal(found.key, expected.key)


# -- models ----------------------------------------------------------------------------------------


def test_a_saved_folder_gives_the_same_features(pipe, folder):
    loaded = load_model(folder)
    assert load_model(str(folder)) is loaded  # read once
    (a,) = features(pipe, PHOTO, layers=LAYERS, size=64)
    (b,) = features(folder, PHOTO, layers=LAYERS, size=64)
    assert torch.equal(a.query, b.query)


def test_a_dtype_asked_for_once_does_not_stick(folder):
    assert load_model(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert load_model(folder).unet.dtype == torch.float32


def test_a_folder_of_sdxl_is_loaded_as_such(tmp_path):
    sdxl = FAMILY["sdxl"].build(tmp_path / "tokenizer")
    sdxl.save_pretrained(tmp_path / "sdxl")
    loaded = load_model(tmp_path / "sdxl")
    assert isinstance(loaded, diffusers.StableDiffusionXLPipeline)
    (a,) = features(sdxl, PHOTO, size=64)
    (b,) = features(loaded, PHOTO, size=64)
    assert torch.equal(a.query, b.query)


def test_what_is_no_model_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"there is no such folder; give 'builtin'"):
        load_model("./nowhere")
    with pytest.raises(ValueError, match=r"has no model_index\.json, so it is not a diffusers"):
        load_model(tmp_path)
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is a file; wanted.*from_single_file"):
        load_model(checkpoint)
    index = tmp_path / "model_index.json"
    index.write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json' is not readable as JSON"):
        load_model(tmp_path)
    index.write_text((folder / "model_index.json").read_text())
    with pytest.raises(
        ValueError,
        match=r"a StableDiffusionPipeline, lacks unet, vae, text_encoder, tokenizer, sch",
    ):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"is a dict without unet, vae"):
        load_model({})


def test_broken_weights_are_named(tmp_path, folder):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model folder '.*broken' could not be loaded"):
        load_model(broken)
