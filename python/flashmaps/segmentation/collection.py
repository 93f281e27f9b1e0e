"""What co-segmenting a collection gives: labels that mean the same everywhere, and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashmaps.diffusion.features import Features
from flashmaps.diffusion.images import Image
from flashmaps.files import whole_folder, write_json
from flashmaps.maps.grids import centres
from flashmaps.matching.match import match_features
from flashmaps.matching.options import MatchOptions
from flashmaps.segmentation import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COMMON = 0.5  # of the images; a part that fewer show is none of what they have in common


@dataclass(frozen=True, eq=False)
class Part:
    """One label of a collection.

    Attributes:
        id: the label.
        shares: [n], of each image's tokens, how many it has.
        absent: images that do not show it.
        prototype: [c] float32, the mean of its tokens' vectors, of length 1.
        border: share of the tokens at the frame of all images that have this label.
    """

    id: int
    shares: np.ndarray
    absent: tuple[int, ...]
    prototype: np.ndarray
    border: float

    @property
    def common(self) -> bool:
        """Whether half of the images show it, at least."""
        return len(self.absent) <= _COMMON * len(self.shares)

    @property
    def background(self) -> bool:
        """Whether it lies around things rather than being one: it holds more of the frame than of
        the pictures."""
        return self.border > float(self.shares.mean())


@dataclass(frozen=True, eq=False)
class CoSegments:
    """Segments of n images; the same label in two images is the same part.

    Attributes:
        images: as given.
        labels: for each image [h, w] int64, of pixels; tokens: [N] int64, of tokens.
        parts: one for each label, in their order.
        confidence: for each image [N] float32, the share of each token's flow, to all images and
            from them, that stays with its label.
        sets: features of each image.
    """

    images: tuple[Image, ...]
    sets: tuple[Features, ...]
    labels: tuple[np.ndarray, ...]
    tokens: tuple[np.ndarray, ...]
    parts: tuple[Part, ...]
    confidence: tuple[np.ndarray, ...]

    @property
    def count(self) -> int:
        """How many labels."""
        return len(self.parts)

    @cached_property
    def foreground(self) -> list[np.ndarray]:
        """For each image [h, w] bool: what the images have in common and is not around things."""
        chosen = np.array([part.common and not part.background for part in self.parts])
        return [chosen[each] for each in self.labels]

    def match(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Points of image i, and where they lie in image j: both [n, 2], (x, y) in pixels.

        Every token of i whose part j shows goes to the token of that part which it is most alike;
        tokens whose part is absent there go nowhere.
        """
        for index in (i, j):
            if not 0 <= index < len(self.images):
                raise IndexError(f"there is no image {index}: the collection has 0 to "
                                 f"{len(self.images) - 1}")  # fmt: skip
        of, to = self.sets[i], self.sets[j]
        compare = "kk" if of.output is None or to.output is None else "features"
        found = match_features(of, to, MatchOptions(compare))
        rows = np.flatnonzero(np.isin(self.tokens[i], self.tokens[j]))
        there = np.empty((len(rows), 2))
        middle = centres(to.grid).numpy()
        for part in np.unique(self.tokens[i][rows]):
            mine = self.tokens[i][rows] == part
            theirs = np.flatnonzero(self.tokens[j] == part)
            # A few rows of the map at a time, those of one part.
            block = found.forward_map.rows(torch.from_numpy(rows[mine]))[0].float().cpu().numpy()
            there[mine] = middle[theirs[block[:, theirs].argmax(1)]]
        here = centres(of.grid).numpy()[rows]
        return _pixels(here, of.image), _pixels(there, to.image)

    def plot(self) -> Figure:
        """The images above, their labels below; one colour is one part everywhere."""
        title = f"{self.count} labels in {len(self.images)} images; one colour is one part"
        return pictures.collection(self.images, self.labels, title)

    def summary(self) -> dict[str, Any]:
        """The numbers on one page, with plain Python values."""
        return {
            "images": len(self.images),
            "count": self.count,
            "parts": [
                {
                    "id": part.id,
                    "shares": part.shares.tolist(),
                    "absent": list(part.absent),
                    "common": part.common,
                    "background": part.background,
                }
                for part in self.parts
            ],
            "mean_confidence": [float(each.mean()) for each in self.confidence],
        }

    def write(self, folder: Path) -> None:
        """Write the files of :meth:`save` to a folder that is there."""
        write_json(folder / "cosegments.json", self.summary())
        for number, (labels, front) in enumerate(zip(self.labels, self.foreground, strict=True)):
            pictures.write_labels(folder / f"labels-{number:04d}.png", labels)
            pictures.write_labels(folder / f"foreground-{number:04d}.png", front.astype(np.int64))
        self.plot().savefig(folder / "cosegments.png", dpi=120)
        pictures.write_page(
            folder / "index.html", "Co-segments", ["cosegments.png"], self.summary()
        )

    def save(self, folder: str | Path) -> Path:
        """Write cosegments.json, an indexed PNG for each image, a picture and a page, or nothing.

        An earlier collection in ``folder`` is replaced; one with anything else in it is refused.
        """
        with whole_folder(folder, "cosegments") as new:
            self.write(new)
        return Path(folder)

    def __repr__(self) -> str:
        return f"CoSegments({len(self.images)} images, {self.count} labels)"


def _pixels(unit: np.ndarray, image: Image) -> np.ndarray:
    return unit * (image.shape[1], image.shape[0]) - 0.5
