"""Train the built-in miniature: first the VAE, then UNet and text encoder on its latents.

    python -m flashmaps.models.train --out DIR --checkpoints DIR [--resume]

Every batch and every noise is drawn from (seed, stage, step), so a resumed run sees what an
uninterrupted one would have seen. With --vae-minutes or --unet-minutes a stage also ends by the
clock, and the learning rate follows whichever limit is nearer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn
from tqdm import tqdm

from .architecture import TINY, Parts, Sizes, build
from .card import model_card
from .export import export
from .photos import Photos

VAE_STAGE, UNET_STAGE, BANK_STAGE, CHECK_STAGE = range(4)
SNR_GAMMA = 5.0  # min-SNR weighting; without it the nearly noiseless steps drown the rest


def main(argv: list[str] | None = None) -> None:
    """Train both stages and export the pipeline; `argv` as on the command line."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in ("vae.pt", "bank.pt", "unet.pt", "log.jsonl"):
            (args.checkpoints / name).unlink(missing_ok=True)
    sizes = TINY if args.tiny else Sizes()
    parts = build(sizes, args.seed)
    photos = Photos(sizes.image)
    psnr = train_vae(parts, photos, args)
    train_unet(parts, photos, psnr, args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; the defaults are those of a run without a clock."""
    parser = argparse.ArgumentParser(
        prog="python -m flashmaps.models.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="pipeline folder to write")
    add("--checkpoints", type=Path, help="checkpoints and log (default: OUT-checkpoints)")
    add("--resume", action="store_true", help="continue from the checkpoints")
    add("--vae-steps", type=int, default=3000)
    add("--unet-steps", type=int, default=5000)
    add("--vae-minutes", type=float, default=math.inf, help="wall clock limit of the stage")
    add("--unet-minutes", type=float, default=math.inf, help="wall clock limit of the stage")
    add("--vae-batch", type=int, default=4)
    add("--unet-batch", type=int, default=16)
    add("--vae-lr", type=float, default=1e-3)
    add("--unet-lr", type=float, default=5e-4)
    add("--bank", type=int, default=8192, help="crops encoded once for the UNet stage")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--export-every", type=int, default=0, help="UNet steps between early exports; 0 for none")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--tiny", action="store_true", help="a toy of the same shape, to test the script")
    args = parser.parse_args(argv)
    if args.checkpoints is None:
        args.checkpoints = args.out.with_name(args.out.name + "-checkpoints")
    return args


class Run:
    """One stage's loop: step limits, learning rate, bfloat16, checkpoints, log, progress bar."""

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        args: argparse.Namespace,
        *,
        steps: int,
        minutes: float,
        lr: float,
        weight_decay: float,
        averages: dict[str, EMAModel] | None = None,
    ) -> None:
        self.name, self.args, self.steps, self.minutes = name, args, steps, minutes
        self.modules, self.averages, self.lr = modules, averages or {}, lr
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.step, self.elapsed = 0, 0.0
        self.extra: dict[str, float] = {}
        self.path = args.checkpoints / f"{name}.pt"
        if args.resume and self.path.exists():
            self._load()

    def progress(self) -> float:
        """Share of the stage that is done, by steps or by clock, whichever is further."""
        return max(self.step / max(self.steps, 1), self.elapsed / (60 * self.minutes))

    def train(
        self,
        loss_function: Callable[[int], tuple[Tensor, dict[str, float]]],
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Minimise `loss_function(step) -> (loss, numbers to log)` until the stage's limit."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5)
        while self.step < self.steps and self.elapsed < 60 * self.minutes:
            start = time.monotonic()
            self._set_learning_rate()
            with torch.autocast("cpu", torch.bfloat16):  # 1.5 times as fast where AMX is
                loss, numbers = loss_function(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            if not torch.isfinite(norm):
                raise RuntimeError(f"{self.name}: gradient is {norm} at step {self.step}")
            self.optimizer.step()
            for key, average in self.averages.items():
                average.step(self.modules[key].parameters())
            self.step += 1
            self.elapsed += time.monotonic() - start
            self._log(loss=loss.item(), **numbers)
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
            if self.step % self.args.save_every == 0:
                self.save()
            after_step()
        bar.close()
        self.save()

    def save(self) -> None:
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "extra": self.extra,
            "optimizer": self.optimizer.state_dict(),
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "averages": {k: a.state_dict() for k, a in self.averages.items()},
        }
        save_whole(state, self.path)

    def _load(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=False)
        self.step, self.elapsed, self.extra = state["step"], state["elapsed"], state["extra"]
        self.optimizer.load_state_dict(state["optimizer"])
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])

    def _set_learning_rate(self) -> None:
        warmup = min(1.0, (self.step + 1) / 100)
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * warmup * decay

    def _log(self, **numbers: float) -> None:
        line = {"stage": self.name, "step": self.step, "seconds": round(self.elapsed, 2), **numbers}
        with open(self.args.checkpoints / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")


def train_vae(parts: Parts, photos: Photos, args: argparse.Namespace) -> float:
    """Fit the VAE to patches and set its scaling factor so that latents have deviation one.

    Returns:
        Peak signal-to-noise ratio of the reconstruction of fresh crops, in decibels.
    """
    vae = parts.vae
    run = Run(
        "vae",
        {"vae": vae},
        args,
        steps=args.vae_steps,
        minutes=args.vae_minutes,
        lr=args.vae_lr,
        weight_decay=1e-4,
    )

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, _ = photos.batch(args.vae_batch, (args.seed, VAE_STAGE, step))
        latent = vae.encode(pixels).latent_dist
        decoded = vae.decode(latent.sample(generator_for(args, VAE_STAGE, step))).sample.float()
        difference = decoded - pixels
        # Pixel error alone is content with blur, so edges count too; no perceptual network is at
        # hand. The square keeps flat colours right while the absolute error looks at medians.
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        divergence = latent.kl().mean() / latent.mean[0].numel()
        total = difference.abs().mean() + difference.square().mean() + edges + 1e-5 * divergence
        return total, {"l1": difference.detach().abs().mean().item(), "kl": divergence.item()}

    run.train(loss)
    if "psnr" not in run.extra:
        vae.eval().requires_grad_(False)
        pixels, _ = photos.batch(32, (args.seed, CHECK_STAGE, 0))
        latents = torch.cat([vae.encode(p).latent_dist.mean for p in pixels.split(8)])
        decoded = torch.cat([vae.decode(z).sample for z in latents.split(8)])
        error = F.mse_loss(decoded.clamp(-1, 1), pixels).item()
        run.extra = {"psnr": 10 * math.log10(4 / error), "scale": 1 / latents.std().item()}
        run.save()
    vae.register_to_config(scaling_factor=run.extra["scale"])
    vae.eval().requires_grad_(False)
    return run.extra["psnr"]


def train_unet(parts: Parts, photos: Photos, psnr: float, args: argparse.Namespace) -> None:
    """Fit UNet and text encoder to predict the noise in latents; export their averages."""
    modules = {"unet": parts.unet, "text_encoder": parts.text_encoder}
    averages = {
        name: EMAModel(m.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        for name, m in modules.items()
    }
    run = Run(
        "unet",
        modules,
        args,
        steps=args.unet_steps,
        minutes=args.unet_minutes,
        lr=args.unet_lr,
        weight_decay=1e-2,
        averages=averages,
    )
    means, deviations, tokens = encode_bank(parts, photos, args)
    signal = compute_snr(parts.scheduler, torch.arange(1000))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = generator_for(args, UNET_STAGE, step)
        chosen = torch.randint(len(means), (args.unet_batch,), generator=generator)
        shape = (args.unet_batch, *means.shape[1:])
        latents = means[chosen] + deviations[chosen] * torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        timesteps = torch.randint(1000, (args.unet_batch,), generator=generator)
        noisy = parts.scheduler.add_noise(latents, noise, timesteps)
        text = parts.text_encoder(tokens[chosen])[0]
        predicted = parts.unet(noisy, timesteps, text).sample.float()
        error = (predicted - noise).square().mean(dim=(1, 2, 3))
        weight = signal[timesteps].clamp(max=SNR_GAMMA) / signal[timesteps]
        return (weight * error).mean(), {"mse": error.detach().mean().item()}

    def export_averages() -> None:
        for name, module in modules.items():
            averages[name].store(module.parameters())
            averages[name].copy_to(module.parameters())
        export(parts, args.out, model_card(parts, args.checkpoints / "log.jsonl", psnr, args))
        for name, module in modules.items():
            averages[name].restore(module.parameters())

    def export_now_and_then() -> None:
        if args.export_every and run.step % args.export_every == 0:
            export_averages()

    run.train(loss, export_now_and_then)
    export_averages()


@torch.no_grad()
def encode_bank(
    parts: Parts, photos: Photos, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode `args.bank` crops once: the frozen encoder would else cost a fifth of each step.

    The bank is kept beside the checkpoints, for a resumed run to start at once.

    Returns:
        Scaled latent means and deviations [bank, 4, h, w] and caption tokens [bank, 77].
    """
    path = args.checkpoints / "bank.pt"
    if args.resume and path.exists():
        bank = torch.load(path)
        if len(bank[0]) == args.bank:
            return bank
    scale = parts.vae.config.scaling_factor
    means, deviations, captions = [], [], []
    for index in tqdm(range(0, args.bank, 32), desc="latents", mininterval=5):
        pixels, texts = photos.batch(min(32, args.bank - index), (args.seed, BANK_STAGE, index))
        with torch.autocast("cpu", torch.bfloat16):
            latent = parts.vae.encode(pixels).latent_dist
        means.append(latent.mean.float() * scale)
        deviations.append(latent.std.float() * scale)
        captions += texts
    tokens = parts.tokenizer(
        captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    bank = torch.cat(means), torch.cat(deviations), tokens
    save_whole(bank, path)
    return bank


def save_whole(state: object, path: Path) -> None:
    """Write under another name, then rename: a run killed meanwhile leaves the old file."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def generator_for(args: argparse.Namespace, stage: int, step: int) -> torch.Generator:
    """The noise source of one step, the same whether the run was interrupted or not."""
    return torch.Generator().manual_seed((args.seed * 4 + stage) * 10_000_000 + step)


if __name__ == "__main__":
    main()
