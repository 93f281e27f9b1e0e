"""The server of the page: its files, and the questions it asks, each in a lane.

Needs FastAPI; nothing else in this package does.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from flashmaps.explorer.guard import CONTENT_TYPE, Guard, Refused, Rules, failure_page
from flashmaps.explorer.lanes import Busy, Lane, Overtaken
from flashmaps.explorer.packing import pack, unpack
from flashmaps.explorer.pictures import Picture
from flashmaps.explorer.session import SLOW, Gone, Session
from flashmaps.explorer.view import Model

STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
MOST_SESSIONS = 32
IDLE = 600.0  # seconds after which a visitor makes room for another


class Sessions:
    """The visitors that there are, by ids that cannot be guessed."""

    def __init__(self, model: Model, pictures: Sequence[Picture]) -> None:
        self._model, self._pictures = model, pictures
        self._found: OrderedDict[str, tuple[Session, float]] = OrderedDict()

    def open(self) -> str:
        """A new visitor's id. Raises Busy where there are too many that are not idle."""
        if len(self._found) >= MOST_SESSIONS:
            oldest, (_, used) = next(iter(self._found.items()))
            if time.monotonic() - used < IDLE:
                raise Busy(f"there are {MOST_SESSIONS} visitors already; try again later")
            del self._found[oldest]
        key = secrets.token_urlsafe(24)
        self._found[key] = Session(self._model, self._pictures), time.monotonic()
        return key

    def get(self, key: str) -> Session:
        """The visitor of an id; Gone for one that is unknown."""
        if key not in self._found:
            raise Gone("this visit is over; the page begins a new one")
        session = self._found[key][0]
        self._found[key] = session, time.monotonic()
        self._found.move_to_end(key)
        return session


def make_server(model: Model, pictures: Sequence[Picture], rules: Rules) -> Guard:
    """The ASGI application.

    ``rules`` say who may ask; their ``most_upload`` should be
    :data:`flashmaps.explorer.pictures.MOST_BYTES`.
    """
    # Looked up by name, so that no path from a request is ever opened.
    files = {each.name: each.read_bytes() for each in STATIC.iterdir() if each.suffix in _TYPES}
    sessions = Sessions(model, pictures)
    lanes = {"slow": Lane("slow"), "quick": Lane("quick")}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for lane in lanes.values():
            lane.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    def failed(status: int, why: str, kind: str) -> Response:
        body = json.dumps({"error": why, "kind": kind})
        headers = {"retry-after": "1"} if status == 503 else None
        return Response(body, status, headers, "application/json")

    async def ask(name: str, request: Request) -> Response:
        try:
            body = await request.body()
            parameters, data = _read(body)
            if name == "open":
                return Response(pack({"session": sessions.open()}), media_type=CONTENT_TYPE)
            visitor = request.headers.get("x-flashmaps-session", "")
            session = sessions.get(visitor)
            lane = lanes["slow" if name in SLOW else "quick"]
            latest = name if name in ("row", "others", "frame", "look") else None
            answer = await lane.run(
                visitor, lambda: session.answer(name, parameters, data), latest=latest
            )
            return Response(answer, media_type=CONTENT_TYPE)
        except Overtaken:
            return Response(status_code=204)
        except Busy as busy:
            return failed(503, str(busy), "busy")
        except Gone as gone:
            return failed(404, str(gone), "gone")
        except (ValueError, ImportError) as error:
            return failed(400, str(error), "invalid")
        except Refused as refused:  # while the body was read
            return failed(refused.status, str(refused), "refused")
        except MemoryError:
            return failed(500, "that takes more memory than there is", "failed")
        except Exception:
            traceback.print_exc(file=sys.stderr)
            told = (
                "that failed, which is a fault of FlashMaps; the terminal that it runs in says how"
            )
            return failed(500, told, "failed")

    async def page(request: Request) -> Response:
        return Response(files["index.html"], media_type=_TYPES[".html"])

    async def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], media_type=_TYPES[Path(name).suffix])

    async def missing(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        why = "There is no such page here" if status == 404 else "That failed, a fault of FlashMaps"
        if request.url.path.startswith("/api/"):
            return failed(status, why, "gone" if status == 404 else "failed")
        return Response(failure_page(status, why), status, media_type=_TYPES[".html"])

    app.add_api_route("/", page, methods=["GET", "HEAD"], response_model=None)
    app.add_api_route("/static/{name}", static, methods=["GET", "HEAD"], response_model=None)
    app.add_api_route("/api/{name}", ask, methods=["POST"], response_model=None)
    app.add_exception_handler(HTTPException, missing)
    app.add_exception_handler(404, missing)
    app.add_exception_handler(500, missing)
    return Guard(app, rules)


def _read(body: bytes) -> tuple[Any, bytes]:
    try:
        length = int.from_bytes(body[:4], "little")
        if len(body) < 4 or length > len(body) - 4:
            raise ValueError
        return unpack(body)
    except (ValueError, RecursionError):
        raise ValueError("the question cannot be read") from None
