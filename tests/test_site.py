"""The documentation site: it names everything that is public, and it builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import flashmaps as fm
import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "reference.md").read_text("utf-8")
    told = re.findall(r"^\.\. auto(class|function):: flashmaps\.(\w+)$", text, re.M)
    assert sorted(name for _, name in told) == sorted(fm.__all__)
    for kind, name in told:
        assert (kind == "class") == isinstance(getattr(fm, name), type), name


def test_every_page_is_in_the_contents() -> None:
    contents = set(re.findall(r"^(\w+)$", (DOCS / "index.md").read_text("utf-8"), re.M))
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert contents == pages


def test_the_gallery_shows_what_its_code_makes() -> None:
    text = (DOCS / "gallery.md").read_text("utf-8")
    made = re.findall(r'savefig\("([\w.]+)"', text)
    assert made == re.findall(r"\(_gallery/([\w.]+)\)", text) and len(made) >= 6


def test_there_is_one_version() -> None:
    root = DOCS.parent
    assert 'dynamic = ["version"]' in (root / "pyproject.toml").read_text("utf-8")
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text("utf-8"), re.M)
    assert cited is not None and cited[1] == fm.__version__


@pytest.mark.slow  # runs the gallery's code
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*command, DOCS, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for each in tmp_path.glob("*.html"):  # whoever reads needs no network
        loaded = re.findall(
            r"<(?:script|img|link)[^>]*(?:src|href)=.(https?:[^ >]*)", each.read_text("utf-8")
        )
        assert not loaded, (each.name, loaded)
    assert "<math" in (tmp_path / "maths.html").read_text("utf-8")
    page = (tmp_path / "reference.html").read_text("utf-8")
    assert all(f'id="flashmaps.{name}"' in page for name in fm.__all__)
