"""Every attack there is, one after the other: `make attack MINUTES=20`.

An attack is a program in this folder that takes --seconds and --seed, prints what it found and how
many cases it ran, and exits with 1 where something did not hold. One with a name that begins with
an underscore, or that has no `main`, is none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def programs() -> list[list[str]]:
    """The attacks, each with its arguments."""
    found = [
        [str(path)]
        for path in sorted(FOLDER.glob("*.py"))
        if not path.name.startswith("_") and "def main(" in path.read_text("utf-8")
    ]
    # The same attack on kernels that are interpreted.
    found += [[*each, "--backend", "triton"] for each in found if each[0].endswith("core.py")]
    return found


def main() -> None:
    """Run them, each for its share of the time, and say which did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of all attacks together")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    found = programs()
    # Interpreted kernels are slow, and few cases of them come of much time.
    weights = [0.25 if "triton" in each else 1.0 for each in found]
    failed = []
    for program, weight in zip(found, weights, strict=True):
        seconds = 60 * given.minutes * weight / sum(weights)
        name = " ".join([Path(program[0]).stem, *program[1:]])
        print(f"== {name}: {seconds:.0f} s, seed {given.seed}", flush=True)
        command = [
            sys.executable,
            *program,
            "--seconds",
            f"{seconds:.0f}",
            "--seed",
            f"{given.seed}",
        ]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
    print("attack: " + (f"FAILED: {', '.join(failed)}" if failed else "everything held"))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
