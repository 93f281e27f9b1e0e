"""How far the resident memory of this process rises during a call (Linux)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def rise_of(run: Callable[[], Any]) -> tuple[Any, int]:
    """(result, bytes): the peak during the call less what was there before."""
    refs = Path("/proc/self/clear_refs")
    if not refs.exists():
        pytest.skip("needs Linux's account of peak memory")
    refs.write_text("5")  # the peak so far becomes the present
    before = status("VmRSS")
    result = run()
    return result, status("VmHWM") - before


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {name}")
