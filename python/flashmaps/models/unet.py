"""Stage two: UNet and text encoder, fitted to undo noise in the latents of captioned pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import compute_snr
from torch import Tensor

from . import alignment
from .alignment import Alignment
from .architecture import Parts
from .bank import Bank, encode, tokenize
from .loop import Loop

SNR_GAMMA = 5.0  # steps with less noise than that count less: nearly all they ask for is noise
LOSS_WEIGHT = f"min(1, {SNR_GAMMA:g} / SNR)"
DROPPED = 0.2  # share of captions replaced by "", which guidance needs, and matching without one
_STEPS = 1000
_HELD_OUT = 99  # a purpose for generators that no step uses


def train_unet(
    parts: Parts,
    bank: Bank,
    held_out: Bank,
    args: argparse.Namespace,
    deadline: float,
    publish: Callable[[str], None],
) -> Loop:
    """Fit UNet and text encoder; returns the loop, which has their averages.

    The loss is the squared error of what is predicted times min(1, 5 / SNR). For noise that is
    min-SNR weighting. For velocity, the default, it is Stable Diffusion 2's own loss but for the
    nearly noiseless steps; min-SNR proper would divide it by SNR + 1 as well, which leaves a
    hundredth of the weight at t = 900 and a quarter at t = 500, where a picture takes shape.

    With ``args.alignment`` above 0, so much of the loss of :mod:`flashmaps.models.alignment` is
    added, each picture weighted by the share of the signal in it (alpha_bar).
    ``publish`` is called now and then, with the averages in the modules and the step as a name.
    """
    modules: dict[str, Any] = {"unet": parts.unet, "text_encoder": parts.text_encoder}
    blocks = {name: parts.unet.get_submodule(name) for name in alignment.LAYERS}
    reader = Alignment([block.norm1.normalized_shape[0] for block in blocks.values()])
    seen: dict[str, Tensor] = {}
    if args.alignment > 0:
        modules["alignment"] = reader
        for name, block in blocks.items():
            block.register_forward_hook(partial(_keep, seen, name))
    loop = Loop("unet", modules, args, deadline, weight_decay=1e-2)
    device, scheduler = loop.device, parts.scheduler
    if device.type == "cpu":
        _use_plain_attention(parts)
    latents, tokens = _latents(parts, bank, args, device), bank.tokens(parts.tokenizer).to(device)
    parts.vae.to(device)
    shown = torch.from_numpy(bank.labels).to(device)
    checked = encode(parts.vae, torch.from_numpy(held_out.images), 16, "held out").to(device)
    checked_tokens = held_out.tokens(parts.tokenizer)[:, 0].to(device)
    empty = tokenize(parts.tokenizer, [""]).to(device)
    signal = compute_snr(scheduler, torch.arange(_STEPS)).to(device)
    velocity = scheduler.config.prediction_type == "v_prediction"
    weights = signal.clamp(max=SNR_GAMMA) / signal
    share = scheduler.alphas_cumprod.to(device)
    unet = torch.compile(parts.unet, dynamic=False) if args.compile else parts.unet

    def error(model: Any, clean: Tensor, ids: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        noisy = scheduler.add_noise(clean, noise, t)
        wanted = scheduler.get_velocity(clean, noise, t) if velocity else noise
        found = model(noisy, t, parts.text_encoder(ids)[0]).sample.float()
        return weights[t] * (found - wanted).square().mean(dim=(1, 2, 3))

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator, count = loop.generator(), loop.batch
        options = {"generator": generator, "device": device}
        chosen = torch.randint(len(latents), (count,), **options)
        caption = torch.randint(3, (count,), **options)
        dropped = torch.rand(count, 1, **options) < DROPPED
        ids = torch.where(dropped, empty, tokens[chosen, caption])
        mean, deviation = latents[chosen].float().unbind(1)
        clean = mean + deviation * torch.randn(mean.shape, **options)
        noise = torch.randn(mean.shape, **options)
        # One timestep from each of `count` equal parts: the same mean with less scatter.
        place = (torch.arange(count, device=device) + torch.rand(count, **options)) / count
        t = (place * _STEPS).long().clamp(max=_STEPS - 1)
        value = error(unet, clean, ids, t, noise).mean()
        if args.alignment <= 0:
            return value, {}
        clear = slice(max(1, count // 2))  # t is in order; behind lies more noise than picture
        outputs = [seen.pop(name)[clear] for name in alignment.LAYERS]
        told = reader(outputs, shown[chosen[clear]], share[t[clear]])
        return value + args.alignment * told, {"aligned": told.detach(), "noise": value.detach()}

    def samples() -> dict[str, float]:
        count = len(checked)
        fixed = torch.Generator(device).manual_seed(_HELD_OUT)
        noise = torch.randn(checked[:, 0].shape, generator=fixed, device=device)
        t = torch.arange(count, device=device) * _STEPS // count
        with loop.accelerator.autocast():
            found = [
                error(parts.unet, checked[i, 0].float(), checked_tokens[i], t[i], noise[i])
                for i in torch.arange(count, device=device).split(32)
            ]
        publish(f"{loop.step:07d}")
        return {"held_out_loss": torch.cat(found).mean().item()}

    loop.run(loss, samples)
    return loop


def _use_plain_attention(parts: Parts) -> None:
    """Matrix products and a softmax instead of torch's fused attention, for maps of up to 256^2.

    On CPU the fused one's backward takes eight times its forward: a step of 64 pictures of 64
    pixels took 1.08 s with it and 0.64 s so. From 1024 tokens on it is the faster one.
    """
    unet = parts.unet
    finest = "down_blocks.0.", f"up_blocks.{len(unet.config.up_block_types) - 1}."
    many = unet.config.sample_size > 16
    unet.set_attn_processor(
        {
            name: AttnProcessor2_0()
            if many and ".attn1." in name and name.startswith(finest)
            else AttnProcessor()
            for name in unet.attn_processors
        }
    )
    parts.text_encoder.set_attn_implementation("eager")


def _keep(seen: dict[str, Tensor], name: str, module: Any, _given: Any, output: Tensor) -> None:
    if module.training:
        seen[name] = output


def _latents(parts: Parts, bank: Bank, args: argparse.Namespace, device: torch.device) -> Tensor:
    """The bank through the frozen encoder, once: it would else cost a third of each step."""
    path = args.work / "latents.pt"
    if args.resume and path.is_file():
        found = torch.load(path, map_location=device, mmap=device.type == "cpu")
        if len(found) == len(bank):
            return found
    parts.vae.to(device)
    chunk = 16 if device.type == "cpu" else 256
    found = encode(parts.vae, bank.pixels(torch.device("cpu")), chunk)
    partial = path.with_suffix(".partial")
    torch.save(found.cpu(), partial)
    partial.replace(path)
    return found
