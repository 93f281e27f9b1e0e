"""MapAttnProcessor: AttnProcessor2_0 to the last bit, and what it records besides."""

from __future__ import annotations

import copy
import gc
import weakref

import flashmaps as fm
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from flashmaps.diffusion import processors
from flashmaps.diffusion.processors import attend
from tiny_adapters import add_ip_adapter, add_lora, image_prompts
from tiny_models import FAMILY
from tiny_pipeline import tiny_unet, tiny_vae
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.usefixtures("one_thread")

SELF, CROSS = "*.attn1", "*.attn2"
# The same numbers in float32, up to log 64, from another log-sum-exp: a few roundings apart.
ROUNDINGS = {"atol": 4e-6, "rtol": 4e-6}
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.fixture
def lse_calls(monkeypatch):
    """Whether each attention gave its log-sum-exp."""
    calls = []

    def spy(*args, **kwargs):
        output, lse = attend(*args, **kwargs)
        calls.append(lse is not None)
        return output, lse

    monkeypatch.setattr(processors, "attend", spy)
    return calls


def call(unet, *, size=(8, 8), batch=1, **kwargs):
    torch.manual_seed(3)
    latent, text = torch.randn(batch, 4, *size), torch.randn(batch, 5, 32)
    latent, text = (x.to(unet.dtype) for x in (latent, text))
    return unet(latent, 7, encoder_hidden_states=text, **kwargs).sample


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- the output ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "guidance"])
@pytest.mark.parametrize("name", ["sd15", "sd2", "sd21", "sdxl", "controlnet", "pixart"])
def test_latents_are_identical_on_every_model_it_is_for(tmp_path, name, guidance):
    family = FAMILY[name]
    pipe = family.build(tmp_path)
    plain = family.run(pipe, guidance=guidance)
    record = fm.Record()
    for part in (getattr(pipe, family.denoiser), getattr(pipe, "controlnet", None)):
        if part is not None:
            part.set_attn_processor(fm.MapAttnProcessor(record=record, keep="statistics"))
    assert torch.equal(family.run(pipe, guidance=guidance), plain)
    assert len(record) >= 2 * sum(family.layers.values())


# What Attention is made with, its input, its context, its mask: by what it is there to try.
CASES = {
    "self": ({}, (2, 12, 16), None, None),
    "cross": ({"cross_attention_dim": 8}, (2, 12, 16), (2, 5, 8), None),
    "mask over keys": ({"cross_attention_dim": 8}, (2, 12, 16), (2, 5, 8), (2, 1, 5)),
    "mask of pairs": ({}, (2, 12, 16), None, (2, 12, 12)),
    "norm_cross, layer": (
        {"cross_attention_dim": 8, "cross_attention_norm": "layer_norm"},
        (2, 12, 16),
        (2, 5, 8),
        None,
    ),
    "norm_cross, group": (
        {
            "cross_attention_dim": 8,
            "cross_attention_norm": "group_norm",
            "cross_attention_norm_num_groups": 2,
        },
        (2, 12, 16),
        (2, 5, 8),
        None,
    ),
    "norm_q and norm_k": ({"qk_norm": "layer_norm"}, (2, 12, 16), None, None),
    "group_norm": ({"norm_num_groups": 4}, (2, 12, 16), None, None),
    "picture": (
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.5},
        (2, 16, 3, 5),
        None,
        None,
    ),
    "picture and spatial_norm": (
        {"spatial_norm_dim": 4, "residual_connection": True},
        (2, 32, 3, 5),
        None,
        None,
    ),
    "wide heads": ({"heads": 1, "dim_head": 40}, (1, 70, 16), None, None),
    "one token": ({}, (1, 1, 16), None, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_output_of_a_layer_is_identical(name, dtype):
    options, shape, context_shape, mask_shape = CASES[name]
    torch.manual_seed(1)
    width = shape[1] if len(shape) == 4 else shape[2]
    attn = Attention(width, **{"heads": 2, "dim_head": 8, **options}).eval().requires_grad_(False)
    attn = attn.to(dtype)
    given = {"encoder_hidden_states": None, "attention_mask": None, "temb": None}
    if context_shape is not None:
        given["encoder_hidden_states"] = random(*context_shape, dtype=dtype, seed=1)
    if mask_shape is not None:
        given["attention_mask"] = random(*mask_shape, dtype=dtype, seed=2)
    if "spatial_norm_dim" in options:
        given["temb"] = random(2, 4, 3, 5, dtype=dtype, seed=3)
    x = random(*shape, dtype=dtype)
    plain = AttnProcessor2_0()(attn, x, **given)
    processor = fm.MapAttnProcessor(reduce=(), keep="qk")
    assert torch.equal(processor(attn, x, **given), plain)
    assert len(processor.record) == 1


def test_latents_are_identical_with_lora_and_fused_projections(tmp_path):
    family = FAMILY["sd2"]
    pipe = family.build(tmp_path)
    add_lora(pipe.unet)
    plain = family.run(pipe)
    with fm.MapAttnProcessor.on(pipe):
        assert torch.equal(family.run(pipe), plain)
    pipe = family.build(tmp_path)
    pipe.fuse_qkv_projections(vae=False)
    fused = family.run(pipe)
    before = dict(pipe.unet.attn_processors)
    with fm.MapAttnProcessor.on(pipe) as record:
        assert torch.equal(family.run(pipe), fused)
    assert record.layers
    assert all(type(each) is FusedAttnProcessor2_0 for each in before.values())
    assert pipe.unet.attn_processors == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_is_identical_in_half_precision_and_with_masks(dtype):
    unet = tiny_unet().to(dtype)
    mask = torch.tensor([[True, True, False, True, False], [True, True, True, False, False]])
    plain = call(unet, batch=2, encoder_attention_mask=mask)
    unet.set_attn_processor(fm.MapAttnProcessor())
    assert torch.equal(call(unet, batch=2, encoder_attention_mask=mask), plain)


def test_output_is_identical_under_autocast(unet):
    with torch.autocast("cpu", torch.bfloat16):
        plain = call(unet)
    unet.set_attn_processor(fm.MapAttnProcessor())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(unet), plain)


# -- the log-sum-exp of attention ------------------------------------------------------------------


def qkv(dtype=torch.float32, *, grad=False):
    shapes = (2, 9, 3, 8), (2, 13, 3, 8), (2, 13, 3, 8)
    found = [random(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes)]
    if grad:
        for each in found:
            each.requires_grad_()
    return [each.transpose(1, 2) for each in found], found  # [B, H, N, d], strided as in a layer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_attend_is_scaled_dot_product_attention_and_its_log_sum_exp(dtype, masked):
    (q, k, v), _ = qkv(dtype)
    mask = random(2, 3, 1, 13, dtype=dtype, seed=5) if masked else None
    output, lse = attend(q, k, v, mask)
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    scores = q.double() @ k.double().mT / 8**0.5 + (mask.double() if masked else 0.0)
    assert lse.shape == (2, 3, 9)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert lse.dtype == accumulated
    torch.testing.assert_close(lse, scores.logsumexp(-1).to(accumulated), atol=1e-6, rtol=1e-6)


def test_attend_has_the_gradient_of_scaled_dot_product_attention():
    (q, k, v), leaves = qkv(grad=True)
    output, lse = attend(q, k, v, None)
    output.square().sum().backward()
    ours = [each.grad.clone() for each in leaves]
    (q, k, v), leaves = qkv(grad=True)
    F.scaled_dot_product_attention(q, k, v).square().sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(ours, leaves, strict=True))
    assert lse is not None and not lse.requires_grad


def test_attend_does_without_where_torch_chooses_another_kernel_or_someone_listens():
    (q, k, v), _ = qkv()
    with sdpa_kernel(SDPBackend.MATH):
        output, lse = attend(q, k, v, None)
        assert lse is None and torch.equal(output, F.scaled_dot_product_attention(q, k, v))
    keep = torch.rand(2, 1, 1, 13) > 0.5
    output, lse = attend(q, k, v, keep)
    assert lse is None
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, attn_mask=keep))
    with torch.device("cpu"):  # a TorchFunctionMode
        assert attend(q, k, v, None)[1] is None
    with torch.autocast("cpu", torch.bfloat16):
        output, lse = attend(q, k, v, None)
        assert lse is None and output.dtype == torch.bfloat16
        assert attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None)[1] is not None


@pytest.mark.parametrize(
    "options, gives",
    [
        ({"reduce": ("entropy", "density")}, True),
        ({"reduce": ("entropy",), "keep": "qk"}, True),
        ({"reduce": ("entropy", "column_sum")}, False),
        ({"reduce": lambda attention_map: attention_map.entropy()}, False),
        ({"reduce": (), "keep": "qk"}, False),
    ],
    ids=["rows", "rows, Q and K", "columns too", "a function", "Q and K"],
)
def test_log_sum_exp_is_taken_where_the_cpu_gains_by_it(unet, lse_calls, options, gives):
    unet.set_attn_processor(fm.MapAttnProcessor(**options))
    call(unet)
    assert lse_calls == [gives] * 20


def test_statistics_from_the_log_sum_exp_are_those_of_capture(unet, lse_calls):
    mask = torch.tensor([[True, True, False, True, False]])
    names = ("entropy", "max", "argmax")
    with fm.capture(unet, reduce=names, keep="statistics") as captured:
        call(unet, encoder_attention_mask=mask)
    with fm.MapAttnProcessor.on(unet, reduce=names, keep="statistics") as record:
        call(unet, encoder_attention_mask=mask)
    assert lse_calls and all(lse_calls)
    assert record.layers == captured.layers
    for ours, theirs in zip(record, captured, strict=True):
        assert (ours.kind, ours.grid, ours.keys) == (theirs.kind, theirs.grid, theirs.keys)
        for name in ("entropy", "max"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **ROUNDINGS)
        assert torch.equal(ours.argmax, theirs.argmax)


# -- what is recorded ------------------------------------------------------------------------------


def test_one_processor_on_all_layers_names_them_in_the_order_they_run(unet):
    processor = fm.MapAttnProcessor()
    unet.set_attn_processor(processor)
    with fm.capture(unet, reduce="entropy") as captured:
        call(unet)
    call(unet)
    assert processor.record.layers == [f"attention {n}" for n in range(20)]
    assert [entry.count for entry in processor.record] == [2] * 20  # means of two calls
    for ours, theirs in zip(processor.record, captured, strict=True):
        torch.testing.assert_close(ours.entropy, theirs.entropy, **ROUNDINGS)


def test_for_layers_gives_what_set_attn_processor_takes(unet):
    record = fm.Record()
    others = {name: p for name, p in unet.attn_processors.items() if ".attn2." in name}
    made = fm.MapAttnProcessor.for_layers(unet, SELF, record=record, reduce="entropy")
    assert made.keys() == unet.attn_processors.keys()
    assert all(each.record is record for name, each in made.items() if ".attn1." in name)
    unet.set_attn_processor(made)
    assert made == {}  # diffusers empties it
    assert {name: p for name, p in unet.attn_processors.items() if ".attn2." in name} == others
    call(unet)
    assert record[0].layer == DOWN and len(record.layers) == 10
    assert {entry.kind for entry in record} == {"self"}


def test_for_layers_makes_one_record_where_none_is_given(unet):
    made = fm.MapAttnProcessor.for_layers(unet)
    assert len({id(each.record) for each in made.values()}) == 1


def test_q_and_k_are_kept_for_lazy_maps(unet):
    with fm.MapAttnProcessor.on(unet, DOWN, reduce=(), keep="qk", dtype=torch.float64) as record:
        call(unet)
    with fm.capture(unet, DOWN) as captured:
        call(unet)
    assert record[0].query.dtype == torch.float64
    assert torch.equal(record[0].query.float(), captured[0].query)
    assert torch.equal(record[0].key.float(), captured[0].key)
    assert record[0].map(backend="reference").to_dense().shape == (1, 64, 64)


def test_grids_are_square_unless_told_or_seen(unet):
    vae = tiny_vae()
    with fm.MapAttnProcessor.on(vae) as record:
        vae.encode(torch.zeros(1, 3, 32, 48))
    assert record[0].grid == (8, 12)  # a picture
    for size, grids in (((8, 8), [(8, 8), (4, 4), (2, 2)]), ((8, 6), [None, None, (2, 2)])):
        record = fm.Record()
        unet.set_attn_processor(fm.MapAttnProcessor.for_layers(unet, SELF, record=record))
        call(unet, size=size)
        assert [entry.grid for entry in record][:3] == grids
    with fm.MapAttnProcessor.on(unet, "*", grid=(8, 6), reduce=("expectation", "pool")[1:]) as rec:
        call(unet, size=(8, 6))
    assert [entry.grid for entry in rec.select(kind="self")][:3] == [(8, 6), (4, 3), (2, 2)]
    assert rec[0].pool.shape == (1, 48, 48)


def test_steps_are_the_calls_of_each_layer(unet):
    options = {"steps": range(1, 3), "keep": "statistics"}
    processor = fm.MapAttnProcessor(**options)
    unet.set_attn_processor(processor)
    for _ in range(4):
        call(unet)
    assert [entry.step for entry in processor.record if entry.layer == "attention 3"] == [1, 2]
    processor.reset()
    call(unet)
    assert len(processor.record) == 40
    call(unet)
    assert [entry.step for entry in processor.record if entry.layer == "attention 3"] == [1, 2, 1]


def test_means_survive_that_a_shared_record_is_cleared(unet):
    record = fm.Record()
    first = fm.MapAttnProcessor.for_layers(unet, SELF, record=record)
    second = fm.MapAttnProcessor.for_layers(unet, "up_blocks.*.attn1", record=record)
    unet.set_attn_processor(dict(first))
    call(unet)
    assert len(record) == 10
    record.clear()
    unet.set_attn_processor(dict(second))
    call(unet)
    assert len(record) == 6
    unet.set_attn_processor(dict(first))  # whose means stood where others stand now
    call(unet)
    assert [entry.count for entry in record] == [1] * 16


# -- traps -----------------------------------------------------------------------------------------


def test_on_puts_back_the_very_processors_also_after_an_exception(unet):
    before = dict(unet.attn_processors)
    with pytest.raises(ZeroDivisionError), fm.MapAttnProcessor.on(unet):
        assert all(type(p) is fm.MapAttnProcessor for p in unet.attn_processors.values())
        raise ZeroDivisionError
    after = unet.attn_processors
    assert all(after[name] is each for name, each in before.items())


def test_on_leaves_a_processor_alone_that_was_set_meanwhile(unet):
    theirs = AttnProcessor2_0()
    with fm.MapAttnProcessor.on(unet):
        unet.get_submodule(DOWN).set_processor(theirs)
    assert unet.get_submodule(DOWN).processor is theirs


def test_capture_listens_to_it_and_may_be_left_in_any_order(unet):
    plain = call(unet)
    before = dict(unet.attn_processors)
    on = fm.MapAttnProcessor.on(unet, SELF)
    record = on.__enter__()
    capture = fm.capture(unet, reduce="entropy")
    captured = capture.__enter__()
    assert torch.equal(call(unet), plain)
    on.__exit__(None, None, None)
    assert torch.equal(call(unet), plain)
    capture.__exit__(None, None, None)
    assert (len(record), len(captured)) == (10, 20)
    assert [entry.count for entry in captured] == [2] * 20
    for ours, theirs in zip(record, captured.select(SELF), strict=True):
        assert torch.equal(ours.entropy, theirs.entropy)
    after = unet.attn_processors
    assert all(after[name] is each for name, each in before.items())


def test_it_has_no_state_of_the_model(unet):
    keys = list(unet.state_dict())
    unet.set_attn_processor(fm.MapAttnProcessor())
    call(unet)
    assert list(unet.state_dict()) == keys
    assert not isinstance(fm.MapAttnProcessor(), torch.nn.Module)


def test_keyword_arguments_of_the_pipeline_do_not_reach_it(unet):
    plain = call(unet)
    unet.set_attn_processor(fm.MapAttnProcessor())
    assert torch.equal(call(unet, cross_attention_kwargs={"gain": 2.0}), plain)


def test_ip_adapter_makes_new_ones_of_it(tmp_path):
    family = FAMILY["sd2"]
    pipe = family.build(tmp_path)
    pipe.unet.set_attn_processor(fm.MapAttnProcessor())
    add_ip_adapter(pipe.unet)
    family.run(pipe, **image_prompts(pipe.unet))
    attn1 = pipe.unet.get_submodule(DOWN).processor
    assert type(attn1) is fm.MapAttnProcessor and len(attn1.record) == 1
    with pytest.raises(RuntimeError, match=r"uses IPAdapterAttnProcessor2_0.*fm\.capture"):
        fm.MapAttnProcessor.for_layers(pipe.unet)
    with fm.MapAttnProcessor.on(pipe, SELF) as record:
        family.run(pipe, **image_prompts(pipe.unet))
    assert len(record) == 10


def test_a_tuple_of_contexts_is_refused(tmp_path):
    family = FAMILY["sd2"]
    pipe = family.build(tmp_path)
    add_ip_adapter(pipe.unet)
    pipe.unet.set_attn_processor(fm.MapAttnProcessor())
    with pytest.raises(RuntimeError, match=r"tuple of contexts, as IP-Adapters.*fm\.capture"):
        family.run(pipe, **image_prompts(pipe.unet))


@pytest.mark.parametrize("name, what", [("sd3", "joint attention"), ("flux", "FluxAttention")])
def test_joint_attention_is_refused(tmp_path, name, what):
    family = FAMILY[name]
    pipe = family.build(tmp_path)
    with pytest.raises(RuntimeError, match=r"uses \w*AttnProcessor.*fm\.capture"):
        fm.MapAttnProcessor.for_layers(pipe.transformer)
    pipe.transformer.set_attn_processor(fm.MapAttnProcessor())
    with pytest.raises(RuntimeError, match=rf"was set on .*{what}.*fm\.capture"):
        family.run(pipe)


def test_processors_that_compute_otherwise_are_refused_with_the_remedy(unet):
    unet.set_attn_processor(AttnProcessor())
    with pytest.raises(RuntimeError, match=r"set_attn_processor\(AttnProcessor2_0\(\)\)"):
        fm.MapAttnProcessor.for_layers(unet)
    with pytest.raises(ValueError, match=r"matches no attention layer"):
        fm.MapAttnProcessor.for_layers(unet, "nothing")


def test_a_name_is_for_one_layer(unet):
    unet.set_attn_processor(fm.MapAttnProcessor(layer="mine"))
    with pytest.raises(RuntimeError, match=r"layer='mine' and was set on a second"):
        call(unet)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_records_once_and_gives_the_same_gradient(reentrant):
    def gradient(unet):
        call(unet).square().sum().backward()
        return unet.get_submodule(DOWN).to_q.weight.grad

    def checkpoint(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

    def trained(processor):
        unet = tiny_unet().train().requires_grad_(True)
        # What is checkpointed needs an input that requires a gradient, if it is reentrant.
        unet.conv_in.register_forward_hook(lambda *given: given[2].requires_grad_())
        unet.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
        unet.set_attn_processor(processor)
        return unet

    plain = gradient(trained(AttnProcessor2_0()))
    processor = fm.MapAttnProcessor(keep="statistics")
    unet = trained(processor)
    ours = gradient(unet)
    assert len(processor.record) == 20
    assert torch.equal(ours, plain)
    gradient(unet)
    assert [entry.step for entry in processor.record] == [0] * 20 + [1] * 20


def test_a_copy_of_the_model_records_for_itself(unet):
    unet.set_attn_processor(fm.MapAttnProcessor.for_layers(unet, SELF))
    call(unet)
    other = copy.deepcopy(unet)
    call(other)
    mine, theirs = (each.get_submodule(DOWN).processor.record for each in (unet, other))
    assert [entry.count for entry in mine] == [1] * 10
    assert [entry.count for entry in theirs] == [2] * 10
    assert theirs.layers == mine.layers


def test_nothing_keeps_the_model_or_its_tensors_alive():
    seen = []

    def watched(attention_map):
        seen.append(weakref.ref(attention_map))
        return attention_map.entropy()

    unet = tiny_unet()
    processor = fm.MapAttnProcessor(reduce=watched, keep="statistics")
    unet.set_attn_processor(processor)
    output = call(unet)
    references = [weakref.ref(unet), weakref.ref(unet.get_submodule(DOWN)), weakref.ref(output)]
    del unet, output
    gc.collect()
    assert len(seen) == 20
    assert not any(reference() for reference in references + seen)
    assert len(processor.record) == 20


@pytest.mark.slow
def test_compiled_unet_runs_and_records_and_can_be_captured():
    torch._dynamo.reset()
    unet = tiny_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    )
    compiled = torch.compile(unet, backend="aot_eager")
    plain = call(compiled)
    with fm.MapAttnProcessor.on(compiled, keep="statistics") as record:
        for _ in range(3):
            assert torch.equal(call(compiled), plain)
        with fm.capture(compiled, reduce="entropy") as captured:
            assert torch.equal(call(compiled), plain)
    assert len(record) == 4 * len(captured) == 4 * 8
    assert record.layers == captured.layers
    for ours, theirs in zip(record[-8:], captured, strict=True):
        torch.testing.assert_close(ours.entropy, theirs.entropy, **ROUNDINGS)
    assert torch.equal(call(compiled), plain)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_layer_runs_and_records():
    torch._dynamo.reset()
    attn = Attention(16, heads=2, dim_head=8, processor=fm.MapAttnProcessor()).eval()
    compiled = torch.compile(attn)
    x = random(2, 12, 16)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), AttnProcessor2_0()(attn, x))
    assert [entry.count for entry in attn.processor.record] == [2]
    torch._dynamo.reset()


def test_compiling_it_without_a_graph_break_is_refused_with_the_reason():
    torch._dynamo.reset()
    attn = Attention(16, heads=2, dim_head=8, processor=fm.MapAttnProcessor()).eval()
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"it records attention: compile without fullgraph=True"):
        compiled(random(2, 12, 16))
    record = attn.processor.record
    output = torch.compile(attn, backend="eager")(random(2, 12, 16))
    assert torch.equal(output, attn(random(2, 12, 16)))
    assert [entry.count for entry in record] == [2]
    torch._dynamo.reset()


def test_on_a_model_the_grid_is_that_of_its_latents(unet):
    """8 x 32 latents are 256 tokens, which is a square number too."""
    latent, text = torch.randn(1, 4, 8, 32), torch.randn(1, 5, 32)
    hooks = len(unet._forward_pre_hooks)
    with fm.MapAttnProcessor.on(unet, "*.attn1", reduce="expectation") as record:
        unet(latent, 3, text)
    assert {entry.grid for entry in record} == {(8, 32), (4, 16), (2, 8)}
    assert len(unet._forward_pre_hooks) == hooks
    with fm.capture(unet, "*.attn1", reduce="expectation") as wanted:
        unet(latent, 3, text)
    for one, other in zip(record, wanted, strict=True):
        torch.testing.assert_close(one.expectation, other.expectation, atol=1e-6, rtol=1e-6)
