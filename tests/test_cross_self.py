"""CrossSelfAttnProcessor: two images of a batch attend to each other, and the maps of that."""

from __future__ import annotations

import weakref

import flashmaps as fm
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from tiny_adapters import add_ip_adapter, add_lora, image_prompts
from tiny_models import FAMILY
from tiny_pipeline import tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

SELF = "*.attn1"
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
PAIR = ("a cat", "a dog")


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return FAMILY["sd2"].build(tmp_path_factory.mktemp("tokenizer"))


def call(unet, *, batch=2, size=(8, 8), **kwargs):
    torch.manual_seed(3)
    latent, text = torch.randn(batch, 4, *size), torch.randn(batch, 5, 32)
    latent, text = (x.to(unet.dtype) for x in (latent, text))
    return unet(latent, 7, encoder_hidden_states=text, **kwargs).sample


def layer(dtype=torch.float32, **options):
    torch.manual_seed(1)
    attn = Attention(16, **{"heads": 2, "dim_head": 8, **options}).eval().requires_grad_(False)
    return attn.to(dtype)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(attn, x, context, mask=None):
    """softmax(Q K^T / sqrt(d)) V of each image, on the keys and values of its context; in float64.

    x: [B, N, C]; context: B tensors [M, C]; mask: B tensors [M], added to the scores.
    """
    rows = []
    for index, (own, seen) in enumerate(zip(x, context, strict=True)):
        q, k, v = (
            projection(tokens).double().unflatten(-1, (attn.heads, -1)).transpose(0, 1)
            for projection, tokens in ((attn.to_q, own), (attn.to_k, seen), (attn.to_v, seen))
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + mask[index].double()
        rows.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    out = torch.stack(rows).to(x.dtype)
    return attn.to_out[0](out)


# -- what is computed ------------------------------------------------------------------------------


CONTEXTS = {
    "other": lambda x: [x[1], x[0], x[3], x[2]],
    "both": lambda x: [torch.cat([a, b]) for a, b in zip(x, x[[1, 0, 3, 2]], strict=True)],
    "source": lambda x: [x[0], x[0], x[2], x[2]],
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", CONTEXTS)
def test_output_is_that_of_dense_attention_on_the_keys_and_values_chosen(keys, masked):
    attn, x = layer(), random(4, 12, 16)
    mask, mixed_mask = None, None
    if masked:
        mask = random(4, 1, 12, seed=4)
        mixed_mask = CONTEXTS[keys](mask[:, 0])
    ours = fm.CrossSelfAttnProcessor(keys=keys)(attn, x, attention_mask=mask)
    truth = dense(attn, x, CONTEXTS[keys](x), mixed_mask)
    # Outputs of order 1 from a softmax over 24 keys in float32.
    torch.testing.assert_close(ours, truth, atol=2e-6, rtol=2e-6)


def test_identical_images_attend_as_without(unet):
    latent, text = random(1, 4, 8, 8).expand(2, -1, -1, -1), random(1, 5, 32).expand(2, -1, -1)
    plain = unet(latent, 7, encoder_hidden_states=text).sample
    for keys in ("other", "source"):
        with fm.CrossSelfAttnProcessor.on(unet, guidance=False, keys=keys):
            mixed = unet(latent, 7, encoder_hidden_states=text).sample
        # The same numbers, but torch may split the work for the two images differently.
        torch.testing.assert_close(mixed, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_source_of_source_keys_is_as_without_to_the_last_bit(dtype):
    attn, x = layer(dtype), random(4, 12, 16, dtype=dtype)
    plain = AttnProcessor2_0()(attn, x)
    mixed = fm.CrossSelfAttnProcessor(keys="source")(attn, x)
    assert torch.equal(mixed[0::2], plain[0::2])
    assert not torch.equal(mixed[1::2], plain[1::2])


@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "guidance"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "controlnet", "pixart"])
def test_pipelines_make_batches_of_adjacent_pairs(tmp_path, name, guidance):
    family = FAMILY[name]
    pipe = family.build(tmp_path)
    # With keys="source" the first prompt's picture comes out as if nothing had been injected.
    plain = family.run(pipe, prompts=PAIR, guidance=guidance)
    with fm.CrossSelfAttnProcessor.on(pipe, keys="source", keep="statistics") as record:
        mixed = family.run(pipe, prompts=PAIR, guidance=guidance)
    assert torch.equal(mixed[0], plain[0])
    assert not torch.equal(mixed[1], plain[1])
    assert len(record) == 2 * family.layers["self"]
    assert record[0].entropy.shape[0] == (4 if guidance else 2)


# -- layers and steps ------------------------------------------------------------------------------


def test_without_steps_the_output_is_identical(pipe):
    family = FAMILY["sd2"]
    plain = family.run(pipe, prompts=PAIR)
    with fm.CrossSelfAttnProcessor.on(pipe, steps=()) as record:
        assert torch.equal(family.run(pipe, prompts=PAIR), plain)
    assert len(record) == 0


def test_steps_are_those_of_the_pipeline(pipe):
    def latents_of_each_step():
        latents = []

        def keep(pipe, step, timestep, given):
            latents.append(given["latents"].clone())
            return {}

        FAMILY["sd2"].run(pipe, prompts=PAIR, steps=4, callback_on_step_end=keep)
        return latents

    plain = latents_of_each_step()
    with fm.CrossSelfAttnProcessor.on(pipe, steps=range(2, 4), keep="statistics") as record:
        mixed = latents_of_each_step()
    same = [torch.equal(a, b) for a, b in zip(mixed, plain, strict=True)]
    assert same == [True, True, False, False]
    assert {entry.step for entry in record} == {2, 3}


def test_layers_are_those_chosen_and_only_of_self_attention(unet):
    before = dict(unet.attn_processors)
    with fm.CrossSelfAttnProcessor.on(unet, "up_blocks.*") as record:
        changed = {name for name, p in unet.attn_processors.items() if p is not before[name]}
        call(unet)
    assert changed == {
        name for name in before if name.startswith("up_blocks") and ".attn1." in name
    }
    assert len(record.layers) == 6
    with pytest.raises(ValueError, match=r"attn2, which attend to text.*self-attention"):
        fm.CrossSelfAttnProcessor.for_layers(unet, "mid_block.*.attn2")


def test_cross_attention_is_untouched():
    attn, x, text = layer(cross_attention_dim=8), random(2, 12, 16), random(2, 5, 8, seed=1)
    processor = fm.CrossSelfAttnProcessor()
    assert torch.equal(processor(attn, x, text), AttnProcessor2_0()(attn, x, text))
    assert len(processor.record) == 0


# -- maps ------------------------------------------------------------------------------------------


def captured_map(unet, rows, columns, **options):
    """map(Q, K) of the first self-attention of a plain run, queries and keys of other images."""
    with fm.capture(unet, DOWN) as record:
        call(unet, **options)
    entry = record[0]
    return fm.AttentionMap(entry.query[rows], entry.key[columns], query_grid=entry.grid)


@pytest.mark.parametrize("keys", ["other", "both"])
def test_maps_are_those_of_plain_q_and_k_in_the_first_layer(unet, keys):
    with fm.CrossSelfAttnProcessor.on(unet, SELF, keys=keys, reduce=(), keep="qk") as record:
        call(unet, batch=4)
    assert record[0].layer == DOWN
    ours = fm.CrossSelfAttnProcessor.maps(record[0])
    sources, targets = slice(0, None, 2), slice(1, None, 2)
    plain = (
        captured_map(unet, sources, targets, batch=4),
        captured_map(unet, targets, sources, batch=4),
    )
    for each, truth in zip(ours, plain, strict=True):
        assert each.shape == (2, 64, 64)
        assert each.query_grid == each.key_grid == (8, 8)
        # The layer projects the same input to the same bits; what follows is one map of them.
        torch.testing.assert_close(each.to_dense(), truth.to_dense(), atol=1e-7, rtol=1e-6)
    trip = fm.round_trip(*ours)
    assert trip.hard_ims.shape == (2,)


def test_statistics_are_those_of_the_maps(unet):
    names = ("entropy", "argmax", "expectation", "pool")
    options = {"reduce": names, "keep": "qk", "pool_to": (2, 2)}
    with fm.CrossSelfAttnProcessor.on(unet, DOWN, **options) as record:
        call(unet)
    entry = record[0]
    for index, each in enumerate(fm.CrossSelfAttnProcessor.maps(entry)):
        found = each.reduce("entropy", "argmax", "expectation")
        assert torch.equal(entry.argmax[index : index + 1], found.argmax)
        for name in ("entropy", "expectation"):
            # float32 up to log 64, a few roundings apart: one has the log-sum-exp of attention
            ours = getattr(entry, name)[index : index + 1]
            torch.testing.assert_close(ours, getattr(found, name), atol=4e-6, rtol=4e-6)
    assert entry.pool.shape == (2, 4, 4)


def test_both_tells_the_share_that_falls_on_the_other_image(unet):
    options = {"keys": "both", "reduce": "column_sum", "block": "image->other", "keep": "qk"}
    with fm.CrossSelfAttnProcessor.on(unet, DOWN, **options) as record:
        call(unet)
    entry = record[0]
    own, other = (entry.map(f"image->{part}").to_dense() for part in ("image", "other"))
    whole = torch.cat([own, other], -1).sum(-1)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    torch.testing.assert_close(entry.column_sum, other.sum(1))
    assert entry.key.shape[2] == 2 * entry.query.shape[2]


def test_grid_may_be_told_and_is_that_of_both_images(unet):
    options = {"reduce": "expectation", "keep": "qk", "grid": (8, 6)}
    with fm.CrossSelfAttnProcessor.on(unet, DOWN, **options) as record:
        call(unet, size=(8, 6))
    assert (record[0].grid, record[0].key_grid) == ((8, 6), (8, 6))
    forth, back = fm.CrossSelfAttnProcessor.maps(record[0])
    assert forth.key_grid == back.query_grid == (8, 6)


def test_saved_records_have_their_maps(unet, tmp_path):
    with fm.CrossSelfAttnProcessor.on(unet, DOWN, reduce=(), keep="qk") as record:
        call(unet)
    again = fm.Record.load(record.save(tmp_path / "pair.safetensors"))
    for ours, theirs in zip(
        fm.CrossSelfAttnProcessor.maps(again[0]),
        fm.CrossSelfAttnProcessor.maps(record[0]),
        strict=True,
    ):
        assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_maps_of_source_keys_and_of_other_entries_are_refused(unet):
    with fm.CrossSelfAttnProcessor.on(unet, DOWN, keys="source", reduce=(), keep="qk") as record:
        call(unet)
    with pytest.raises(ValueError, match=r"keys='source'.*there is no A_st"):
        fm.CrossSelfAttnProcessor.maps(record[0])
    truth = captured_map(unet, slice(1, 2), slice(0, 1)).to_dense()
    mixed = record[0].map(pairs=[[1, 1]]).to_dense()  # A_ts, as the message says
    torch.testing.assert_close(mixed, truth, atol=1e-7, rtol=1e-6)
    with fm.capture(unet, DOWN) as captured:
        call(unet)
    with pytest.raises(ValueError, match=r"of no other image.*CrossSelfAttnProcessor"):
        fm.CrossSelfAttnProcessor.maps(captured[0])


# -- traps -----------------------------------------------------------------------------------------


def test_odd_batches_are_refused(unet):
    with (
        fm.CrossSelfAttnProcessor.on(unet),
        pytest.raises(ValueError, match=r"batch of pairs.*got a batch of 3"),
    ):
        call(unet, batch=3)


@pytest.mark.parametrize("count", [1, 3])
def test_batches_without_pairs_once_guidance_is_taken_off_are_refused(pipe, count):
    prompts = PAIR[:1] * count
    message = rf"got a batch of {2 * count} in 2 parts of guidance, that is {count};"
    with fm.CrossSelfAttnProcessor.on(pipe, SELF, keys="source"):
        with pytest.raises(ValueError, match=message):
            FAMILY["sd2"].run(pipe, prompts=prompts, guidance=True)
    # Set by hand nothing tells of guidance, but the first layer sees one picture twice.
    latent = torch.randn(count, 4, 8, 8).repeat(2, 1, 1, 1)
    text = torch.randn(2 * count, 5, 32)
    unet = tiny_unet()
    unet.set_attn_processor(fm.CrossSelfAttnProcessor.for_layers(unet, SELF))
    with pytest.raises(ValueError, match=r"parts of guidance.*say guidance=False"):
        unet(latent, 7, encoder_hidden_states=text)
    unet.set_attn_processor(AttnProcessor2_0())
    unet.set_attn_processor(fm.CrossSelfAttnProcessor.for_layers(unet, SELF, guidance=False))
    if count == 1:
        unet(latent, 7, encoder_hidden_states=text)


def test_parts_of_guidance_that_cannot_be_told_are_refused(pipe):
    class Own:  # someone's pipeline, which guides in an order of its own
        do_classifier_free_guidance = True
        unet = pipe.unet

    with fm.CrossSelfAttnProcessor.on(Own(), SELF):
        with pytest.raises(ValueError, match=r"cannot be told; say guidance=True"):
            FAMILY["sd2"].run(pipe, prompts=PAIR)
    with fm.CrossSelfAttnProcessor.on(Own(), SELF, guidance=True) as record:
        FAMILY["sd2"].run(pipe, prompts=PAIR)
    assert len(record) == 10


@pytest.mark.parametrize("keys", ["source", "both"])
def test_one_source_for_many_targets(keys):
    attn, x = layer(), random(3, 12, 16)
    seen = [x[0], x[0], x[0]]
    if keys == "both":
        seen = [torch.cat([own, x[0]]) for own in x]
    got = fm.CrossSelfAttnProcessor(keys=keys, sources="first")(attn, x)
    torch.testing.assert_close(got, dense(attn, x, seen), atol=1e-6, rtol=1e-5)
    # The source's output: to the last bit, or twice the same keys, which changes the rounding.
    plain = AttnProcessor2_0()(attn, x)
    if keys == "source":
        assert torch.equal(got[0], plain[0])
    torch.testing.assert_close(got[0], plain[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("guidance", [False, True])
def test_one_source_for_many_targets_in_a_pipeline(pipe, guidance):
    prompts = ["a cat", "a dog", "a red cat"]
    plain = FAMILY["sd2"].run(pipe, prompts=prompts, guidance=guidance)
    options = {"keys": "source", "sources": "first", "keep": "qk", "reduce": ()}
    with fm.CrossSelfAttnProcessor.on(pipe, SELF, **options) as record:
        mixed = FAMILY["sd2"].run(pipe, prompts=prompts, guidance=guidance)
    assert torch.equal(mixed[0], plain[0])
    assert all(not torch.equal(mixed[n], plain[n]) for n in (1, 2))
    for half in record[0].key.chunk(1 + guidance):  # every image has the keys of its half's first
        assert torch.equal(half[0], half[1]) and torch.equal(half[0], half[2])


def test_injection_has_a_place():
    attn, x = layer(), random(4, 12, 16)  # two pairs, on 3 x 4 tokens
    whole = fm.CrossSelfAttnProcessor(keys="source")(attn, x)
    plain = AttnProcessor2_0()(attn, x)
    where = torch.zeros(6, 8)
    where[:, 4:] = 1  # the right half
    some = fm.CrossSelfAttnProcessor(keys="source", where=where, grid=(3, 4))(attn, x)
    got, inside, outside = (y.unflatten(1, (3, 4)) for y in (some, whole, plain))
    assert torch.equal(got[:, :, 2:], inside[:, :, 2:])
    assert torch.equal(got[:, :, :2], outside[:, :, :2])
    partly = fm.CrossSelfAttnProcessor(keys="source", where=where * 0.25, grid=(3, 4))(attn, x)
    blend = torch.lerp(outside, inside, 0.25)[:, :, 2:]
    torch.testing.assert_close(partly.unflatten(1, (3, 4))[:, :, 2:], blend)
    each = torch.stack([where, where, 1 - where, 1 - where])
    some = fm.CrossSelfAttnProcessor(keys="source", where=each, grid=(3, 4))(attn, x)
    assert torch.equal(some.unflatten(1, (3, 4))[2:, :, :2], inside[2:, :, :2])


def test_a_place_is_found_on_every_level_of_a_pipeline(pipe):
    plain = FAMILY["sd2"].run(pipe, prompts=PAIR, guidance=True)
    with fm.CrossSelfAttnProcessor.on(pipe, SELF, where=torch.zeros(32, 48)):
        assert torch.equal(FAMILY["sd2"].run(pipe, prompts=PAIR, guidance=True), plain)
    with fm.CrossSelfAttnProcessor.on(pipe, SELF):
        injected = FAMILY["sd2"].run(pipe, prompts=PAIR, guidance=True)
    with fm.CrossSelfAttnProcessor.on(pipe, SELF, where=torch.ones(2, 5, 7)):
        assert torch.equal(FAMILY["sd2"].run(pipe, prompts=PAIR, guidance=True), injected)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"sources='last'; choose from 'pairs', 'first'"):
        fm.CrossSelfAttnProcessor(sources="last")
    with pytest.raises(ValueError, match=r"one source for many targets.*choose keys='source'"):
        fm.CrossSelfAttnProcessor(sources="first")
    with pytest.raises(ValueError, match=r"where= must be \[height, width\].*got \(4,\)"):
        fm.CrossSelfAttnProcessor(where=torch.ones(4))
    with pytest.raises(ValueError, match=r"where= must be weights from 0"):
        fm.CrossSelfAttnProcessor(where=torch.full((2, 2), 2.0))
    with pytest.raises(ValueError, match=r"where= needs the grid of 11 tokens"):
        fm.CrossSelfAttnProcessor(where=torch.ones(2, 2))(layer(), random(2, 11, 16))
    with pytest.raises(ValueError, match=r"weights for 3 images, but the batch has 2"):
        fm.CrossSelfAttnProcessor(where=torch.ones(3, 2, 2))(layer(), random(2, 9, 16))
    with pytest.raises(ValueError, match=r"needs a batch of a source and at least one target"):
        fm.CrossSelfAttnProcessor(keys="both", sources="first")(layer(), random(1, 9, 16))
    with pytest.raises(ValueError, match=r"keys='mine'; choose from 'other', 'both', 'source'"):
        fm.CrossSelfAttnProcessor(keys="mine")
    with pytest.raises(ValueError, match=r"no grid for expectation; give block='image->other'"):
        fm.CrossSelfAttnProcessor(keys="both", reduce=("entropy", "expectation"))
    with pytest.raises(ValueError, match=r"reduce='nothing' is unknown"):
        fm.CrossSelfAttnProcessor(reduce="nothing")
    with pytest.raises(ValueError, match=r"mask over keys.*differs between queries"):
        fm.CrossSelfAttnProcessor()(
            layer(), random(2, 12, 16), attention_mask=random(2, 12, 12, seed=1)
        )


def test_very_processors_are_back_also_after_an_exception(unet):
    before = dict(unet.attn_processors)
    with pytest.raises(ZeroDivisionError), fm.CrossSelfAttnProcessor.on(unet):
        raise ZeroDivisionError
    with fm.MapAttnProcessor.on(unet, SELF) as outer, fm.CrossSelfAttnProcessor.on(unet) as inner:
        call(unet)  # the inner ones take the place of the outer ones
    assert (len(outer), len(inner)) == (0, 10)
    after = unet.attn_processors
    assert all(after[name] is each for name, each in before.items())


def test_lora_and_fused_projections_keep_working(tmp_path):
    family = FAMILY["sd2"]
    pipe = family.build(tmp_path)
    add_lora(pipe.unet)
    plain = family.run(pipe, prompts=PAIR)
    with fm.CrossSelfAttnProcessor.on(pipe, keys="source"):
        assert torch.equal(family.run(pipe, prompts=PAIR)[0], plain[0])
    pipe = family.build(tmp_path)
    pipe.fuse_qkv_projections(vae=False)
    plain = family.run(pipe, prompts=PAIR)
    with fm.CrossSelfAttnProcessor.on(pipe, keys="source"):
        assert torch.equal(family.run(pipe, prompts=PAIR)[0], plain[0])


def test_works_beside_an_ip_adapter(tmp_path):
    family = FAMILY["sd2"]
    pipe = family.build(tmp_path)
    add_ip_adapter(pipe.unet)
    with fm.CrossSelfAttnProcessor.on(pipe) as record:
        family.run(pipe, prompts=PAIR, **image_prompts(pipe.unet))
    assert len(record.layers) == 10


def test_joint_attention_and_other_processors_are_refused(tmp_path, unet):
    flux = FAMILY["flux"].build(tmp_path)
    with pytest.raises(RuntimeError, match=r"uses FluxAttnProcessor; CrossSelfAttnProcessor"):
        fm.CrossSelfAttnProcessor.for_layers(flux.transformer)
    unet.set_attn_processor(AttnProcessor())
    with pytest.raises(RuntimeError, match=r"set_attn_processor\(AttnProcessor2_0\(\)\)"):
        fm.CrossSelfAttnProcessor.for_layers(unet)


def test_capture_around_it_sees_the_keys_that_were_injected(unet):
    with fm.CrossSelfAttnProcessor.on(unet, reduce=(), keep="qk") as record:
        plain = call(unet)
        with fm.capture(unet, SELF) as captured:
            assert torch.equal(call(unet), plain)
    for ours, theirs in zip(record[:10], captured, strict=True):
        assert torch.equal(ours.query, theirs.query) and torch.equal(ours.key, theirs.key)


def test_gradient_checkpointing_injects_in_backward_what_it_did_in_forward():
    def gradient(checkpointing, **options):
        unet = tiny_unet().train().requires_grad_(True)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with fm.CrossSelfAttnProcessor.on(unet, **options) as record:
            call(unet).square().sum().backward()
        return unet.get_submodule(DOWN).to_q.weight.grad, record

    plain, _ = gradient(False)
    ours, record = gradient(True)
    assert torch.equal(ours, plain)
    assert len(record) == 10 and record[0].count == 1
    unet = tiny_unet().train().requires_grad_(True)
    unet.enable_gradient_checkpointing()
    with fm.CrossSelfAttnProcessor.on(unet, steps=range(1)):
        call(unet).square().sum().backward()
        loss = call(unet).square().sum()  # of a step without injection
        with pytest.raises(RuntimeError, match=r"ran again in backward"):
            loss.backward()


def test_nothing_keeps_injected_tensors_alive(unet):
    seen = []

    def watched(attention_map):
        seen.append(weakref.ref(attention_map))
        return attention_map.entropy()

    with fm.CrossSelfAttnProcessor.on(unet, reduce=watched) as record:
        call(unet)
    assert len(seen) == 10 and not any(reference() for reference in seen)
    assert all(entry.query is None and entry.key is None for entry in record)
