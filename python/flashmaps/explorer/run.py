"""``flashmaps explore``: from arguments to a server that runs until it is stopped."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashmaps.explorer.guard import Rules, loopback_rules, public_rules
from flashmaps.explorer.pictures import MOST_BYTES, Picture, bundled, picture

PORT = 8766
_NEEDED = ("fastapi", "uvicorn", "diffusers", "transformers", "PIL")


def check_installed() -> None:
    """ImportError that says how to get what the explorer needs, where it is not here."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the explorer needs {', '.join(missing)}, which is not installed; install it with: "
            "pip install 'flashmaps[explore]'"
        )


def open_pictures(images: Sequence[str | Path]) -> list[Picture]:
    """The images, or the two that come with the package. Raises for those that cannot be read."""
    if not images:
        return bundled()
    found = [picture(Path(each).name, each) for each in images]
    return found if len(found) > 1 else found * 2


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError that says what stands against it."""
    where = f"port {port} of {host}"
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        # Not on Windows, where it would let two programs have one port.
        if sys.platform != "win32":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(128)
    except socket.gaierror:
        raise OSError(f"{host!r} is no address of this machine; give one with --host") from None
    except OverflowError:
        raise ValueError(f"port is {port}; wanted 0 (any that is free) to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "is taken by another program; choose another with --port, or 0 for any"
        elif error.errno in (errno.EACCES, errno.EPERM):
            why = "may not be used without more rights; choose one above 1023 with --port"
        elif error.errno == errno.EADDRNOTAVAIL:
            why = "is no address of this machine; give one with --host"
        else:
            why = f"cannot be used: {error.strerror or error}"
        raise OSError(f"{where} {why}") from None
    return made


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def rules_for(host: str, port: int, names: Sequence[str], token: str | None) -> Rules:
    """Who may ask: on loopback whoever is there, elsewhere who has the token."""
    if is_loopback(host) and not names:
        return loopback_rules(port, token=token, most_upload=MOST_BYTES)
    return public_rules(host, port, names, token=token or _new_token(), most_upload=MOST_BYTES)


def _new_token() -> str:
    return secrets.token_urlsafe(24)


def address(host: str, port: int, token: str | None) -> str:
    """What to open. The token is behind a #, which browsers send to nobody."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/" + (f"#token={token}" if token else "")


def run(
    images: Sequence[str | Path] = (),
    *,
    model: Any = "builtin",
    host: str = "127.0.0.1",
    port: int = PORT,
    names: Sequence[str] = (),
    token: bool = False,
    browser: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the explorer until interrupted.

    Args:
        images: files to look at; none: the two that come with the package.
        model: anything :func:`flashmaps.diffusion.features.load_model` takes.
        host: address to listen on. On any but a loopback one every question needs a token, which
            is part of the address that is told. There is no encryption: better is to leave the host
            as it is and to reach it through ssh.
        port: to listen on; 0 is any that is free.
        names: by which others may call this server, beside its address.
        token: ask for one on loopback too, where other users of this machine could ask.
        browser: open the page, where there is a screen.
        say: is told the address.

    Raises ImportError, ValueError or OSError, in a sentence, before anything is served.
    """
    check_installed()
    pictures = open_pictures(images)
    with listen(host, port) as bound:
        port = bound.getsockname()[1]
        from flashmaps.diffusion.features import load_model
        from flashmaps.explorer.server import make_server
        from flashmaps.explorer.view import Model, View

        seen = Model(load_model(model), str(model) if isinstance(model, (str, Path)) else "model")
        seen.told()  # a model that cannot be observed is refused here, not on the page
        rules = rules_for(host, port, names, _new_token() if token else None)
        app = make_server(seen, pictures, rules)
        seen.see(pictures[:2], View(), outputs=seen.own.compare == "features")  # for the first page
        import uvicorn

        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False,
                proxy_headers=False, ws="none", timeout_keep_alive=60, limit_concurrency=256,
            )
        )  # fmt: skip
        where = address(host, port, rules.token)
        say(f"FlashMaps shows its maps at {where} (Ctrl+C ends it)")
        if browser and _has_screen():
            import webbrowser

            threading.Timer(0.5, webbrowser.open, (where,)).start()
        server.run(sockets=[bound])


def _has_screen() -> bool:
    """Whether a browser with windows can be expected."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
