"""Builds the C++ kernels with a sanitizer and attacks them: `make sanitize`.

    python tests/sanitize.py --seconds 120 --only undefined

"address" finds reads and writes outside what was allocated, "undefined" what C++ does not define
(overflow of signed numbers, shifts, misaligned pointers). Both see every build that runs here
(AVX-512, AVX2, baseline), NaN and infinity among the inputs, threads, budgets and plans. Each has a
tree of its own under build/; nothing that is installed is touched.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = {
    # Not -O0: strips are found by the optimiser's vectors. One frame pointer for readable traces.
    "address": "-fsanitize=address -fno-omit-frame-pointer -g1",
    "undefined": "-fsanitize=undefined -fno-sanitize-recover=all -g1",
}
_RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so"}


def build(sanitizer: str) -> Path:
    """The module, compiled if need be."""
    import native

    flags = SANITIZERS[sanitizer]
    return native.build(
        "_C",
        f"-DCMAKE_CXX_FLAGS={flags}",
        "-DCMAKE_BUILD_TYPE=Release",
        tree=ROOT / "build" / f"sanitize-{sanitizer}",
    )


def runtime(sanitizer: str) -> str:
    """What is to be loaded before Python: the sanitizer's own, and that whose throws it watches."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    found = []
    for library in (_RUNTIMES[sanitizer], "libstdc++.so"):
        asked = [compiler, f"-print-file-name={library}"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True)
        found.append(os.path.realpath(said.stdout.strip()))
    return ":".join(found)


def attack(module: Path, seconds: float, seed: int) -> None:
    """In a process with the sanitizer: the core's attack on that module."""
    spec = importlib.util.spec_from_file_location("flashmaps._C", module)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    sys.modules["flashmaps._C"] = extension
    from attack import core
    from flashmaps.maps.backends import cpu

    assert cpu._C is extension
    builds = ("cpu", *(f"cpu-{name}" for name in extension.instruction_sets()[1:]))
    done = core.attack(seconds, seed, of=builds)
    print(f"{sum(done.values())} cases of seed {seed} on {', '.join(extension.instruction_sets())}")


def main() -> None:
    """Build and attack with each sanitizer; exit with 1 where one found something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of attack, each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=SANITIZERS, action="append")
    parser.add_argument("--module", help=argparse.SUPPRESS)  # of the process that attacks
    given = parser.parse_args()
    if given.module:
        attack(Path(given.module), given.seconds, given.seed)
        return
    failed = []
    for sanitizer in given.only or SANITIZERS:
        module = build(sanitizer)
        environment = {
            **os.environ,
            "LD_PRELOAD": runtime(sanitizer),
            # Python itself never gives back all it allocates.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "OMP_WAIT_POLICY": "passive",
        }
        command = [sys.executable, __file__, "--module", str(module)]
        command += ["--seconds", str(given.seconds), "--seed", str(given.seed)]
        print(f"== {sanitizer}", flush=True)
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            failed.append(sanitizer)
    print("sanitizers: " + (f"FAILED: {', '.join(failed)}" if failed else "nothing found"))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
