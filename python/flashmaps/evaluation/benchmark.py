"""What a benchmark is: pairs of images, and points whose places in both are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from flashmaps.images import Image

NAMES = ("world", "stereo", "warps", "spair", "pf-pascal", "pf-willow", "cub")
PUBLIC = {"spair": "SPair-71k", "pf-pascal": "PF-Pascal", "pf-willow": "PF-Willow", "cub": "CUB"}


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images and n points of the source.

    Attributes:
        category: what results are also given for, for instance "car".
        source, target: what to call the images; equal names are equal images.
        source_image, target_image: [h, w, 3] float32 in [0, 1].
        source_points: [n, 2], (x, y) in source pixels, (0, 0) the centre of the top left pixel.
        target_points: [n, 2], where they truly lie in the target; NaN for a point that is known to
            have no place in the target that one can see.
        base: pixels of the target that PCK thresholds are fractions of.
        units: [n] int, what is drawn again for intervals where that is not the pair: parts of it.
        mirrored_points: [n, 2], where the same points of the other side of a symmetric object lie,
            NaN where they cannot be seen; None where there is no other side.
    """

    category: str
    source: str
    target: str
    source_image: Image
    target_image: Image
    source_points: np.ndarray
    target_points: np.ndarray
    base: float
    units: np.ndarray | None = None
    mirrored_points: np.ndarray | None = None


class Benchmark(Protocol):
    """Numbered pairs, each the same whenever it is asked for, and what to say about them."""

    name: str
    what: str  # a sentence: which images, which truth
    base: str  # what PCK thresholds are fractions of
    unit: str  # what is drawn again for intervals
    headline: float  # the PCK threshold of the plots, and of right and wrong for the scores

    def __len__(self) -> int:
        """How many pairs."""
        ...

    def pair(self, index: int) -> Pair:
        """Pair ``index``, from 0 to len - 1."""
        ...


def open_benchmark(
    name: str,
    *,
    pairs: int | None = None,
    points: int | None = None,
    seed: int = 0,
    data: str | Path | None = None,
    split: str = "test",
    image_size: int | None = None,
) -> Benchmark:
    """A benchmark by its name.

    Args:
        name: "world", "stereo", "warps", "spair", "pf-pascal", "pf-willow" or "cub".
        pairs: how many; default 50 for world and warps, 1 for stereo, 1000 for cub, all there are
            for the others. Fewer than all are drawn by ``seed``.
        points: how many points of a pair to draw where the truth is dense (world, stereo, warps).
        seed: draws the pairs, the warps and the points.
        data: the folder of a public benchmark, in its published layout.
        split: of a public benchmark: "test", "val" or "trn"; of world: "test" or "validation".
        image_size: pixels a side of the images that world draws; default 256. The scenes are the
            same at every size.

    Raises ValueError or FileNotFoundError that says what was expected where.
    """
    if name not in NAMES:
        raise ValueError(f"benchmark {name!r} is not known; choose from {', '.join(NAMES)}")
    if pairs is not None and pairs < 1:
        raise ValueError(f"pairs={pairs}; wanted at least 1")
    if points is not None and points < 1:
        raise ValueError(f"points={points}; wanted at least 1")
    if image_size is not None and name != "world":
        raise ValueError(f"image_size={image_size}: only world draws its images at any size")
    if name in PUBLIC:
        if points is not None:
            raise ValueError(
                f"points={points}: {PUBLIC[name]} has points of its own; all of them are used"
            )
        return _open_public(name, pairs, seed, data, split)
    if data is not None:
        raise ValueError(f"data={str(data)!r}: {name} needs no folder; it is made or ships here")
    if name == "stereo":
        from flashmaps.evaluation.stereo import Stereo

        if pairs not in (None, 1):
            raise ValueError(f"pairs={pairs}: stereo is a single pair")
        return Stereo(points=points or 4096, seed=seed)
    if name == "warps":
        from flashmaps.evaluation.warps import Warps

        return Warps(pairs or 50, points=points or 256, seed=seed)
    from flashmaps.evaluation.worlds import SIDE, Worlds

    if split not in ("test", "validation"):
        raise ValueError(f"split={split!r}; world is scored on its splits 'test' and 'validation'")
    side = image_size or SIDE
    return Worlds(pairs or 50, points=points or 256, seed=seed, side=side, split=split)


def _open_public(
    name: str, pairs: int | None, seed: int, data: str | Path | None, split: str
) -> Benchmark:
    from flashmaps.evaluation.cub import Cub
    from flashmaps.evaluation.proposal_flow import PFPascal, PFWillow
    from flashmaps.evaluation.spair import SPair

    kinds: dict[str, type[SPair] | type[PFPascal] | type[PFWillow] | type[Cub]] = {
        "spair": SPair, "pf-pascal": PFPascal, "pf-willow": PFWillow, "cub": Cub,
    }  # fmt: skip
    opened = kinds[name]
    if data is None:
        raise ValueError(
            f"data is missing: {name} needs the folder of {PUBLIC[name]} as it is published: "
            f"{opened.layout}"
        )
    return opened(Path(data).expanduser(), split=split, pairs=pairs, seed=seed)


def need_files(folder: Path, wanted: Sequence[str], layout: str) -> None:
    """FileNotFoundError unless ``folder`` holds everything in ``wanted``; says what it lacks."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {str(folder)!r}; wanted {layout}")
    absent = [name for name in wanted if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(
            f"data: the folder {str(folder)!r} lacks {', '.join(absent)}; wanted {layout}"
        )


def choose(count: int, wanted: int | None, seed: int) -> list[int]:
    """``wanted`` of 0 .. count - 1 drawn without repeats, in rising order; None for all."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).permutation(count)[:wanted].tolist())


def draw(rng: np.random.Generator, count: int, among: int) -> np.ndarray:
    """``count`` of 0 .. among - 1 without repeats, or all of them where there are fewer; rising."""
    return np.sort(rng.permutation(among)[:count])
