"""An object that is partly hidden, imagined whole: what :func:`flashmaps.complete` gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmaps.diffusion.images import Image
from flashmaps.files import whole_folder, write_json
from flashmaps.parts.shapes import Shape
from flashmaps.segmentation import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "completion"
_SEEN = np.array((0.55, 0.55, 0.55), dtype=np.float32)
_GUESS = np.array((0.95, 0.6, 0.1), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Completion:
    """One object of an image, with what is hidden of it.

    Attributes:
        image: [h, w, 3] as given.
        visible: [h, w] bool, where the object is seen; front: where something stands in front.
        amodal: [h, w] float32, the probability that the object reaches this pixel.
        names: of the parts; shares: of each, what share of it is seen, NaN where the exemplars put
            it nowhere in the picture.
        images: for each sample [h, w, 3] float32, the image with the object's hidden region painted
            in; everywhere else it is ``image`` to the bit.
        scores: of each sample, higher is better: see :func:`flashmaps.complete`.
        shape: how the exemplars lie over the image.
        settings: what it was made with, as JSON has it.
    """

    image: Image
    visible: np.ndarray
    front: np.ndarray
    amodal: np.ndarray
    names: tuple[str, ...]
    shares: np.ndarray
    images: tuple[Image, ...]
    scores: tuple[float, ...]
    shape: Shape
    settings: dict[str, Any]

    @property
    def hidden(self) -> np.ndarray:  # [h, w] bool
        """Where the object is more probable than not, and not seen."""
        return (self.amodal > 0.5) & ~self.visible

    @property
    def missing(self) -> tuple[str, ...]:
        """Parts of which less than half is seen, though they lie within the picture."""
        return tuple(n for n, s in zip(self.names, self.shares, strict=True) if s < 0.5)

    @property
    def best(self) -> int:
        """The sample with the highest score; 0 where nothing is hidden."""
        return int(np.argmax(self.scores)) if self.scores else 0

    @property
    def cut(self) -> Image:
        """The best sample's object alone, on white: [h, w, 3]."""
        whole = (self.visible | self.hidden)[..., None]
        return np.where(whole, self.images[self.best], np.float32(1))

    def plot(self) -> Figure:
        """The image, what was seen of the object and where it may reach, and the samples."""
        from matplotlib.figure import Figure

        shown = [
            ("image", self.image),
            ("seen, and probably there", self._shares()),
            *((f"sample {k}{' (best)' if k == self.best else ''}", each)
              for k, each in enumerate(self.images)),
            ("the best, alone", self.cut),
        ]  # fmt: skip
        height, width = self.image.shape[:2]
        columns = min(4, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(
            figsize=(3 * columns, rows * (3 * height / width + 0.4)), layout="constrained"
        )
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for ax, (title, picture) in zip(axes, shown, strict=False):
            ax.imshow(picture)
            ax.set_title(title, fontsize=9, loc="left")
        return figure

    def _shares(self) -> Image:
        probable = np.where(self.visible, 0.0, self.amodal)[..., None]
        ground = np.where(self.visible[..., None], _SEEN, np.float32(1))
        return (ground * (1 - probable) + _GUESS * probable).astype(np.float32)

    def summary(self) -> dict[str, Any]:
        """The numbers on one page, with plain Python values."""
        return {
            "missing": list(self.missing),
            "share_seen": {
                name: None if np.isnan(share) else float(share)
                for name, share in zip(self.names, self.shares, strict=True)
            },
            "pixels_seen": int(self.visible.sum()),
            "pixels_in_front": int(self.front.sum()),
            "pixels_imagined": int(self.hidden.sum()),
            "samples": len(self.scores),
            "scores": list(self.scores),
            "best": self.best,
            "agreement_of_exemplars": self.shape.agreement.tolist(),
            "settings": self.settings,
        }

    def write(self, folder: Path) -> None:
        """Write the files of :meth:`save` to a folder that is there."""
        from PIL import Image as Pil

        def picture(name: str, pixels: np.ndarray) -> None:
            Pil.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(folder / name)

        for number, each in enumerate(self.images):
            picture(f"sample-{number:02d}.png", each)
        picture("best.png", self.images[self.best])
        picture("amodal.png", self.amodal)
        for name, mask in (("visible", self.visible), ("front", self.front)):
            picture(f"{name}.png", mask.astype(np.float32))
        self.plot().savefig(folder / "completion.png", dpi=120)
        write_json(folder / "completion.json", self.summary())
        pictures.write_page(
            folder / "index.html", "Completion", ["completion.png", "best.png"], self.summary()
        )

    def save(self, folder: str | Path) -> Path:
        """Write completion.json, the samples, masks as PNG (255: yes), a picture and a page.

        An earlier completion in ``folder`` is replaced; a folder with anything else in it is
        refused.
        """
        with whole_folder(folder, KIND) as new:
            self.write(new)
        return Path(folder)

    def __repr__(self) -> str:
        told = ", ".join(self.missing) or "none"
        return (
            f"Completion({int(self.visible.sum())} pixels seen, {int(self.hidden.sum())} imagined, "
            f"parts missing: {told}; {len(self.scores)} samples, best {self.best})"
        )
