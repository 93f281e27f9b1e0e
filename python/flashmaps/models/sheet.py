"""A sheet of generated pictures under their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashmaps.world import CATEGORIES

_COLOURS = "red blue yellow green orange purple white pink black brown grey".split()
_PLACES = ("on grass", "on sand", "on snow", "on water", "on a road", "on a white background")
CAPTIONS = (
    *(
        f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {name} {_PLACES[i % len(_PLACES)]}"
        for i, (name, colour) in enumerate(zip(CATEGORIES, 2 * _COLOURS, strict=False))
    ),
    *(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CATEGORIES),
    "a striped red bird beside a blue car on sand",
    "a spotted orange cat left of a green truck on grass",
    "a white boat behind a black horse on snow",
    "a purple turtle above a yellow crab on a blue background",
    "a photo of a cat",
    "a photo of a flower",
)


def generate(
    pipe: Any, captions: Sequence[str], *, seed: int = 0, steps: int = 30, guidance: float = 3.0
) -> list[Any]:
    """One picture for each caption, PIL; picture i has noise (seed, i), whatever the others are."""
    generators = [
        torch.Generator("cpu").manual_seed(seed * 100_003 + i) for i in range(len(captions))
    ]
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Any] = []
    for start in range(0, len(captions), 32):
        chunk = slice(start, start + 32)
        pictures += pipe(
            list(captions[chunk]),
            generator=generators[chunk],
            num_inference_steps=steps,
            guidance_scale=guidance,
        ).images
    return pictures


def write_sheet(
    pipe: Any, path: Path, *, captions: Sequence[str] = CAPTIONS, columns: int = 6, **options: Any
) -> None:
    """Draw ``captions`` and save them as one picture, in the format that ``path`` ends in."""
    from PIL import Image, ImageDraw

    pictures = generate(pipe, captions, **options)
    width, height = pictures[0].size
    text = 26
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + text + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = i % columns * (width + 4) + 2, i // columns * (height + text + 4) + 2
        draw.multiline_text(
            (left, top), _wrapped(caption, width // 6), fill="black", font_size=10, spacing=1
        )
        sheet.paste(picture, (left, top + text))
    sheet.save(path, quality=88)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, max(8, width))[:2])
