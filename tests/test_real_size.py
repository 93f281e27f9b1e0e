"""Capture on a UNet of Stable Diffusion 2's real size: random weights, 64 x 64 latents.

    make test ARGS="-m slow -s tests/test_real_size.py"

Takes about five minutes on two cores, and 8 GB. It prints time and peak memory of a step with and
without a capture. Time is not asserted.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import flashmaps as fm
import oracle
import pytest
import resident
import torch
from oracle import Value, assert_picks_maximum, assert_within_budget

pytestmark = pytest.mark.slow

STATISTICS = ("entropy", "argmax", "column_sum", "density", "pool")
POOL_TO = (8, 8)
ROUNDS = 5
LARGEST = ("down_blocks.0.*.attn1", "up_blocks.3.*.attn1")  # those of 64 x 64 tokens


def sd2_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=(5, 10, 20, 20),  # head counts, in spite of the name
        cross_attention_dim=1024,
        use_linear_projection=True,
    )
    return unet.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet():
    return sd2_unet()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 4, 64, 64, generator=generator)
    return latent, 500, torch.randn(1, 77, 1024, generator=generator)


def measured(run):
    """(seconds, peak resident bytes, result) of one call."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes the present
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return seconds, int(line.split()[1]) * 1024, result
    raise RuntimeError("this system does not tell a process's peak memory")


def test_a_loss_on_maps_takes_little_memory(unet, inputs, capsys):
    """Backward to the latent of a loss on every 64 x 64 self-attention map, and of one without."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of peak memory")
    latent, *others = inputs

    def gradient(maps):
        leaf = latent.clone().requires_grad_()
        if not maps:
            unet(leaf, *others).sample.square().mean().backward()
            return leaf.grad
        with fm.capture(unet, kind="self", keep="qk", grad=True, layers=LARGEST) as record:
            loss = unet(leaf, *others).sample.square().mean()
        for entry in record:
            assert entry.grid == (64, 64)
            loss = loss + entry.map().entropy().mean()
        assert len(record) == 5
        loss.backward()
        return leaf.grad

    told = {}
    for maps in (False, True):
        gradient(maps)  # what is loaded once
        seconds, peak, found = measured(lambda maps=maps: gradient(maps))
        assert torch.isfinite(found).all() and found.any()
        told[maps] = seconds, peak
    (plain, least), (ours, most) = told[False], told[True]
    with capsys.disabled():
        print(
            f"\nSD2's UNet, 64 x 64: backward {plain:.1f} s, with the entropy of five 64 x 64 maps "
            f"in the loss {ours:.1f} s; peak {least / 1e6:.0f} MB and {most / 1e6:.0f} MB, ratio "
            f"{most / least:.3f}"
        )
    assert most <= 1.1 * least


def test_a_step_of_learning_parts(tmp_path, capsys):
    """One step of "both" in bfloat16 with gradients checkpointed, beside what the plan said."""
    from flashmaps.parts.learn import _checkpointed
    from flashmaps.parts.losses import step_losses
    from tiny_pipeline import tiny_pipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of peak memory")
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    names = ("<thing>", *(f"<part-{p}>" for p in range(5)))
    text = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer), hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=2, num_attention_heads=16, bos_token_id=pipe.tokenizer.bos_token_id,
        eos_token_id=pipe.tokenizer.eos_token_id, pad_token_id=pipe.tokenizer.pad_token_id,
    )  # fmt: skip
    pipe.unet = sd2_unet().bfloat16()
    pipe.text_encoder = CLIPTextModel(text).eval().requires_grad_(False).bfloat16()
    plan = fm.plan_parts(pipe, batch=1, size=64 * 4)  # the tiny VAE's latents are a quarter
    words = {name: torch.randn(1, 1024).requires_grad_() for name in names}
    latent, noise = torch.randn(1, 4, 64, 64), torch.randn(1, 4, 64, 64)
    masks = torch.rand(1, len(names), 64, 64)

    def step():
        with torch.enable_grad(), _checkpointed(pipe.unet):
            noises, attention = step_losses(
                pipe, latent, noise, [500], ["a " + " ".join(names)], words, masks, names,
                ("*.attn2",),
            )  # fmt: skip
            return torch.autograd.grad(noises + 0.005 * attention, list(words.values()))

    before = resident.status("VmRSS")
    seconds, peak, slopes = measured(step)
    assert all(x.isfinite().all() and x.any() for x in slopes)
    with capsys.disabled():
        print(
            "\nSD2's UNet, 64 x 64, bfloat16, checkpointed: a step of learning parts "
            f"{seconds:.0f} s; peak {peak / 1e9:.2f} GB, {(peak - before) / 1e9:.2f} of it in "
            f"the step; planned: {plan}"
        )
    assert peak < 12e9


@torch.no_grad()
def test_a_completion(tmp_path, capsys):
    """`fm.complete` in bfloat16 with two exemplars, one sample and one step with guidance."""
    import numpy as np
    from flashmaps.diffusion.capture import find_layers
    from flashmaps.matching.settings import fingerprint
    from tiny_pipeline import tiny_pipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of peak memory")
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer), hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=2, num_attention_heads=16, bos_token_id=pipe.tokenizer.bos_token_id,
        eos_token_id=pipe.tokenizer.eos_token_id, pad_token_id=pipe.tokenizer.pad_token_id,
    )  # fmt: skip
    pipe.unet = sd2_unet().bfloat16()
    pipe.text_encoder = CLIPTextModel(text).eval().requires_grad_(False).bfloat16()
    pipe.vae.bfloat16()
    side = 64 * 4  # the tiny VAE's latents are a quarter
    rows, columns = np.indices((side, side))
    whole = (rows - 120) ** 2 + (columns - 130) ** 2 < 70**2
    picture = np.where(whole[..., None], (200, 60, 40), (40, 120, 60)).astype(np.uint8)
    labels = np.where(whole, np.where(rows < 120, 0, 1), -1).astype(np.int16)
    layers = find_layers(pipe.unet, "*.attn2")
    count = 2
    parts = fm.Parts(
        names=("<part-0>", "<part-1>"), embeddings=torch.randn(count, 1, 1024),
        category="<thing>", category_embedding=torch.randn(1, 1024), model="",
        weights=fingerprint(pipe), size=(side, side), layers=tuple(layers), timestep=100,
        head=torch.randn(count + 1, len(layers) * (count + 5) + 1), norms=torch.ones(count, 2),
        images=(picture, picture[:, ::-1].copy()),
        labels=(labels, labels[:, ::-1].copy()),
    )  # fmt: skip
    front = (rows > 130) & (columns > 100) & (columns < 170)
    image = np.where(front[..., None], 90, picture).astype(np.uint8)

    def run():
        return fm.complete(
            image, parts, visible=whole & ~front, occluder=front, model=pipe, samples=1, steps=1,
            strength=1.0,
        )  # fmt: skip

    before = resident.status("VmRSS")
    seconds, peak, made = measured(run)
    assert made.hidden.any()
    assert np.array_equal(made.images[0][~made.hidden], made.image[~made.hidden])
    with capsys.disabled():
        print(
            "\nSD2's UNet, 64 x 64, bfloat16: a completion, two exemplars, one sample of one step "
            f"{seconds:.0f} s; peak {peak / 1e9:.2f} GB, {(peak - before) / 1e9:.2f} of it in the "
            "completion"
        )
    assert peak < 12e9


@torch.no_grad()
def test_a_step_with_every_statistic(unet, inputs, capsys):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of peak memory")
    assert sum(p.numel() for p in unet.parameters()) > 860e6

    def plain():
        return unet(*inputs).sample

    def captured():
        with fm.capture(unet, kind="self", reduce=STATISTICS, pool_to=POOL_TO) as record:
            output = unet(*inputs).sample
        return output, record

    expected = plain()
    captured()
    seconds, peaks = {"plain": [], "captured": []}, {"plain": [], "captured": []}
    for _ in range(ROUNDS):
        for name, run in (("plain", plain), ("captured", captured)):
            took, peak, result = measured(run)
            seconds[name].append(took)
            peaks[name].append(peak)
            output = result if name == "plain" else result[0]
            assert torch.equal(output, expected)
    record = result[1]
    assert len(record) == 16
    assert sorted(entry.grid for entry in record) == [(8, 8)] + [
        grid for side in (16, 32, 64) for grid in [(side, side)] * 5
    ]
    for entry in record:
        tokens = entry.grid[0] * entry.grid[1]
        assert entry.entropy.shape == entry.argmax.shape == entry.density.shape == (1, tokens)
        assert entry.pool.shape == (1, 64, 64)
        torch.testing.assert_close(entry.density.sum(), torch.tensor(float(tokens)))
    times = {name: median(values) for name, values in seconds.items()}
    # The least of several: what else the process holds on to only adds.
    memory = {name: min(values) for name, values in peaks.items()}
    with capsys.disabled():
        print(
            f"\nSD2's UNet, 64 x 64, {torch.get_num_threads()} threads: step "
            f"{times['plain']:.2f} s, with all statistics of 16 self-attention layers "
            f"{times['captured']:.2f} s, ratio {times['captured'] / times['plain']:.3f} "
            f"(medians of {ROUNDS} by turns); peak {memory['plain'] / 1e6:.0f} MB and "
            f"{memory['captured'] / 1e6:.0f} MB, ratio "
            f"{memory['captured'] / memory['plain']:.4f}"
        )
    assert memory["captured"] <= 1.02 * memory["plain"]


@torch.no_grad()
def test_maps_are_those_of_the_eager_processor(unet, inputs):
    """`AttnProcessor` builds maps; those it builds of the same Q and K have the same numbers."""
    from diffusers.models.attention_processor import AttnProcessor

    with fm.capture(unet, kind="self", keep="qk") as record:
        output = unet(*inputs).sample
    layers = dict(unet.named_modules())
    dtype = torch.float32
    for entry in record:
        A = entry.map()
        found = A.reduce("entropy", "max", "argmax", "column_sum", "column_max")
        attn = layers[entry.layer]
        heads = attn.get_attention_scores(entry.query[0], entry.key[0])  # [H, N, M]
        eager = heads.mean(0, keepdim=True)
        del heads
        true, _ = oracle.attention(entry.query, entry.key, dtype=torch.float64, scale=entry.scale)
        plain = oracle.Map(eager, 1, true.roundings)
        for name in ("entropy", "max", "column_sum", "column_max"):
            what = f"{name} of {entry.layer}"
            rival: Value = getattr(plain, name)()
            truth: Value = getattr(true, name)()
            assert_within_budget(what, getattr(found, name), truth, rival, true, dtype)
        assert_picks_maximum(
            f"argmax of {entry.layer}", found.argmax, true.values, eager, true, dtype, 2
        )
        cells = oracle.cells(entry.grid, POOL_TO)
        assert_within_budget(
            f"pool of {entry.layer}",
            A.pool(POOL_TO, POOL_TO),
            true.pool(cells, cells),
            plain.pool(cells, cells),
            true,
            dtype,
        )
    processors = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    eager_output = unet(*inputs).sample
    unet.set_attn_processor(processors)
    # Both round float32 differently in each of 32 attentions; the output is of order one.
    torch.testing.assert_close(eager_output, output, atol=1e-4, rtol=1e-3)
