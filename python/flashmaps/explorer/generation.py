"""Pictures that the model makes: entropy of every layer at every step; words of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.features import features
from flashmaps.diffusion.words import WordMaps, word_maps
from flashmaps.explorer.pictures import Picture
from flashmaps.explorer.view import Model, View


@dataclass(frozen=True, eq=False)
class Generation:
    """A picture and what the self-attention of each layer was like while it was made.

    Attributes:
        image: PIL image.
        layers: names, in the order in which they ran; grids: (height, width) of each.
        entropy: for each layer, for each step, [N] nats, of the half that saw the prompt.
        means: of these; bounds: log N of each layer, the largest entropy there can be.
        timesteps: what the model was told at each step.
        prompt, seed: what it was made from.
    """

    image: Any
    layers: tuple[str, ...]
    grids: tuple[tuple[int, int], ...]
    entropy: list[list[Tensor]]
    timesteps: list[float]
    prompt: str
    seed: int

    @property
    def steps(self) -> int:
        """How many."""
        return len(self.timesteps)

    @property
    def means(self) -> list[list[float]]:
        return [[float(each.mean()) for each in steps] for steps in self.entropy]

    @property
    def bounds(self) -> list[float]:
        return [float(torch.tensor(h * w).log()) for h, w in self.grids]


def generate(pipe: Any, prompt: str, steps: int, seed: int) -> Generation:
    """Make a picture and keep the entropies of its self-attention."""
    with (
        torch.no_grad(),
        capture(pipe, kind="self", reduce="entropy", keep="statistics") as record,
    ):
        made = pipe(
            prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)
        )
    found: dict[str, list[Any]] = {}
    for entry in record:
        found.setdefault(entry.layer, []).append(entry.conditional)
    # A layer whose tokens have no known grid cannot be laid over the picture.
    found = {name: each for name, each in found.items() if each[0].grid is not None}
    if not found:
        raise ValueError("the layers of this model have no known grid; nothing can be shown")
    first = next(iter(found.values()))
    return Generation(
        image=made.images[0],
        layers=tuple(found),
        grids=tuple(each[0].grid for each in found.values()),
        entropy=[[entry.entropy[0].float().cpu() for entry in each] for each in found.values()],
        timesteps=[float(entry.timestep or 0) for entry in first],
        prompt=prompt,
        seed=seed,
    )


def words_of_picture(model: Model, picture: Picture, prompt: str, view: View) -> WordMaps:
    """Where in a picture the words of a prompt are attended to, at the view's timesteps."""
    settings = model.settings(view).for_features
    with capture(
        model.pipe.unet, kind="cross", reduce="image_to_text", guidance="conditional"
    ) as record:
        features(model.pipe, [picture.image], **settings, prompt=prompt)
    return word_maps(record, prompt, model.pipe)
