"""What the documents say: their examples run, and what they name exists."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import flashmaps
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/flashmaps"
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/cpu.md",
    "docs/maths.md",
    "docs/kernels.md",
    "docs/cuda.md",
    "docs/gradients.md",
    "docs/models.md",
    "docs/recipes.md",
    "docs/evaluation.md",
    "docs/explore.md",
    "docs/segments.md",
    "docs/world.md",
    "docs/training.md",
)

# Named before they exist: `flashmaps match --out results` and `flashmaps eval` write them.
MADE_LATER = {
    *("results", "results.md", "parts"),
    *("pck.png", "scores.png", "risk.png", "reliability.png", "examples.png"),
}
# Names of other things that look like paths to `paths_in`.
NOT_OURS = {"left.png", "right.png", "matches.png", "street.jpg", "one.jpg", "two.jpg"}


def text_of(document: str) -> str:
    return (ROOT / document).read_text("utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(document), re.M | re.S)


def examples() -> list[Any]:
    """(document, block, family) of every Python example; the family is that of its `pipe`."""
    found = []
    for document in ("README.md", "docs/recipes.md", "docs/quickstart.md", "docs/explore.md"):
        pattern = r"(?:^<!-- pipe: ([\w-]+) -->\n)?^```python\n(.*?)^```$"
        each = re.findall(pattern, text_of(document), re.M | re.S)
        for number, (family, block) in enumerate(each, 1):
            name = f"{Path(document).stem}-{number}"
            found.append(pytest.param(document, block, family, id=name))
    return found


@pytest.mark.parametrize(("document", "block", "family"), examples())
def test_examples_run(
    document: str,
    block: str,
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    if family:
        from tiny_models import FAMILY

        adapted = family == "ip-adapter"
        names["pipe"] = FAMILY["sd15" if adapted else family].build(tmp_path / "tokenizer")
        if adapted:
            from tiny_adapters import add_ip_adapter, image_prompts

            add_ip_adapter(names["pipe"].unet, adapters=2)
            names["prompts"] = image_prompts(names["pipe"].unet, adapters=2)
    if "left.png" in block:
        from skimage import data, io, transform

        for name, image in zip(("left", "right"), data.stereo_motorcycle()[:2], strict=True):
            small = transform.resize(image, (96, 144), anti_aliasing=True)
            io.imsave(tmp_path / f"{name}.png", (small * 255).astype("uint8"))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, document, "exec"), names)
    assert capsys.readouterr().out.strip()


def test_documents_have_examples() -> None:
    assert len(examples()) >= 14


def modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(flashmaps.__path__, "flashmaps.")]
    return ["flashmaps", *(name for name in names if ".models" not in name and "._C" not in name)]


@pytest.mark.parametrize("name", modules())
def test_doctests(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0, log.getvalue()


def paths_in(document: str) -> set[str]:
    """What is linked to, or written in backticks and looks like a file or a folder of ours."""
    text = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.M | re.S)
    linked = re.findall(r"\]\(([^)#\s]+)\)", text)
    written = re.findall(r"`([\w./-]+\.(?:py|h|cpp|md|txt|toml|png)|[\w./-]+/)`", text)
    found = {name for name in (*linked, *written) if not name.startswith("http")}
    return {name.rstrip("/") for name in found} - NOT_OURS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    missing = []
    for name in paths_in(document) - MADE_LATER:
        # As written from the root, from the document, from the package, or anywhere in the package.
        places = [ROOT, (ROOT / document).parent, PACKAGE]
        in_package = "/" not in name and any(PACKAGE.rglob(name))
        if not in_package and not any((place / name).exists() for place in places):
            missing.append(name)
    assert not missing, f"{document} names files that do not exist: {sorted(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_functions_exist(document: str) -> None:
    """`fm.x` in text and examples."""
    for name in set(re.findall(r"\bfm\.(\w+)", text_of(document))):
        assert name in flashmaps.__all__, f"{document} names fm.{name}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M))
    for document in DOCUMENTS:
        found = re.findall(r"(?:`|^)make ([a-z-]+)", text_of(document), re.M)
        assert set(found) <= targets, document


def shell_lines(start: str) -> list[str]:
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("line", shell_lines("flashmaps "))
def test_commands_exist(line: str) -> None:
    """Each `flashmaps` command of the README, with its options."""
    typer = pytest.importorskip("typer")
    pytest.importorskip("rich")
    from flashmaps.app.commands import make_app

    _, name, *arguments = shlex.split(line, comments=True)
    app = typer.main.get_command(make_app())
    assert name in app.commands
    options = {option for each in app.commands[name].params for option in each.opts}
    assert {word for word in arguments if word.startswith("--")} <= options


def test_named_extras_exist() -> None:
    import tomllib

    known = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    found = re.findall(r"pip install '\.\[(\w+)\]'", text_of("README.md"))
    assert found and set(found) <= set(known)


def test_the_measured_table_is_that_of_the_newest_run() -> None:
    """README's numbers come from one run of the benchmarks, whose file it names."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benches/readme.py")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    file, _, table = done.stdout.partition("\n")
    readme = (ROOT / "README.md").read_text("utf-8")
    assert table.strip() in readme
    assert f"(benches/results/{file.removesuffix('.json')}.md)" in readme
