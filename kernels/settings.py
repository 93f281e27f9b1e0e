"""Launch settings: which tiles, for which architecture, kind of pass, dtype and head dimension.

The table is settings.json; `python -m flashmaps.kernels.autotune` rewrites a card's part of it, and
docs/kernels.md says how its numbers came about. A card that is not in it takes those of sm_80.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("settings.json")

# Kinds of passes, in the order of the table: log-sum-exp; statistics of rows, of columns; either of
# them without a mask and at sizes that the tiles divide; with an operand; writing the map; the k
# largest; tiles of two maps; all but the first and the last of them where a tile has all keys (up
# to `whole_row`; the columns of that entry do not count); what is rare and takes registers:
# normalised lines, numbers of a head that are not neighbours in memory, offsets of 64 bits;
# products of two maps, which are float32 whatever they are made of; and the way back.
KINDS = (
    "lse", "rows", "columns", "even", "product", "dense", "topk", "return", "whole", "rare",
    "composed", "gradient",
)  # fmt: skip


class Tiling(NamedTuple):
    """R x C tiles, by this many warps, with loads this many stages ahead."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int = 0  # that a thread may have; 0: NVIDIA's assembler weighs them against spills
    # A log-sum-exp keeps to the maxima of its first tile; see `launch_lse.tiling_of`.
    anchored: int = 0
    # Resident heads' products come before exponentials of the head before, where programs enough
    # for every multiprocessor hide nothing of each other.
    ahead: int = 0

    @property
    def options(self) -> dict[str, int]:
        """For triton."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True, eq=False)  # known by identity
class Settings:
    """What one architecture does."""

    architecture: str  # "sm_80", "sm_90", "sm_100", "gfx942" or "interpreter"
    table: dict[str, dict[str, list[int]]]  # kind -> "bits/width" -> tiling
    programs: int  # how many programs keep the whole card busy
    operand_columns: int  # columns of an operand that a program takes at once
    whole_row: int  # see `keeps_rows`
    matmul_precision: str  # torch.get_float32_matmul_precision()
    multiprocessors: int = 1
    resident: bool = True  # whether kept tokens of all heads stay on chip where they fit
    anchored: bool = False  # whether any log-sum-exp keeps to the maxima of its first tile
    splits: int = 0  # of streamed tokens, if not as many as the multiprocessors make best
    ahead: bool = False  # whether any products come before the exponentials of the last

    @property
    def nvidia(self) -> bool:
        return self.architecture.startswith("sm_")

    @property
    def fast_log(self) -> bool:
        """Whether log2 is to be that of the special function unit."""
        return self.nvidia

    @property
    def flatten(self) -> bool:
        """Whether the loops over keys and heads become one, so that loads run ahead across both.

        On Blackwell the compiler unrolls what it flattens, and registers spill.
        """
        return self.architecture in ("sm_80", "sm_90")

    @property
    def resident_bytes(self) -> int:
        """What kept tokens of all heads and the tiles streamed past them may take on chip.

        None on Blackwell, whose matrix unit has memory of its own: it has not been looked at.
        """
        return {"sm_80": 160, "sm_90": 200, "interpreter": 64}.get(self.architecture, 0) * 1024

    @property
    def one_product(self) -> bool:
        """Whether a sum may take up one product of matrices only, each time round a loop.

        triton up to 3.8 compiles two of them into one accumulator wrongly for Blackwell
        (triton-lang/triton#10821). So heads are then padded to one part, and float32 is multiplied
        as such: parts of bfloat16 would be several products.
        """
        return self.architecture == "sm_100"

    def keeps_rows(self, keys: int, dim: int) -> bool:
        """Whether a tile takes a whole row of so many keys: no log-sum-exp, one pass."""
        return keys <= (self.whole_row if dim <= 128 else self.whole_row // 2)

    def tiling(self, kind: str, dtype: torch.dtype, dim: int) -> Tiling:
        """The tiles of one kind of pass."""
        bits = 32 if dtype == torch.float32 else 16
        width = next(w for w in (64, 128, 256) if dim <= w)
        return Tiling(*self.table[kind][f"{bits}/{width}"])

    def precision(self, dtype: torch.dtype) -> str:
        """How products of Q and K are computed.

        float16 and bfloat16: exact products, summed in float32. float32 follows torch's own switch,
        `torch.set_float32_matmul_precision`: "highest" (torch's default) multiplies in float32;
        "high" and "medium" on the matrix units, in three parts of bfloat16 each, about as exact.
        """
        exact = dtype != torch.float32 or self.matmul_precision == "highest"
        return "ieee" if exact or self._plainly else "bf16x6"

    @property
    def _plainly(self) -> bool:
        """Whether products of float32 take no parts of bfloat16."""
        return self.one_product or self.architecture == "interpreter"

    def chunk(self, dtype: torch.dtype) -> int:
        """How many numbers of a head are multiplied at once, at most: as many as registers hold."""
        if self.architecture == "interpreter":
            return 32
        if dtype == torch.float32:
            return 16
        return 256 if self.one_product else 128

    def composition_precision(self) -> str:
        """How two maps (float32) are multiplied: the parts of bfloat16 that torch's switch means.

        "highest": about as exact as float32. "high": three products of parts, about 2^-16.
        "medium": one product of numbers rounded to bfloat16.
        """
        if self.architecture == "interpreter":
            return "ieee"
        if self.one_product and self.matmul_precision != "medium":
            return "ieee"
        return {"highest": "bf16x6", "high": "bf16x3", "medium": "bf16"}[self.matmul_precision]

    def operand_precision(self, dtype: torch.dtype) -> str:
        """How the map (float32) is multiplied with an operand (float32)."""
        if dtype == torch.float32 or self._plainly:
            return self.precision(torch.float32)
        return "bf16x6"

    def pooling_precision(self) -> str:
        """How the map is summed over cells: exactly, whatever torch's switch says."""
        return "ieee" if self._plainly else "bf16"


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text("utf-8"))


# Of the largest card of each: an A100, an H100, a B200, an MI300X.
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 2}


def settings_of(architecture: str, matmul_precision: str = "highest") -> Settings:
    """The settings of an architecture by its name."""
    entry = _table()[architecture]
    return Settings(
        architecture,
        entry["tiles"],
        entry["programs"],
        entry["operand_columns"],
        entry["whole_row"],
        matmul_precision,
        _MULTIPROCESSORS[architecture],
    )


def architecture_of(device: torch.device) -> str:
    """Which part of the table a device takes."""
    if interpreting():
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    # Consumer cards of any generation have the shared memory of sm_80's smaller relatives, and
    # matrix instructions that sm_80's table suits.
    return {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), "sm_80")


@functools.cache
def _settings_here(device: torch.device, matmul_precision: str) -> Settings:
    found = settings_of(architecture_of(device), matmul_precision)
    if device.type != "cuda":
        return found
    here = torch.cuda.get_device_properties(device).multi_processor_count
    return replace(found, multiprocessors=here)


def settings_here(device: torch.device) -> Settings:
    """The settings of a device, under torch's present matmul precision."""
    return _settings_here(device, torch.get_float32_matmul_precision())


def interpreting() -> bool:
    """Whether triton runs its kernels in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
