"""The tiny pipelines of the other tests: they run, repeat themselves, and are built as they say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from tiny_adapters import (
    GainProcessor,
    MatmulProcessor,
    ModuleProcessor,
    add_ip_adapter,
    add_lora,
    image_prompts,
    set_processors,
)
from tiny_models import (
    FAMILIES,
    FAMILY,
    Family,
    run_wan_image_to_video,
    tiny_wan_image_to_video,
)
from torch.overrides import TorchFunctionMode

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


class _Shapes(TorchFunctionMode):
    """The shapes of q and k, as [B, H, N, d], of each attention call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.note(*args, **kwargs)
        return function(*args, **kwargs)

    def note(self, query, key, *args, **kwargs):
        self.seen.append((tuple(query.shape), tuple(key.shape)))


def _attention_of(family, pipe, **arguments):
    """Shapes of q and k of every attention call, one list for each forward of the denoiser."""
    model, forwards = getattr(pipe, family.denoiser), []
    forward = model.forward

    def spied(*args, **kwargs):
        with _Shapes() as shapes:
            output = forward(*args, **kwargs)
        forwards.append(shapes.seen)
        return output

    model.forward = spied
    try:
        family.run(pipe, **arguments)
    finally:
        del model.forward
    return forwards


@every_family
def test_two_steps_are_finite_and_repeat(family: Family, tmp_path):
    pipe = family.build(tmp_path)
    first = family.run(pipe)
    assert first.isfinite().all()
    assert torch.equal(first, family.run(pipe))
    assert torch.equal(first, family.run(family.build(tmp_path / "again")))
    assert not torch.equal(first, family.run(pipe, guidance=False))
    assert not torch.equal(first, family.run(pipe, prompts=["two dogs"]))


@every_family
def test_nothing_trains(family: Family, tmp_path):
    for part in family.build(tmp_path).components.values():
        if isinstance(part, torch.nn.Module):
            assert not part.training
            assert not any(p.requires_grad for p in part.parameters())


@every_family
def test_attention_is_as_the_family_says(family: Family, tmp_path):
    pipe, prompts = family.build(tmp_path), ["a cat", "a big dog"]
    height, width = family.grid()
    image = family.frames * height * width
    text = family.text_tokens or len("a big dog")

    (shapes,) = _attention_of(family, pipe, prompts=prompts, steps=1, guidance=False)
    kinds = Counter(
        "joint" if q[2] > image else "cross" if k[2] == text else "self" for q, k in shapes
    )
    assert kinds == family.layers
    finest = max(q[2] for q, _ in shapes)
    assert finest == image + (text if "joint" in family.layers else 0)
    assert all(q[0] == 2 for q, _ in shapes)

    guided = _attention_of(family, pipe, prompts=prompts, steps=1, guidance=True)
    if family.batched:
        assert [q[0] for q, _ in guided[0]] == [4] * len(shapes)
    assert len(guided) == (1 if family.batched else 2)


def test_image_to_video_looks_at_the_image_and_then_at_the_text():
    model = tiny_wan_image_to_video()
    with _Shapes() as shapes:
        output = run_wan_image_to_video(model)
    assert output.isfinite().all()
    assert torch.equal(output, run_wan_image_to_video(model))
    assert [k[2] for _, k in shapes.seen] == [192, 7, 512] * 2


@every_family
def test_a_lora_changes_the_output(family: Family, tmp_path):
    pipe = family.build(tmp_path)
    before = family.run(pipe)
    add_lora(getattr(pipe, family.denoiser))
    after = family.run(pipe)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    assert torch.equal(after, family.run(pipe))


@pytest.mark.parametrize("guidance", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize(
    ("name", "adapters", "images"),
    [("sd15", 1, 1), ("sd2", 2, 3), ("sdxl", 2, 1), ("flux", 2, 3), ("sd3", 1, 2)],
)
def test_ip_adapters_change_the_output(name, adapters, images, guidance, tmp_path):
    family = FAMILY[name]
    pipe = family.build(tmp_path)
    model = getattr(pipe, family.denoiser)
    before = family.run(pipe, guidance=guidance)
    add_ip_adapter(model, adapters)
    prompts = image_prompts(model, adapters=adapters, images=images, guidance=guidance)
    after = family.run(pipe, guidance=guidance, **prompts)
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_several_image_prompts_are_several_calls_after_the_text(tmp_path):
    family = FAMILY["sd2"]
    pipe = family.build(tmp_path)
    add_ip_adapter(pipe.unet, adapters=2)
    prompts = image_prompts(pipe.unet, adapters=2, images=3)
    (shapes,) = _attention_of(family, pipe, steps=1, **prompts)
    assert [k[2] for _, k in shapes[:4]] == [96, 77, 12, 12]


@pytest.mark.parametrize("processor", [GainProcessor, ModuleProcessor, MatmulProcessor])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart"])
def test_other_processors_run(processor, name, tmp_path):
    family = FAMILY[name]
    pipe = family.build(tmp_path)
    set_processors(getattr(pipe, family.denoiser), processor)
    assert family.run(pipe).isfinite().all()


def test_a_processor_gets_its_own_keyword(tmp_path):
    family = FAMILY["sd2"]
    pipe = family.build(tmp_path)
    before = family.run(pipe)
    set_processors(pipe.unet, GainProcessor)
    assert torch.equal(before, family.run(pipe))
    assert not torch.equal(before, family.run(pipe, cross_attention_kwargs={"gain": 2.0}))
