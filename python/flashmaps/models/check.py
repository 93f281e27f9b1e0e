"""Ask a classifier what the miniature has drawn.

    python -m flashmaps.models.check --model DIR --work DIR

A small convolutional network learns categories and colours from scenes of the world's training
split with one object each; then it names what the model draws from captions such as "a red cat on
grass". How often it is right about scenes of the validation split, and about those after the VAE,
says how far its word can be trusted. The counts go to check.json in --work, and from there to the
model card.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from flashmaps.files import write_json
from flashmaps.world import CATEGORIES, COLOURS, Split

from .bank import as_input
from .pictures import ALONE
from .sheet import generate

NAMES = tuple(CATEGORIES)
COLOUR_NAMES = tuple(COLOURS)
KINDS = ("category", "colour")  # the columns of what is asked and what is found
_GROUNDS = ("grass", "sand", "snow", "water")


class Classifier(nn.Module):
    """Four convolutions, each halving the picture, and a mean over what is left of it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        self.layers = nn.Sequential(
            *itertools.chain.from_iterable(
                (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
                for a, b in itertools.pairwise(widths)
            ),
            nn.Conv2d(widths[-1], widths[-1], 3, padding=1),
            nn.ReLU(),
        )
        self.last = nn.ModuleList(nn.Linear(widths[-1], len(x)) for x in (NAMES, COLOUR_NAMES))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[b, 3, h, w] in [-1, 1] to scores of categories and of colours, [b, names] each."""
        seen = self.layers(pixels).mean(dim=(2, 3))
        return [last(seen) for last in self.last]


def scenes(split: str, count: int, size: int, seed: int, workers: int) -> tuple[Tensor, Tensor]:
    """Scenes with one object: uint8 [n, size, size, 3], numbers of category and colour [n, 2]."""
    source = Split(split, size=size, count=count, seed=seed, options=ALONE)
    loader: Any = DataLoader(source, 64, num_workers=workers, collate_fn=_images_and_labels)  # type: ignore[arg-type]
    found = list(tqdm(loader, desc=f"{split} scenes", mininterval=5))
    images, labels = zip(*found, strict=True)
    return torch.cat(images), torch.cat(labels)


def _images_and_labels(chunk: Sequence[Any]) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.stack([scene.image for scene in chunk]))
    things = [scene.instances[0] for scene in chunk]
    return images, torch.tensor(
        [[NAMES.index(thing.category), COLOUR_NAMES.index(thing.colour)] for thing in things]
    )


def fit(
    images: Tensor, labels: Tensor, *, epochs: int, seed: int, device: torch.device, batch: int = 64
) -> Classifier:
    """A classifier of ``images``, trained with blur and noise so that it looks at shapes."""
    torch.manual_seed(seed)
    model = Classifier().to(device).train()
    steps = -(-len(images) // batch) * epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(epochs), desc="classifier"):
        for chosen in torch.randperm(len(images)).split(batch):
            pixels = _worn(as_input(images[chosen].to(device)))
            wanted = labels[chosen].to(device).unbind(1)
            both = zip(model(pixels), wanted, strict=True)
            loss = torch.stack([F.cross_entropy(found, asked) for found, asked in both]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _worn(pixels: Tensor) -> Tensor:
    """Every other picture as blurred as a VAE leaves it, with a little noise in all of them."""
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    chosen = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    return torch.where(chosen, blurred, pixels) + 0.05 * torch.randn_like(pixels)


@torch.no_grad()
def named(model: Classifier, pixels: Tensor, batch: int = 64) -> Tensor:
    """The category's and the colour's number, [n, 2] from float32 [n, 3, h, w] in [-1, 1]."""
    device = next(model.parameters()).device
    return torch.cat(
        [
            torch.stack([scores.argmax(1) for scores in model(part.to(device))], 1).cpu()
            for part in pixels.split(batch)
        ]
    )


@torch.no_grad()
def through_vae(vae: AutoencoderKL, pixels: Tensor, batch: int = 16) -> Tensor:
    """Pictures [n, 3, h, w] as the VAE gives them back."""
    parts = (
        vae.decode(vae.encode(part.to(vae.device)).latent_dist.mean).sample.clamp(-1, 1).cpu()
        for part in pixels.split(batch)
    )
    return torch.cat(list(parts))


def captions(count: int, seed: int) -> tuple[list[str], Tensor]:
    """``count`` captions: categories in turn, colours and grounds by chance; numbers [n, 2]."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for index in range(count):
        label, number = index % len(NAMES), int(rng.integers(len(COLOUR_NAMES)))
        colour = COLOUR_NAMES[number]
        labels.append([label, number])
        ground = _GROUNDS[rng.integers(len(_GROUNDS))]
        texts.append(f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {NAMES[label]} on {ground}")
    return texts, torch.tensor(labels)


def check(
    pipe: Any,
    *,
    count: int = 240,
    training: int = 12_000,
    held_out: int = 600,
    epochs: int = 8,
    size: int = 64,
    steps: int = 30,
    guidance: float = 3.0,
    seed: int = 0,
    workers: int = 2,
) -> dict[str, Any]:
    """Shares of right names: of held-out scenes, of those after the VAE, of generated pictures.

    Pictures are looked at with ``size`` pixels a side. Categories come first; ``colours`` has the
    same for the objects' colours. ``by_category`` has, for each asked for, the share that was drawn
    right.
    """
    device = pipe.device
    model = fit(
        *scenes("train", training, size, seed + 1, workers), epochs=epochs, seed=seed, device=device
    )
    whole = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images, labels = scenes("validation", held_out, whole, seed, workers)
    pixels = as_input(images)

    def right(pixels: Tensor, labels: Tensor) -> Tensor:
        smaller = F.interpolate(pixels, size=(size, size), mode="area")
        return (named(model, smaller) == labels).float()

    texts, wanted = captions(count, seed)
    drawn = generate(pipe, texts, seed=seed, steps=steps, guidance=guidance)
    generated = right(as_input(torch.from_numpy(np.stack([np.asarray(x) for x in drawn]))), wanted)
    shares = {
        "scenes": right(pixels, labels),
        "reconstructions": right(through_vae(pipe.vae, pixels), labels),
        "generated": generated,
    }
    category, colour = range(len(KINDS))
    asked = wanted[:, category]
    return {
        **{name: share[:, category].mean().item() for name, share in shares.items()},
        "colours": {name: share[:, colour].mean().item() for name, share in shares.items()},
        "by_category": {
            name: generated[asked == label, category].mean().item()
            for label, name in enumerate(NAMES)
            if (asked == label).any()
        },
        "count": count,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
    }


def main(argv: list[str] | None = None) -> None:
    """Check a pipeline folder; `argv` as on the command line."""
    from diffusers import StableDiffusionPipeline

    from flashmaps.models import builtin_folder

    parser = argparse.ArgumentParser(
        prog="python -m flashmaps.models.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="builtin", help="'builtin' or a pipeline folder")
    add("--work", type=Path, default=Path(), help="folder for check.json")
    add("--count", type=int, default=240, help="pictures to generate")
    add("--training", type=int, default=12_000, help="scenes for the classifier")
    add("--epochs", type=int, default=8)
    add("--steps", type=int, default=30, help="of the sampler")
    add("--guidance", type=float, default=3.0)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2)
    options = vars(parser.parse_args(argv))
    work = options.pop("work")
    model = options.pop("model")
    pipe = StableDiffusionPipeline.from_pretrained(
        builtin_folder() if model == "builtin" else model, local_files_only=True
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    found = check(pipe, **options)
    write_json(work / "check.json", found)
    print(f"scenes {found['scenes']:.3f}  after the VAE {found['reconstructions']:.3f}")
    print(f"generated {found['generated']:.3f}  {found['by_category']}")
    print(f"colours {found['colours']}")


if __name__ == "__main__":
    main()
