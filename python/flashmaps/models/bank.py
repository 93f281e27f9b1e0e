"""Pictures drawn once and kept on disk, and their latents: drawing costs more than a GPU's step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPTokenizer

from flashmaps.files import whole_folder

from .alignment import SQUARES
from .pictures import REDUCTION, Pictures

_RECIPE = "bank.json"
_CHUNK = 64
VIEWS = 5  # goes up when views of the same number change


class Bank:
    """A folder of examples: pictures and their captions.

    ``images.npy``: uint8 [n, 3, size, size, 3], see
    :class:`flashmaps.models.pictures.Example`. ``labels`` is None unless the bank was drawn with
    labels: then int16 [n, side, side, 2].
    """

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="c")
        named = folder / "labels.npy"
        self.labels = np.load(named, mmap_mode="c") if named.is_file() else None
        self.captions: list[list[list[str]]] = json.loads((folder / "captions.json").read_text())

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, device: torch.device) -> Tensor:
        """All images, uint8 [3 n, size, size, 3]: on a GPU in its memory, else read as needed."""
        images = torch.from_numpy(self.images).flatten(0, 1)
        return images if device.type == "cpu" else images.to(device)

    def tokens(self, tokenizer: CLIPTokenizer) -> Tensor:
        """Three captions of an example's first two pictures, int64 [n, 2, 3, 77]."""
        texts = [text for both in self.captions for three in both for text in three]
        return tokenize(tokenizer, texts).view(len(self), 2, 3, -1)


def open_bank(folder: Path, pictures: Pictures, workers: int) -> Bank:
    """The bank of ``pictures`` in ``folder``, drawn by ``workers`` processes unless it is there."""
    recipe = {
        name: value
        for name, value in vars(pictures).items()
        if name in ("size", "count", "seed", "photo_share", "alone_share", "kin_share")
    }
    recipe["labels"] = SQUARES if pictures.labelled else 0
    recipe["views"] = VIEWS
    known = folder / _RECIPE
    if not (known.is_file() and json.loads(known.read_text()) == recipe):
        _draw(folder, pictures, recipe, workers)
    return Bank(folder)


def _draw(folder: Path, pictures: Pictures, recipe: dict[str, Any], workers: int) -> None:
    loader: Any = DataLoader(pictures, _CHUNK, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
    count, side = len(pictures), pictures.size // REDUCTION
    cells = (count, side, side, 2)
    captions: list[tuple[tuple[str, ...], ...]] = []
    with whole_folder(folder, "pictures") as new:

        def array(name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
            return np.lib.format.open_memmap(new / f"{name}.npy", "w+", dtype, shape)

        images = array("images", np.uint8, (count, 3, pictures.size, pictures.size, 3))
        labels = array("labels", np.int16, cells) if pictures.labelled else None
        for chunk in tqdm(loader, desc=folder.name, mininterval=5):
            for example in chunk:
                place = len(captions)
                images[place] = example.images
                if labels is not None:
                    labels[place] = example.labels
                captions.append(example.captions)
        del images, labels  # writes what is not on disk yet
        (new / "captions.json").write_text(json.dumps(captions))
        (new / _RECIPE).write_text(json.dumps(recipe))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers as the pipeline makes them, int64 [n, 77]."""
    unique = sorted(set(captions))  # most captions come up often
    place = {caption: index for index, caption in enumerate(unique)}
    ids = tokenizer(
        unique, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    return ids[[place[caption] for caption in captions]]


def as_input(images: Tensor) -> Tensor:
    """uint8 [b, h, w, 3] to float32 [b, 3, h, w] in [-1, 1]."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, chunk: int, name: str | None = None) -> Tensor:
    """Scaled means and deviations of the posterior, float16 [n, 2, 4, h, w] on the VAE's device.

    With a name there is a progress bar.
    """
    found = []
    device = vae.device
    for part in tqdm(images.split(chunk), desc=name, mininterval=5, disable=name is None):
        with torch.autocast(device.type, torch.bfloat16):
            latent = vae.encode(as_input(part.to(device))).latent_dist
        pair = torch.stack([latent.mean, latent.std], dim=1).float() * vae.config.scaling_factor
        found.append(pair.half())
    with torch.autocast(device.type, enabled=False):  # a step's own may be on, and is for no half
        return torch.cat(found)
