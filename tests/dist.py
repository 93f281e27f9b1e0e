"""Builds what a release holds, and tries it as those who install it would.

    python tests/dist.py [--out dist] [--pythons python3.11 python3.12 python3.13] [--light]

The sdist once; a wheel from it for each Python; twine's check of all; then each wheel in an
environment that holds nothing else, with the extra `explore`, where a map is reduced by the C++
backend and the explorer answers. ``--light`` installs what the maps alone need, and looks at those.
Pythons that are not here are named, and left out. pybind11 has no stable ABI, hence a wheel for
each; wheels for other machines are cibuildwheel's (`[tool.cibuildwheel]` in pyproject.toml).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ("setuptools", "wheel", "pybind11", "cmake", "ninja", "build")

EXPLORE = """
import threading, urllib.request
from flashmaps.explorer import run
told = threading.Event()
where = []
def say(text):
    where.append(text.split()[5]); told.set()
kwargs = {"port": 0, "browser": False, "say": say}
threading.Thread(target=run.run, kwargs=kwargs, daemon=True).start()
assert told.wait(600)
import time
for _ in range(100):
    try:
        page = urllib.request.urlopen(where[0], timeout=10).read()
        break
    except OSError:
        time.sleep(0.1)
assert b"/static/app.js" in page
import anywidget, flashmaps as fm
print("explorer", where[0])
"""


def run(*command: str | Path, **more: str) -> None:
    """Run a command, shown; SystemExit if it fails."""
    print("+", *command, flush=True)
    done = subprocess.run([str(each) for each in command], env={**os.environ, **more}, cwd="/")
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}")


def pip(python: Path, *what: str | Path) -> None:
    """Install into an environment."""
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "-q",
        "--constraint", constraints, *what)  # fmt: skip


def environment(python: str, folder: Path) -> Path:
    """The python of a new environment."""
    run(python, "-m", "venv", folder)
    return folder / "bin/python"


def find(names: list[str]) -> list[str]:
    """Those Pythons that are here and run: on PATH, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = []
    for name in names:
        places = [shutil.which(name), *sorted(pyenv.glob(f"versions/*/bin/{Path(name).name}"))]
        works = [
            str(path) for path in places
            if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode
        ]  # fmt: skip
        found += works[:1]
        if not works:
            print(f"{name} is not here, and is left out; pyenv or uv can install it")
    return found


def main() -> None:
    """Build, check and try."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--pythons", nargs="+", default=["python3.11", "python3.12", "python3.13"])
    parser.add_argument("--light", action="store_true")
    given = parser.parse_args()
    out = given.out.resolve()
    pythons = find(given.pythons)
    if not pythons:
        raise SystemExit("none of the Pythons is here")
    # Of twelve files that are compiled, one knows Python; ccache finds the others again.
    launcher = {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache"} if shutil.which("ccache") else {}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, ROOT)
        sdist = max(out.glob("flashmaps-*.tar.gz"), key=lambda path: path.stat().st_mtime)
        with tarfile.open(sdist) as archive:
            archive.extractall(here / "source", filter="data")
        (source,) = (here / "source").iterdir()
        wheels = []
        for number, python in enumerate(pythons):
            builder = environment(python, here / f"build-{number}")
            pip(builder, *BUILD)
            run(builder, "-m", "build", "--no-isolation", "--wheel",
                "--outdir", here / f"wheel-{number}", source,
                FLASHMAPS_REQUIRE_NATIVE="1", FLASHMAPS_CUDA="0", **launcher)  # fmt: skip
            (wheel,) = (here / f"wheel-{number}").iterdir()
            wheels.append(Path(shutil.copy2(wheel, out)))
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, *wheels)
        for number, (python, wheel) in enumerate(zip(pythons, wheels, strict=True)):
            fresh = environment(python, here / f"fresh-{number}")
            pip(fresh, wheel if given.light else f"flashmaps[explore] @ {wheel.as_uri()}")
            run(fresh, ROOT / "tests/smoke.py")
            if not given.light:
                run(fresh, "-c", EXPLORE)
            shutil.rmtree(here / f"fresh-{number}")  # gigabytes, with torch
    print("built and tried:", *(each.name for each in (sdist, *wheels)))


if __name__ == "__main__":
    main()
