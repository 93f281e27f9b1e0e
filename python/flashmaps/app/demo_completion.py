"""One hidden animal imagined whole, beside the truth: the demo's last picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashmaps.diffusion.images import Image, load_image
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation.completion import convex_hull
from flashmaps.evaluation.hidden_objects import WorldHidden
from flashmaps.matching.settings import settings_of
from flashmaps.parts.completion import GUIDANCE, STRENGTH
from flashmaps.parts.inpaint import inpaint, rough_fill
from flashmaps.parts.shapes import Exemplar, whole_shape
from flashmaps.segmentation.segment import see

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CATEGORY = "cat"
EXEMPLARS = 8
STEPS = 20
_FAINT = 0.3


class ShownCompletion:
    """The first scene of the test split with a hidden animal, completed by a collection."""

    def __init__(self, pipe: Any) -> None:
        objects = WorldHidden("test", 1, exemplars=EXEMPLARS, categories=(CATEGORY,))
        one, collection = objects[0], objects.exemplars(CATEGORY)
        image, self.truth = load_image(one.image), load_image(one.uncovered)
        with fit_threads(pipe), torch.no_grad():
            found, *sets = see(pipe, [image, *(each for each, _ in collection)])
            exemplars = [
                Exemplar(each, mask) for each, (_, mask) in zip(sets, collection, strict=True)
            ]
            shape = whole_shape(found, one.visible, one.front, exemplars, settings_of(pipe).options)
            answer = shape.amodal > 0.5
            states = pipe.encode_prompt([f"a {CATEGORY}", ""], pipe._execution_device, 1, False)[0]
            region, hidden = one.front & ~one.visible, answer & ~one.visible
            rough = rough_fill(image, one.visible, one.front, hidden)
            (made,) = inpaint(
                pipe, rough, region, states[:1], states[1:], seeds=(0,), steps=STEPS,
                guidance=GUIDANCE, strength=STRENGTH,
            )  # fmt: skip
            (self.empty,) = inpaint(
                pipe, image, region, states[1:], states[1:], seeds=(0,), steps=STEPS, guidance=1.0,
                strength=1.0,
            )  # fmt: skip
        self.image, self.whole = image, np.where(hidden[..., None], made, image)
        answers = {
            "FlashMaps": answer,
            "convex hull": one.visible | (one.front & convex_hull(one.visible)),
        }
        self.masks = {"truth": one.whole, **answers}
        self.iou = {
            name: float((each & one.whole).sum() / (each | one.whole).sum())
            for name, each in answers.items()
        }
        self.results = {
            "category": CATEGORY,
            "exemplars": EXEMPLARS,
            "hidden_share": float(one.hidden.sum() / one.whole.sum()),
            "iou": self.iou,
        }

    def figure(self) -> Figure:
        """The image, the truth, ours, the hull, and what the empty prompt gives."""
        from matplotlib.figure import Figure

        ours, hull = self.iou["FlashMaps"], self.iou["convex hull"]
        shown = [
            ("the scene", self.image),
            ("what is behind: the truth", _alone(self.truth, self.masks["truth"])),
            (f"FlashMaps, IoU {ours:.2f}", _alone(self.whole, self.masks["FlashMaps"])),
            (f"convex hull, IoU {hull:.2f}", _alone(self.image, self.masks["convex hull"])),
            ("inpainted, empty prompt", self.empty),
        ]
        figure = Figure(figsize=(3 * len(shown), 3.4), layout="constrained")
        for ax, (title, picture) in zip(figure.subplots(1, len(shown)), shown, strict=True):
            ax.imshow(picture)
            ax.set_title(title, fontsize=10, loc="left")
            ax.set_axis_off()
        return figure


def _alone(image: Image, mask: np.ndarray) -> Image:
    """An image that is pale but for what a mask shows."""
    return np.where(mask[..., None], image, 1 - _FAINT * (1 - image)).astype(np.float32)
