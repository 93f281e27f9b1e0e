"""protocol.json: which images, which truth, which rules, so that anyone gets the same numbers.

It lies beside the results of every table of segments. Whoever has another method segments the same
images, writes one label PNG for each (its name, its truth's size; indices or grey values are
labels), and has them scored by the same rules: ``flashmaps eval segments --labels FOLDER``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashmaps.evaluation.label_folders import read_labels
from flashmaps.evaluation.segment_scores import BACKGROUND, VOID

FORMAT = "flashmaps segment protocol 1"
RULES = {
    "pixels": "labels and truth are compared at the pixels of the truth; those whose truth is "
    "void are not counted, nothing else is left out",
    "matching": "Hungarian: segments and targets are paired one to one so that the summed IoU is "
    "largest",
    "unmatched_target": 0,
    "background": "is no target; counts in unions, and in ARI and NMI as one more group",
    "iou": "mean over targets of an image, then mean over images that have some",
    "ari": "Hubert and Arabie (1985), of all pixels that are counted",
    "nmi": "mutual information over the mean of both entropies, of the same pixels",
    "mbo": "mean over targets of the largest IoU with any segment",
    "class_iou": "segments are named by the class that they are matched to in their image, one to "
    "one; those without a partner are background, or wrong where there is none; true and false "
    "positives are summed over all images; mean over the classes that the images show",
    "collection": "is scored as one image",
    "truth_values": {"background": BACKGROUND, "void": VOID},
}


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 of shapes and values."""
    found = hashlib.sha256()
    for each in arrays:
        found.update(str((each.shape, str(each.dtype))).encode())
        found.update(np.ascontiguousarray(each).tobytes())
    return found.hexdigest()


def entry(name: str, images: Sequence[np.ndarray], truth: Iterable[np.ndarray]) -> dict[str, Any]:
    """What the protocol says of one image, or of a collection."""
    whole = [np.asarray(each, dtype=np.int16) for each in truth]
    return {
        "name": name,
        "sizes": [list(each.shape[:2]) for each in images],
        "images_sha256": digest(*images),
        "truth_sha256": digest(*whole),
    }


def protocol(what: str, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What protocol.json holds."""
    return {"format": FORMAT, "rules": RULES, "images": what, "entries": list(entries)}


def given_labels(folder: str | Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Somebody's labels of one image: [h, w] int64, of the file NAME.png in ``folder``.

    Raises FileNotFoundError where there is none, ValueError where it has another size.
    """
    path = Path(folder) / f"{name}.png"
    labels = read_labels(path)
    if labels.shape != tuple(shape):
        raise ValueError(
            f"labels: {str(path)!r} is {labels.shape[1]} x {labels.shape[0]} pixels; the truth has "
            f"{shape[1]} x {shape[0]}"
        )
    return labels
