"""The command line: what it writes, and what it says to mistakes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from flashmaps.app import cli
from flashmaps.app.commands import make_app
from PIL import Image
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    tiny_pipeline(path / "tokenizer-files").save_pretrained(path / "tiny")
    return path / "tiny"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(make_app(), [str(a) for a in arguments])


def test_match_writes_its_folder(folder, photo, tmp_path):
    out = tmp_path / "out"
    result = run("match", photo, photo, "--model", folder, "--size", 64, "--seed", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "match.json").is_file() and (out / "matches.png").is_file()
    assert "hard ims" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere.png", "{photo}"], "SOURCE: there is no file 'nowhere.png'"),
        (["{photo}", "{photo}", "--model", "./nowhere"], "there is no such folder"),
        (["{photo}", "{photo}", "--model", "{photo}"], "is a file; wanted a diffusers folder"),
        (["{photo}", "{photo}", "--model", "{model}", "--timestep", "2000"], "takes 0 to 999"),
        (["{photo}", "{photo}", "--model", "{model}", "--layers", "x"], "matches no attention"),
        (["{photo}", "{photo}", "--model", "{model}", "--backend", "fast"], "backend 'fast'"),
        (["{photo}", "{photo}", "--out", "{photo}"], "is a file; give a folder"),
        (["{photo}", "{photo}", "--out", "{photo}/in"], "which is a file; give a folder"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(folder, photo, tmp_path, arguments, text):
    filled = [a.format(photo=photo, model=folder) for a in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out")]
    result = run("match", *filled)
    assert result.exit_code == 2
    assert text in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_where(monkeypatch):
    monkeypatch.setenv("FLASHMAPS_DEBUG", "1")
    result = run("match", "nowhere.png", "nowhere.png")
    assert isinstance(result.exception, FileNotFoundError)


def test_demo_refuses_an_occupied_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 2 and "holds other files" in result.stderr


def test_bench_outside_a_checkout_says_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flashmaps.app.commands.__file__", str(tmp_path / "a" / "b" / "c" / "d.py"))
    result = run("bench")
    assert result.exit_code == 2 and "make bench" in result.stderr


def test_bench_runs_pytest_on_the_benches(tmp_path, monkeypatch):
    (tmp_path / "benches").mkdir()
    (tmp_path / "python" / "flashmaps").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    seen = []

    class Done:
        returncode = 3

    monkeypatch.setattr("subprocess.run", lambda command, **_: seen.append(command) or Done)
    result = run("bench", "--", "-k", "text")
    assert result.exit_code == 3
    assert seen[0][1:3] == ["-m", "pytest"] and seen[0][-2:] == ["-k", "text"]


def test_help_names_the_commands():
    result = run("--help")
    for command in ("match", "demo", "doctor", "bench"):
        assert command in result.output


def test_heavy_packages_are_imported_when_they_are_used():
    code = (
        "import sys, flashmaps.matching.match, flashmaps.matching.plots\n"
        "import flashmaps.app.report, flashmaps.app.demo\n"
        "heavy = {'diffusers', 'transformers', 'matplotlib', 'PIL', 'skimage', 'typer', 'jinja2'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_typer_the_remedy_is_printed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "pip install 'flashmaps[cli]'" in capsys.readouterr().err


def test_what_eval_was_asked_has_the_defaults_of_its_options():
    import inspect
    from dataclasses import fields

    from flashmaps.app.arguments import OF_MATCHES, Asked
    from flashmaps.app.eval_command import evaluate

    given = inspect.signature(evaluate).parameters
    assert [each.name for each in fields(Asked)] == list(given)
    for name, option in given.items():
        if option.default is not inspect.Parameter.empty:
            assert getattr(Asked, name) == option.default, name
    assert set(OF_MATCHES) <= set(given)
