"""The documentation site: `make docs` (Sphinx with furo and myst; warnings are errors)."""

from __future__ import annotations

import io
import re
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "python"))

import flashmaps  # noqa: E402
from docutils import nodes  # noqa: E402

project = "FlashMaps"
author = "The FlashMaps authors"
copyright = author
version = release = flashmaps.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"  # below
exclude_patterns = ["notebooks"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # docstrings say shapes and units, which types do not
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_use_ivar = True
html_theme = "furo"
html_title = "FlashMaps"
html_static_path: list[str] = []
html_extra_path = ["notebooks"]
html_theme_options = {"source_edit_link": "", "top_of_page_buttons": []}
html_copy_source = False
html_show_copyright = False


def make_gallery(app: Any) -> None:
    """Run the code of gallery.md, which writes the pictures that stand below it."""
    text = (HERE / "gallery.md").read_text("utf-8")
    folder = HERE / "_gallery"
    wanted = [folder / name for name in re.findall(r"\(_gallery/([\w.-]+)\)", text)]
    newest = (HERE / "gallery.md").stat().st_mtime
    if all(each.exists() and each.stat().st_mtime > newest for each in wanted):
        return
    folder.mkdir(exist_ok=True)
    names: dict[str, Any] = {"__name__": "gallery"}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        with chdir(folder), redirect_stdout(io.StringIO()):
            exec(compile(block, "gallery.md", "exec"), names)


def repair(app: Any, name: str, source: list[str]) -> None:
    """Links to files of the repository, which the site does not hold, become their names."""
    source[0] = re.sub(r"\[([^\]\n]+)\]\(\.\./[^)\s]+\)", r"\1", source[0])
    # Of the project's own marks, one names the model of an example.
    source[0] = re.sub(r"^<!-- .*? -->\n", "", source[0], flags=re.M)


def code(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written to be read: no bars or stars mean anything, backticks mean code.

    What is indented after a blank line, under plain text, is an example.
    """
    made: list[str] = []
    above, example = "", -1  # the last line of text, and how far the example is indented
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() and example >= 0 and indent < example:
            example = -1
        if line.strip() and example < 0 and made and not made[-1].strip():
            outer = len(above) - len(above.lstrip())
            plain = above.strip() and not re.match(r"(:|- |[*] |[.][.] )", above.lstrip())
            if plain and indent >= outer + 4:
                example = indent
                made += [" " * outer + "::", ""]
        if line.strip():
            above = line
        if example < 0:
            line = re.sub(r"(?<![`:\w])`([^`\s][^`]*)`(?![`_])", r"``\1``", line)
            parts = re.split(r"(``.*?``)", line)
            parts[::2] = [
                re.sub(r"([|]|(?<=[\s(])\*+(?=\w))", r"\\\1", each) for each in parts[::2]
            ]
            line = "".join(parts)
        made.append(line)
    lines[:] = made


def mathml(text: str, display: str) -> str:
    """A formula as MathML, which browsers draw themselves: no script, and nothing from a network.

    Raises an error where the formula has a command that latex2mathml does not know.
    """
    from latex2mathml.converter import convert

    made = convert(re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", text), display=display)
    if unknown := re.search(r"\\[a-zA-Z]+", re.sub(r"<[^>]*>", "", made)):
        raise ValueError(f"{unknown[0]} in {text!r} is not known to latex2mathml")
    return made.replace("<mi>log</mi>", '<mo lspace="0.17em" rspace="0.17em">log</mo>')


def inline_math(writer: Any, node: nodes.math) -> None:
    """A formula in a line."""
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def display_math(writer: Any, node: nodes.math_block) -> None:
    """A formula by itself."""
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Hooks."""
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("builder-inited", make_gallery)
    app.connect("source-read", repair)
    app.connect("autodoc-process-docstring", code)
