"""Foreign text where it is shown: names of files, prompts, categories, errors of libraries.

Each place has its own signs that mean something, and a name must never be able to say them.
"""

from __future__ import annotations

import html
import re


def printable(text: object, *, lines: bool = False) -> str:
    """For a terminal: what moves the cursor, colours, hides or reorders text is written as escapes.

    With ``lines``, line ends and tabs stay.
    """
    kept = "\n\t" if lines else ""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in str(text)
    )


def markdown(text: object) -> str:
    """For a page of Markdown, in a table or not: the text itself, with no meaning."""
    shown = html.escape(printable(text), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", shown)
