"""The images of a batch: where they come from, their names, and whether they are the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmaps.diffusion.images import Image, load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")


@dataclass(frozen=True)
class Collection:
    """Images in a fixed order; read when they are asked for.

    Attributes:
        items: what :func:`flashmaps.diffusion.images.load_image` takes, one each.
        names: of the images, each once.
    """

    items: tuple[Any, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, images: Any) -> Collection:
        """A folder (its images, by name, folders inside too), or several of anything.

        Raises ValueError for none, or for two of one name.
        """
        if isinstance(images, (str, Path)):
            folder = Path(images)
            if not folder.is_dir():
                raise ValueError(f"{str(images)!r} is no folder of images; or give several images")
            paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not paths:
                raise ValueError(f"{str(images)!r} holds no images ({', '.join(SUFFIXES)})")
            return cls(tuple(paths), tuple(p.relative_to(folder).as_posix() for p in paths))
        if not isinstance(images, Sequence) or not len(images):
            raise ValueError("images is empty: give a folder, or at least one image")
        names = tuple(
            str(each) if isinstance(each, (str, Path)) else f"image {number}"
            for number, each in enumerate(images)
        )
        if len(set(names)) < len(names):
            twice = next(name for number, name in enumerate(names) if name in names[:number])
            raise ValueError(f"image {twice!r} is given twice")
        return cls(tuple(images), names)

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> Image:
        """Image ``index``, decoded now."""
        return load_image(self.items[index], f"image {self.names[index]!r}")

    def digest(self) -> str:
        """Of all names and of every image's bytes: other images are another run."""
        digest = hashlib.sha256()
        for index, (item, name) in enumerate(zip(self.items, self.names, strict=True)):
            digest.update(name.encode() + b"\0")
            if isinstance(item, (str, Path)):
                if not Path(item).is_file():
                    raise FileNotFoundError(f"there is no image file {str(item)!r}")
                with open(item, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                pixels = np.ascontiguousarray(self.load(index))
                digest.update(
                    repr(pixels.shape).encode() + hashlib.sha256(pixels.tobytes()).digest()
                )
        return digest.hexdigest()[:32]

    def index(self) -> dict[str, int]:
        """Numbers by name, and by the last part of a path where that is one image's alone."""
        found = {name: number for number, name in enumerate(self.names)}
        last = [Path(name).name for name in self.names]
        often = Counter(last)
        for number, name in enumerate(last):
            if often[name] == 1:
                found.setdefault(name, number)
        return found
