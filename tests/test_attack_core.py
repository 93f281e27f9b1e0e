"""The attack on the core with a small budget, and every case that it ever found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attack.core import Case, attack, backends, draw, run
from attack.found import FOUND

pytestmark = pytest.mark.filterwarnings("ignore:Profiler clears events")


@pytest.mark.parametrize("case", FOUND, ids=lambda case: f"{case.backend}-{case.seed}")
def test_what_was_found_holds(case: Case) -> None:
    if case.backend not in backends():  # triton: in a process where it is interpreted
        line = f"from attack.core import Case, run; run({case})"
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        said = subprocess.run(
            [sys.executable, "-c", line],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert said.returncode == 0, said.stderr
        return
    run(case)


@pytest.mark.parametrize("seed", range(4))
def test_a_small_attack(seed: int) -> None:
    done = attack(60.0, seed, most=25)
    assert sum(done.values()) == 25


@pytest.mark.slow
def test_a_longer_attack() -> None:
    print(attack(60.0, 99))


def test_a_case_prints_as_the_line_that_makes_it() -> None:
    import random

    for number in range(50):
        case = draw(random.Random(number), backends())
        assert eval(str(case)) == case
        assert draw(random.Random(number), backends()) == case
