"""A benchmark by its name."""

from __future__ import annotations

from pathlib import Path

from flashmaps.arguments import whole
from flashmaps.evaluation.benchmark import NAMES, PUBLIC, Benchmark
from flashmaps.evaluation.cub import Cub
from flashmaps.evaluation.proposal_flow import PFPascal, PFWillow
from flashmaps.evaluation.spair import SPair
from flashmaps.evaluation.stereo import Stereo
from flashmaps.evaluation.warps import Warps
from flashmaps.evaluation.worlds import SIDE, Worlds
from flashmaps.world.scene import SIZES

MOST = 10_000_000  # pairs, and points of a pair


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
    whole("seed", seed, 0)
    if pairs is not None:
        whole("pairs", pairs, 1, MOST)
    if points is not None:
        whole("points", points, 1, MOST)
    if image_size is not None and name != "world":
        raise ValueError(f"image_size={image_size}: only world draws its images at any size")
    if image_size is not None:
        whole("image_size", image_size, *SIZES)
    if name in PUBLIC:
        if points is not None:
            raise ValueError(
                f"points={points}: {PUBLIC[name]} has points of its own; all of them are used"
            )
        return _open_public(name, pairs, seed, data, split)
    if data is not None:
        raise ValueError(f"data={str(data)!r}: {name} needs no folder; it is made or ships here")
    if name == "stereo":
        if pairs not in (None, 1):
            raise ValueError(f"pairs={pairs}: stereo is a single pair")
        return Stereo(points=points or 4096, seed=seed)
    if name == "warps":
        return Warps(pairs or 50, points=points or 256, seed=seed)
    if split not in ("test", "validation"):
        raise ValueError(f"split={split!r}; world is scored on its splits 'test' and 'validation'")
    side = image_size or SIDE
    return Worlds(pairs or 50, points=points or 256, seed=seed, side=side, split=split)


def _open_public(
    name: str, pairs: int | None, seed: int, data: str | Path | None, split: str
) -> Benchmark:
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
