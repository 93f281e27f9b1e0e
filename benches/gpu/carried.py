"""Makes build/carried: what a machine with a card, and no compiler or network, is given along.

    make carried                                   # or, with a Python like the card's at hand:
    python benches/gpu/carried.py --python /path/to/python3.12

The modules flashmaps._C and flashmaps._cuda for that Python, and a Triton cache of the kernels that
`session.py --quick` checks, times and tunes, compiled for the card here, where none is (warm.py). A
cache is hit only by the very triton that filled it, so its Python should have the card's: without
--python an environment is made (build/carried-env) of the versions below. build/ is not for git.

Compiled kernels stay in build/carried-cache, so a command that was stopped goes on where it was;
those of other sources or another triton are deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tree

# What a card's machine is expected to have.
PYTHON = "python3.12"
PACKAGES = ("torch==2.11.0", "triton==3.6.0", "numpy==2.5.*", "setuptools<82")
ARCHITECTURE = "sm_90"

MOST = 24 * 10**6  # bytes in all


def environment(folder: Path) -> str:
    """The Python of an environment with PACKAGES, made where there is none yet."""
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        run(PYTHON, "-m", "venv", str(folder))
        run(str(python), "-m", "pip", "install", "--quiet", *PACKAGES)
        (folder / "ready").touch()
    return str(python)


def run(*command: str, **environment: str) -> str:
    """A command's output; what it says of errors is shown."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def modules(python: str, out: Path, architecture: str, *, emulated: bool) -> None:
    """Build the compiled modules for another Python with this one's CMake, Ninja and pybind11."""
    import pybind11

    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = (shutil.which(tool, path=scripts) for tool in ("cmake", "ninja"))
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    for name, tool in (("cmake", cmake), ("ninja", ninja), ("nvcc", nvcc)):
        if tool is None:
            raise SystemExit(f"{name} was not found: it builds the modules to carry along")
    tag = run(
        python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    ).strip()
    sources = [("native", tree.ROOT, ["_C"]), ("cuda", tree.ROOT / "csrc/cuda", ["_cuda"])]
    if emulated:
        sources[0][2].append("_emulated")
    for name, source, targets in sources:
        build = tree.ROOT / "build" / f"carried-{name}"
        options = [
            f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={_program(python)}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCMAKE_BUILD_TYPE=Release",
        ]  # fmt: skip
        if name == "cuda":
            number = architecture.removeprefix("sm_")
            options += [
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={number}-real",
            ]
        run(str(cmake), "-S", str(source), "-B", str(build), "-G", "Ninja", *options)
        run(str(cmake), "--build", str(build), "--target", *targets)
        for target in targets:
            shutil.copy(build / f"{target}{tag}", out)
            run("strip", str(out / f"{target}{tag}"))


def _program(python: str) -> str:
    """The interpreter itself, whose headers CMake looks for beside it."""
    found = run(python, "-c", "import sys; print(sys.base_prefix + '/bin/python%d.%d' % "
                "sys.version_info[:2])").strip()  # fmt: skip
    return found if Path(found).exists() else python


def kept_cache(folder: Path, versions: str, parts: list[str]) -> Path:
    """Where kernels of these sources, versions and parts are kept; others' are deleted."""
    told = hashlib.sha256(f"{versions} {sorted(parts)}".encode())
    for file in sorted((tree.ROOT / "kernels").glob("*")):
        if file.suffix in (".py", ".json"):
            told.update(file.read_bytes())
    cache = folder / told.hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    for other in folder.iterdir():
        if other != cache:
            shutil.rmtree(other)
    return cache


def triton_cache(python: str, out: Path, cache: Path, arguments: list[str], jobs: int) -> int:
    """Fill a cache and pack it; how many kernels it has."""
    command = (python, str(Path(__file__).with_name("warm.py")), *arguments)
    workers = [
        subprocess.Popen(
            [*command, "--share", f"{number}/{jobs}"],
            env={**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
            cwd=cache,
        )
        for number in range(jobs)
    ]
    statuses = [worker.wait() for worker in workers]
    if any(statuses):
        raise SystemExit("the Triton cache could not be filled: see above; it goes on from there")
    # Intermediate code is not read again; whoever wants it compiles anew.
    for text in cache.glob("*/*"):
        if text.suffix in (".ttir", ".ttgir", ".llir", ".source"):
            text.write_text("")
    run("tar", "-cJf", str(out / "triton-cache.tar.xz"), "-C", str(cache), ".", XZ_OPT="-9e")
    return len([*cache.glob("*/*.cubin")])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="carried.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--python", help="an interpreter with the card's versions; default an environment of them")
    add("--architecture", default=ARCHITECTURE, help="of the card")
    add("--kernels", nargs="*", default=["quick", "headline", "tune"], metavar="PART",
        help="of the cache: some of quick, headline, tune, all; default without all")  # fmt: skip
    add("--emulated", action="store_true", help="CUDA C++ for the CPU too, to try without a card")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile kernels")
    options = parser.parse_args()
    begin = time.monotonic()
    out = tree.CARRIED
    out.mkdir(parents=True, exist_ok=True)
    python = options.python or environment(tree.ROOT / "build/carried-env")
    modules(python, out, options.architecture, emulated=options.emulated)
    what = "import json, platform, torch, triton; print(json.dumps([platform.python_version(), "
    versions = json.loads(run(python, "-c", what + "torch.__version__, triton.__version__]))"))
    said = dict(zip(("python", "torch", "triton"), versions, strict=True))
    kernels = 0
    if options.kernels:
        arguments = [options.architecture, *options.kernels]
        cache = kept_cache(tree.ROOT / "build/carried-cache", str(said), arguments)
        kernels = triton_cache(python, out, cache, arguments, options.jobs)
    files = {file.name: file.stat().st_size for file in sorted(out.iterdir()) if file.is_file()}
    told = {**said, "architecture": options.architecture, "kernels": kernels}
    (out / "carried.json").write_text(json.dumps(told, indent=1) + "\n")
    for name, size in files.items():
        print(f"{size / 1e6:8.2f} MB  {name}")
    print(f"{sum(files.values()) / 1e6:8.2f} MB in {out}, {kernels} kernels, {said}, "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    if sum(files.values()) > MOST:
        raise SystemExit(f"more than {MOST / 1e6:.0f} MB, which is all that can be carried")


if __name__ == "__main__":
    main()
