"""Rewrites settings.json: the tiles of one architecture.

    python -m flashmaps.kernels.autotune               # on a machine with a GPU: the fastest ones
    python -m flashmaps.kernels.autotune --ahead sm_90 # anywhere: the first ones that fit
    python -m flashmaps.kernels.autotune --ahead sm_90 return product:32/128   # only these

Both try the same short lists. What fits compiles without spilling registers, in the card's shared
memory, for every problem of its kind that `ahead` compiles and some more. Lists begin with what is
expected to be fast: large tiles, because each number of Q and K that comes from the second-level
cache is used once for every token on the other side of the tile.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from flashmaps.files import write_text
from flashmaps.kernels import settings
from flashmaps.kernels.ahead import (
    REPRESENTATIVE,
    SHARED,
    Case,
    every_case,
    examine,
    key_of,
)
from flashmaps.kernels.settings import KINDS, TABLE, Settings, architecture_of, settings_of

Tiles = tuple[tuple[int, ...], ...]  # rows, columns, warps, stages

_HALF: Tiles = (
    (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2),
    (64, 32, 8, 1), (64, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 1),
)  # fmt: skip
_FULL: Tiles = (
    (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 4, 2), (32, 32, 8, 2),
    (16, 32, 4, 1), (16, 16, 4, 1),
)  # fmt: skip
_COMPOSED: Tiles = (
    (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2), (32, 32, 4, 2),
)  # fmt: skip
# All keys in a tile: rows count only.
_WHOLE: Tiles = ((64, 256, 8, 2), (64, 256, 8, 1), (32, 256, 8, 2), (16, 256, 8, 1))
_REGISTERS = 255  # the most that a thread can have on NVIDIA's cards
_FLAGS = slice(5, None)  # of an entry: anchored, ahead

_ROWS = ("entropy", "max", "argmax", "expectation")
_COLUMNS = ("column_sum", "column_entropy", "column_max", "column_argmax")
_TOPK = ("topk_values", "topk_indices")
_ANY: tuple[tuple[str, ...], ...] = (_ROWS, _COLUMNS, ("dense",), _TOPK)


def candidates(architecture: str, kind: str, bits: int, width: int) -> list[tuple[int, ...]]:
    """The tilings to try, the most promising first.

    On NVIDIA's cards each also with all registers to itself: where several programs would fit
    beside each other but for a few registers, the assembler spills those. Today's comes first where
    it is anchored or goes ahead, which no list has: `benches/gpu/tuning.py` found those on a card.
    """
    tiles = list(_tiles(kind, bits))
    if architecture.startswith("sm_"):
        tiles = [each for tile in tiles for each in (tile, (*tile, _REGISTERS))]
    today = settings_of(architecture).table[kind].get(f"{bits}/{width}", [])
    return [tuple(today), *tiles] if any(today[_FLAGS]) else tiles


def _tiles(kind: str, bits: int) -> Tiles:
    if kind == "whole":
        return _WHOLE
    if bits == 32 and kind != "composed":
        return _FULL
    # With an operand the tile is also the left side of a product: another copy, in three parts.
    return {
        "product": _HALF[1:],
        "rare": _HALF[3:],
        "composed": _COMPOSED,
        "gradient": _HALF[3:],
    }.get(kind, _HALF)


def cases(kind: str, bits: int, width: int) -> Iterator[Case]:
    """The plainest problem of a kind, and demanding ones: masked, of odd sizes, every reducer."""
    plain = {
        "lse": Case(("lse",)),
        "rows": Case(_ROWS, queries=4001, keys=4003),
        "columns": Case(_COLUMNS, queries=4001, keys=4003),
        "even": Case((*_ROWS, "diagonal")),
        "product": Case(("product",)),
        "dense": Case(("dense",)),
        "topk": Case(_TOPK),
        "return": Case(("return_probability",)),
        "whole": Case(_ROWS, keys=77, known_lse=False),
        "rare": Case(_ROWS, layout="dims first"),
        "composed": Case((*_ROWS, "diagonal"), composed=True),
        "gradient": Case(("entropy", "expectation"), backward=True),
    }[kind]
    plain = replace(plain, dim=width, dtype=torch.float32 if bits == 32 else torch.float16)
    yield plain
    odd = {"queries": 4001, "keys": 4003, "masked": True, "dim": width * 5 // 8}
    if kind == "return":
        odd["keys"] = 4001
    demanding = [replace(plain, **odd)]
    if kind == "even":
        demanding = [replace(plain, dim=width * 5 // 8), replace(plain, names=_COLUMNS)]
    elif kind == "rows":
        square = {**odd, "queries": 4001, "keys": 4001}
        demanding = [replace(plain, **square, names=(*_ROWS, "diagonal", "max"))]
    elif kind == "product":
        demanding.append(replace(plain, **odd, names=("transposed_product",), columns=17))
    elif kind == "topk":
        demanding.append(replace(plain, **odd, k=64))
    elif kind == "composed":
        demanding = [replace(plain, **odd, precision=each) for each in ("highest", "high")]
        demanding += [replace(each, queries=4096, keys=4096) for each in demanding]
    elif kind == "whole":
        few = {"queries": 4001, "masked": True, "known_lse": False}
        few["keys"] = 256 if width <= 128 else 128
        demanding = [replace(plain, **few, names=each) for each in _ANY]
    elif kind == "rare":
        lines = {"normalize": "rows", "queries": 4001, "masked": True, "layout": "heads first"}
        names = (*_ANY, ("product",), ("transposed_product",))
        demanding = [replace(plain, **lines, names=each) for each in names]
        lines |= {"keys": 4096, "queries": 4096}
        demanding.append(replace(plain, **lines, names=("return_probability",)))
    for case in demanding:
        yield case
        if bits == 32:
            yield replace(case, precision="high")


def with_tiling(of: Settings, kind: str, key: str, tiling: tuple[int, ...]) -> Settings:
    """The settings with one entry of the table changed."""
    table = {name: dict(entries) for name, entries in of.table.items()}
    table[kind][key] = list(tiling)
    return replace(of, table=table)


def of_class(bits: int, width: int) -> Iterator[Case]:
    """The cases that `ahead` compiles whose Q and K are of that size."""
    for case in (*REPRESENTATIVE, *every_case()):
        size = 32 if case.dtype == torch.float32 else 16
        if size == bits and width // 2 < max(case.dim, 33) <= width:
            yield case


def fits(architecture: str, kind: str, bits: int, width: int, tiling: tuple[int, ...]) -> bool:
    """Whether every problem of a kind compiles in these tiles without spilling."""
    seen = set()
    for case in (*cases(kind, bits, width), *of_class(bits, width)):
        changed = with_tiling(
            settings_of(architecture, case.precision), kind, f"{bits}/{width}", tiling
        )
        for launch in case.launches_with(changed):
            if launch.kind != kind or key_of(launch) in seen:
                continue
            seen.add(key_of(launch))
            try:
                found = examine(launch, architecture)
            except Exception:  # triton gave up: too much shared memory, or an error of its own
                return False
            # Four warps alone leave half of the units idle: two programs must find room.
            room = SHARED[architecture] // (2 if launch.tiling.warps == 4 else 1)
            if found.problems() or found.shared > room:
                return False
    return True


def first_that_fits(architecture: str, kind: str, bits: int, width: int) -> tuple[int, ...] | None:
    """The first of the candidates, or None."""
    for tiling in candidates(architecture, kind, bits, width):
        if fits(architecture, kind, bits, width, tiling):
            return tiling
    return None


def ahead(architecture: str, only: list[str]) -> dict[str, dict[str, list[int]]]:
    """The table of an architecture that is not here; ``only`` some of it: "rows", "rows:16/64"."""
    table = {kind: dict(of) for kind, of in settings_of(architecture).table.items()}
    classes = [
        (kind, bits, width)
        for kind in KINDS
        for bits in (16, 32)
        for width in (64, 128, 256)
        if not only or {kind, f"{kind}:{bits}/{width}"} & set(only)
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = [pool.submit(first_that_fits, architecture, *each) for each in classes]
        for (kind, bits, width), job in zip(classes, jobs, strict=True):
            found = job.result()
            print(f"{architecture} {kind} {bits}/{width}: {found}", flush=True)
            table[kind][f"{bits}/{width}"] = list(
                found or candidates(architecture, kind, bits, width)[-1]
            )
    return table


def fastest(architecture: str, kind: str, bits: int, width: int) -> tuple[int, ...]:
    """The fastest of the candidates that fit, on the GPU that is here."""
    case = next(cases(kind, bits, width))
    times: dict[tuple[int, ...], float] = {}
    for tiling in candidates(architecture, kind, bits, width):
        if not fits(architecture, kind, bits, width, tiling):
            continue
        changed = with_tiling(settings_of(architecture), kind, f"{bits}/{width}", tiling)
        times[tiling] = _milliseconds(case.runner(changed, "cuda"))
    found = min(times, key=times.__getitem__)
    print(f"{kind} {bits}/{width}: " + ", ".join(f"{t} {ms:.3f} ms" for t, ms in times.items()))
    return found


def _milliseconds(run: Callable[[], object]) -> float:
    """Median of some calls on the GPU."""
    times = []
    for _ in range(13):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return sorted(times[3:])[5]


def here() -> None:
    """Tune for the GPU that is here, and write."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no GPU here. The tiles of a card that is elsewhere: "
            "python -m flashmaps.kernels.autotune --ahead sm_90"
        )
    architecture = architecture_of(torch.device("cuda"))
    table: dict[str, dict[str, list[int]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for bits in (16, 32):
            for width in (64, 128, 256):
                found = fastest(architecture, kind, bits, width)
                table[kind][f"{bits}/{width}"] = list(found)
    write(architecture, table)


def write(architecture: str, tiles: dict[str, dict[str, list[int]]]) -> None:
    """Put an architecture's tiles into settings.json, one kind a line."""
    everything = json.loads(TABLE.read_text("utf-8"))
    everything[architecture]["tiles"] = tiles
    lines = ["{"]
    for name, entry in everything.items():
        lines.append(f' "{name}": {{')
        for field, value in entry.items():
            if field != "tiles":
                lines.append(f'  "{field}": {value},')
        lines.append('  "tiles": {')
        lines.append(
            ",\n".join(f'   "{kind}": {json.dumps(of)}' for kind, of in entry["tiles"].items())
        )
        lines += ["  }", " },"]
    lines[-1] = " }"
    write_text(TABLE, "\n".join([*lines, "}", ""]))
    settings._table.cache_clear()


def main(arguments: list[str]) -> None:
    """`python -m flashmaps.kernels.autotune [--ahead [ARCHITECTURE...] [KIND[:BITS/WIDTH]...]]`"""
    if arguments[:1] == ["--ahead"]:
        architectures = [name for name in arguments[1:] if name in SHARED] or list(SHARED)
        only = [name for name in arguments[1:] if name not in SHARED]
        for architecture in architectures:
            write(architecture, ahead(architecture, only))
    else:
        here()


if __name__ == "__main__":
    main(sys.argv[1:])
