"""Capture on every family of diffusers' models: what it finds, and that it changes nothing."""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter

import numpy as np
import pytest
import torch
from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.observe import ContextWatch, attention_layers
from tiny_adapters import (
    GainProcessor,
    ModuleProcessor,
    add_ip_adapter,
    add_lora,
    image_prompts,
    set_processors,
)
from tiny_models import FAMILIES, FAMILY, run_wan_image_to_video, tiny_wan_image_to_video

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDED = pytest.mark.parametrize("guidance", [True, False], ids=["guided", "plain"])
EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """Every family's pipeline, made when first asked for; tests leave them as they were."""
    made = {}

    def get(family):
        if family.name not in made:
            made[family.name] = family.build(tmp_path_factory.mktemp(family.name))
        return made[family.name]

    return get


def fresh(name, folder, **changes):
    """A pipeline of a test's own, to change; its family, and its denoiser."""
    family = FAMILY[name]
    pipe = family.build(folder, **changes)
    return family, pipe, getattr(pipe, family.denoiser)


def close(got, wanted):
    """Equal up to the rounding of float32 sums of a few dozen terms of order one."""
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-5)


# -- what is found ---------------------------------------------------------------------------------


@EVERY
@GUIDED
def test_output_is_identical_and_every_layer_is_found(pipes, family, guidance):
    pipe = pipes(family)
    plain = family.run(pipe, guidance=guidance)
    with capture(pipe) as record:
        captured = family.run(pipe, guidance=guidance)
    assert torch.equal(plain, captured)
    passes = 2 if guidance and not family.batched else 1
    for step in (0, 1):
        found = Counter(entry.kind for entry in record.select(step=step))
        assert found == {kind: passes * count for kind, count in family.layers.items()}
    assert {entry.step for entry in record} == {0, 1}
    assert len({entry.timestep for entry in record}) == 2
    finest = max((e for e in record if e.grid), key=lambda e: math.prod(e.grid))
    assert (finest.grid, finest.frames) == (family.grid(), family.frames)


@EVERY
@GUIDED
def test_statistics_on_the_fly_change_nothing_either(pipes, family, guidance):
    pipe = pipes(family)
    plain = family.run(pipe, guidance=guidance)
    with capture(pipe, reduce=("entropy", "argmax", "density", "image_to_text")) as record:
        captured = family.run(pipe, guidance=guidance)
    assert torch.equal(plain, captured)
    passes = 2 if guidance and not family.batched else 1
    assert len(record) == passes * sum(family.layers.values())  # the mean over both steps
    assert all(entry.count == 2 and entry.query is None for entry in record)
    for entry in record:
        assert ("image_to_text" in entry.statistics) == (entry.kind != "self")


@EVERY
def test_guidance_is_labelled_as_it_runs(pipes, family):
    pipe = pipes(family)
    with capture(pipe, steps=[0]) as record:
        family.run(pipe, prompts=["a cat", "a dog"])
    labels = Counter(entry.guidance for entry in record)
    whole = sum(family.layers.values())
    if family.batched:
        assert labels == {"both": whole}
        assert all(len(entry.query) == 4 for entry in record)
    else:
        assert labels == {"conditional": whole, "unconditional": whole}
        assert all(len(entry.query) == 2 for entry in record)
    with capture(pipe, steps=[0]) as record:
        family.run(pipe, prompts=["a cat", "a dog"], guidance=False)
    assert {entry.guidance for entry in record} == {None if family.batched else "conditional"}


@EVERY
@pytest.mark.parametrize("which", ["conditional", "unconditional"])
def test_chosen_half_is_the_one_meant(pipes, family, which):
    """At the first step a guided run's conditional half sees what an unguided run sees."""
    pipe = pipes(family)
    with capture(pipe, steps=0, guidance=which) as chosen:
        family.run(pipe)
    with capture(pipe, steps=0) as both:
        family.run(pipe)
    assert {entry.guidance for entry in chosen} == {which}
    assert {len(entry.query) for entry in chosen} == {1}
    halves = both.select(guidance=which)
    assert len(halves) == len(chosen) == sum(family.layers.values())
    for one, other in zip(halves, chosen, strict=True):
        assert torch.equal(one.query, other.query) and torch.equal(one.key, other.key)
    with capture(pipe, steps=0, guidance="conditional") as unguided:
        family.run(pipe, guidance=False)
    assert len(unguided) == len(chosen)
    alike = all(
        a.key.shape == b.key.shape and torch.allclose(a.key, b.key, atol=1e-5)
        for a, b in zip(chosen, unguided, strict=True)
    )
    assert alike == (which == "conditional")


def test_a_batch_without_guidance_is_never_cut_in_half(pipes):
    family = FAMILY["sd2"]
    pipe = pipes(family)
    with capture(pipe, steps=0, guidance="conditional") as record:
        family.run(pipe, prompts=["a cat", "a dog"], guidance=False)
    assert {len(entry.query) for entry in record} == {2}
    with pytest.warns(UserWarning, match="nothing was recorded: the layers ran"):
        with capture(pipe, steps=0, guidance="unconditional") as record:
            family.run(pipe, guidance=False)
    assert len(record) == 0


def as_pipeline(kind, pipe, **more):
    """Another pipeline of the same parts; those it does not take are left out."""
    wanted = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in wanted}
    made = kind(**parts, **more)
    made.set_progress_bar_config(disable=True)
    return made


def test_two_passes_that_have_no_names_are_one_step_too(pipes):
    """Flux's image to image, Kontext and others run guidance twice without a cache context."""
    from diffusers import FluxImg2ImgPipeline
    from PIL import Image

    family = FAMILY["flux"]
    pipe = as_pipeline(FluxImg2ImgPipeline, pipes(family))
    options = {"image": Image.new("RGB", (96, 64), (200, 30, 30)), "strength": 1.0}
    layer = "transformer_blocks.0.attn"
    with capture(pipe, layer) as record:
        family.run(pipe, steps=3, **options)
    parts = ("conditional", "unconditional")
    assert [(e.step, e.guidance) for e in record] == [(i, each) for i in range(3) for each in parts]
    with capture(pipe, layer) as unguided:
        family.run(pipe, steps=1, guidance=False, **options)
        family.run(pipe, steps=1, guidance=False, **options)
    assert [(e.step, e.guidance) for e in unguided] == [(0, "conditional"), (1, "conditional")]
    assert torch.equal(unguided[0].key, record[0].key)  # the prompt's pass comes first
    noise = torch.randn(1, 96, 16).expand(2, -1, -1)  # the same latents twice are two images here
    with capture(pipe, layer, guidance="conditional") as record:
        prompts = ["a cat", "a dog"]
        family.run(pipe, prompts=prompts, guidance=False, latents=noise, steps=1, **options)
    assert {len(entry.query) for entry in record} == {2}


def test_skip_layer_guidance_is_a_further_pass_of_its_step(pipes):
    family = FAMILY["sd3"]
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0}
    with capture(pipes(family), "transformer_blocks.0.attn") as record:
        family.run(pipes(family), steps=3, **skipping, skip_layer_guidance_stop=1.0)
    found = [(entry.step, entry.guidance) for entry in record]
    assert found == [(0, "both"), (1, "both"), (1, "other"), (2, "both"), (2, "other")]
    assert {e.guidance for e in record.select(guidance="conditional")} == {"conditional"}


def test_layers_that_perturbed_attention_replaces_are_refused(tmp_path):
    from diffusers import StableDiffusionPAGPipeline

    family, pipe, _ = fresh("sd2", tmp_path)
    more = {"pag_applied_layers": ["mid"], "requires_safety_checker": False}
    pag = as_pipeline(StableDiffusionPAGPipeline, pipe, **more)
    with pytest.raises(RuntimeError, match=r"was replaced.*pag_applied_layers: choose other"):
        with capture(pag):
            family.run(pag, steps=1, pag_scale=3.0)


def test_guidance_that_ends_within_a_run(pipes):
    """As callbacks do it: the steps without guidance join the conditional mean."""
    family = FAMILY["sd2"]
    pipe = pipes(family)

    def stop(pipe, step, timestep, tensors):
        if step == 0:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    names = ["prompt_embeds"]
    with capture(pipe, "mid_block.*", reduce="entropy", guidance="conditional") as record:
        family.run(
            pipe, steps=3, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=names
        )
    assert {(entry.guidance, entry.count) for entry in record} == {("conditional", 3)}


def test_a_scale_of_numpy_switches_guidance_off_too(pipes):
    family = FAMILY["sd2"]
    same = [torch.Generator().manual_seed(0) for _ in range(2)]
    with capture(pipes(family), "mid_block.*", guidance="conditional") as record:
        family.run(
            pipes(family), prompts=["a cat", "a dog"], generator=same, steps=1,
            guidance_scale=np.float64(1.0),
        )  # fmt: skip
    assert {len(entry.query) for entry in record} == {2}


def test_a_forward_with_any_arguments_before_the_models_own(tmp_path):
    """As DeepCache puts there; pipelines pass latents and timestep by position."""
    family, pipe, model = fresh("sd2", tmp_path)
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with capture(pipe, "down_blocks.0.*", steps=0) as record:
        family.run(pipe)
    found = {(e.guidance, e.timestep is None, e.grid) for e in record}
    assert found == {("both", False, family.grid())}


def test_a_context_that_is_not_the_text_is_not_called_text(tmp_path):
    """As reference-only control hands self-attention its own tokens and those of another image."""
    family, pipe, model = fresh("sd2", tmp_path)
    for name, layer in attention_layers(model).items():
        if name.endswith("attn1"):

            def seeing_more(hidden, encoder_hidden_states=None, _own=layer.forward, **more):
                return _own(hidden, encoder_hidden_states=torch.cat([hidden] * 2, 1), **more)

            layer.forward = seeing_more
    with capture(pipe, steps=0, reduce="image_to_text", keep="qk") as record:
        family.run(pipe)
    for entry in record:
        text = {"text": slice(0, 77)} if entry.layer.endswith("attn2") else {}
        assert entry.keys == text and ("image_to_text" in entry.statistics) == bool(text)
        assert "image" in entry.queries


@EVERY
def test_sizes_that_are_not_square(pipes, family):
    pipe = pipes(family)
    height, width = family.size[1], family.size[0]
    with capture(pipe, steps=0) as record:
        family.run(pipe, height=height, width=width)
    for entry in record:
        assert entry.grid is not None
        image = entry.queries["image"]
        assert image.stop - image.start == math.prod(entry.grid) * entry.frames
    assert max(math.prod(e.grid) for e in record) == math.prod(family.grid(height, width))
    assert family.grid(height, width) in {entry.grid for entry in record}


@EVERY
def test_blocks_by_name_are_blocks_of_the_softmax(pipes, family):
    pipe = pipes(family)
    with capture(pipe, steps=0) as record:
        family.run(pipe, prompts=["a cat", "a large dog"])
    for entry in record:
        bias = 0 if entry.key_mask() is None else entry.key_mask()
        if isinstance(bias, torch.Tensor) and bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape).masked_fill(~bias, -math.inf)
        bias = bias[:, None, None] if isinstance(bias, torch.Tensor) else 0
        scores = entry.scale * entry.query.double() @ entry.key.double().mT + bias
        dense = scores.softmax(-1).mean(1).float()
        close(entry.map().to_dense(), dense)
        for rows, queries in entry.queries.items():
            for columns, keys in entry.keys.items():
                block = entry.map(f"{rows}->{columns}")
                close(block.to_dense(), dense[:, queries, keys])
                close(block.entropy(), torch.special.entr(dense[:, queries, keys]).sum(-1))
                alone = scores[:, :, queries, keys].softmax(-1).mean(1).float()
                if (alone == alone).all():  # a block whose keys are all masked has no softmax
                    within = entry.map(f"{rows}->{columns}", renormalize=True)
                    close(within.to_dense(), alone)


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_text_and_image_stand_where_the_entry_says(pipes, name):
    """The text's keys are what the layer's own norm of added keys returned."""
    family = FAMILY[name]
    pipe = pipes(family)
    model = getattr(pipe, family.denoiser)
    seen, hooks = {}, []
    for layer, module in model.named_modules():
        for norm in ("norm_added_k", "norm_k"):
            if getattr(module, norm, None) is not None:

                def keep(_, __, out, at=(layer, norm)):
                    seen[at] = out

                hooks.append(getattr(module, norm).register_forward_hook(keep))
    with capture(pipe, steps=0, kind="joint", guidance="conditional") as record:
        family.run(pipe, steps=1, guidance=False)
    for hook in hooks:
        hook.remove()
    for entry in record:
        parts = {"text": "norm_added_k", "image": "norm_k"}
        if (entry.layer, "norm_added_k") not in seen:  # Flux's single blocks: one norm for both
            assert entry.queries["text"] == slice(0, family.text_tokens)
            continue
        for part, norm in parts.items():
            wanted = seen[entry.layer, norm]
            if name != "sd3":
                wanted = wanted.transpose(1, 2)  # [B, N, H, d]
            # Rotation keeps lengths, and each token's are its own.
            close(entry.key[:, :, entry.keys[part]].norm(dim=-1), wanted.norm(dim=-1))
        first = "text" if family.text_first else "image"
        assert entry.keys[first].start == 0


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_positions_can_be_removed(pipes, name):
    family = FAMILY[name]
    pipe = pipes(family)
    model = getattr(pipe, family.denoiser)
    seen, hooks = {}, []
    for layer, module in model.named_modules():
        if getattr(module, "norm_k", None) is not None:
            hooks.append(
                module.norm_k.register_forward_hook(
                    lambda _, __, out, at=layer: seen.update({at: out})
                )
            )
    with capture(pipe, steps=0, kind=("self", "joint")) as record:
        family.run(pipe, steps=1, guidance=False)
    for hook in hooks:
        hook.remove()
    for entry in record:
        before = seen[entry.layer]  # [B, N, H, d], or Wan's [B, N, H d]
        before = before.reshape(*before.shape[:2], entry.heads, -1).transpose(1, 2)
        image = entry.keys["image"]
        if before.shape[2] != entry.key.shape[2]:  # a double block: the image's alone
            image_before = before
        else:
            image_before = before[:, :, image]
        same = entry.map("image->image", positions="removed", renormalize=True)
        close(same.problem.key, image_before)
        kept = entry.map("image->image", renormalize=True)
        assert not torch.allclose(kept.problem.key, image_before, atol=1e-3)
    with pytest.raises(ValueError, match=r"positions='gone'; choose from kept, removed"):
        entry.map(positions="gone")


def test_positions_of_an_unknown_form_are_refused(pipes):
    family = FAMILY["qwen"]
    pipe = pipes(family)
    with capture(pipe, steps=0) as record:
        family.run(pipe, steps=1, guidance=False)
    with pytest.raises(ValueError, match=r"rotary embedding is of a form .* positions='kept'"):
        record[0].map(positions="removed")


def test_frames_of_a_video_are_blocks(pipes):
    family = FAMILY["wan"]
    pipe = pipes(family)
    with capture(pipe, steps=0, kind="self") as record:
        family.run(pipe, steps=1, guidance=False)
    entry = record[0]
    dense = entry.map().to_dense()
    size = math.prod(entry.grid)
    block = entry.map((entry.frame(0), entry.frame(-1)))
    close(block.to_dense(), dense[:, :size, size:])
    assert block.query_grid == block.key_grid == family.grid()
    with pytest.raises(IndexError, match="frame 2 is out of range: there are 2"):
        entry.frame(2)


def test_a_second_transformer_has_its_name_before_its_layers(tmp_path):
    family, pipe, _ = fresh("wan", tmp_path)
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from tiny_models import tiny_wan

    parts = {n: p for n, p in pipe.components.items() if n != "transformer_2"}
    pipe = WanPipeline(
        **{**parts, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)},
        transformer_2=tiny_wan(),
        boundary_ratio=0.9,
    )
    pipe.set_progress_bar_config(disable=True)
    plain = family.run(pipe, steps=4, guidance=False)
    with capture(pipe, kind="self") as record:
        assert torch.equal(plain, family.run(pipe, steps=4, guidance=False))
    assert {entry.step for entry in record} == {0, 1, 2, 3}
    second = {entry.step for entry in record if entry.layer.startswith("transformer_2.")}
    assert second and second < {0, 1, 2, 3}


def test_image_to_video_tells_its_image_from_its_text():
    model = tiny_wan_image_to_video()
    plain = run_wan_image_to_video(model)
    with capture(model) as record:
        assert torch.equal(plain, run_wan_image_to_video(model))
    found = [(entry.kind, entry.key.shape[2]) for entry in record.select("blocks.0.*")]
    assert found == [("self", 192 * 1), ("image_prompt", 7), ("cross", 512)]


def test_layers_that_share_a_processor_are_told_apart(pipes):
    """SD3.5's attn and attn2: one is joint, the other self, with one processor object."""
    family = FAMILY["sd3"]
    pipe = pipes(family)
    block = pipe.transformer.transformer_blocks[0]
    assert block.attn.processor is block.attn2.processor
    with capture(pipe, "transformer_blocks.0.*", steps=0) as record:
        family.run(pipe, steps=1)
    kinds = {entry.layer.split(".")[-1]: entry.kind for entry in record}
    assert kinds == {"attn": "joint", "attn2": "self"}
    assert block.attn.processor is block.attn2.processor


# -- what users attach -----------------------------------------------------------------------------


@EVERY
def test_lora(family, tmp_path):
    _, pipe, model = fresh(family.name, tmp_path)
    before = family.run(pipe, steps=1)
    add_lora(model)
    plain = family.run(pipe, steps=1)
    assert not torch.equal(before, plain)
    with capture(pipe) as record:
        assert torch.equal(plain, family.run(pipe, steps=1))
    passes = 1 if family.batched else 2
    assert len(record) == passes * sum(family.layers.values())


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sd3"])
def test_ip_adapter(name, adapters, tmp_path):
    if name == "sd3" and adapters == 2:
        pytest.skip("SD3 takes one IP-Adapter")
    family, pipe, model = fresh(name, tmp_path)
    add_ip_adapter(model, adapters=adapters)
    prompts = image_prompts(model, adapters=adapters, images=2)
    plain = family.run(pipe, steps=1, **prompts)
    with capture(pipe) as record:
        assert torch.equal(plain, family.run(pipe, steps=1, **prompts))
    found = Counter(entry.kind for entry in record)
    passes = 1 if family.batched else 2
    usual = {kind: passes * n for kind, n in family.layers.items()}
    assert {kind: n for kind, n in found.items() if kind != "image_prompt"} == usual
    layers = {"sd15": 7, "sdxl": 11, "flux": 2, "sd3": 4}[name]
    assert found["image_prompt"] == passes * adapters * layers
    tokens = 4 if name == "sd3" else 2 * 4  # SD3's makes four tokens of all images
    for entry in record.select(kind="image_prompt"):
        prompt = entry.keys["image_prompt"]
        assert prompt.stop - prompt.start == tokens
        assert entry.map("image->image_prompt").to_dense().shape[2] == tokens


@pytest.mark.parametrize("make", [GainProcessor, ModuleProcessor], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_processors_of_ones_own(name, make, tmp_path):
    family, pipe, model = fresh(name, tmp_path)
    set_processors(model, make)
    more = {"cross_attention_kwargs": {"gain": 0.5}}
    more = more if make is GainProcessor and name != "pixart" else {}
    keys = list(model.state_dict())
    plain = family.run(pipe, steps=1, **more)
    with capture(pipe) as record:
        assert list(model.state_dict()) == keys
        assert torch.equal(plain, family.run(pipe, steps=1, **more))
    assert len(record) == sum(family.layers.values())


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan", "pixart"])
def test_fused_projections(name, tmp_path):
    # diffusers' fused processor of SD3 knows neither dual attention nor norms of q and k.
    changes = {"dual_attention_layers": (), "qk_norm": None} if name == "sd3" else {}
    family, pipe, model = fresh(name, tmp_path, **changes)
    model.fuse_qkv_projections()
    plain = family.run(pipe, steps=1)
    with capture(pipe) as record:
        assert torch.equal(plain, family.run(pipe, steps=1))
    found = Counter(entry.kind for entry in record)
    passes = 1 if family.batched else 2
    usual = {"joint": 3} if name == "sd3" else family.layers
    assert found == {kind: passes * n for kind, n in usual.items()}
    for entry in record:
        assert entry.queries and entry.keys
        assert entry.query.untyped_storage().nbytes() == entry.query.nbytes


@EVERY
def test_gradient_checkpointing_records_once(family, tmp_path):
    """Layers run again in backward; the gradients are those without a capture."""
    _, pipe, model = fresh(family.name, tmp_path)
    calls = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    family.run(pipe, steps=1, guidance=False)
    hook.remove()
    args, kwargs = calls[0]
    model.requires_grad_(True).train()
    model.enable_gradient_checkpointing()
    weight = next(p for n, p in model.named_parameters() if n.endswith("to_k.weight"))

    def backward():
        model.zero_grad()
        out = model(*args, **{**kwargs, "return_dict": False})[0]
        out.square().sum().backward()
        return weight.grad.clone()

    plain = backward()
    with capture(pipe, reduce="entropy", keep="qk") as record:
        captured = backward()
    assert torch.equal(plain, captured)
    assert len(record) == sum(family.layers.values())
    for what in (record[0].query, record[-1].entropy):  # see test_capture_gradients.py
        with pytest.raises(RuntimeError, match="grad=True"):
            what.sum().backward()


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_attention_backends_of_torch_are_seen(backend, tmp_path):
    family, pipe, model = fresh("flux", tmp_path)
    model.set_attention_backend(backend)
    plain = family.run(pipe, steps=1)
    with capture(pipe) as record:
        assert torch.equal(plain, family.run(pipe, steps=1))
    assert len(record) == 8


@pytest.mark.filterwarnings("ignore:.*flex_attention:UserWarning")
def test_other_attention_backends_are_refused_by_name(tmp_path):
    family, pipe, model = fresh("flux", tmp_path)
    model.set_attention_backend("flex")
    with pytest.raises(
        RuntimeError,
        match=r"layer 'transformer_blocks.0.attn' uses FluxAttnProcessor.*backend is 'flex'"
        r".*call `model.set_attention_backend\('native'\)` first",
    ):
        with capture(pipe):
            family.run(pipe, steps=1)
    model.set_attention_backend("native")
    with capture(pipe) as record:
        family.run(pipe, steps=1)
    assert len(record) == 8


def test_processors_that_never_attend_are_refused_by_name(tmp_path):
    from tiny_adapters import MatmulProcessor

    family, pipe, model = fresh("sd15", tmp_path)
    set_processors(model, MatmulProcessor)
    with pytest.raises(RuntimeError, match=r"uses MatmulProcessor.*a processor that calls it"):
        with capture(pipe):
            family.run(pipe, steps=1)


# -- nothing is left -------------------------------------------------------------------------------


@EVERY
def test_everything_is_as_it_was(pipes, family):
    pipe = pipes(family)
    model = getattr(pipe, family.denoiser)

    def state():
        processors = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
        hooks = len(model._forward_hooks) + len(model._forward_pre_hooks)
        return processors, hooks, list(model.state_dict()), sorted(model.__dict__)

    before = state()
    with capture(pipe) as record:
        family.run(pipe, steps=1)
    after = state()
    assert before[1:] == after[1:]
    assert all(after[0][name] is processor for name, processor in before[0].items())
    assert len(record) > 0


@pytest.mark.parametrize("name", ["sd2", "flux"])
def test_a_copy_of_a_captured_model_is_not_captured(pipes, name):
    family = FAMILY[name]
    pipe = pipes(family)
    model = getattr(pipe, family.denoiser)
    plain = family.run(pipe, steps=1)
    with capture(pipe, keep="qk") as record:
        other = copy.deepcopy(model)
        setattr(pipe, family.denoiser, other)
        try:
            assert torch.equal(plain, family.run(pipe, steps=1))
        finally:
            setattr(pipe, family.denoiser, model)
        assert len(record) == 0
        family.run(pipe, steps=1)
    assert len(record) > 0
    for layer, mine in attention_layers(model).items():
        copied = other.get_submodule(layer).processor
        assert type(copied) is type(mine.processor) and copied is not mine.processor


def test_cache_contexts_are_left_alone(pipes):
    family = FAMILY["flux"]
    pipe = pipes(family)
    first, second = capture(pipe), capture(pipe)
    a, b = first.__enter__(), second.__enter__()
    family.run(pipe, steps=1)
    first.__exit__(None, None, None)
    assert isinstance(pipe.transformer.cache_context, ContextWatch)
    family.run(pipe, steps=1)
    second.__exit__(None, None, None)
    assert "cache_context" not in pipe.transformer.__dict__
    assert {entry.guidance for entry in (*a, *b)} == {"conditional", "unconditional"}
    assert [max(e.step for e in record) for record in (a, b)] == [0, 1]


def test_pipeline_after_pipeline_counts_steps_on(pipes):
    family = FAMILY["flux"]
    pipe = pipes(family)
    with capture(pipe, "transformer_blocks.0.attn", steps=[1, 2]) as record:
        family.run(pipe, steps=2)
        family.run(pipe, steps=2)
    assert [(entry.step, entry.guidance) for entry in record] == [
        (1, "conditional"),
        (1, "unconditional"),
        (2, "conditional"),
        (2, "unconditional"),
    ]
