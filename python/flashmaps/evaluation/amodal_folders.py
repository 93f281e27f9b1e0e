"""Data sets with amodal masks, in the folders in which they are published.

| data set | annotations | whole | seen |
| --- | --- | --- | --- |
| KINS | COCO's form, one entry an object | ``segmentation`` (or ``a_segm``) | ``inmodal_seg`` (or
  ``i_segm``) |
| COCO-A | COCO's form, one entry an image with ``regions`` | ``segmentation``, one polygon |
  ``visible_mask``, where a region is covered |

Masks are polygons or run lengths, which pycocotools decodes. What stands in front of an object is
what the other objects of its image show that touches or covers its outline: nothing else is
annotated. An object is cut out of its image with a border around its box, and the collection of its
category are the largest objects of other images that nothing covers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmaps.diffusion.images import load_image
from flashmaps.evaluation.benchmark import inside, need_files
from flashmaps.evaluation.hidden_objects import EXEMPLARS, HiddenObject

_LEAST_HIDDEN, _MOST_HIDDEN = 0.15, 0.6  # of an object's pixels, as in the world's scenes
_SMALLEST = 32  # pixels of an object's longer side
_BORDER = 0.25  # of the longer side of its box, around it


@dataclass(frozen=True, eq=False)
class _Object:
    """One annotated object: its image, its category and its masks, not yet decoded."""

    name: str
    image: Path
    size: tuple[int, int]
    category: str
    box: tuple[float, float, float, float]  # of the whole, x, y, width, height
    whole: Any
    seen: Any  # None: as the whole

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """(whole, seen), [h, w] bool."""
        full = decode(self.whole, self.size)
        return full, full if self.seen is None else decode(self.seen, self.size) & full


@dataclass(frozen=True)
class _Layout:
    name: str
    title: str
    folders: tuple[str, ...]
    splits: tuple[str, ...]
    annotations: str
    other_names: tuple[str, ...]
    images: str
    told: str


LAYOUTS = (
    _Layout(
        "kins", "KINS", ("KINS", "kins"), ("test", "train"), "instances_{split}.json",
        ("update_{split}_2020.json",), "{split}ing/image_2",
        "KINS/ with instances_test.json (or update_test_2020.json) and testing/image_2/",
    ),
    _Layout(
        "coco-a", "COCO-A", ("COCOA", "cocoa"), ("val", "train"),
        "annotations/COCO_amodal_{split}2014.json", (), "{split}2014",
        "COCOA/ with annotations/COCO_amodal_val2014.json and val2014/",
    ),
)  # fmt: skip


class AmodalFolder:
    """A data set of amodal masks in its published layout, as `evaluate_completion` takes it.

    Args:
        folder: the data set's own folder, or the one that it lies in.
        split: default the one that is usually scored, "test" of KINS and "val" of COCO-A.
        count: only so many objects, the first.
        exemplars: how many objects a collection has at most.

    An object counts if 15 to 60 % of it are hidden, it is 32 pixels long at least, and its category
    has two whole objects in other images. Raises FileNotFoundError for a folder in none of the
    layouts, or that lacks files; ValueError for a split that it does not have.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        split: str | None = None,
        count: int | None = None,
        exemplars: int = EXEMPLARS,
    ) -> None:
        layout, root, annotations = _find(Path(folder), split)
        split = layout.splits[0] if split is None else split
        images = layout.images.format(split=split)
        need_files(root, [images], layout.told)
        read = _kins if layout.name == "kins" else _coco_a
        try:
            found = read(json.loads(annotations.read_text("utf-8")), root / images)
        except (KeyError, TypeError, IndexError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"data: {str(annotations)!r} is not in the form of {layout.title}: "
                f"{type(error).__name__} {error}"
            ) from None
        self.name = layout.name
        self._beside: dict[Path, list[_Object]] = defaultdict(list)
        for each in found:
            self._beside[each.image].append(each)
        self._whole: dict[str, list[_Object]] = defaultdict(list)
        candidates = []
        for each in found:
            if max(each.box[2:]) < _SMALLEST:
                continue
            share = _hidden_share(each)
            if share == 0:
                self._whole[each.category].append(each)
            elif _LEAST_HIDDEN <= share <= _MOST_HIDDEN:
                candidates.append(each)
        self._objects = [each for each in candidates if len(self._others(each)) >= 2][:count]
        if not self._objects:
            raise ValueError(
                f"data: the {split} split in {str(root)!r} has no object of which 15 to 60 % are "
                "hidden and whose kind is seen whole in two other images"
            )
        self._many = exemplars
        self.what = f"{layout.title}, {split} split, {len(self._objects)} hidden objects"

    def __len__(self) -> int:
        """How many objects."""
        return len(self._objects)

    def __getitem__(self, index: int) -> HiddenObject:
        each = self._objects[index]
        full, seen = each.masks()
        front = np.zeros_like(full)
        for other in self._beside[each.image]:
            if other is not each:
                front |= other.masks()[1]
        image = load_image(each.image, each.name)
        _check(image, each)
        cut = _window(full)
        return HiddenObject(
            each.name, each.category, image[cut], seen[cut], front[cut] & ~seen[cut], full[cut]
        )

    def exemplars(self, category: str) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """(image, mask of the whole object [h, w]): the largest that nothing covers."""
        scored = {each.image for each in self._objects}
        found = self._whole[category]
        # Images of scored objects come last: only where there are too few others.
        found = sorted(found, key=lambda each: (each.image in scored, -each.box[2] * each.box[3]))
        made = []
        for each in found[: self._many]:
            image, full = load_image(each.image, each.name), each.masks()[0]
            _check(image, each)
            cut = _window(full)
            made.append((image[cut], full[cut]))
        return made

    def _others(self, of: _Object) -> list[_Object]:
        return [each for each in self._whole[of.category] if each.image != of.image]


def decode(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """[h, w] bool of COCO's polygons ([x, y, ...], one or several) or run lengths."""
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError(
            f"KINS and COCO-A need pycocotools ({error}); install it with: pip install pycocotools"
        ) from None
    if isinstance(mask, list):
        polygons = mask if mask and isinstance(mask[0], list) else [mask]
        runs = coco.merge(coco.frPyObjects(polygons, *size))
    else:
        counts = mask["counts"]
        runs = coco.frPyObjects(mask, *size) if isinstance(counts, list) else mask
    found = np.asarray(coco.decode(runs)).astype(bool)
    if found.shape != size:
        raise ValueError(f"data: a mask is {found.shape}, its image {size}")
    return found


def _kins(found: Any, images: Path) -> list[_Object]:
    about = {each["id"]: each for each in found["images"]}
    names = {each["id"]: str(each["name"]) for each in found["categories"]}
    objects = []
    for each in found["annotations"]:
        image = about[each["image_id"]]
        objects.append(
            _Object(
                f"{image['file_name']}, object {each['id']}",
                images / Path(image["file_name"]).name,
                (int(image["height"]), int(image["width"])),
                names[each["category_id"]],
                tuple(each["a_bbox"] if "a_bbox" in each else each["bbox"]),
                each["a_segm"] if "a_segm" in each else each["segmentation"],
                each["i_segm"] if "i_segm" in each else each["inmodal_seg"],
            )
        )
    return objects


def _coco_a(found: Any, images: Path) -> list[_Object]:
    about = {each["id"]: each for each in found["images"]}
    objects = []
    for entry in found["annotations"]:
        image = about[entry["image_id"]]
        for number, each in enumerate(entry["regions"]):
            if each.get("isStuff"):
                continue
            x, y = each["segmentation"][0::2], each["segmentation"][1::2]
            objects.append(
                _Object(
                    f"{image['file_name']}, region {number}",
                    images / image["file_name"],
                    (int(image["height"]), int(image["width"])),
                    str(each["name"]),
                    (min(x), min(y), max(x) - min(x), max(y) - min(y)),
                    each["segmentation"],
                    each.get("visible_mask"),
                )
            )
    return objects


def _hidden_share(each: _Object) -> float:
    if each.seen is None:
        return 0.0
    full, seen = each.masks()
    return 1 - int(seen.sum()) / max(int(full.sum()), 1)


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of a mask's box, with a border, within the image."""
    rows, columns = np.nonzero(mask)
    border = int(_BORDER * max(np.ptp(rows), np.ptp(columns)) + 1)
    return (
        slice(max(int(rows.min()) - border, 0), int(rows.max()) + border + 1),
        slice(max(int(columns.min()) - border, 0), int(columns.max()) + border + 1),
    )


def _check(image: np.ndarray, each: _Object) -> None:
    if image.shape[:2] != each.size:
        raise ValueError(
            f"data: {str(each.image)!r} is {image.shape[1]} x {image.shape[0]} pixels; its "
            f"annotations say {each.size[1]} x {each.size[0]}"
        )


def _find(folder: Path, split: str | None) -> tuple[_Layout, Path, Path]:
    """The layout whose annotations are there, its folder, and their file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {str(folder)!r}")
    for layout in LAYOUTS:
        root = inside(folder, *layout.folders)
        wanted = layout.splits if split is None else (split,)
        there = {
            each: root / name.format(split=each)
            for each in layout.splits
            for name in (layout.annotations, *layout.other_names)
            if (root / name.format(split=each)).is_file()
        }
        if not there:
            continue
        if wanted[0] not in there:
            raise ValueError(
                f"split={wanted[0]!r}: {layout.title} in {str(root)!r} has {', '.join(there)}"
            )
        return layout, root, there[wanted[0]]
    told = "\n  ".join(f"{layout.title}: {layout.told}" for layout in LAYOUTS)
    raise FileNotFoundError(
        f"data: {str(folder)!r} is in none of the layouts that are known:\n  {told}"
    )
