"""The CUDA kernels as nvcc compiles them, without a GPU: registers, spills, instructions."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flashmaps.maps.backends import cuda, cuda_blocks

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100")
VARIANTS = [(token, steps) for token in ("Half", "BFloat") for steps in (3, 4, 5)]

# The kernels of a variant, by their names in cuda_blocks.REGISTERS.
KERNELS = {"lse": "lse", "statistics": "statistics", "product": "product", "return": "round_trip"}


def _nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    for place in (os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes)):
        if place and (found := shutil.which(place)) is not None:
            return found
    return None


NVCC = _nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found, which compiles for GPUs")


@functools.cache
def known_architectures() -> set[str]:
    assert NVCC is not None
    done = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def cuobjdump() -> str:
    """Of the toolkit, or the one that triton brings along."""
    assert NVCC is not None
    folders = [str(Path(NVCC).resolve().parent), *os.environ.get("PATH", "").split(os.pathsep)]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        pytest.skip("cuobjdump was not found, which reads machine code")
    return found


@dataclass
class Compiled:
    """One kernel for one architecture."""

    name: str
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    instructions: Counter[str] | None = None

    def count(self, opcode: str) -> int:
        """Instructions of that name, with whatever modifiers."""
        assert self.instructions is not None
        return sum(
            times
            for found, times in self.instructions.items()
            if found == opcode or found.startswith(f"{opcode}.")
        )


def compiled(folder: Path, source: str, architecture: str, *defines: str) -> dict[str, Compiled]:
    """What nvcc makes of a source, by kernel. Its warnings are errors."""
    if architecture.rstrip("a") not in known_architectures():
        pytest.skip(f"this nvcc does not know {architecture}")
    assert NVCC is not None
    out = folder / f"{architecture}.cubin"
    command = [
        NVCC, "-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch={architecture}", "-cubin",
        "-Werror=all-warnings", "-Xptxas=-v", "-DFLASHMAPS_POLYNOMIAL=0",
        *(f"-D{define}" for define in defines), str(ROOT / "csrc/cuda" / source), "-o", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    found: dict[str, Compiled] = {}
    now = None
    for line in (done.stdout + done.stderr).splitlines():
        if match := re.search(r"Compiling entry function '\w*?\d([a-z_]+)_kernel", line):
            now = found.setdefault(match[1], Compiled(match[1]))
        elif now is not None and (match := re.search(r"(\d+) bytes stack frame", line)):
            now.stack = int(match[1])
            now.spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", line))
        elif now is not None and (match := re.search(r"Used (\d+) registers", line)):
            now.registers = int(match[1])
    code = subprocess.run(
        [cuobjdump(), "-sass", str(out)], capture_output=True, text=True, check=True
    ).stdout
    for part in code.split("Function : ")[1:]:
        match = re.match(r"\w*?\d([a-z_]+)_kernel", part)
        assert match is not None
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", part, re.M)
        found[match[1]].instructions = Counter(opcodes)
    return found


def check_variant(folder: Path, architecture: str, token: str, steps: int) -> None:
    """No spills, few enough registers, and the instructions that the design is made of."""
    defines = (f"FLASHMAPS_TOKEN={token}", f"FLASHMAPS_STEPS={steps}")
    kernels = compiled(folder, "variant.cu", architecture, *defines)
    assert set(kernels) == set(KERNELS)
    for name, kernel in kernels.items():
        assert kernel.stack == 0 and kernel.spilled == 0, f"spills: {kernel}"
        assert kernel.count("LDL") == 0 and kernel.count("STL") == 0, f"local memory: {kernel}"
        assert kernel.registers <= cuda_blocks.REGISTERS[KERNELS[name]], kernel
        # Of one chunk of a head and a warp's 32 x 64 of a tile, for each map.
        maps = 2 if name == "return" else 1
        wanted = {"HMMA": maps * 16 * steps, "LDSM": maps * 6 * steps}
        if name == "product":  # of 64 columns of the map and 32 of the operand, 8 at a time
            wanted["HMMA"] += 3 * 2 * 8 * 4
        for opcode, times in wanted.items():
            assert kernel.count(opcode) == times, f"{opcode}: {kernel.count(opcode)}, not {times}"
        assert kernel.count("LDGSTS") > 0, "no asynchronous copies"
        assert kernel.count("MUFU.EX2") >= 64, "exponentials of something else than the unit"


@needs_nvcc
@pytest.mark.parametrize("architecture", ("sm_80", "sm_90a"))
def test_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    check_variant(tmp_path, architecture, "Half", 4)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    "variant", VARIANTS, ids=[f"{token}-{16 * steps}" for token, steps in VARIANTS]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_without_spills(
    architecture: str, variant: tuple[str, int], tmp_path: Path
) -> None:
    check_variant(tmp_path, architecture, *variant)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_surrounds_the_passes_compiles_without_spills(
    architecture: str, tmp_path: Path
) -> None:
    kernels = compiled(tmp_path, "launch.cu", architecture)
    assert set(kernels) == {"prepare", "combine", "combine_lse"}
    for kernel in kernels.values():
        assert kernel.stack == 0 and kernel.spilled == 0 and kernel.registers <= 64, kernel


def test_the_module_loads_without_a_driver_and_says_so_when_it_is_called() -> None:
    if cuda._native is None:
        pytest.skip("flashmaps._cuda is not built here")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match="asking device 0 what it has: cudaError"):
        cuda._native.limits(0)
