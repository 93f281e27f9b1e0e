"""The attack on the core with a small budget, and every case that it ever found."""

from __future__ import annotations

import pytest
from attack.core import Case, attack, backends, draw, run
from attack.found import FOUND

pytestmark = pytest.mark.filterwarnings("ignore:Profiler clears events")


@pytest.mark.parametrize("case", FOUND, ids=lambda case: f"{case.backend}-{case.seed}")
def test_what_was_found_holds(case: Case) -> None:
    if case.backend not in backends():
        pytest.skip(f"{case.backend} does not run here")
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
