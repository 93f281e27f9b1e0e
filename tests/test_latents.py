"""Noise and DDIM inversion: known answers, and the way back."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from flashmaps.diffusion.latents import encode, invert, noised, plan_inversion
from tiny_models import FAMILY
from tiny_pipeline import tiny_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))


def scheduled(name="DDIMScheduler", **config):
    """As much of a pipeline as noise and inversion need: its scheduler."""
    return SimpleNamespace(scheduler=getattr(diffusers, name)(**{**BETAS, **config}))


def arrive(plan, latent, denoise):
    """The last stop of an inversion."""
    *_, last = invert(plan, latent, denoise)
    return last


def sample_back(pipe, latent, start, steps, denoise):
    """DDIM sampling from timestep ``start`` down to no noise."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps.tolist():
        if t <= start:
            latent = scheduler.step(denoise(latent, t), t, latent).prev_sample
    return latent


# -- noise -----------------------------------------------------------------------------------------


def test_noise_is_normal_and_follows_the_schedule():
    pipe = scheduled()
    seeds = [(5, 6), (7, 8)]
    carried = list(noised(pipe, LATENT, (0, 250, 999), seeds))
    assert [t for t, _ in carried] == [0, 250, 999] * 2
    for (t, found), row in zip(carried, [0] * 3 + [1] * 3, strict=True):
        for image, z in enumerate(LATENT):
            generator = torch.Generator().manual_seed(seeds[image][row])
            noise = torch.randn(z.shape, generator=generator)
            kept = pipe.scheduler.alphas_cumprod[t].double()
            expected = kept.sqrt() * z + (1 - kept).sqrt() * noise
            torch.testing.assert_close(found[image], expected.float())


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
    ],
)
def test_every_scheduler_gives_the_same_noise(name):
    """LCM's own defaults are other betas: what counts is what the scheduler has."""
    (_, expected), (_, found) = (
        next(noised(scheduled(each), LATENT, (300,), [(0,), (1,)]))
        for each in ("DDIMScheduler", name)
    )
    torch.testing.assert_close(found, expected)
    bare = SimpleNamespace(scheduler=getattr(diffusers, name)())
    before = bare.scheduler.alphas_cumprod.clone()
    plan = plan_inversion(bare, (300,), 50)
    torch.testing.assert_close(plan.scheduler.alphas_cumprod, before)


# -- what the VAE makes of images ------------------------------------------------------------------

GREYS = [np.full((32, 48, 3), grey, np.float32) for grey in (0.2, 0.7)]


def test_images_are_encoded_to_the_scaled_mean(tmp_path):
    pipe = tiny_pipeline(tmp_path)
    with torch.no_grad():
        found = encode(pipe, GREYS)
        for image, grey in zip(found, (0.2, 0.7), strict=True):
            pixels = torch.full((1, 3, 32, 48), 2 * grey - 1)
            expected = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
            torch.testing.assert_close(image[None], expected, atol=1e-5, rtol=1e-5)


def test_a_vae_may_have_channel_statistics_or_no_posterior(tmp_path):
    from diffusers import AutoencoderTiny

    pipe = FAMILY["sdxl"].build(tmp_path)
    with torch.no_grad():
        plain = encode(pipe, GREYS) / pipe.vae.config.scaling_factor
        mean, std = [0.5, 0.0, -1.0, 2.0], [2.0, 1.0, 0.5, 4.0]
        pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
        found = encode(pipe, GREYS) / pipe.vae.config.scaling_factor
        for channel in range(4):
            expected = (plain[:, channel] - mean[channel]) / std[channel]
            torch.testing.assert_close(found[:, channel], expected)
        torch.manual_seed(0)
        small = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
        pipe.vae = AutoencoderTiny(
            **small, num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3
        ).eval()
        assert encode(pipe, GREYS).shape == (2, 4, 8, 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_the_vae_of_sdxl_runs_in_float32_and_is_put_back(tmp_path, dtype):
    pipe = FAMILY["sdxl"].build(tmp_path).to(dtype)
    before = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    seen = []
    hook = pipe.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.no_grad():
        latent = encode(pipe, GREYS)
        assert seen == [torch.float32] and latent.dtype == torch.float32
        pipe.vae.register_to_config(force_upcast=False)
        encode(pipe, GREYS)
        assert seen[1:] == [dtype]
        pipe.vae.register_to_config(force_upcast=True)
        hook.remove()
        failing = pipe.vae.encoder.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(pipe, GREYS)
        failing.remove()
    after = pipe.vae.state_dict()
    assert all(after[name].dtype == dtype for name in before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# -- inversion -------------------------------------------------------------------------------------

CONVENTIONS = pytest.mark.parametrize(
    "config",
    [
        {"steps_offset": offset, "set_alpha_to_one": one}
        for offset in (0, 1)
        for one in (False, True)
    ],
    ids=lambda config: (
        f"offset{config['steps_offset']}-{'one' if config['set_alpha_to_one'] else 'a0'}"
    ),
)


@CONVENTIONS
def test_a_model_that_predicts_no_noise_only_scales_and_comes_back_exactly(config):
    """x_t = sqrt(a_t / a) z, with a = 1 or a_0 the level of an image without noise."""
    pipe = scheduled(**config)
    plan = plan_inversion(pipe, (501,), 20)

    def denoise(latent, t):
        return torch.zeros_like(latent)

    t, found = arrive(plan, LATENT, denoise)
    assert t == 500 + config["steps_offset"]
    kept = pipe.scheduler.alphas_cumprod
    clean = 1.0 if config["set_alpha_to_one"] else kept[0]
    rounding = 2 * len(plan.path) * torch.finfo(torch.float32).eps  # two roundings a step
    torch.testing.assert_close(found, (kept[t] / clean).sqrt() * LATENT, rtol=2 * rounding, atol=0)
    back = sample_back(pipe, found, t, 20, denoise)
    torch.testing.assert_close(back, LATENT, rtol=4 * rounding, atol=0)


@CONVENTIONS
def test_a_model_that_predicts_no_velocity_turns_by_the_angles_of_the_schedule(config):
    """With v = 0 each step multiplies by cos(u_t - u_s), cos u = sqrt(a)."""
    pipe = scheduled(prediction_type="v_prediction", **config)
    plan = plan_inversion(pipe, (501,), 20)
    _, found = arrive(plan, LATENT, lambda latent, t: torch.zeros_like(latent))
    kept = pipe.scheduler.alphas_cumprod.double()
    clean = torch.ones(()).double() if config["set_alpha_to_one"] else kept[0]
    angles = torch.stack([clean, *kept[list(plan.path)]]).sqrt().arccos()
    expected = angles.diff().cos().prod().float() * LATENT
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_flow_of_normal_data_is_to_stay(prediction):
    """Data of unit variance keeps it at every noise level; twice the steps, half the error."""
    pipe = scheduled(prediction_type=prediction)
    kept = pipe.scheduler.alphas_cumprod

    def denoise(latent, t):  # the best there is for normal data
        noise = (1 - kept[t]).sqrt() * latent
        return noise if prediction == "epsilon" else torch.zeros_like(latent)

    errors = []
    for steps in (50, 100, 200):
        _, found = arrive(plan_inversion(pipe, (500,), steps), LATENT, denoise)
        errors.append(float((found - LATENT).norm() / LATENT.norm()))
    assert errors[0] < 0.05
    for coarse, fine in pairwise(errors):
        assert 0.4 < fine / coarse < 0.6, errors


@pytest.mark.parametrize("name", ["sd15", "sd2", "sd21", "sdxl"])
def test_sampling_comes_back_and_twice_the_steps_halve_the_error(name, tmp_path):
    """DDIM is a first-order method, whatever the model: the error is C / steps."""
    from flashmaps.diffusion.features import _conditions, _denoiser, _encode_prompt

    pipe = FAMILY[name].build(tmp_path)
    z, errors = LATENT[:1], []
    with torch.no_grad():
        conditions = _conditions(pipe, [_encode_prompt(pipe, "a cat")], (32, 48))
        denoise = _denoiser(pipe, conditions, lambda: None)
        for steps in (10, 20, 40):
            t, found = arrive(plan_inversion(pipe, (501,), steps), z, denoise)
            assert t == 501
            back = sample_back(pipe, found, t, steps, denoise)
            errors.append(float((back - z).norm() / z.norm()))
    assert not torch.allclose(found, z, atol=0.1)  # it did go somewhere
    for coarse, fine in pairwise(errors):
        assert 0.4 < fine / coarse < 0.6, errors


def test_the_stops_are_the_nearest_timesteps_of_the_schedule():
    pipe = scheduled(steps_offset=1)
    plan = plan_inversion(pipe, (261, 1, 40, 999), 50)
    assert plan.stops == (1, 41, 261, 981) and len(plan.path) == 50
    calls = []

    def denoise(latent, t):
        calls.append(t)
        return torch.zeros_like(latent)

    assert [t for t, _ in invert(plan, LATENT, denoise)] == [1, 41, 261, 981]
    assert tuple(calls) == plan.path
    # 1000 steps with an offset would end at 1000, where the model knows nothing.
    assert plan_inversion(pipe, (999,), 1000).stops == (999,)
    assert plan_inversion(pipe, (999,), 1).stops == (1,)


def test_what_cannot_be_inverted_is_refused():
    with pytest.raises(
        ValueError, match=r"inversion_steps=700: the DDIM schedule ends at timestep 699"
    ):
        plan_inversion(scheduled(), (900,), 700)
    with pytest.raises(ValueError, match=r"prediction_type='sample'. Leave inversion_steps out"):
        plan_inversion(scheduled(prediction_type="sample"), (261,), 50)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_latents_are_not_clipped_whatever_the_scheduler(name):
    """DDIMInverseScheduler clips to [-1, 1] where a config does not say otherwise."""
    plan = plan_inversion(scheduled(name), (500,), 50)
    _, found = arrive(plan, 30 * LATENT, lambda latent, t: torch.zeros_like(latent))
    assert found.abs().max() > 10
