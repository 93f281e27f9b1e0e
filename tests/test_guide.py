"""Guidance: the loss falls, the pipeline is as before, every family's latents are found."""

from __future__ import annotations

from typing import Any

import flashmaps as fm
import pytest
import torch
from flashmaps.diffusion.guide import guide
from tiny_models import FAMILIES
from tiny_pipeline import tiny_pipeline
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


def generate(pipe: Any, **more: Any) -> Tensor:
    options = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 48}
    noise = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=noise, **{**options, **more}).images


def attended(record: Any) -> Tensor:
    """Attend-and-Excite: some place must look at the word."""
    return sum(1 - entry.map().column_max()[:, 2].mean() for entry in record)


def diffuse(record: Any) -> Tensor:
    """A self-attention loss: rows must be sharp."""
    return sum(entry.map().entropy().mean() for entry in record)


@pytest.mark.parametrize("scale", [1.0, 7.5], ids=["plain", "guided"])
@pytest.mark.parametrize(("loss", "kind"), [(attended, "cross"), (diffuse, "self")])
def test_the_loss_falls(pipe: Any, loss: Any, kind: str, scale: float) -> None:
    def last(steps: Any) -> tuple[float, list[tuple[int, float]]]:
        with guide(pipe, loss, kind=kind, steps=steps, scale=50.0, iterations=4) as told:
            latents = generate(pipe, guidance_scale=scale)
        assert latents.isfinite().all()
        return told.losses[0][1] if told.losses else 0.0, told.losses

    _, losses = last(range(2))
    assert [step for step, _ in losses] == [0] * 4 + [1] * 4
    for step in (0, 1):
        of_step = [value for at, value in losses if at == step]
        assert of_step[-1] < of_step[0]


def test_a_move_is_that_of_the_formula(pipe: Any) -> None:
    """One step of DDIM: latents of the model and of the scheduler less scale times the gradient."""
    seen: list[Tensor] = []

    def hook(model: Any, args: tuple, kwargs: dict) -> None:
        seen.append((args[0] if args else kwargs["sample"]).clone())

    handle = pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    generate(pipe, num_inference_steps=1, guidance_scale=7.5)
    with fm.guide(pipe, diffuse, kind="self", scale=3.0):
        generate(pipe, num_inference_steps=1, guidance_scale=7.5)
    handle.remove()
    plain, moved = seen
    latent = plain[:1].clone().requires_grad_()
    text = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    pipe.scheduler.set_timesteps(1)
    with fm.capture(pipe.unet, kind="self", keep="qk", grad=True) as record:
        pipe.unet(latent, pipe.scheduler.timesteps[0], encoder_hidden_states=text)
    (slope,) = torch.autograd.grad(diffuse(record), latent)
    torch.testing.assert_close(moved, plain - 3.0 * slope, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_behind(pipe: Any) -> None:
    plain = generate(pipe)
    before = vars(pipe.scheduler).keys()
    with guide(pipe, diffuse, kind="self", steps=()):
        assert torch.equal(generate(pipe), plain)
    with guide(pipe, diffuse, kind="self"), fm.capture(pipe, kind="self") as record:
        assert not torch.equal(generate(pipe), plain)
    per_step = len(record) // 3
    assert [entry.step for entry in record] == [n // per_step for n in range(3 * per_step)]
    assert vars(pipe.scheduler).keys() == before
    assert torch.equal(generate(pipe), plain)


def test_other_schedulers_move_what_they_scale(pipe: Any) -> None:
    from diffusers import EulerDiscreteScheduler

    before = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(before.config)
    try:
        with guide(pipe, diffuse, kind="self", scale=200.0, iterations=3) as told:
            assert generate(pipe, guidance_scale=7.5).isfinite().all()
    finally:
        pipe.scheduler = before
    first = [value for step, value in told.losses if step == 0]
    assert first[-1] < first[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family(family: Any, tmp_path: Any) -> None:
    pipe = family.build(tmp_path)
    kind = "joint" if family.name in ("sd3", "flux", "qwen") else "self"
    with guide(pipe, diffuse, kind=kind, steps=(0,), scale=100.0, iterations=2) as told:
        family.run(pipe)
    values = [value for _, value in told.losses]
    assert len(values) == 2 and values[1] < values[0]


@pytest.mark.filterwarnings("ignore:nothing was recorded")
def test_bad_input(pipe: Any) -> None:
    def runs(loss: Any, **options: Any) -> None:
        with guide(pipe, loss, **options):
            generate(pipe)

    with pytest.raises(TypeError, match="loss must be a function"):
        runs(3)
    with pytest.raises(TypeError, match="scheduler"), guide(pipe.unet, diffuse):
        pass
    with pytest.raises(ValueError, match="one number"):
        runs(lambda record: record[0].map().entropy(), kind="self")
    with pytest.raises(ValueError, match="has a gradient"):
        runs(lambda record: record[0].map().argmax().sum(), kind="self")
    with pytest.raises(ValueError, match="no layer was recorded"):
        runs(diffuse, resolution=999)
    with pytest.raises(ValueError, match="loss is nan"):
        runs(lambda record: diffuse(record) * float("nan"), kind="self")
