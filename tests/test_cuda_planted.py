"""Errors planted in the CUDA kernels, each of which their run on the host must find.

Some are planted while the kernels run: csrc/cuda/emulation can spoil any call of a primitive. What
has no primitive, as where a tail begins, is changed in a copy of the sources, and compiled again.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import cuda_emulated
import native
import numpy as np
import numpy.typing as npt
import pytest
import torch
from checks import Checked
from cuda_emulated import Watched, shapes
from cuda_problems import OPERATIONS
from problems import Problem

pytestmark = pytest.mark.usefixtures("poison", "one_thread")
emulated, module = cuda_emulated.emulated, cuda_emulated.module  # fixtures

CUDA = native.ROOT / "csrc" / "cuda"

# While they run --------------------------------------------------------------------------------

TWO_HEADS, ONE_HEAD = Problem((1, 2, 70, 169, 40)), Problem((1, 1, 70, 169, 40))
CASES = [
    ("lse", TWO_HEADS), ("reductions", TWO_HEADS), ("product", TWO_HEADS), ("product", ONE_HEAD),
    ("transposed_product", TWO_HEADS), ("return_probability", TWO_HEADS),
]  # fmt: skip
# Calls that may be spoiled without harm, and why.
HARMLESS = {
    "? first + i : 0), bytes)": "terms of columns that are not there, whose scores are replaced",
}


def check(operation: str, problem: Problem) -> None:
    """Hold an operation to float64, by the error budget of test_cuda.py."""
    OPERATIONS[operation](Checked(problem, torch.float16, "cuda", "cpu"))


def line_of(site: tuple[Any, ...]) -> str:
    """A site's line of the sources."""
    return (CUDA / site[1]).read_text().splitlines()[site[2] - 1].strip()


@pytest.mark.parametrize(("operation", "problem"), CASES, ids=str)
def test_every_spoiled_call_is_found_out(
    operation: str, problem: Problem, emulated: Watched
) -> None:
    emulated.shapes = shapes((2, 2, True))
    kernels = emulated.native
    kernels.take_sites()
    check(operation, problem)  # as it is, nothing is wrong
    sites = kernels.take_sites()
    assert {site[0] for site in sites} >= {
        "sync_threads", "wait_copies", "copy_async_16", "ldmatrix_x4", "mma_16816",
    }  # fmt: skip
    missed = []
    for site in sites:
        kernels.plant(*site[:3])
        try:
            check(operation, problem)
        except (AssertionError, RuntimeError) as error:
            # Who skips a barrier or a wait has a race, whatever the numbers are.
            if site[0] in ("sync_threads", "sync_warp", "wait_copies"):
                assert "a race: " in str(error)
        else:
            if not any(text in line_of(site) for text in HARMLESS):
                missed.append((*site[:3], line_of(site)))
        finally:
            kernels.plant("", "", 0)
    assert not missed


def test_every_call_in_the_sources_is_among_them(emulated: Watched) -> None:
    emulated.native.take_sites()
    for operation, problem in CASES:
        check(operation, problem)
    seen = {site[1:3] for site in emulated.native.take_sites()}
    call = re.compile(
        r"\b(sync_threads|sync_warp|wait_copies<\d>|copy_async_\d+|ldmatrix_x4(_trans)?|"
        r"mma_16816<T>|mma_1688_tf32|shuffle(_xor)?)\("
    )
    for path in CUDA.glob("*.h"):
        if path.name in ("primitives.h", "device.h", "emulated.h"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if call.search(line):
                assert (path.name, number) in seen, f"{path.name}:{number}: {line.strip()}"


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
        "tile.h", "row < there ?", "row <= there ?", "of global memory"
    ),
    "eight numbers too many of each token are read": Change(
        "tile.h", "8 * unit < dim -", "8 * unit <= dim -", "of global memory"
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
