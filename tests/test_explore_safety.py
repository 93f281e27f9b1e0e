"""What the explorer's server refuses: hosts, origins, tokens, paths, uploads, other visits."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from explored import Client, png, serving
from flashmaps.explorer import lanes, pictures, server
from flashmaps.explorer.guard import Guard, public_rules
from flashmaps.explorer.packing import pack, unpack
from flashmaps.explorer.parameters import Parameters
from flashmaps.explorer.run import address, is_loopback, rules_for

OUTSIDE = (
    "../../etc/passwd", "..", "%2e%2e%2fetc%2fpasswd", "/etc/passwd", "..\\..\\x",
    "file:///etc/passwd", "p0/../p1", "p0\0", "C:\\Windows", "....//....//etc/passwd",
)  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving() as rules:
        yield Client(rules).open()


# -- who may ask -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:{port}x", "",
     "localhost.evil.example:{port}", "127.0.0.1.evil.example:{port}", "[::2]:{port}",
     "10.0.0.1:{port}", "127.0.0.1:{port}@evil.example", ":{port}"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/static/app.js", "/api/open"])
def test_a_foreign_host_is_refused(client: Client, host: str, path: str) -> None:
    method = "POST" if path.startswith("/api") else "GET"
    body = pack({}) if method == "POST" else b""
    status, _, answer = client.send(method, path, body, Host=host.format(port=client.port))
    assert status == 421 and b"another name" in answer


def test_no_host_and_two_hosts_are_refused(client: Client) -> None:
    assert client.send("GET", "/", Host=None)[0] in (400, 421)
    assert client.send("GET", "/", host="evil.example")[0] in (400, 421)  # beside the right one


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
def test_own_hosts_are_answered(client: Client, host: str) -> None:
    status, _, page = client.send("GET", "/", Host=f"{host}:{client.port}")
    assert status == 200 and b"/static/app.js" in page


@pytest.mark.parametrize(
    "origin",
    ["null", "http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1",
     "http://127.0.0.1:1", "http://localhost:{port}", "file://"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/api/about"])
def test_a_foreign_origin_is_refused(client: Client, origin: str, path: str) -> None:
    method = "POST" if path.startswith("/api") else "GET"
    given = origin.format(port=client.port)
    status, headers, answer = client.send(method, path, pack({}) if method == "POST" else b"",
                                          Origin=given)  # fmt: skip
    assert status == 403 and b"origin" in answer
    assert "access-control-allow-origin" not in headers


def test_what_forms_and_simple_requests_can_send_is_refused(client: Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        assert client.send("POST", "/api/about", pack({}), Content_Type=kind)[0] == 415
    assert client.send("POST", "/api/about", pack({}), Sec_Fetch_Site="cross-site")[0] == 403
    assert client.send("POST", "/api/about", pack({}), Sec_Fetch_Site="same-site")[0] == 403
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD"):
        assert client.send(method, "/api/about")[0] == 405
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        assert client.send(method, "/", b"")[0] == 405


def test_an_origin_of_its_own_is_answered(client: Client) -> None:
    own = f"http://127.0.0.1:{client.port}"
    status, _, _ = client.send(
        "POST", "/api/about", pack({}), Origin=own, Sec_Fetch_Site="same-origin"
    )
    assert status == 200


def test_browsers_are_told_what_to_forbid(client: Client) -> None:
    for path in ("/", "/static/style.css", "/nowhere", "/static/nothing.js"):
        _, headers, body = client.send("GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy  # nothing from outside
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert b"://" not in body.replace(b"http://www.w3.org/2000/svg", b"")


def test_elsewhere_than_on_loopback_a_token_is_needed() -> None:
    with serving(names=("maps.example",)) as rules:
        assert rules.token is not None and len(rules.token) >= 32
        client = Client(rules).open()
        assert client.ask("about")[0]["model"]["name"] == "builtin"
        name = f"maps.example:{rules.port}"
        assert client.send("POST", "/api/about", pack({}), Host=name)[0] == 200
        for wrong in ("", rules.token[:-1], rules.token + "x", "é"):
            status, _, answer = client.send("POST", "/api/about", pack({}), X_FlashMaps_Token=wrong)
            assert status == 401 and b"token" in answer
        assert client.send("POST", "/api/open", pack({}), X_FlashMaps_Token=None)[0] == 401
        # The page itself holds nothing; its token is behind the #, which is not sent.
        assert client.send("GET", "/")[0] == 200
        assert address("127.0.0.1", rules.port, rules.token).endswith(f"/#token={rules.token}")


def test_rules_follow_the_address() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "maps.example", "")))
    assert rules_for("127.0.0.1", 80, (), None).token is None
    for host in ("0.0.0.0", "10.0.0.1", "::"):
        assert rules_for(host, 80, (), None).token
    everywhere = Guard(None, public_rules("0.0.0.0", 8000, (), token="t", most_upload=0))
    # An address cannot be rebound, a name can.
    assert everywhere._is_host("10.1.2.3:8000") and everywhere._is_host("[fe80::1]:8000")
    assert not everywhere._is_host("evil.example:8000")
    one = Guard(None, public_rules("10.0.0.1", 8000, (), token="t", most_upload=0))
    assert one._is_host("10.0.0.1:8000") and not one._is_host("10.0.0.2:8000")
    at_80 = Guard(None, rules_for("127.0.0.1", 80, (), None))
    assert at_80._is_host("localhost") and at_80._is_host("[::1]") and at_80._is_host("[::1]:80")


# -- what may be asked -----------------------------------------------------------------------------


@pytest.mark.parametrize("outside", OUTSIDE)
def test_no_parameter_is_a_path(client: Client, outside: str) -> None:
    questions = {
        "image": ["picture"], "forget": ["picture"], "segments": ["picture"],
        "look": ["source", "target", "compare", "normalize"], "row": ["look", "side"],
        "statistic": ["look", "name"], "pin": ["look"], "collect": ["look"], "others": ["look"],
        "script": ["look", "statistic"], "words": ["picture"],
    }  # fmt: skip
    look = client.ask("look", {"source": "p0", "target": "p1"})[0]["look"]
    for question, names in questions.items():
        for name in names:
            given = {"picture": "p0", "source": "p0", "target": "p1", "look": look, "token": 0}
            status, _, answer = client.send(
                "POST", f"/api/{question}", pack({**given, name: outside})
            )
            assert status in (400, 404), (question, name, answer)
            assert b"root:" not in answer
    for layers in ([outside], outside, [[outside]]):
        given = {"source": "p0", "target": "p1", "layers": layers}
        assert client.send("POST", "/api/look", pack(given))[0] == 400


@pytest.mark.parametrize(
    "path",
    ["/static/../session.py", "/static/%2e%2e/session.py", "/static/..%2fsession.py", "/../x",
     "/static/", "/static", "/etc/passwd", "//etc/passwd", "/static//etc/passwd", "/api",
     "/static/app.js/..", "/static/%00", "/docs", "/openapi.json", "/static/session.py"],
)  # fmt: skip
def test_no_address_is_a_path(client: Client, path: str) -> None:
    status, headers, page = client.send("GET", path)
    assert status in (404, 405, 307) and b"import" not in page
    if status == 404:
        assert headers["content-type"].startswith("text/html")
        assert b"This cannot be shown" in page and b'href="/"' in page


@pytest.mark.parametrize(
    "name", ["nothing", "_row", "answer", "__init__", "add", "_picture", "x y"]
)
def test_only_questions_are_answered(client: Client, name: str) -> None:
    status, _, answer = client.send("POST", f"/api/{name}".replace(" ", "%20"), pack({}))
    assert status == 404 and json.loads(answer)["kind"] == "gone"


@pytest.mark.parametrize(
    "body",
    [b"", b"x", b"\xff\xff\xff\xff{}", b"\x02\0\0\0{", b"\x02\0\0\0[]", b"\x04\0\0\0null",
     b"\x02\0\0\0\xff\xfe", struct.pack("<I", 60000) + b"[" * 60000, b"\x05\0\0\0{'a'}"],
)  # fmt: skip
def test_malformed_questions_are_refused(client: Client, body: bytes) -> None:
    status, _, answer = client.send("POST", "/api/about", body)
    assert status == 400 and json.loads(answer)["kind"] == "invalid"


@pytest.mark.parametrize(
    "wrong",
    [{"token": -1}, {"token": 10**30}, {"token": 1.5}, {"token": "1"}, {"token": True},
     {"token": [0]}, {"token": None}, {"token": 5000}, {"side": "left"}, {"side": 1},
     {"look": 7}, {"more": 1}],
)  # fmt: skip
def test_malformed_parameters_are_refused(client: Client, wrong: dict) -> None:
    look = client.ask("look", {"source": "p0", "target": "p1"})[0]["look"]
    given = {"look": look, "side": "source", "token": 3, **wrong}
    status, _, answer = client.send("POST", "/api/row", pack(given))
    assert status == 400 and json.loads(answer)["error"]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0}, {"temperature": -1}, {"temperature": "1"}, {"temperature": 1e9},
     {"timestep": [1000]}, {"timestep": [-1]}, {"timestep": "1"}, {"timestep": [1.5]},
     {"timestep": list(range(65))}, {"size": 1 << 19}, {"size": 129}, {"head": 99}, {"head": -1},
     {"compare": "vv"}, {"normalize": "all"}, {"layers": ["nothing"]}, {"layers": {}},
     {"layers": ["down_blocks.0.attentions.0.transformer_blocks.0.attn1",
                 "mid_block.attentions.0.transformer_blocks.0.attn1"]}],
)  # fmt: skip
def test_a_view_that_cannot_be_is_refused(client: Client, wrong: dict) -> None:
    given = {"source": "p0", "target": "p1", **wrong}
    status, _, answer = client.send("POST", "/api/look", pack(given))
    assert status == 400 and json.loads(answer)["error"]


def test_text_that_is_too_long_or_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="1001 characters; at most 1000"):
        Parameters({"prompt": "x" * 1001}).text("prompt")
    with pytest.raises(ValueError, match="surrogate"):
        Parameters({"prompt": "\ud800"}).text("prompt")
    with pytest.raises(ValueError, match="JSON object"):
        Parameters([])


# -- uploads ---------------------------------------------------------------------------------------


def header_of(width: int, height: int) -> bytes:
    """A PNG that says to be so large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "empty"),
        (b"not an image", "no PNG, JPEG or WebP"),
        (png()[:200], "cut off"),
        (png()[:40] + b"\0" * 200, "no PNG"),
        (png(kind="BMP"), "no PNG, JPEG or WebP"),
        (png(kind="GIF"), "no PNG, JPEG or WebP"),
        (png(kind="TIFF"), "no PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG, JPEG or WebP"),
        (header_of(6000, 6000), "6000 x 6000 pixels"),
        (header_of(20000, 2), "20000 x 2 pixels"),
        (header_of(1 << 30, 1 << 30), "no PNG|pixels"),
        (header_of(64, 64), "cut off"),
        (png(8, 8), "at least 16"),
        (png(kind="JPEG")[:300], "no PNG|cut off"),
    ],
    ids=lambda each: each[:24] if isinstance(each, str) else f"{len(each)} bytes",
)
def test_malformed_uploads_are_refused(client: Client, data: bytes, told: str) -> None:
    import re

    status, _, answer = client.send("POST", "/api/upload", pack({"name": "x"}, data))
    assert status == 400 and re.search(told, json.loads(answer)["error"])


def test_oversized_uploads_are_refused_before_they_are_read(client: Client) -> None:
    most = pictures.MOST_BYTES
    much = str(most + 2**17)
    status, _, answer = client.send("POST", "/api/upload", b"", Content_Length=much)
    assert status == 413 and str(most + 2**16).encode() in answer
    assert client.send("POST", "/api/about", b"", Content_Length=str(2**17))[0] == 413
    assert client.send("POST", "/api/about", b"", Content_Length="9" * 40)[0] in (400, 413)
    assert client.send("POST", "/api/about", b"", Content_Length="-1")[0] == 400


def test_a_body_that_does_not_say_its_length_is_cut_off(client: Client) -> None:
    piece = b"%x\r\n" % 2**15 + b"x" * 2**15 + b"\r\n"
    status, _, _ = client.send(
        "POST", "/api/about", piece * 3 + b"0\r\n\r\n", Transfer_Encoding="chunked"
    )
    assert status == 413


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_uploads_are_shown(client: Client, kind: str) -> None:
    visit = Client.__new__(Client)
    visit.__dict__ |= client.__dict__
    visit.open()
    values, _ = visit.ask("upload", {"name": "../a <b>.png"}, png(kind=kind))
    (new,) = [each for each in values["pictures"] if each["own"]]
    assert new["name"] == "../a <b>.png" and (new["height"], new["width"]) == (48, 64)
    told, shown = visit.ask("image", {"picture": values["picture"]})
    assert told["type"] == "image/png" and shown.startswith(b"\x89PNG")
    assert not visit.ask("forget", {"picture": values["picture"]})[0]["pictures"][2:]


# -- apart -----------------------------------------------------------------------------------------


def test_a_visit_sees_nothing_of_another(client: Client) -> None:
    one, two = (Client.__new__(Client) for _ in range(2))
    for each in (one, two):
        each.__dict__ |= client.__dict__
        each.open()
    mine = one.ask("upload", {"name": "mine"}, png(seed=1))[0]["picture"]
    look = one.ask("look", {"source": mine, "target": "p1"})[0]["look"]
    assert [each["id"] for each in two.ask("about")[0]["pictures"]] == ["p0", "p1"]
    for question, given in (
        ("image", {"picture": mine}), ("forget", {"picture": mine}),
        ("look", {"source": mine, "target": "p1"}), ("segments", {"picture": mine}),
        ("row", {"look": look, "token": 0}), ("script", {"look": look}), ("pin", {"look": look}),
    ):  # fmt: skip
        assert two.send("POST", f"/api/{question}", pack(given))[0] in (400, 404)
    # What comes from the command line belongs to nobody.
    assert one.send("POST", "/api/forget", pack({"picture": "p0"}))[0] == 404
    other = two.ask("upload", {"name": "other"}, png(seed=2))[0]["picture"]
    assert one.ask("image", {"picture": mine})[1] != two.ask("image", {"picture": other})[1]
    for wrong in ("", "x", two.session[:-1], two.session + "x"):
        status, _, answer = client.send("POST", "/api/about", pack({}), X_FlashMaps_Session=wrong)
        assert status == 404 and json.loads(answer)["kind"] == "gone"


def test_visits_and_pictures_are_limited(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmaps.explorer import session

    sessions = server.Sessions(None, [])  # type: ignore[arg-type]
    first = sessions.open()
    for _ in range(server.MOST_SESSIONS - 1):
        sessions.open()
    with pytest.raises(lanes.Busy, match="32 visitors"):
        sessions.open()
    monkeypatch.setattr(server, "IDLE", -1.0)  # now all of them are
    sessions.open()
    with pytest.raises(session.Gone):
        sessions.get(first)
    visit = Client.__new__(Client)
    visit.__dict__ |= client.__dict__
    visit.open()
    monkeypatch.setattr(session, "MOST_PICTURES", 3)
    visit.ask("upload", {}, png())
    status, _, answer = visit.send("POST", "/api/upload", pack({}, png(seed=3)))
    assert status == 400 and b"remove one" in answer


def test_too_much_at_once_is_told_so() -> None:
    import asyncio
    import threading

    async def crowd() -> list[object]:
        lane, gate = lanes.Lane("test"), threading.Event()
        waiting = [asyncio.ensure_future(lane.run("a", gate.wait)) for _ in range(9)]
        waiting += [asyncio.ensure_future(lane.run(f"b{i}", gate.wait)) for i in range(60)]
        await asyncio.sleep(0.05)
        gate.set()
        return await asyncio.gather(*waiting, return_exceptions=True)

    found = asyncio.run(crowd())
    assert [type(each) for each in found[:9]] == [bool] * 8 + [lanes.Busy]
    assert sum(each is True for each in found) == lanes.MOST_WAITING


def test_a_newer_place_overtakes_older_ones() -> None:
    import asyncio
    import threading

    async def moves() -> tuple[list[object], list[int]]:
        lane, gate, done = lanes.Lane("test"), threading.Event(), []

        def work(i: int) -> int:
            gate.wait(10)
            done.append(i)
            return i

        waiting = []
        for i in range(5):
            waiting.append(asyncio.ensure_future(lane.run("a", lambda i=i: work(i), latest="row")))
            await asyncio.sleep(0.02)
        other = asyncio.ensure_future(lane.run("b", lambda: work(9), latest="row"))
        await asyncio.sleep(0.02)
        gate.set()
        return await asyncio.gather(*waiting, other, return_exceptions=True), done

    found, done = asyncio.run(moves())
    assert done == [0, 4, 9]  # the one that had begun, the newest, and the other visitor's
    assert [type(each) for each in found[1:4]] == [lanes.Overtaken] * 3


def test_a_fault_shows_nothing_of_the_inside(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flashmaps.explorer.session import Session

    def broken(*_: object) -> bytes:
        raise RuntimeError("the secret place")

    monkeypatch.setattr(Session, "answer", broken)
    status, _, answer = client.send("POST", "/api/about", pack({}))
    assert status == 500 and b"secret" not in answer and b"fault of FlashMaps" in answer
    monkeypatch.setattr(Session, "answer", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert b"memory" in client.send("POST", "/api/about", pack({}))[2]
    assert "the secret place" in capsys.readouterr().err  # in the terminal it is


def test_packing_goes_both_ways() -> None:
    assert unpack(pack({"a": [1.5, float("nan")]}, b"xyz")) == ({"a": [1.5, None]}, b"xyz")
    assert not list(Path(pictures.BUNDLED).glob("*.py"))
