"""Pictures of segments, labels as indexed PNG, and the page that shows them."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmaps.diffusion.images import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flashmaps.segmentation.result import Segments

_MOST = 256  # colours of an indexed PNG


def palette(count: int) -> np.ndarray:
    """[count, 3] uint8, neighbours far apart in hue; the same number always has the same colour."""
    from matplotlib.colors import hsv_to_rgb

    index = np.arange(count)
    hue = index * 0.618034 % 1
    strength = np.where(index // 8 % 2 == 0, 0.75, 0.5)
    light = np.where(index // 4 % 2 == 0, 0.95, 0.75)
    return np.rint(hsv_to_rgb(np.stack((hue, strength, light), -1)) * 255).astype(np.uint8)


def painted(image: Image, labels: np.ndarray, *, share: float = 0.55) -> Image:
    """The image in grey under the colours of its labels; -1 stays grey. [h, w, 3] float32."""
    grey = np.repeat(image.mean(2, keepdims=True), 3, 2)
    colours = palette(int(labels.max()) + 1 if labels.max() >= 0 else 1) / 255.0
    over = colours[labels.clip(0)] * share + grey * (1 - share)
    return np.where(labels[..., None] >= 0, over, grey).astype(np.float32)


def segments(found: Segments) -> Figure:
    """The image, and each level painted over it with its borders drawn."""
    from matplotlib.figure import Figure

    if found.image is None:
        raise ValueError("these segments are of a map alone: there is no image to draw them on")
    height, width = found.image.shape[:2]
    columns = 1 + len(found.tree)
    figure = Figure(figsize=(4 * columns, 4 * height / width + 0.5), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    axes[0].imshow(found.image)
    axes[0].set_title("image", fontsize=10, loc="left")
    for ax, level in zip(axes[1:], found.tree, strict=True):
        shown = painted(found.image, level.labels)
        shown[level.boundary] = 1.0
        ax.imshow(shown)
        ax.set_title(f"{level.count} {level.name}", fontsize=10, loc="left")
    for ax in axes:
        ax.set_axis_off()
    return figure


def collection(images: Sequence[Image], labels: Sequence[np.ndarray], title: str) -> Figure:
    """Images above, the same with their labels below: one colour means one part everywhere."""
    from matplotlib.figure import Figure

    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2 * columns, 4 * rows + 0.5), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for ax in axes.ravel():
        ax.set_axis_off()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = 2 * (number // columns), number % columns
        axes[row, column].imshow(image)
        axes[row + 1, column].imshow(painted(image, label))
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Labels as a PNG whose pixel values are them: indexed colours, or 16 bits above 256.

    -1 is written as the last value, 255 or 65535.
    """
    from PIL import Image as Pil

    last = _MOST - 1 if labels.max() < _MOST - 1 else 2**16 - 1
    values = np.where(labels < 0, last, labels)
    if last == _MOST - 1:
        picture = Pil.fromarray(values.astype(np.uint8), mode="P")
        colours = palette(_MOST)
        colours[-1] = 0
        picture.putpalette(colours.ravel().tolist())
    else:
        picture = Pil.fromarray(values.astype(np.uint16))
    picture.save(path, format="PNG")


def write_page(path: Path, title: str, images: Sequence[str], summary: dict[str, Any]) -> None:
    """A page that shows pictures beside it, and the numbers."""
    shown = "\n".join(
        f'<p><img src="{html.escape(name)}" alt="{html.escape(title)}"></p>' for name in images
    )
    numbers = html.escape(json.dumps(summary, indent=2))
    path.write_text(
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>\n"
        "<style>body{font-family:sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%}pre{overflow:auto}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n{shown}\n<details><summary>Numbers</summary>"
        f"<pre>{numbers}</pre></details>\n</html>\n",
        encoding="utf-8",
    )
