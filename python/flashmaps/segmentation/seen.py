"""What segments read of an image: one layer tells parts apart, another objects.

The layer that a model matches by tells every place from every other: by its attention a thing falls
into many pieces. What the encoder's first self-attention goes to is the rest of the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashmaps.diffusion.capture import find_layers
from flashmaps.diffusion.features import Features, features, vae_factor

# Chosen on 24 scenes of the validation split of the drawn world, with the built-in model: averaged
# with up_blocks.2.attentions.1 it finds no better objects, and more of them.
OBJECT_LAYERS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@dataclass(frozen=True)
class Seen:
    """Two views of one image, of the same tokens.

    Attributes:
        likeness: what tokens look like: segments of likeness, parts and links are found by it.
        attention: the queries and keys that the walk of objects goes by; the same features where
            there are no others.
    """

    likeness: Features
    attention: Features


def as_seen(found: Features | Seen) -> Seen:
    """Features alone are read for both."""
    return found if isinstance(found, Seen) else Seen(found, found)


def with_object_layers(pipe: Any, sets: Sequence[Features]) -> list[Seen]:
    """Features of a model's own layers, and those of :data:`OBJECT_LAYERS` beside them.

    The image is shown to the model once more, at the same size, timesteps, seeds and prompt: twice
    the model's time, and the queries and keys of one more layer in memory. A model without such a
    layer (SDXL), or whose layer has another grid than the features (SD1 and SD2, which match at
    half its resolution), is not shown the image again: the features that are there are read for
    both.
    """
    made = []
    for found in sets:
        other = found
        if _fits(pipe, found):
            (other,) = features(
                pipe, [found.image], layers=OBJECT_LAYERS, timestep=found.timestep,
                seeds=found.seeds or (0,), prompt=found.prompt, size=found.input_size,
                inversion_steps=found.inversion_steps,
            )  # fmt: skip
        made.append(Seen(found, other))
    return made


def _fits(pipe: Any, found: Features) -> bool:
    """Whether the model has that layer, with these tokens: the encoder's first are the cells."""
    try:
        find_layers(pipe.unet, OBJECT_LAYERS)
    except ValueError:
        return False
    cells = tuple(side // vae_factor(pipe) for side in found.input_size)
    return found.grid == cells and found.layers != (OBJECT_LAYERS,)
