"""A server of the explorer in a thread, and a client that may say what it likes to it."""

from __future__ import annotations

import http.client
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from flashmaps.diffusion.features import load_model
from flashmaps.explorer.guard import CONTENT_TYPE, Rules
from flashmaps.explorer.packing import pack, unpack
from flashmaps.explorer.pictures import bundled
from flashmaps.explorer.run import listen, rules_for
from flashmaps.explorer.server import make_server
from flashmaps.explorer.view import Model
from PIL import Image


@contextmanager
def serving(host: str = "127.0.0.1", *, names: tuple[str, ...] = ()) -> Iterator[Rules]:
    """The rules of a server that runs within."""
    with listen(host, 0) as bound:
        rules = rules_for(host, bound.getsockname()[1], names, None)
        app = make_server(Model(load_model("builtin"), "builtin"), bundled(), rules)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        yield rules
        server.should_exit = True
        thread.join(30)


class Client:
    """Asks the server as the page does; ``headers`` and ``body`` may be anything else."""

    def __init__(self, rules: Rules) -> None:
        self.port, self.token = rules.port, rules.token
        self.session = ""

    def send(
        self, method: str, path: str, body: bytes = b"", **headers: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; a header of None is left out."""
        sent = {"Host": f"127.0.0.1:{self.port}"}
        if path.startswith("/api/"):
            sent |= {
                "Content-Type": CONTENT_TYPE, "X-FlashMaps-Session": self.session,
                "X-FlashMaps-Token": self.token or "",
            }  # fmt: skip
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            if body and "Content-Length" not in sent and "Transfer-Encoding" not in sent:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders()
            if body:
                connection.send(body)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def ask(self, name: str, given: dict[str, Any] | None = None, data: bytes = b"") -> Any:
        """The values and the bytes of an answer that is expected."""
        status, _, body = self.send("POST", f"/api/{name}", pack(given or {}, data))
        assert status == 200, (status, body[:500])
        return unpack(body)

    def open(self) -> Client:
        """Begin a visit."""
        self.session = self.ask("open")[0]["session"]
        return self


def png(height: int = 48, width: int = 64, seed: int = 0, kind: str = "PNG") -> bytes:
    """A picture that is like no other, as bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
