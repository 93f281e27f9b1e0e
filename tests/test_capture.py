"""Capture: what it records, that it changes nothing, and every trap of diffusers known so far."""

from __future__ import annotations

import gc
import inspect
import weakref

import flashmaps as fm
import pytest
import torch
from flashmaps.diffusion.capture import capture, find_layers
from tiny_pipeline import tiny_pipeline, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SELF, CROSS = "*.attn1", "*.attn2"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def unet():
    return tiny_unet()


def call(unet, *, size=(8, 8), t=7, batch=1, **kwargs):
    torch.manual_seed(3)
    latent, text = torch.randn(batch, 4, *size), torch.randn(batch, 5, 32)
    return unet(latent, t, encoder_hidden_states=text, **kwargs).sample


def processors(unet):
    return {name: id(layer.processor) for name, layer in find_layers(unet, "*").items()}


def generate(pipe, **kwargs):
    noise = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 48}
    return pipe("a cat", generator=noise, **{**options, **kwargs}).images


# -- what is recorded ------------------------------------------------------------------------------


def test_picture_is_identical_to_the_last_bit(pipe):
    plain = generate(pipe)
    with capture(pipe, "*") as record:
        captured = generate(pipe)
    assert torch.equal(plain, captured)
    assert len(record) == 2 * len(find_layers(pipe.unet, "*"))


def test_entries_know_layer_step_timestep_kind_and_grid(pipe):
    with capture(pipe, "down_blocks.*") as record:
        generate(pipe)
    first = record[0]
    assert first.layer == DOWN
    assert (first.step, first.kind, first.grid, first.key_grid) == (0, "self", (8, 12), (8, 12))
    assert first.query.shape == (2, 1, 96, 16)  # [unconditional, conditional]
    assert first.scale == pytest.approx(16**-0.5)
    assert first.timestep == float(pipe.scheduler.timesteps[0])
    cross = record.select("*.attn2", step=1)[0]
    assert (cross.kind, cross.grid, cross.key_grid) == ("cross", (8, 12), None)
    assert cross.key.shape[2] == 77
    assert cross.timestep == float(pipe.scheduler.timesteps[1])
    assert [e.grid for e in record.select(SELF, step=0)] == [(8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (16, 4)], ids=str)
def test_odd_sizes_have_their_grid(unet, size):
    with capture(unet, SELF) as record:
        call(unet, size=size)
    for entry in record:
        height, width = entry.grid
        assert height * width == entry.query.shape[2]
    assert record[0].grid == size


def test_map_is_the_softmax_of_what_the_layer_saw(unet):
    with capture(unet, DOWN) as record:
        call(unet, size=(4, 6))
    entry = record[0]
    scores = entry.query.double() @ entry.key.double().mT / 16**0.5
    attention_map = entry.map(backend="reference")
    assert (attention_map.query_grid, attention_map.key_grid) == ((4, 6), (4, 6))
    torch.testing.assert_close(
        attention_map.to_dense(), scores.softmax(-1).mean(1).float(), atol=1e-6, rtol=1e-5
    )


def test_mask_of_text_becomes_key_mask(unet):
    keep = torch.tensor([[True, True, False, True, False]])
    with capture(unet, CROSS) as record:
        call(unet, encoder_attention_mask=keep)
    dense = record[0].map().to_dense()
    assert (dense[:, :, ~keep[0]] == 0).all()
    torch.testing.assert_close(dense.sum(-1), torch.ones(dense.shape[:2]))


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_that_differs_between_queries_is_exact(unet, additive, tmp_path):
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    unet.set_attn_processor(MaskProcessor(mask, additive))
    layers = "down_blocks.0.*.attn1"
    with capture(unet, layers) as record, capture(unet, layers, reduce="entropy") as reduced:
        call(unet)
        call(unet)
    record.save(tmp_path / "record.safetensors")
    for entry in (record[0], fm.Record.load(tmp_path / "record.safetensors")[0]):
        A = entry.map()
        scores = entry.query.double() @ entry.key.double().mT * entry.scale
        wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(1)
        torch.testing.assert_close(A.to_dense().double(), wanted, atol=1e-6, rtol=1e-5)
        assert A.backend == "reference" and (A.to_dense()[:, ~mask] == 0).all()
    assert len({entry._mask.data_ptr() for entry in record}) == 1  # one mask for all entries
    assert reduced[0].count == 2
    part = record[0].map((slice(10, 20), slice(0, 30))).to_dense()
    torch.testing.assert_close(part, record[0].map().to_dense()[:, 10:20, :30])


def test_a_mask_that_weighs_keys_by_query_is_refused(unet):
    unet.set_attn_processor(MaskProcessor(torch.rand(64, 64), additive=True, weights=True))
    with capture(unet, DOWN) as record:
        call(unet)
    with pytest.raises(ValueError, match=r"adds numbers that differ between queries"):
        record[0].map()
    assert record[0]._mask.numel() == 64  # N numbers of it were kept, not N x N


def test_causal_attention_has_its_map(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Causal(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            query, key, value = (
                p(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for p in (attn.to_q, attn.to_k, attn.to_v)
            )
            key, value = key[:, :1], value[:, :1]  # and one head for all
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            return attn.to_out[0](out.transpose(1, 2).flatten(2))

    layers = find_layers(unet, "*.attn1")
    name = next(each for each, layer in layers.items() if layer.heads > 1)
    layers[name].set_processor(Causal())
    with capture(unet, name) as record:
        call(unet)
    entry = record[0]
    assert entry.causal and entry.key.shape[1] == 1 < entry.query.shape[1]
    scores = entry.query.double() @ entry.key.double().mT * entry.scale
    hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    wanted = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
    torch.testing.assert_close(entry.map().to_dense().double(), wanted, atol=1e-6, rtol=1e-5)


class MaskProcessor:
    """Gives every self-attention of 64 tokens a mask of its own."""

    def __init__(self, mask, additive=False, weights=False):
        self.mask = mask if weights else torch.where(mask, 0.0, -10000.0) if additive else mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        from diffusers.models.attention_processor import AttnProcessor2_0

        if encoder_hidden_states is None and hidden_states.shape[1] == 64:
            attention_mask = self.mask.expand(attn.heads, 64, 64)
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)


def test_steps_choose_forward_passes(unet):
    for steps, seen in ((1, [1]), (range(2), [0, 1]), (lambda step: step % 2 == 0, [0, 2])):
        with capture(unet, DOWN, steps=steps) as record:
            for _ in range(3):
                call(unet)
        assert [entry.step for entry in record] == seen


def test_dtype_is_converted_on_recording(unet):
    with capture(unet, DOWN, dtype=torch.bfloat16) as record:
        call(unet)
    assert record[0].query.dtype == record[0].key.dtype == torch.bfloat16


def test_memory_is_that_of_q_and_k_alone(unet):
    with capture(unet, SELF) as record:
        call(unet)
    for entry in record:
        for tensor in (entry.query, entry.key):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_order_is_execution_not_attn_processors(unet):
    with capture(unet, SELF) as record:
        call(unet)
    names = record.layers
    assert names[0].startswith("down") and names[-1].startswith("up_blocks.2")
    middle = next(i for i, name in enumerate(names) if name.startswith("mid"))
    assert all(name.startswith("down") for name in names[:middle])


def test_names_of_attn_processors_work_as_patterns(unet):
    name = next(iter(unet.attn_processors))
    with capture(unet, name) as record:
        call(unet)
    assert record.layers == [name.removesuffix(".processor")]


def test_only_the_chosen_model_is_seen(pipe, unet):
    """Neither the text encoder nor the VAE, nor a ControlNet whose layers have the same names."""
    from diffusers import ControlNetModel

    control = ControlNetModel.from_unet(pipe.unet)
    with capture(pipe, DOWN) as record:
        generate(pipe, output_type="np", num_inference_steps=1)
        control(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 32), torch.randn(1, 3, 64, 64))
    assert len(record) == 1


# -- nothing is left behind ------------------------------------------------------------------------


def test_processors_are_the_same_objects_afterwards(unet):
    before = processors(unet)
    with capture(unet, "*"):
        assert processors(unet) != before
        call(unet)
    assert processors(unet) == before
    assert not unet._forward_hooks and not unet._forward_pre_hooks


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_processors_are_the_same_objects_after_an_exception(unet, error):
    before = processors(unet)

    def fail(*_):
        raise error("stop")

    hook = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.register_forward_hook(fail)
    with pytest.raises(error), capture(unet, "*"):
        call(unet)
    hook.remove()
    assert processors(unet) == before
    assert not unet._forward_hooks and not unet._forward_pre_hooks
    assert torch.overrides._len_torch_function_stack() == 0
    with capture(unet, DOWN) as record:
        call(unet)
    assert len(record) == 1


def test_state_dict_keys_never_change(unet):
    before = list(unet.state_dict())
    with capture(unet, "*"):
        assert list(unet.state_dict()) == before
    assert list(unet.state_dict()) == before


def test_no_tensor_outlives_the_record(unet):
    with capture(unet, "*") as record:
        call(unet)
    seen = [weakref.ref(entry.query) for entry in record]
    del record
    gc.collect()
    assert not any(ref() is not None for ref in seen)


def test_captures_nest_and_leave_in_any_order(unet):
    before = processors(unet)
    first, second = capture(unet, "*"), capture(unet, DOWN)
    a, b = first.__enter__(), second.__enter__()
    call(unet)
    first.__exit__(None, None, None)
    call(unet)
    second.__exit__(None, None, None)
    assert (len(a), len(b)) == (len(before), 2)
    assert processors(unet) == before


def test_a_capture_can_be_used_again(unet):
    again = capture(unet, DOWN)
    with again as record:
        call(unet)
    with again:
        call(unet)
        with pytest.raises(RuntimeError, match="already active"):
            again.__enter__()
    assert len(record) == 2


# -- traps of diffusers ----------------------------------------------------------------------------


class GainProcessor:
    """Takes a keyword argument of its own, which diffusers passes only if __call__ names it."""

    def __init__(self):
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.inner, self.gains = AttnProcessor2_0(), []

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None,
        gain=1.0,
    ):  # fmt: skip
        self.gains.append(gain)
        return gain * self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def test_named_keyword_arguments_reach_the_processor(unet):
    processor = GainProcessor()
    unet.set_attn_processor(processor)
    plain = call(unet, cross_attention_kwargs={"gain": 0.5})
    with capture(unet, "*"):
        captured = call(unet, cross_attention_kwargs={"gain": 0.5})
    assert torch.equal(plain, captured)
    assert set(processor.gains) == {0.5}


def test_processor_shared_between_layers_is_told_apart(unet):
    unet.set_attn_processor(GainProcessor())
    with capture(unet, SELF) as record:
        call(unet)
    assert len(record.layers) == len(record) == len(find_layers(unet, SELF))


class ForwardOnly(torch.nn.Module):
    """A Module processor with a weight, that defines only `forward`."""

    def __init__(self):
        super().__init__()
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.inner, self.gain = AttnProcessor2_0(), torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return self.gain * self.inner(attn, hidden_states, encoder_hidden_states, attention_mask)


def test_module_processors_keep_their_place_and_parameters(unet):
    layer = find_layers(unet, DOWN)[DOWN]
    layer.set_processor(ForwardOnly())
    processor, keys = layer.processor, list(unet.state_dict())
    assert f"{DOWN}.processor.gain" in keys
    signature = inspect.signature(processor.__call__)
    plain = call(unet)
    with capture(unet, DOWN) as record:
        assert list(unet.state_dict()) == keys
        assert inspect.signature(layer.processor.__call__) == signature
        captured = call(unet)
    assert torch.equal(plain, captured) and len(record) == 1
    assert layer.processor is processor and "processor" not in layer.__dict__
    assert list(unet.state_dict()) == keys


def test_stand_in_looks_like_the_processor(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0

    layer = find_layers(unet, DOWN)[DOWN]
    original = layer.processor
    with capture(unet, DOWN):
        assert isinstance(layer.processor, AttnProcessor2_0)
        assert type(layer.processor.__class__()) is AttnProcessor2_0  # what IP-Adapter does
        assert inspect.signature(layer.processor.__call__) == inspect.signature(original.__call__)
        layer.processor._attention_backend = "native"
        assert layer.processor._attention_backend == "native"
    assert original._attention_backend == "native"


def test_ip_adapter_records_the_text_attention(unet):
    """Its context is a tuple and it attends several times, text first."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    name = DOWN.replace("attn1", "attn2")
    layer = find_layers(unet, name)[name]
    torch.manual_seed(5)
    layer.set_processor(IPAdapterAttnProcessor2_0(16, 32, num_tokens=(4,), scale=0.7))
    layer.processor.requires_grad_(False)
    hidden, text, image = torch.randn(1, 64, 16), torch.randn(1, 5, 32), torch.randn(1, 1, 4, 32)

    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn2 = layer

        def forward(self, hidden_states, timestep=None):
            return self.attn2(hidden_states, encoder_hidden_states=(text, [image]))

    host = Host()
    plain = host(hidden)
    with capture(host, "attn2") as record:
        captured = host(hidden)
    assert torch.equal(plain, captured)
    assert [entry.kind for entry in record] == ["cross", "image_prompt"]
    assert [entry.key.shape[2] for entry in record] == [5, 4]


def test_fused_projections_give_the_same(unet):
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    unet.fuse_qkv_projections()
    assert isinstance(find_layers(unet, DOWN)[DOWN].processor, FusedAttnProcessor2_0)
    plain = call(unet)
    with capture(unet, SELF) as record:
        captured = call(unet)
    assert torch.equal(plain, captured)
    for entry in record:  # views of the fused projection would keep V alive
        assert entry.query.untyped_storage().nbytes() == entry.query.nbytes


@pytest.mark.parametrize(
    "change",
    [lambda unet: unet.set_attention_slice("max"), lambda unet: unet.fuse_qkv_projections()],
    ids=["slicing", "fusing"],
)
def test_processors_replaced_inside_a_capture_are_noticed(unet, change):
    with pytest.raises(RuntimeError, match=r"was replaced while it was captured.*before `fm.cap"):
        with capture(unet, DOWN):
            change(unet)
            call(unet)
    chosen = find_layers(unet, DOWN)[DOWN].processor  # the user's choice stays
    assert type(chosen).__name__ in ("SlicedAttnProcessor", "FusedAttnProcessor2_0")


def test_setting_a_processor_dict_inside_is_noticed_too(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0

    with pytest.raises(RuntimeError, match="was replaced"), capture(unet, DOWN):
        unet.set_attn_processor({name: AttnProcessor2_0() for name in unet.attn_processors})
        call(unet)


def test_gradient_checkpointing_records_once(unet):
    unet.requires_grad_(True).train()
    unet.enable_gradient_checkpointing()
    with capture(unet, "*") as record:
        call(unet).sum().backward()
    assert len(record) == len(find_layers(unet, "*"))
    with pytest.raises(RuntimeError, match="grad=True"):  # see test_capture_gradients.py
        record[0].query.sum().backward()


def test_v_prediction_and_upcast_attention_change_nothing_here(unet):
    upcast = tiny_unet(upcast_attention=True)
    with capture(upcast, DOWN) as record:
        assert torch.equal(call(upcast), call(unet))
    assert len(record) == 1


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda p: p.AttnProcessor(), "set_attn_processor"),
        (lambda p: p.SlicedAttnProcessor(1), "disable_attention_slicing"),
        (lambda p: p.XFormersAttnProcessor(), "disable_xformers_memory_efficient_attention"),
    ],
    ids=["plain", "sliced", "xformers"],
)
def test_paths_without_sdpa_are_refused_by_name(unet, make, remedy):
    from diffusers.models import attention_processor

    processor = make(attention_processor)
    unet.set_attn_processor(processor)
    with pytest.raises(RuntimeError) as caught:
        capture(unet, DOWN)
    text = str(caught.value)
    assert DOWN in text and type(processor).__name__ in text and remedy in text


def test_unknown_processor_without_sdpa_is_refused_when_it_runs(unet):
    class Linear:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states

    unet.set_attn_processor(Linear())
    with pytest.raises(RuntimeError, match=r"uses Linear, which cannot be observed.*did not call"):
        with capture(unet, DOWN):
            call(unet)


def test_pattern_without_match_names_the_layers_there_are(unet):
    with pytest.raises(ValueError, match=r"layers='up_block\.\*' matches no .*\n.*") as caught:
        capture(unet, ["*", "up_block.*"])
    assert DOWN in str(caught.value)
    with pytest.raises(ValueError, match="layers is empty"):
        capture(unet, [])


def test_other_bad_arguments(unet):
    with pytest.raises(ValueError, match=r"keep='reduce' is not known.*'qk'"):
        capture(unet, DOWN, keep="reduce")
    with pytest.raises(TypeError, match=r"`unet` or `transformer`.*got str"):
        capture("stable-diffusion")
    with pytest.raises(ValueError, match="steps must be indices"):
        capture(unet, DOWN, steps=[-1])


def test_name_in_the_package_can_be_called_whatever_was_imported_first(unet):
    with fm.capture(unet, DOWN) as record:
        call(unet)
    assert len(record) == 1
