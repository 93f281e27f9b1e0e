"""Who may ask, and how much: Host, Origin, token, size; and what browsers are told to forbid.

A page elsewhere on the web can make its visitor's browser send requests to this machine. Four
things stop that: the Host must be a name of this server (a rebound DNS name is not), the Origin
must be the page's own, questions have a content type that no form and no simple request can have,
and the visitor's id is in a header, not in a cookie that browsers would send along.
"""

from __future__ import annotations

import hmac
import html
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CONTENT_TYPE = "application/x-flashmaps"
MOST_BODY = 2**16  # bytes of a question
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)


@dataclass(frozen=True)
class Rules:
    """What requests must hold to.

    Attributes:
        hosts: names that a Host header may give, without a port.
        port: that it must give, unless it is 80.
        addresses: whether any numeric address will do, where the server listens on all of them.
            What a rebound name resolves to does not matter: the browser sends the name.
        token: that each question must bring; None: none is needed.
        most_upload: bytes of an upload.
    """

    hosts: frozenset[str]
    port: int
    addresses: bool = False
    token: str | None = None
    most_upload: int = 0


class Refused(Exception):
    """A request that is not answered: a status, and a sentence."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Guard:
    """ASGI middleware that refuses what `Rules` do not allow, before anything else sees it.

    A body that grows beyond what is taken raises Refused in whoever reads it.
    """

    def __init__(self, app: Any, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        api = scope["path"].startswith("/api/")
        try:
            limit = self._check(scope, api)
        except Refused as refused:
            await respond(sent, refused.status, str(refused), api)
            return

        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise Refused(413, f"the request is larger than the {limit} bytes that are taken")
            return message

        await self._app(scope, limited, sent)

    def _check(self, scope: Any, api: bool) -> int:
        """How many bytes of body are taken; raises Refused."""
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            name = name.decode("latin-1").lower()
            if name in headers and name in ("host", "origin", "content-length"):
                raise Refused(400, f"the request has two headers {name}")
            headers[name] = value.decode("latin-1")
        host = headers.get("host", "")
        if not self._is_host(host):
            raise Refused(421, "this server has another name: open it at the address that it told")
        origin = headers.get("origin")
        if origin is not None and origin != f"{scope.get('scheme', 'http')}://{host}":
            raise Refused(403, "the request comes from a page of another origin")
        method = scope["method"]
        if not api:
            if method not in ("GET", "HEAD"):
                raise Refused(405, "pages are fetched by GET alone")
            return 0
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refused(403, "the request comes from a page of another site")
        if method != "POST":
            raise Refused(405, "questions are asked by POST alone")
        if headers.get("content-type", "") != CONTENT_TYPE:
            raise Refused(415, f"questions have the content type {CONTENT_TYPE}")
        wanted, given = self._rules.token, headers.get("x-flashmaps-token", "")
        if wanted is not None and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise Refused(401, "the token is missing or wrong: open the address that was told")
        limit = MOST_BODY
        if scope["path"] == "/api/upload":
            limit += self._rules.most_upload
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdecimal():
            raise Refused(400, "the content length is no number")
        if len(length) > 12 or int(length) > limit:
            raise Refused(413, f"the request is larger than the {limit} bytes that are taken")
        return limit

    def _is_host(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        if not colon or "]" in port:  # no port, or the last part of an IPv6 address
            name, port = host, "80"
        if not port.isdecimal() or port.lstrip("0") != str(self._rules.port):
            return False
        return name.lower() in self._rules.hosts or (self._rules.addresses and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


async def respond(send: Send, status: int, why: str, api: bool) -> None:
    """A refusal: JSON for a question, a page for a page."""
    if api:
        body, kind = json.dumps({"error": why, "kind": "refused"}).encode(), b"application/json"
    else:
        body, kind = failure_page(status, why).encode(), b"text/html; charset=utf-8"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def failure_page(status: int, why: str) -> str:
    """A page that says what went wrong and what to do."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>FlashMaps: {status}</title>\n"
        '<link rel="stylesheet" href="/static/style.css">\n'
        '<main class="fm-failure"><p class="fm-mark">FlashMaps</p>\n'
        f"<h1>This cannot be shown</h1>\n<p>{html.escape(why)}.</p>\n"
        '<p><a href="/">Back to the pictures</a></p></main></html>\n'
    )


def loopback_rules(port: int, *, token: str | None, most_upload: int) -> Rules:
    """Rules of a server that only this machine can reach."""
    return Rules(frozenset(LOOPBACK), port, token=token, most_upload=most_upload)


def public_rules(
    host: str, port: int, names: Iterable[str], *, token: str, most_upload: int
) -> Rules:
    """Rules of a server that others can reach: by its address, or by names that were allowed."""
    bare = f"[{host}]" if ":" in host else host
    everywhere = host in ("0.0.0.0", "::", "")
    hosts = {*LOOPBACK, *(name.lower() for name in names)} | (
        set() if everywhere else {bare.lower()}
    )
    return Rules(frozenset(hosts), port, everywhere, token, most_upload)
