"""What users install: the wheel, the sdist, an install without a compiler, a light import.

Nothing here needs a network: builds run without isolation, on a copy of the project.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ("setuptools", "pybind11", "cmake", "ninja")
# Imported by functions that need them, never by `import flashmaps`.
HEAVY = ("PIL", "diffusers", "matplotlib", "skimage", "sklearn", "transformers", "triton", "typer")

needs_build_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in BUILD_TOOLS)
    or not (ROOT / "setup.py").exists(),
    reason=f"builds the project: needs its source tree and {', '.join(BUILD_TOOLS)}",
)


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter elsewhere, with stdout and stderr together and a plain environment."""
    plain = {k: v for k, v in os.environ.items() if k not in ("FLASHMAPS_REQUIRE_NATIVE", "CXX")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=plain | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build(kind: str, tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a "wheel" or "sdist" of `tree` into tree/dist, as pip does without isolation."""
    hook = f"import setuptools.build_meta as backend; backend.build_{kind}('dist')"
    return python("-c", hook, cwd=tree, **environment)


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def shipped_files() -> set[str]:
    """What a wheel must hold of this source tree, by its path in the wheel."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*_build_failed.txt")
    files = set()
    for source, target in (("python/flashmaps", "flashmaps"), ("kernels", "flashmaps/kernels")):
        for folder, _, names in os.walk(ROOT / source):
            if "__pycache__" not in folder:
                inside = Path(target) / Path(folder).relative_to(ROOT / source)
                files |= {
                    (inside / name).as_posix() for name in set(names) - unwanted(folder, names)
                }
    return files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project, without what was built or measured in it."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "results")
    copy = tmp_path / "project"
    copy.mkdir()
    for folder in ("csrc", "kernels", "python", "benches", "tests"):
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


@needs_build_tools
def test_without_a_compiler_the_wheel_is_built_and_says_why_it_is_slow(tree: Path):
    done = build("wheel", tree, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stdout
    assert "THE C++ EXTENSION WAS NOT BUILT" in done.stdout
    assert "/nonexistent/c++" in done.stdout  # why
    assert "Install a C++20 compiler" in done.stdout  # remedy

    with zipfile.ZipFile(only(tree / "dist", "*.whl")) as wheel:
        names = set(wheel.namelist())
        note = wheel.read("flashmaps/_native_build_failed.txt").decode()
        entry_points = wheel.read("flashmaps-0.1.0.dist-info/entry_points.txt").decode()
    assert "/nonexistent/c++" in note and "Install a C++20 compiler" in note
    assert "flashmaps = flashmaps.app.cli:main" in entry_points
    assert {"flashmaps/py.typed", "flashmaps/kernels/__init__.py"} <= names
    assert not [name for name in names if name.startswith("flashmaps/_C.")]
    # Everything in the package's folders is shipped: modules, the built-in model, templates.
    assert shipped_files() - names == set()


@needs_build_tools
def test_a_required_extension_that_cannot_be_built_is_an_error(tree: Path):
    done = build("wheel", tree, CXX="/nonexistent/c++", FLASHMAPS_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "flashmaps._C was not built" in done.stdout
    assert "/nonexistent/c++" in done.stdout
    assert "Install a C++20 compiler" in done.stdout
    assert not list((tree / "dist").glob("*.whl"))


@needs_build_tools
def test_the_sdist_is_the_whole_project(tree: Path):
    done = build("sdist", tree)
    assert done.returncode == 0, done.stdout
    with tarfile.open(only(tree / "dist", "*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {
        path.relative_to(tree).as_posix()
        for folder in ("csrc", "kernels", "benches", "tests", "python/flashmaps")
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    wanted |= {"CMakeLists.txt", "LICENSE", "Makefile", "constraints.txt", "setup.py"}
    wanted -= {f"python/flashmaps/_{name}_build_failed.txt" for name in ("native", "cuda")}
    assert wanted - names == set()


@pytest.mark.slow  # compiles everything
@needs_build_tools
def test_a_wheel_from_the_sdist_holds_a_working_extension(tree: Path, tmp_path: Path):
    done = build("sdist", tree)
    assert done.returncode == 0, done.stdout
    shutil.unpack_archive(only(tree / "dist", "*.tar.gz"), tmp_path / "unpacked")
    source = only(tmp_path / "unpacked", "flashmaps-*")
    done = build("wheel", source, FLASHMAPS_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout

    installed = tmp_path / "installed"
    shutil.unpack_archive(only(source / "dist", "*.whl"), installed, "zip")
    assert not (installed / "flashmaps/_native_build_failed.txt").exists()
    done = python(
        "-c",
        "import torch, flashmaps._C as native; print(native.__file__)",
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(str(installed))


def test_import_is_light(tmp_path: Path):
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import flashmaps\n"
        f"print(sorted(set({HEAVY}) & (set(sys.modules) - before)))\n"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_public_name_is_there_and_importing_loads_the_maps_alone(tmp_path: Path):
    script = (
        "import sys, flashmaps as fm\n"
        "rooms = ('diffusion', 'matching', 'evaluation', 'app', 'world', 'models')\n"
        "print([room for room in rooms if f'flashmaps.{room}' in sys.modules])\n"
        "for name in fm.__all__: getattr(fm, name)\n"
        "print(set(fm._LATER) <= set(fm.__all__) <= set(dir(fm)))\n"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-2:] == ["[]", "True"]


def test_the_version_is_the_same_everywhere():
    import flashmaps

    assert flashmaps.__version__ == importlib.metadata.version("flashmaps")


def test_kernels_import_without_triton_and_say_what_to_use(tmp_path: Path):
    script = (
        "import sys\n"
        "sys.modules['triton'] = None\n"  # any import of it now fails
        "import flashmaps.kernels\n"
        "print(flashmaps.kernels.unavailable_reason())\n"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert 'backend="cpu"' in done.stdout
