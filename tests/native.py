"""Builds those parts of the C++ sources that only the tests need: targets no install includes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(target: str, *options: str, tree: Path | None = None) -> Path:
    """Compile what has changed of a CMake target; the library. Skips where there is no compiler.

    Another configuration (``options``) takes a ``tree`` of its own.

    Raises RuntimeError, with what the compiler said, where the sources are at fault.
    """
    pybind11 = pytest.importorskip("pybind11")
    compiler = os.environ.get("CXX", "c++").split()[0]
    cmake, ninja, _ = (_find(name) for name in ("cmake", "ninja", compiler))
    # A tree of its own: that of the install is set up anew where its settings change.
    if tree is None:
        tree = ROOT / "build" / f"tests-{sysconfig.get_config_var('EXT_SUFFIX').split('.')[1]}"
    if not (tree / "build.ninja").exists():
        _run(
            cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
        )  # fmt: skip
    _run(cmake, "--build", str(tree), "--target", target)
    names = {f"{target}.so", f"{target}.dylib", f"lib{target}.a"}
    names.add(target + str(sysconfig.get_config_var("EXT_SUFFIX")))
    (made,) = (tree / name for name in names if (tree / name).exists())
    return made


def _find(tool: str) -> str:
    beside = str(Path(sys.executable).parent)  # the environment's own, on PATH or not
    found = shutil.which(tool, path=beside) or shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} was not found, which builds the emulation of CUDA kernels")
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
