"""The contact sheet of the world, and the command that draws it."""

from __future__ import annotations

import numpy as np
import pytest
from flashmaps import world
from flashmaps.app.commands import make_app
from PIL import Image
from typer.testing import CliRunner


def run(*arguments):
    return CliRunner().invoke(make_app(), ["world", *map(str, arguments)])


def test_the_command_writes_a_sheet_that_holds_its_scenes(tmp_path):
    out = tmp_path / "sheet.png"
    result = run("--out", out, "--split", "test", "--size", 48, "--count", 5, "--pairs", 3)
    assert result.exit_code == 0, result.output
    assert "Written" in result.output
    sheet = np.asarray(Image.open(out))
    scenes = world.Split("test", size=48)
    for index in range(5):
        assert holds(sheet, scenes[index].image)


def holds(sheet: np.ndarray, tile: np.ndarray) -> bool:
    """Whether the tile stands somewhere in the sheet, pixel for pixel."""
    corners = np.argwhere((sheet[:, :, :3] == tile[0, 0]).all(axis=2))
    height, width = tile.shape[:2]
    return any(np.array_equal(sheet[y : y + height, x : x + width], tile) for y, x in corners)


def test_the_command_keeps_to_categories_and_single_objects(tmp_path):
    out = tmp_path / "sheet.png"
    result = run("--out", out, "--size", 32, "--count", 2, "--pairs", 0, "--category", "cat",
                 "--category", "boat", "--alone")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Image.open(out).size[0] > 64


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--split", "dev"], "there is no split 'dev'"),
        (["--category", "dog"], "there is no 'dog'"),
        (["--size", "8"], "size must be a whole number from 16"),
        (["--count", "0"], "count must be a whole number >= 1, got 0"),
        (["--pairs", "-1"], "--pairs must be a whole number >= 0, got -1"),
        (["--out", "sheet.jpg"], "must end in .png"),
        (["--out", "{folder}/nowhere/sheet.png"], "there is no such folder"),
    ],
)
def test_mistakes_exit_with_2_and_write_nothing(tmp_path, arguments, text):
    filled = [each.format(folder=tmp_path) for each in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "sheet.png")]
    result = run(*filled)
    assert result.exit_code == 2, result.output
    assert text in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_only_a_sheet_is_replaced(tmp_path):
    line = ("--count", "1", "--pairs", "0", "--size", "16", "--out", str(tmp_path / "sheet.png"))
    assert run(*line).exit_code == 0
    first = (tmp_path / "sheet.png").read_bytes()
    assert run(*line, "--seed", "1").exit_code == 0
    assert (tmp_path / "sheet.png").read_bytes() != first
    Image.new("RGB", (8, 8)).save(tmp_path / "sheet.png")  # a photograph, say
    for content in ((tmp_path / "sheet.png").read_bytes(), b"precious"):
        (tmp_path / "sheet.png").write_bytes(content)
        result = run(*line)
        assert result.exit_code == 2 and "flashmaps has not written it" in result.stderr
        assert (tmp_path / "sheet.png").read_bytes() == content
