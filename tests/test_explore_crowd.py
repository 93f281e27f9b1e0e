"""Ten visitors who move at once: no fault, each sees its own, and memory stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("psutil")
sys.path.insert(0, str(Path(__file__).parents[1] / "benches"))

from explored import serving

# Rows, answers and threads are made and freed, which the allocator may keep some of; a leak of one
# answer each, of thousands, would be more.
MOST_GROWTH = 64 * 2**20


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_ten_visitors_move_at_once(seconds: float) -> None:
    from explore import visit_at_once

    with serving() as rules:
        found = visit_at_once(rules, 10, seconds, 256 if seconds > 10 else 64)
    print(found.told())
    assert found.faults == []
    assert len(found.milliseconds) > 10
    assert found.after - found.before < MOST_GROWTH
