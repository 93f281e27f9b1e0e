"""What learning the parts of a collection gives: words, and how they are read in an image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.features import size_multiple
from flashmaps.diffusion.images import Image, fit_size, load_image, resize
from flashmaps.diffusion.latents import encode
from flashmaps.diffusion.learned_words import save_word
from flashmaps.diffusion.loading import load_model
from flashmaps.files import whole_folder, write_json
from flashmaps.matching.settings import fingerprint
from flashmaps.parts.reading import probabilities, seen
from flashmaps.segmentation import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "flashmaps parts 1"
KIND = "parts"
_ABOUT = "parts.json"
_COLLECTION = "collection.safetensors"
_WORD = re.compile(r"<[A-Za-z][A-Za-z0-9_-]{0,40}>")


def check_word(argument: str, name: str) -> str:
    """A learned word's name, which is that of its file too. ValueError for others."""
    if not isinstance(name, str) or not _WORD.fullmatch(name):
        raise ValueError(
            f"{argument}={name!r} must be letters, digits, - and _ between < and >, such as <part>"
        )
    return name


def _file_of(name: str) -> str:
    return f"{check_word('name', name).strip('<>')}.safetensors"


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a collection as words of one model; made by :func:`flashmaps.learn_parts`.

    Attributes:
        names: the parts' words, "<part-0>" and so on.
        embeddings: [P, n, c] float32, n tokens of each, as the text encoder takes them in.
        category: the word of the whole object, "<thing>"; category_embedding: [n, c].
        model: the name it was given by, "" for a loaded pipeline; weights: its fingerprint, by
            which others are refused.
        size: (height, width) in pixels that images were shown at.
        layers: cross-attention layers that are read; timestep: of the noise they are read at.
        head: [P + 1, layers (P + 5) + 1], from the attention to all words to the probability of
            each part and of none, see :func:`flashmaps.parts.reading.probabilities`.
        norms: [P, 2], what evidence of a part is set beside, see :mod:`flashmaps.parts.presence`.
        images: of the collection, uint8 [h, w, 3] each, in ``size``.
        labels: of each image [h, w] int16, the part that each pixel shows, -1 for none.
        losses: of each step.
        settings: what it was learned with, as JSON has it.
    """

    names: tuple[str, ...]
    embeddings: Tensor
    category: str
    category_embedding: Tensor
    model: str
    weights: str
    size: tuple[int, int]
    layers: tuple[str, ...]
    timestep: int
    head: Tensor
    norms: Tensor
    images: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    losses: tuple[float, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many parts."""
        return len(self.names)

    @property
    def words(self) -> dict[str, Tensor]:
        """Every learned word and its embedding [n, c], the category's first."""
        return {
            self.category: self.category_embedding,
            **dict(zip(self.names, self.embeddings, strict=True)),
        }

    def prompt(self, parts: Iterable[int] | None = None) -> str:
        """The text that tells of the object and these parts; None: all, (): the object alone."""
        chosen = range(self.count) if parts is None else parts
        return " ".join(("a", self.category, *(self.names[p] for p in chosen)))

    def pipeline(self, model: Any = None) -> Any:
        """The loaded model. ValueError unless it is the one that the parts were learned with.

        ``model``: as for :func:`flashmaps.match`; None: the name that they were learned under.
        """
        if model is None and not self.model:
            raise ValueError(
                "model: these parts were learned with a pipeline that has no name; give it again"
            )
        pipe = load_model(self.model if model is None else model)
        here = fingerprint(pipe)
        if here != self.weights:
            raise ValueError(
                f"these parts are words of another model ({self.model or 'a pipeline'}, weights "
                f"{self.weights}) and mean nothing to the model given (weights {here}): learn "
                "them with it"
            )
        return pipe

    def masks(
        self, image: Any, *, model: Any = None, seeds: Iterable[int] = (0, 1)
    ) -> np.ndarray:  # [P, h, w]
        """[P, h, w] float32: how probable each part is at each pixel of an image.

        What is left to 1 is the probability of no part. The mean over ``seeds`` of the noise.
        """
        pipe = self.pipeline(model)
        picture = load_image(image)
        found = self.read(pipe, [picture], seeds=seeds)
        height, width = picture.shape[:2]
        full = torch.nn.functional.interpolate(
            found, (height, width), mode="bilinear", align_corners=False
        )
        return full[0, :-1].numpy()

    @torch.no_grad()
    def read(self, pipe: Any, images: Iterable[Image], *, seeds: Iterable[int] = (0, 1)) -> Tensor:
        """[B, P + 1, h, w] float32, on the model's own cells: of each part, and of none at last."""
        shown = [resize(each, self.fitted(pipe, each)) for each in images]
        logs = seen(
            pipe, encode(pipe, shown), [self.prompt()] * len(shown), self.words, tuple(self.words),
            layers=self.layers, timestep=self.timestep, seeds=tuple(seeds),
        )  # fmt: skip
        return probabilities(logs, self.head).float().cpu()

    def fitted(self, pipe: Any, image: Image) -> tuple[int, int]:
        """As large as images were when the parts were learned, in the image's own shape."""
        return fit_size(image.shape[0], image.shape[1], max(self.size), size_multiple(pipe))

    def plot(self) -> Figure:
        """The collection above, its parts below; one colour is one part."""
        title = f"{self.count} parts of {len(self.images)} images; one colour is one part"
        shown = [each.astype(np.float32) / 255 for each in self.images]
        return pictures.collection(shown, [x.astype(np.int64) for x in self.labels], title)

    def summary(self) -> dict[str, Any]:
        """The numbers on one page, with plain Python values."""
        areas = [[float((each == p).mean()) for p in range(self.count)] for each in self.labels]
        return {
            "names": list(self.names),
            "category": self.category,
            "tokens_a_part": int(self.embeddings.shape[1]),
            "images": len(self.images),
            "steps": len(self.losses),
            "last_loss": float(np.mean(self.losses[-20:])) if self.losses else None,
            "mean_share_of_image": np.mean(areas, 0).tolist(),
        }

    def write(self, folder: Path) -> None:
        """Write the files of :meth:`save` to a folder that is there."""
        from safetensors.torch import save_file

        for name, embedding in self.words.items():
            save_word(folder / _file_of(name), name, embedding)
        save_file(
            {
                "images": torch.from_numpy(np.stack(self.images)),
                "labels": torch.from_numpy(np.stack(self.labels)),
                "head": self.head.contiguous(),
                "norms": self.norms.contiguous(),
                "losses": torch.tensor(self.losses, dtype=torch.float64),
            },
            folder / _COLLECTION,
        )
        about = {
            "format": FORMAT, "names": list(self.names), "category": self.category,
            "model": self.model, "weights": self.weights, "size": list(self.size),
            "layers": list(self.layers), "timestep": self.timestep, "settings": self.settings,
            "summary": self.summary(),
        }  # fmt: skip
        write_json(folder / _ABOUT, about)
        self.plot().savefig(folder / "parts.png", dpi=120)
        pictures.write_page(folder / "index.html", "Parts", ["parts.png"], self.summary())

    def save(self, folder: str | Path) -> Path:
        """Write a folder: a textual inversion for each word, the collection, a picture and a page.

        ``pipe.load_textual_inversion("FOLDER/part-0.safetensors")`` takes the words one by one.
        Earlier parts in ``folder`` are replaced; a folder with anything else in it is refused.
        """
        with whole_folder(folder, KIND) as new:
            self.write(new)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Parts:
        """Read what :meth:`save` wrote. FileNotFoundError, or ValueError for a folder of others."""
        from safetensors.torch import load_file

        place = Path(folder)
        if not (place / _ABOUT).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} holds no parts: there is no {_ABOUT}; `flashmaps parts` and "
                "Parts.save write one"
            )
        try:
            about = json.loads((place / _ABOUT).read_text("utf-8"))
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}; wanted {FORMAT!r}")
            names = (about["category"], *about["names"])
            words = []
            for name in names:
                (embedding,) = load_file(place / _file_of(name)).values()
                words.append(embedding.reshape(-1, embedding.shape[-1]))
            tensors = load_file(place / _COLLECTION)
            return cls(
                names=tuple(about["names"]),
                embeddings=torch.stack(words[1:]),
                category=about["category"],
                category_embedding=words[0],
                model=about["model"],
                weights=about["weights"],
                size=(int(about["size"][0]), int(about["size"][1])),
                layers=tuple(about["layers"]),
                timestep=int(about["timestep"]),
                head=tensors["head"],
                norms=tensors["norms"],
                images=tuple(tensors["images"].numpy()),
                labels=tuple(tensors["labels"].numpy()),
                losses=tuple(tensors["losses"].tolist()),
                settings=about["settings"],
            )
        except FileNotFoundError:
            raise
        except Exception as error:  # of JSON, of safetensors, of a field that is not there
            raise ValueError(f"{str(folder)!r} is not readable as parts: {error}") from None

    def __repr__(self) -> str:
        return f"Parts({self.count} parts of {len(self.images)} images)"
