"""SPair-71k (Min et al., 2019) in its published layout.

    SPair-71k/
      JPEGImages/<category>/<image>.jpg
      PairAnnotation/<trn, val or test>/<number>-<source>-<target>:<category>.json
      Layout/large/<trn, val or test>.txt       # one annotation's name a line, without .json

An annotation has src_imname, trg_imname, category, trg_bndbox [x1, y1, x2, y2], and src_kps and
trg_kps: [[x, y], ...], the keypoints that both images show.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flashmaps.diffusion.images import load_image
from flashmaps.evaluation.benchmark import Pair, choose, inside, need_files

SPLITS = ("test", "val", "trn")


class SPair:
    """Pairs of one split, PCK on the longer side of the target's box."""

    name = "spair"
    layout = (
        "the folder SPair-71k with JPEGImages/<category>/*.jpg, PairAnnotation/<split>/*.json and "
        "Layout/large/<split>.txt"
    )
    base = "the longer side of the target object's bounding box"
    unit = "pairs (which share images, so that intervals are somewhat too narrow)"
    headline = 0.1

    def __init__(
        self, folder: Path, *, split: str = "test", pairs: int | None = None, seed: int = 0
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r}; SPair-71k has {', '.join(SPLITS)}")
        folder = inside(folder, "SPair-71k")
        listing = f"Layout/large/{split}.txt"
        need_files(folder, ["JPEGImages", f"PairAnnotation/{split}", listing], self.layout)
        names = (folder / listing).read_text("utf-8").split()
        if not names:
            raise ValueError(f"data: {str(folder / listing)!r} names no pairs")
        self._folder, self._split = folder, split
        self._names = [names[i] for i in choose(len(names), pairs, seed)]
        self.what = f"SPair-71k, {split} split, {len(self._names)} of {len(names)} pairs"

    def __len__(self) -> int:
        """How many pairs."""
        return len(self._names)

    def pair(self, index: int) -> Pair:
        """The pair of the split's line ``index`` (of those chosen)."""
        path = self._annotation(self._names[index])
        found = json.loads(path.read_text("utf-8"))
        try:
            category = found["category"]
            images = [f"{category}/{found[side]}" for side in ("src_imname", "trg_imname")]
            source, target = (np.array(found[key], float) for key in ("src_kps", "trg_kps"))
            x1, y1, x2, y2 = found["trg_bndbox"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"data: {str(path)!r} is not an annotation of SPair-71k ({error!r})"
            ) from None
        if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2:
            raise ValueError(
                f"data: {str(path)!r} has src_kps of shape {source.shape} and trg_kps of "
                f"{target.shape}; wanted [n, 2] both"
            )
        loaded = [load_image(self._folder / "JPEGImages" / name, name) for name in images]
        base = float(max(x2 - x1, y2 - y1))
        return Pair(category, images[0], images[1], loaded[0], loaded[1], source, target, base)

    def _annotation(self, name: str) -> Path:
        folder = self._folder / "PairAnnotation" / self._split
        # File systems that know no colon have an underscore there.
        for written in (name, name.replace(":", "_")):
            if (folder / f"{written}.json").is_file():
                return folder / f"{written}.json"
        raise FileNotFoundError(f"data: the folder {str(folder)!r} lacks {name}.json")
