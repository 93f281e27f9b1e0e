"""The picture of docs/parts.md: parts found in images that words were not learned from.

    python -m flashmaps.evaluation.part_figure RUN docs/parts.png

RUN is a folder of ``flashmaps eval parts``. For each category that it has learned with "both" and
true masks: an image that was held out, its true parts, the parts that are found.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from flashmaps.diffusion.images import load_image
from flashmaps.diffusion.loading import load_model
from flashmaps.evaluation.part_scenes import lone_images
from flashmaps.files import whole_file
from flashmaps.parts.result import Parts
from flashmaps.segmentation.pictures import painted
from flashmaps.world import CATEGORIES

_MOST = 6  # categories


def draw(run: Path, out: Path, *, which: int = 0) -> None:
    """Write the picture; ``which``: of the images held out. ValueError for a run without any."""
    from matplotlib.figure import Figure

    asked = json.loads((run / "results.json").read_text("utf-8"))
    folders = {name: run / "learned" / f"true-both-0-{name}" for name in CATEGORIES}
    there = [name for name, each in folders.items() if (each / "parts.json").is_file()][:_MOST]
    if not there:
        raise ValueError(f"{str(run)!r} has learned no words yet")
    split = "validation" if "validation" in asked["images"] else "test"
    figure = Figure(figsize=(2 * len(there), 6.4), layout="constrained")
    axes = figure.subplots(3, len(there), squeeze=False)
    pipe = load_model(asked["model"])
    for column, name in enumerate(there):
        parts = Parts.load(folders[name])
        held = lone_images(name, split, 1, first=len(parts.images) + which, size=parts.size[0])
        image = load_image(held.images[0])
        masks = parts.masks(image, model=pipe)
        found = np.where(masks.max(0) > 1 - masks.sum(0), masks.argmax(0), -1)
        for row, (picture, title) in enumerate((
            (image, name), (painted(image, held.labels[0].astype(int)), "true parts"),
            (painted(image, found), "found"),
        )):  # fmt: skip
            axes[row, column].imshow(picture)
            axes[row, column].set_title(title, fontsize=9, loc="left")
            axes[row, column].set_axis_off()
    with whole_file(out) as new:
        figure.savefig(new, dpi=90, format="png")


def main(argv: list[str] | None = None) -> None:
    """Draw; `argv` as on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flashmaps.evaluation.part_figure", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args(argv)
    draw(given.run, given.out)


if __name__ == "__main__":
    main()
