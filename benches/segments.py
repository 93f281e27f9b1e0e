"""Segments of one image by size: seconds after the forward pass, and memory beyond the features.

    python benches/segments.py --sides 64 96 --threads 2

Features are those of the built-in model for a photograph that scikit-image ships, at so many
tokens a side. Memory is the process's peak resident size during the call, less what it was
before (Linux: /proc/self/clear_refs); it counts everything, numpy's and torch's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import flashmaps as fm
import torch
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
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
