"""The notebooks in docs/notebooks: as executed as they say, and they run."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parents[1] / "docs/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_three() -> None:
    assert [each.stem for each in NOTEBOOKS] == ["generation", "matching", "words"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_from_top_to_bottom(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [each for each in outputs if each.output_type == "error"]
    assert any("image/png" in each.get("data", {}) for each in outputs)
    for cell in code:
        compile(cell.source.replace("%matplotlib inline\n", ""), path.name, "exec")
        assert cell.outputs or cell is code[0]
    assert path.stat().st_size < 2**20


@pytest.mark.slow  # a process each, that loads everything
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(book, timeout=900, kernel_name="python3", resources=resources)
    client.execute()  # raises what a cell raises
    if path.stem == "matching":
        shown = [each for each in book.cells[-1].outputs if each.output_type == "execute_result"]
        assert "application/vnd.jupyter.widget-view+json" in shown[0]["data"]
