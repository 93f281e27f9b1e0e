"""The command `explore`: the page that shows maps as one points."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashmaps.app.arguments import Model
from flashmaps.app.terminal import quiet_libraries


def explore(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files, or folders of them.", show_default="two drawn ones"),
    ] = None,
    model: Model = "builtin",
    port: Annotated[int, typer.Option(help="To listen on; 0: any that is free.")] = 8766,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback asks for a token.")
    ] = "127.0.0.1",
    name: Annotated[
        list[str] | None, typer.Option(help="Name by which others may call this server.")
    ] = None,
    token: Annotated[
        bool, typer.Option("--token", help="Ask for a token on this machine too.")
    ] = False,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Only say where the page is.")
    ] = False,
) -> None:
    """Point at images and see, in a browser, where each token looks."""
    from rich.console import Console

    from flashmaps.app.segment_commands import image_files
    from flashmaps.app.terminal import plain
    from flashmaps.explorer.run import check_installed, run

    check_installed()
    quiet_libraries()
    console = Console(soft_wrap=True)
    run(
        image_files(images or []), model=model, host=host, port=port, names=name or [],
        token=token, browser=not no_browser, say=lambda told: console.print(plain(told)),
    )  # fmt: skip
