"""Builds flashmaps._C, and flashmaps._cuda where there is nvcc, with CMake and Ninja.

Everything static stands in pyproject.toml.

Both extensions are optional. If _C cannot be built, the install goes on with the pure Python
backend, says so, and leaves the reason in flashmaps/_native_build_failed.txt for `flashmaps doctor`
and `flashmaps.backends()`. FLASHMAPS_REQUIRE_NATIVE=1 makes a failed build an error.

_cuda (csrc/cuda/, backend "cuda") is built apart from it, and leaves its reason in
flashmaps/_cuda_build_failed.txt. It takes CUDA 12 or later and about a minute:
  CUDACXX                       the nvcc to use; default: on PATH, in CUDA_HOME, /usr/local/cuda
  FLASHMAPS_CUDA_ARCHITECTURES  as CMake's CMAKE_CUDA_ARCHITECTURES; default: "80-real;90", machine
                                code for sm_80 (which sm_86 and sm_89 run) and sm_90, and PTX for
                                what comes after
  FLASHMAPS_CUDA=0              leaves it out
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
REQUIRE_NATIVE = os.environ.get("FLASHMAPS_REQUIRE_NATIVE", "0") not in ("", "0")
FAILURE_NOTES = {
    "flashmaps._C": "_native_build_failed.txt",
    "flashmaps._cuda": "_cuda_build_failed.txt",
}
GET_A_COMPILER = (
    "Install a C++20 compiler, GCC or Clang, and Python's headers (Debian, Ubuntu: apt install g++ "
    "python3-dev; Fedora: dnf install gcc-c++ python3-devel; macOS: xcode-select --install), then "
    "flashmaps again. If they are there, `pip install -v` shows what else went wrong."
)


GET_NVCC = "Install CUDA's compiler, version 12 or later, put it on PATH, then flashmaps again."


class BuildFailed(Exception):
    """The extension could not be built: why, and what to do about it."""

    def __init__(self, why: str, remedy: str = GET_A_COMPILER) -> None:
        super().__init__(f"Why: {why}\nRemedy: {remedy}")


def find_tool(name: str) -> str:
    """The path of cmake or ninja, from this environment's pip package or else from PATH."""
    # The pip packages come first: their scripts are not on PATH when a virtual environment's
    # python is called without activating it.
    if importlib.util.find_spec(name) is not None:
        module = __import__(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", "")
        if (found := shutil.which(name, path=folder)) is not None:
            return found
    if (found := shutil.which(name)) is not None:
        return found
    raise BuildFailed(f"{name} was not found.", f"pip install {name}, then flashmaps again.")


def find_nvcc() -> str:
    """The path of CUDA's compiler."""
    if os.environ.get("FLASHMAPS_CUDA", "1") in ("", "0"):
        raise BuildFailed("FLASHMAPS_CUDA=0 asked for none.", "unset it, then flashmaps again.")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    for place in places:
        if place and (found := shutil.which(place)) is not None:
            return found
    raise BuildFailed("nvcc was not found.", GET_NVCC)


def first_error(log: list[str]) -> str:
    """The first complaint in a build log, else its last line."""
    lines = [line.strip() for line in log if line.strip()] or ["no output"]
    start = next((i for i, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
    if lines[start].startswith("CMake Error at"):  # the place; the complaint follows
        return " ".join(lines[start + 1 : start + 3])
    return lines[start]


def run(*command: str) -> None:
    """Run a command, showing its output as it comes; raise BuildFailed if it fails."""
    print("+", *command, flush=True)
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode != 0:
        raise BuildFailed(first_error(lines))


class CMakeBuild(build_ext):
    """Runs CMake in place of setuptools' own compiler driver."""

    def run(self) -> None:
        """Note whether this is an editable build: setuptools hides it from build_extension."""
        self.in_source_tree = bool(self.inplace)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build an extension and put it where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # An editable install imports from the source tree, so the note has to stand there.
        package = ROOT / "python/flashmaps" if self.in_source_tree else target.parent
        note = package / FAILURE_NOTES[ext.name]
        try:
            if ext.name == "flashmaps._cuda":
                self.build_cuda(target.parent)
            else:
                self.build_native(target.parent)
        except BuildFailed as failure:
            for stale in (target, package / target.name):
                stale.unlink(missing_ok=True)  # an extension of older sources must not be found
            if REQUIRE_NATIVE and ext.name == "flashmaps._C":
                raise CompileError(
                    f"flashmaps._C was not built.\n{failure}\n"
                    "(FLASHMAPS_REQUIRE_NATIVE is set; without it the install goes on.)"
                ) from None
            note.write_text(f"{failure}\n", encoding="utf-8")
            if ext.name == "flashmaps._cuda":
                print(f'\nflashmaps: backend "cuda" was not built.\n{failure}\n', file=sys.stderr)
                return
            print(
                f"\n{'!' * 80}\n"
                "flashmaps: THE C++ EXTENSION WAS NOT BUILT. The package works, but slowly:\n"
                "the cpu backend is missing and everything runs on the reference.\n"
                f"{failure}\n"
                f"{'!' * 80}\n",
                file=sys.stderr,
                flush=True,
            )
        else:
            note.unlink(missing_ok=True)

    def build_native(self, destination: Path) -> None:
        """Build flashmaps._C into `destination`."""
        self.run_cmake(ROOT, "native", destination, ("CXX", "CXXFLAGS", "LDFLAGS"))

    def build_cuda(self, destination: Path) -> None:
        """Build flashmaps._cuda into `destination`."""
        nvcc = find_nvcc()
        options = [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        if architectures := os.environ.get("FLASHMAPS_CUDA_ARCHITECTURES"):
            options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        settings = (
            "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX",
            "FLASHMAPS_CUDA_ARCHITECTURES",
        )  # fmt: skip
        self.run_cmake(ROOT / "csrc/cuda", "cuda", destination, settings, options)

    def run_cmake(
        self,
        source: Path,
        name: str,
        destination: Path,
        variables: Sequence[str],
        options: Sequence[str] = (),
    ) -> None:
        """Configure, build and install the module of a source tree into `destination`."""
        try:
            import pybind11
        except ImportError:
            raise BuildFailed(
                "pybind11 was not found.", "pip install pybind11, then flashmaps again."
            ) from None
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        # The build tree outlives the command, so that the next one compiles only what has changed.
        # One per interpreter, since the module's name and flags depend on it.
        tree = ROOT / "build" / f"{name}-{sysconfig.get_config_var('EXT_SUFFIX').split('.')[1]}"
        configure = [
            cmake, "-S", str(source), "-B", str(tree), "-G", "Ninja",
            # Given every time: in an isolated build these paths change from run to run.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *options,
        ]  # fmt: skip
        # CMake reads these only on a tree's first configuration: start afresh when they change.
        settings = repr([*options, *(os.environ.get(variable) for variable in variables)])
        remembered = tree / "settings.txt"
        if not remembered.exists() or remembered.read_text() != settings:
            remembered.unlink(missing_ok=True)  # until this configuration has worked
            configure.append("--fresh")
        run(*configure)
        remembered.write_text(settings)
        run(cmake, "--build", str(tree))
        run(cmake, "--install", str(tree), "--prefix", str(destination), "--strip")


setup(
    packages=[
        *find_packages("python"),
        "flashmaps.kernels",
        *(f"flashmaps.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"": "python", "flashmaps.kernels": "kernels"},
    ext_modules=[
        # For setuptools "optional" means: copy the file into the source tree only if it exists.
        Extension("flashmaps._C", sources=[], optional=not REQUIRE_NATIVE),
        Extension("flashmaps._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
