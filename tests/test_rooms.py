"""Who may import whom: the contracts of pyproject.toml, by import-linter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(init.parent.name for init in (ROOT / "python/flashmaps").glob("*/__init__.py"))


def test_imports_run_one_way() -> None:
    pytest.importorskip("importlinter")
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = (ROOT / "python/flashmaps" / room / "__init__.py").read_text("utf-8")
    assert text.startswith('"""') and len(text.split('"""')[1].split()) > 10


def test_the_picture_shows_the_imports_there_are() -> None:
    pytest.importorskip("grimp")
    from rooms import imports, mermaid

    assert mermaid(imports()) in (ROOT / "ARCHITECTURE.md").read_text("utf-8")
