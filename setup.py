"""Builds flashmaps._C with CMake and Ninja; everything static stands in pyproject.toml.

The extension is optional. If it cannot be built, the install goes on with the pure Python backend,
says so, and leaves the reason in flashmaps/_native_build_failed.txt for `flashmaps doctor` and
`flashmaps.backends()`. FLASHMAPS_REQUIRE_NATIVE=1 makes a failed build an error.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
REQUIRE_NATIVE = os.environ.get("FLASHMAPS_REQUIRE_NATIVE", "0") not in ("", "0")
FAILURE_NOTE = "_native_build_failed.txt"
GET_A_COMPILER = (
    "Install a C++20 compiler, GCC or Clang, and Python's headers (Debian, Ubuntu: apt install g++ "
    "python3-dev; Fedora: dnf install gcc-c++ python3-devel; macOS: xcode-select --install), then "
    "flashmaps again. If they are there, `pip install -v` shows what else went wrong."
)


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
        """Build flashmaps._C and put it where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # An editable install imports from the source tree, so the note has to stand there.
        package = ROOT / "python/flashmaps" if self.in_source_tree else target.parent
        note = package / FAILURE_NOTE
        try:
            self.run_cmake(target.parent)
        except BuildFailed as failure:
            for stale in (target, package / target.name):
                stale.unlink(missing_ok=True)  # an extension of older sources must not be found
            if REQUIRE_NATIVE:
                raise CompileError(
                    f"flashmaps._C was not built.\n{failure}\n"
                    "(FLASHMAPS_REQUIRE_NATIVE is set; without it the install goes on.)"
                ) from None
            note.write_text(f"{failure}\n", encoding="utf-8")
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

    def run_cmake(self, destination: Path) -> None:
        """Configure, build and install the module into `destination`."""
        try:
            import pybind11
        except ImportError:
            raise BuildFailed(
                "pybind11 was not found.", "pip install pybind11, then flashmaps again."
            ) from None
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        # The build tree outlives the command, so that the next one compiles only what has changed.
        # One per interpreter, since the module's name and flags depend on it.
        tree = ROOT / "build" / f"native-{sysconfig.get_config_var('EXT_SUFFIX').split('.')[1]}"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            # Given every time: in an isolated build these paths change from run to run.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]  # fmt: skip
        # CMake reads these only on a tree's first configuration: start afresh when they change.
        settings = repr([os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS")])
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
        Extension("flashmaps._C", sources=[], optional=not REQUIRE_NATIVE)
    ],
    cmdclass={"build_ext": CMakeBuild},
)
