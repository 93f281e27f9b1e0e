"""What every command does at a terminal: mistakes in one sentence, quiet libraries, tables."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import typer

from flashmaps.escapes import printable

# Errors whose message tells the user what to mend; anything else is a bug and shows its traceback.
_MISTAKES = (ValueError, OSError, ImportError)
_EXIT_MISTAKE = 2


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """The command with errors told in one sentence on stderr: exit code 2 for the user's mistakes.

    FLASHMAPS_DEBUG shows where they happened instead.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):  # typer's own, which are RuntimeErrors
            raise
        except (*_MISTAKES, RuntimeError) as error:
            if os.environ.get("FLASHMAPS_DEBUG"):
                raise
            print(f"flashmaps: {printable(error, lines=True)}", file=sys.stderr)
            print("(set FLASHMAPS_DEBUG=1 to see where this happened)", file=sys.stderr)
            raise typer.Exit(_EXIT_MISTAKE if isinstance(error, _MISTAKES) else 1) from None

    return run


def quiet_libraries() -> None:
    """Keep the loading bars and notes of diffusers and transformers off the terminal."""
    # Set before they are imported, since they also note things while being imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if find_spec("diffusers") is None or find_spec("transformers") is None:
        return  # load_model says how to get them
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def plain(text: object) -> Any:
    """Text for rich, which reads markup in a string; here nothing in it means anything."""
    from rich.text import Text

    return Text(printable(text, lines=True))


def say(text: str) -> None:
    """A line for the reader, in which nothing is markup; paths come through ``printable``."""
    from rich.console import Console

    Console(highlight=False).print(plain(text), soft_wrap=True)


def print_tables(tables: list[tuple[str, list[str], list[list[str]]]]) -> None:
    """Titled tables of text, the first column to the left."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, header, rows in tables:
        table = Table(
            title=plain(title),
            title_justify="left",
            title_style="bold",
            box=None,
            padding=(0, 2, 0, 0),
        )
        for index, name in enumerate(header):
            table.add_column(plain(name), justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*map(plain, row))
        console.print(table)
        console.print()
