"""Errors planted in the CUDA kernels, each of which their run on the host must find.

Some are planted while the kernels run: csrc/cuda/emulation can spoil any call of a primitive. What
has no primitive, as where a tail begins, is changed in a copy of the sources, and compiled again.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import native
import numpy as np
import numpy.typing as npt
import pytest

CUDA = native.ROOT / "csrc" / "cuda"

# In a copy of the sources ----------------------------------------------------------------------


class Change(NamedTuple):
    """An error of one line, and how it shows: in what is said, or in the numbers."""

    file: str
    before: str
    after: str
    says: str | None = None


CHANGES = {
    "the tail of the keys begins one late": Change(
        "tile.h", "first + column >= there", "first + column > there"
    ),
    "one token too many is read": Change(
        "tile.h", "row < there &&", "row <= there &&", "of global memory"
    ),
    "eight numbers too many of each token are read": Change(
        "tile.h", "8 * unit < dims", "8 * unit <= dims", "of global memory"
    ),
    "one row too many is written": Change(
        "passes.h", "if (index >= num_kept) break;", "if (index > num_kept) break;",
        "writes 4 bytes of global memory",
    ),
    "fragments are swapped": Change("tile.h", "a[m], b[0], b[1]", "a[m], b[0], b[2]"),
    "a fragment has the wrong rows": Change(
        "tile.h", "kWarpRows + lane % 16", "kWarpRows + lane / 2"
    ),
    "the accumulators' rows are mistaken": Change(
        "tile.h", "r / 2 * 16 + r % 2 * 8", "r / 2 * 8 + r % 2 * 16"
    ),
    "units are permuted where they are written only": Change(
        "tile.h", "to + Panel<S>::offset(row, unit)",
        "to + (row * Panel<S>::kRowBytes + 16 * unit)",
    ),
    "there is one stage": Change(
        "tile.h", "to = stage(c.step % kStages)", "to = stage(0)", "a race"
    ),
}  # fmt: skip
ALWAYS = (
    "the tail of the keys begins one late", "one row too many is written", "fragments are swapped",
)  # fmt: skip


def compiled(folder: Path, change: Change | None) -> ctypes.CDLL:
    """tests/cuda_planted.cpp with the kernels as they are, or changed."""
    sources = folder / "csrc"
    shutil.copytree(native.ROOT / "csrc", sources)
    if change is not None:
        changed = sources / "cuda" / change.file
        text = changed.read_text()
        assert change.before in text, f"{change.file} has changed; plant the error anew"
        changed.write_text(text.replace(change.before, change.after, 1))
    emulation = native.build("flashmaps_emulation")
    made = folder / "planted.so"
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-fPIC", "-shared", "-o", str(made),
         "-I", str(sources), str(native.ROOT / "tests" / "cuda_planted.cpp"), str(emulation)],
        check=True,
    )  # fmt: skip
    library = ctypes.CDLL(str(made))
    library.row_statistics.restype = ctypes.c_char_p
    return library


HEADS, QUERIES, KEYS, DIM = 2, 37, 75, 40
PITCH = 40


def row_statistics(library: ctypes.CDLL) -> tuple[str, float]:
    """What the kernels say, and how far they are off: the largest error of entropy and maximum."""
    random = np.random.default_rng(0)
    # Scores about as large as 0, the one of a key that is not there.
    query, key = (
        (random.standard_normal((HEADS, count, DIM)) / 2).astype(np.float16)
        for count in (QUERIES, KEYS)
    )
    shift = np.full((HEADS, PITCH), np.nan, np.float32)
    entropy, top = (np.full(QUERIES, np.nan, np.float32) for _ in range(2))
    argtop = np.full(QUERIES, -1, np.int64)
    arrays = [query, key], [shift, entropy, top, argtop]
    inputs, outputs = ([ctypes.c_void_p(x.ctypes.data) for x in some] for some in arrays)
    sizes = HEADS, QUERIES, KEYS, DIM, PITCH
    said = library.row_statistics(*inputs, *sizes, *outputs).decode()

    scores = query.astype(np.float64) @ key.astype(np.float64).swapaxes(1, 2)
    powers = np.exp(scores - scores.max(2, keepdims=True))
    dense = (powers / powers.sum(2, keepdims=True)).mean(0)
    errors: list[npt.NDArray[np.float64]] = [
        entropy + (dense * np.log(dense)).sum(1),
        top - dense.max(1),
        dense.max(1) - dense[np.arange(QUERIES), argtop],
    ]
    error = np.abs(errors).max()
    return said, float("inf") if np.isnan(error) else float(error)


def test_nothing_is_found_where_nothing_is_planted(tmp_path: Path) -> None:
    said, error = row_statistics(compiled(tmp_path, None))
    assert said == ""
    assert error < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow, id=name)
        for name in CHANGES
    ],
)
def test_a_changed_source_is_found_out(tmp_path: Path, name: str) -> None:
    change = CHANGES[name]
    said, error = row_statistics(compiled(tmp_path, change))
    if change.says is None:
        assert said == ""
        assert error > 1e-3  # a hundred times what is right
    else:
        assert change.says in said
