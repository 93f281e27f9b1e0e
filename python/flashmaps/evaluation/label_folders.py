"""Data sets with labels of every pixel, in the folders in which they are published.

| data set | classes | background | not counted |
| --- | --- | --- | --- |
| PASCAL VOC 2012 | 20 | label 0 | 255, the borders |
| COCO-Stuff-27 | 27 (Ji et al., 2019; Cho et al., 2021) | none | 255 |
| Cityscapes | 27, ids 7 to 33 (Cho et al., 2021) | none | all other ids |
| ADE20K (SceneParse150) | 150 | none | 0 |

VOC also says which object each pixel shows: the level "objects". The images of a split are those of
the published list, in its order, or all of its folder by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmaps.diffusion.images import load_image
from flashmaps.evaluation.benchmark import inside, need_files
from flashmaps.evaluation.segment_scenes import LabelledImage
from flashmaps.evaluation.segment_scores import BACKGROUND, VOID

# COCO-Stuff's 182 labels (91 of things, then 91 of stuff, by number from 0) in the 27 groups that
# unsupervised segmentation is scored on: its 12 groups of things and 15 of stuff, in their order.
# Things come in runs, stuff does not.
_THINGS = (
    ("electronic", 71, 76), ("appliance", 77, 82), ("food", 51, 60), ("furniture", 61, 70),
    ("indoor", 83, 90), ("kitchen", 43, 50), ("accessory", 25, 32), ("animal", 15, 24),
    ("outdoor", 9, 14), ("person", 0, 0), ("sports", 33, 42), ("vehicle", 1, 8),
)  # fmt: skip
_STUFF = (
    ("ceiling", (101, 102)),
    ("floor", (100, 113, 114, 115, 116, 117)),
    ("food", (120, 121, 152, 169)),
    ("furniture", (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164)),
    ("rawmaterial", (99, 131, 138, 142)),
    ("textile", (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167)),
    ("wall", (170, 171, 172, 173, 174, 175, 176)),
    ("window", (179, 180)),
    ("building", (94, 95, 127, 150, 157, 165)),
    ("ground", (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158)),
    ("plant", (93, 96, 118, 123, 128, 133, 141, 162, 168)),
    ("sky", (105, 156)),
    ("solid", (126, 134, 149, 159, 161, 181)),
    ("structural", (98, 112, 137, 145, 163)),
    ("water", (119, 147, 154, 177, 178)),
)
COCO_GROUPS = tuple(f"{n} things" for n, *_ in _THINGS) + tuple(f"{n} stuff" for n, _ in _STUFF)


def _coco_table() -> np.ndarray:
    table = np.full(256, VOID)
    for group, (_, first, last) in enumerate(_THINGS):
        table[first : last + 1] = group
    for group, (_, members) in enumerate(_STUFF):
        table[list(members)] = len(_THINGS) + group
    return table


def _run_table(first: int, last: int, background: int | None = None) -> np.ndarray:
    """Labels first to last are classes 0, 1, ...; all others are not counted."""
    table = np.full(256, VOID)
    table[first : last + 1] = np.arange(last - first + 1)
    if background is not None:
        table[background] = BACKGROUND
    return table


Files = list[tuple[str, Path, dict[str, Path]]]  # name, image, label file of each level


@dataclass(frozen=True)
class Layout:
    """How one data set lies in its folder.

    Attributes:
        name, title: for commands, for pages.
        folders: its own folder, where the one that holds it was given.
        needs: what the folder must hold, given the split.
        splits: that have labels.
        table: [256], a class for each value of the label files, BACKGROUND or VOID.
        files: images and label files of a split.
        told: the layout in words.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    needs: Callable[[str], list[str]]
    splits: tuple[str, ...]
    table: np.ndarray
    files: Callable[[Path, str], Files]
    told: str


def _listed(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text("utf-8").splitlines() if line.split()]


def _voc(folder: Path, split: str) -> Files:
    return [
        (
            name,
            folder / "JPEGImages" / f"{name}.jpg",
            {
                "classes": folder / "SegmentationClass" / f"{name}.png",
                "objects": folder / "SegmentationObject" / f"{name}.png",
            },
        )
        for name in _listed(folder / f"ImageSets/Segmentation/{split}.txt")
    ]


_COCO_LIST = "curated/{split}2017/Coco164kFull_Stuff_Coarse_7.txt"


def _coco(folder: Path, split: str) -> Files:
    curated = folder / _COCO_LIST.format(split=split)
    labels = folder / f"annotations/{split}2017"
    names = _listed(curated) if curated.is_file() else sorted(p.stem for p in labels.glob("*.png"))
    return [
        (name, folder / f"images/{split}2017/{name}.jpg", {"classes": labels / f"{name}.png"})
        for name in names
    ]


def _cityscapes(folder: Path, split: str) -> Files:
    end = "_leftImg8bit.png"
    found = sorted((folder / "leftImg8bit" / split).glob(f"*/*{end}"))
    return [
        (
            path.name.removesuffix(end),
            path,
            {
                "classes": folder / "gtFine" / split / path.parent.name
                / f"{path.name.removesuffix(end)}_gtFine_labelIds.png"
            },
        )
        for path in found
    ]  # fmt: skip


def _ade(folder: Path, split: str) -> Files:
    images = sorted((folder / "images" / split).glob("*.jpg"))
    labels = folder / "annotations" / split
    return [(path.stem, path, {"classes": labels / f"{path.stem}.png"}) for path in images]


LAYOUTS = (
    Layout(
        "voc", "PASCAL VOC 2012", ("VOCdevkit/VOC2012", "VOC2012"),
        lambda split: ["JPEGImages", "SegmentationClass", "SegmentationObject",
                       f"ImageSets/Segmentation/{split}.txt"],
        ("val", "train", "trainval"), _run_table(1, 20, background=0), _voc,
        "VOC2012/ with JPEGImages/, SegmentationClass/, SegmentationObject/ and "
        "ImageSets/Segmentation/",
    ),
    Layout(
        "coco-stuff-27", "COCO-Stuff-27", ("cocostuff",),
        lambda split: [f"images/{split}2017", f"annotations/{split}2017"],
        ("val", "train"), _coco_table(), _coco,
        "cocostuff/ with images/val2017/, annotations/val2017/ and, for the usual images, "
        "curated/val2017/",
    ),
    Layout(
        "cityscapes", "Cityscapes", ("cityscapes",),
        lambda split: [f"leftImg8bit/{split}", f"gtFine/{split}"],
        ("val", "train"), _run_table(7, 33), _cityscapes,
        "cityscapes/ with leftImg8bit/val/ and gtFine/val/",
    ),
    Layout(
        "ade20k", "ADE20K", ("ADEChallengeData2016",),
        lambda split: [f"images/{split}", f"annotations/{split}"],
        ("validation", "training"), _run_table(1, 150), _ade,
        "ADEChallengeData2016/ with images/validation/ and annotations/validation/",
    ),
)  # fmt: skip


class LabelFolder:
    """A data set of labels in its published layout, as `evaluate_segments` takes it.

    Args:
        folder: the data set's own folder, or the one that it lies in.
        split: one with labels; default the data set's validation split.
        count: only so many images, the first.

    Raises FileNotFoundError for a folder in none of the layouts, or that lacks files; ValueError
    for a split that it does not have.
    """

    def __init__(
        self, folder: str | Path, *, split: str | None = None, count: int | None = None
    ) -> None:
        self._layout, root = _find(Path(folder), split)
        layout = self._layout
        split = layout.splits[0] if split is None else split
        need_files(root, layout.needs(split), layout.told)
        self._files = layout.files(root, split)[:count]
        if not self._files:
            raise FileNotFoundError(
                f"data: the {split} split in {str(root)!r} lists no images; wanted {layout.told}"
            )
        self.name = layout.name
        self.levels = tuple(self._files[0][2])
        self.what = f"{layout.title}, {split} split, {len(self._files)} images"
        self.classes = {"classes": int(layout.table.max()) + 1}

    def __len__(self) -> int:
        """How many images."""
        return len(self._files)

    def __getitem__(self, index: int) -> LabelledImage:
        name, path, labels = self._files[index]
        image = load_image(path, name)
        truth = {}
        for level, file in labels.items():
            raw = read_labels(file)
            if raw.shape != image.shape[:2]:
                raise ValueError(
                    f"data: {str(file)!r} is {raw.shape[1]} x {raw.shape[0]} pixels, its image "
                    f"{image.shape[1]} x {image.shape[0]}"
                )
            table = self._layout.table if level == "classes" else _run_table(1, 254, background=0)
            truth[level] = table[raw]
        return LabelledImage(name, image, truth)


def read_labels(path: Path) -> np.ndarray:
    """The values of a label file: [h, w] int64, 0 to 255, indices of colours where it has some."""
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"data: there is no label file {str(path)!r}")
    with Image.open(path) as picture:
        values = np.asarray(picture)
    if values.ndim != 2 or values.dtype != np.uint8:
        raise ValueError(
            f"data: {str(path)!r} holds {values.dtype} of shape {values.shape}; wanted one "
            "byte for each pixel, its label"
        )
    return values.astype(np.int64)


def _find(folder: Path, split: str | None) -> tuple[Layout, Path]:
    """The layout whose folders are there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {str(folder)!r}")
    wrong: list[str] = []
    for layout in LAYOUTS:
        root = inside(folder, *layout.folders)
        tops = {name.split("/")[0] for name in layout.needs(layout.splits[0])}
        if not all((root / top).is_dir() for top in tops):
            continue
        # ADE20K and COCO-Stuff have the same two folders at the top: the splits tell them apart.
        there = [
            each for each in layout.splits
            if all((root / name).exists() for name in layout.needs(each))
        ]  # fmt: skip
        if split in there or (split is None and layout.splits[0] in there):
            return layout, root
        if there:
            wrong.append(f"{layout.title} there has {', '.join(there)}")
    if wrong:
        raise ValueError(f"split={split!r}: {'; '.join(wrong)}")
    told = "\n  ".join(f"{layout.title}: {layout.told}" for layout in LAYOUTS)
    raise FileNotFoundError(
        f"data: {str(folder)!r} is in none of the layouts that are known:\n  {told}"
    )
