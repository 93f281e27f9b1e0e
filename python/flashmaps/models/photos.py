"""Training pictures: random crops of the photos inside scikit-image and scikit-learn.

All are read from the installed packages without a network. `stereo_motorcycle` is what matching is
demonstrated on, so it must never be listed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image, ImageEnhance

# file: (caption, how often it is drawn). Colour photos of things come more often than textures.
SKIMAGE_PHOTOS = {
    "astronaut.png": ("a woman astronaut", 3),
    "chelsea.png": ("a cat", 3),
    "coffee.png": ("a cup of coffee", 3),
    "rocket.jpg": ("a rocket on a launch pad", 3),
    "retina.jpg": ("a retina", 1),
    "coins.png": ("old coins", 2),
    "camera.png": ("a man with a camera", 2),
    "clock_motion.png": ("a clock", 1),
    "moon.png": ("the moon", 1),
    "hubble_deep_field.jpg": ("galaxies and stars", 1),
    "ihc.png": ("tissue", 1),
    "cell.png": ("cells", 0.5),
    "page.png": ("a page of text", 0.5),
    "brick.png": ("a brick wall", 1),
    "grass.png": ("grass", 1),
    "gravel.png": ("gravel", 1),
}
SKLEARN_PHOTOS = {"china.jpg": ("a temple in china", 3), "flower.jpg": ("a flower", 3)}
TEMPLATES = ("a photo of {}", "a picture of {}", "{}", "a close up of {}")
SMALLEST_CROP = 72  # pixels of the photo: smaller crops show blur and no object


class Photos:
    """Random patches of the photos, with captions.

    Args:
        size: side of a patch in pixels.
    """

    def __init__(self, size: int = 128):
        self.size = size
        entries = [
            *_read("skimage.data", SKIMAGE_PHOTOS),
            *_read("sklearn.datasets.images", SKLEARN_PHOTOS),
        ]
        self.names, self.images, self.subjects, weights = zip(*entries, strict=True)
        self.weights = np.array(weights) / sum(weights)

    def patch(self, rng: np.random.Generator) -> tuple[np.ndarray, tuple[str, ...]]:
        """A crop, uint8 [size, size, 3], and three captions; all chance is ``rng``'s."""
        chosen = rng.choice(len(self.images), p=self.weights)
        pixels = self._patch(self.images[chosen], rng)
        templates = rng.permutation(len(TEMPLATES))[:3]
        return pixels, tuple(TEMPLATES[i].format(self.subjects[chosen]) for i in templates)

    def _patch(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        largest = min(image.size) / 1.1  # leaves room for the aspect jitter
        side = math.exp(rng.uniform(math.log(min(SMALLEST_CROP, largest)), math.log(largest)))
        aspect = rng.uniform(0.95, 1.05)
        width, height = side * aspect, side / aspect
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        patch = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            patch = enhance(patch).enhance(rng.uniform(0.8, 1.2))
        return np.asarray(patch)


def _read(
    package: str, photos: Mapping[str, tuple[str, float]]
) -> Iterator[tuple[str, Image.Image, str, float]]:
    from importlib import resources

    for name, (subject, weight) in photos.items():
        with (resources.files(package) / name).open("rb") as stream:
            yield name, Image.open(stream).convert("RGB"), subject, weight
