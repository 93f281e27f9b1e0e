"""Segments of one image by size: seconds after the forward pass, and memory beyond the features.

    python benches/segments.py --sides 64 96 --threads 2
    python benches/segments.py --sides --images 25 50 100 200     # collections of 1024 tokens each

Features are those of the built-in model for a photograph that scikit-image ships, at so many
tokens a side. Memory is the process's peak resident size during the call, less what it was
before (Linux: /proc/self/clear_refs); it counts everything, numpy's and torch's. Collections are
those of eight drawn scenes of one category, over and over, each time with other noise on all
features.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import flashmaps as fm
import torch
from flashmaps.diffusion.features import Features
from flashmaps.segmentation.segment import see

_PIXELS = 4  # of the built-in model's input for each token


def peak_beyond(run: object) -> tuple[float, int]:
    """(seconds, bytes): of one call, how long and how far the resident size rose."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the earlier peak
    before = _status("VmRSS")
    started = time.perf_counter()
    run()  # type: ignore[operator]
    seconds = time.perf_counter() - started
    return seconds, _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def features_of(side: int) -> object:
    """Features of a photograph, ``side`` tokens a side."""
    from skimage.data import astronaut

    pixels = side * _PIXELS
    return see("builtin", [astronaut()], size=(pixels, pixels))[0]


def collection_of(images: int, seen: list[Features]) -> list[Features]:
    """``images`` features: those of ``seen`` in turn, with a tenth of their deviation as noise."""
    generator = torch.Generator().manual_seed(0)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * x.std() * torch.randn(x.shape, generator=generator)

    return [
        replace(f, query=noisy(f.query), key=noisy(f.key), output=noisy(f.output))
        for f in (seen[i % len(seen)] for i in range(images))
    ]


def time_collections(counts: list[int]) -> None:
    """A table of collections by their number of images."""
    from flashmaps.evaluation.segment_scenes import WorldCollections

    drawn = WorldCollections("validation", 8, seeds=1, categories=("car",))[0]
    seen = see("builtin", drawn.images)
    fm.cosegment(seen[:2])
    print("| images | tokens each | labels | seconds | CPU seconds | MB beyond the features |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in counts:
        sets = collection_of(count, seen)
        kept: list[fm.CoSegments] = []
        cpu = time.process_time()
        seconds, rise = peak_beyond(lambda: kept.append(fm.cosegment(sets)))  # noqa: B023
        cpu = time.process_time() - cpu
        tokens = sets[0].grid[0] * sets[0].grid[1]
        cells = (count, tokens, kept[0].count, f"{seconds:.1f}", f"{cpu:.1f}", f"{rise / 1e6:.0f}")
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="*", default=[32, 64, 96])
    parser.add_argument("--images", type=int, nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.images:
        time_collections(given.images)
    if not given.sides:
        return
    small = features_of(16)
    fm.segment(small)  # what is loaded and compiled once
    print("| tokens | objects | parts | seconds | CPU seconds | MB beyond the features |")
    print("| --- | --- | --- | --- | --- | --- |")
    for side in given.sides:
        found = features_of(side)
        kept: list[fm.Segments] = []
        cpu = time.process_time()
        seconds, rise = peak_beyond(lambda: kept.append(fm.segment(found)))  # noqa: B023
        cpu = time.process_time() - cpu
        objects, parts = (level.count for level in kept[0].tree)
        cells = (side**2, objects, parts, f"{seconds:.2f}", f"{cpu:.2f}", f"{rise / 1e6:.0f}")
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
