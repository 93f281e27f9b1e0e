"""What segmenting an image gives: levels of segments from coarse to fine, pictures and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmaps.diffusion.images import Image
from flashmaps.files import whole_folder, write_json
from flashmaps.maps.grids import Grid
from flashmaps.segmentation import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Level:
    """Segments at one fineness.

    Attributes:
        name: "objects", "parts", or what they were found by.
        tokens: [N] int64, the segment of each token, 0 to count - 1.
        labels: [h, w] int64, of each pixel. A segment smaller than a patch of the image's may have
            no pixel.
        parents: [count], the segment of the level above that holds most tokens of each; None on
            the first.
        codelength: bits a step of the walk when it is told by these segments; ``alone``: when it is
            told by none.
        confidence: [N] float32, the share of a token's flow that stays in its segment.
        boundary: [h, w] bool, pixels with another segment beside, above or below them.
    """

    name: str
    tokens: np.ndarray
    labels: np.ndarray
    parents: np.ndarray | None
    codelength: float
    alone: float
    confidence: np.ndarray
    boundary: np.ndarray

    @property
    def count(self) -> int:
        """How many segments."""
        return int(self.tokens.max()) + 1


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of one image; its own attributes are those of the first, coarsest level.

    Attributes:
        image: [h, w, 3] as given; None where a map alone was segmented.
        grid: (height, width) of the tokens.
        tree: levels from coarse to fine: objects, then parts, whose ``parents`` are objects.
    """

    image: Image | None
    grid: Grid
    tree: tuple[Level, ...]

    def level(self, k: int) -> Level:
        """Level ``k`` of the tree, 0 the coarsest; IndexError where there is none."""
        if not -len(self.tree) <= k < len(self.tree):
            raise IndexError(f"level {k} is not there: the tree has {len(self.tree)}, from 0")
        return self.tree[k]

    @property
    def labels(self) -> np.ndarray:  # [h, w] int64
        return self.tree[0].labels

    @property
    def tokens(self) -> np.ndarray:  # [N] int64
        return self.tree[0].tokens

    @property
    def count(self) -> int:
        return self.tree[0].count

    @property
    def codelength(self) -> float:  # bits a step
        return self.tree[0].codelength

    @property
    def confidence(self) -> np.ndarray:  # [N] float32
        return self.tree[0].confidence

    @property
    def boundary(self) -> np.ndarray:  # [h, w] bool
        return self.tree[0].boundary

    def plot(self) -> Figure:
        """The image, and each level over it."""
        return pictures.segments(self)

    def summary(self) -> dict[str, Any]:
        """The numbers on one page, with plain Python values."""
        return {
            "size": list(self.labels.shape),
            "grid": list(self.grid),
            "levels": [
                {
                    "name": each.name,
                    "count": each.count,
                    "codelength_bits": each.codelength,
                    "codelength_alone_bits": each.alone,
                    "mean_confidence": float(each.confidence.mean()),
                    "share_of_pixels": [
                        float((each.labels == k).mean()) for k in range(each.count)
                    ],
                    "parents": None if each.parents is None else each.parents.tolist(),
                }
                for each in self.tree
            ],
        }

    def write(self, folder: Path) -> None:
        """Write the files of :meth:`save` to a folder that is there."""
        write_json(folder / "segments.json", self.summary())
        for each in self.tree:
            pictures.write_labels(folder / f"{each.name}.png", each.labels)
        if self.image is not None:
            self.plot().savefig(folder / "segments.png", dpi=120)
            pictures.write_page(folder / "index.html", "Segments", ["segments.png"], self.summary())

    def save(self, folder: str | Path) -> Path:
        """Write segments.json, an indexed PNG for each level, a picture and a page, or nothing.

        Earlier segments in ``folder`` are replaced; a folder with anything else in it is refused.
        """
        with whole_folder(folder, "segments") as new:
            self.write(new)
        return Path(folder)

    def __repr__(self) -> str:
        height, width = self.grid
        told = ", ".join(f"{each.count} {each.name}" for each in self.tree)
        return f"Segments({height}x{width} tokens: {told}; {self.codelength:.2f} bits a step)"
