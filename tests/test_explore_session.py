"""What the explorer answers: rows, pins, statistics, words, segments, generations, scripts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.diffusion.features import load_model
from flashmaps.explorer.packing import levels, roots, unpack
from flashmaps.explorer.pictures import BUNDLED, bundled, picture, uploaded
from flashmaps.explorer.run import check_installed, listen, open_pictures
from flashmaps.explorer.session import STATISTICS, Gone, Session
from flashmaps.explorer.view import Model

ONE, TWO = (BUNDLED / name for name in ("one.jpg", "two.jpg"))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(Model(load_model("builtin"), "builtin"), bundled())


@pytest.fixture(scope="module")
def match() -> fm.Match:
    return fm.match(ONE, TWO)


def ask(session: Session, name: str, /, **given: object) -> tuple[dict, np.ndarray]:
    values, data = unpack(session.answer(name, given))
    return values, np.frombuffer(data, np.uint8)


@pytest.fixture(scope="module")
def look(session: Session) -> str:
    return ask(session, "look", source="p0", target="p1")[0]["look"]


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_row_is_the_row_of_the_match(
    session: Session, look: str, match: fm.Match, side: str
) -> None:
    there, back = match.forward_map, match.backward_map
    if side == "target":
        there, back = back, there
    tokens = there.shape[1]
    for token in (0, 333, tokens - 1):
        values, data = ask(session, "row", look=look, side=side, token=token)
        row = there.rows([token])[0, 0]
        best = int(row.argmax())
        home = int(back.rows([best])[0, 0].argmax())
        assert (values["best"], values["home"]) == (best, home)
        # Features of an image alone and in a batch differ by rounding of float32 sums.
        assert values["max"] == pytest.approx(float(row.max()), rel=1e-3)
        entropy = float(there.entropy()[0, token])
        assert values["entropy"] == pytest.approx(entropy, abs=1e-3 * math.log(tokens))
        # A byte on a square-root scale: off by half a step, and by what the features are.
        shown = data[tokens : 2 * tokens].astype(float) / 255
        assert np.abs(shown - (row / row.max()).sqrt().numpy()).max() <= 0.5 / 255 + 1e-3


def test_a_row_takes_no_map(session: Session, look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                largest = max(largest, made.numel())
            return made

    monkeypatch.setattr(fm.AttentionMap, "to_dense", None)
    with Watch():
        ask(session, "row", look=look, side="source", token=5)
    pair = session._pairs[look]
    source = pair.features["source"]
    vectors = max(x.numel() for x in (source.query, source.output) if x is not None)
    tokens = math.prod(pair.features["source"].grid)
    assert largest <= 2 * vectors < tokens**2  # features and rows, never N x N


def test_a_pin_is_the_match(session: Session, look: str, match: fm.Match) -> None:
    values, _ = ask(session, "pin", look=look, side="source", token=333)
    assert values["best"] == int(match.forward[333]) and values["calibrated"]
    assert values["confidence"] == pytest.approx(float(match.confidence[333]), abs=2e-3)
    assert values["place"] == pytest.approx(match._matched("source", match.readout)[333].tolist(),
                                            abs=2e-3)  # fmt: skip
    back, _ = ask(session, "pin", look=look, side="target", token=7)
    assert back["best"] == int(match.backward[7])


def test_statistics_are_those_of_the_match(session: Session, look: str, match: fm.Match) -> None:
    trip = match.round_trip
    truth = {
        "cycle": trip.hard_distance[0], "density": trip.density[0], "entropy": match.entropy,
        "ime": trip.inverse_entropy[0], "confidence": match.confidence,
    }  # fmt: skip
    for name, (side, _, _) in STATISTICS.items():
        values, data = ask(session, "statistic", look=look, name=name)
        assert values["side"] == side and len(data) == match.forward_map.shape[1]
        if name in truth:
            assert values["mean"] == pytest.approx(float(truth[name].float().mean()), rel=5e-3)


def test_nothing_to_show_is_zero() -> None:
    data, low, high = levels(torch.tensor([1.0, float("nan"), 3.0]))
    assert list(data) == [1, 0, 255] and (low, high) == (1, 3)
    assert list(levels(torch.full((2,), float("nan")))[0]) == [0, 0]
    assert list(roots(torch.zeros(3))) == [0, 0, 0]
    assert list(roots(torch.tensor([0.0, 0.25, 1.0]))) == [0, 128, 255]


MORE = [
    {"compare": "kk", "temperature": 0.02}, {"compare": "qk"}, {"normalize": "rows"}, {"head": 0},
    {"layers": ["up_blocks.2.attentions.0.transformer_blocks.0.attn1",
                "up_blocks.2.attentions.1.transformer_blocks.0.attn1"], "compare": "qk"},
]  # fmt: skip


@pytest.mark.parametrize(
    "view",
    [
        {"compare": "qk", "head": 1, "size": 64},
        {"timestep": [1, 200], "size": 64},
        *(pytest.param(each, marks=pytest.mark.slow) for each in MORE),
    ],
    ids=str,
)
def test_the_script_makes_what_is_seen(
    session: Session, view: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values, _ = ask(session, "look", source="p0", target="p1", **view)
    look = values["look"]
    seen, data = ask(session, "row", look=look, side="source", token=40)
    program, _ = ask(session, "script", look=look, side="source", token=40)
    names: dict = {}
    exec(program["python"], names)
    assert (tmp_path / "explore.png").read_bytes().startswith(b"\x89PNG")
    first, second = seen["sizes"][:2]
    made = names["values"].flatten()
    shown = data[first : first + second].astype(float) / 255
    off = np.abs(shown - (made / made.max()).sqrt().float().numpy()).max()
    assert off <= 0.5 / 255 + 2e-3
    program, _ = ask(session, "script", look=look, statistic="density")
    assert "m.round_trip.density[0]" in program["python"]


def test_words_segments_and_a_collection(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = ask(session, "look", source="p0", target="p1")[0]["look"]
    words, data = ask(session, "words", picture="p0", prompt="a cat, a crab")
    assert words["words"][:2] == ["a", "cat"]
    height, width = words["grid"]
    assert len(data) == len(words["words"]) * height * width
    values, data = ask(session, "segments", picture="p0")
    assert [level["name"] for level in values["levels"]] == ["objects", "parts"]
    assert len(data) == 2 * math.prod(values["size"])
    # One that is smaller than a patch of pixels may have none.
    assert 0 < data.max() < max(level["count"] for level in values["levels"])
    values, _ = ask(session, "collect", look=look)
    assert values["others"] == ["p1"]
    row, there = ask(session, "row", look=look, side="source", token=77)
    found, data = ask(session, "others", look=look, token=77)
    first, second = row["sizes"][:2]
    assert found["best"] == [row["best"]] and (data == there[first : first + second]).all()
    monkeypatch.chdir(tmp_path)
    for asked, shape in (
        ({"prompt": "a cat, a crab", "word": "cat"}, (height, width)),
        ({"level": 1}, (512, 512)),
    ):
        program, _ = ask(session, "script", look=look, **asked)
        names: dict = {}
        exec(program["python"], names)
        assert tuple(names["values"].shape) == shape
        if "word" in asked:
            mean = float(names["values"].flatten().max())
            assert mean == pytest.approx(words["high"][words["words"].index("cat")], rel=1e-3)
    with pytest.raises(ValueError, match="prompt is empty"):
        ask(session, "words", picture="p0", prompt=" ")


def test_a_generation_is_watched(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, _ = ask(session, "generate", prompt="a red bird", steps=2, seed=1)
    assert values["steps"] == 2 and len(values["means"]) == len(values["layers"]) == 7
    for mean, bound in zip(values["means"], values["bounds"], strict=True):
        assert all(0 < each <= bound for each in mean)
    frame, data = ask(session, "frame", layer=3, step=1)
    assert frame["mean"] == pytest.approx(values["means"][3][1])
    assert len(data) == math.prod(values["grids"][3])
    look = ask(session, "look", source="p0", target="p1")[0]["look"]
    program, _ = ask(session, "script", look=look, layer=3, step=1)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(program["python"], names)
    assert float(names["values"].mean()) == pytest.approx(frame["mean"], rel=1e-4)
    with pytest.raises(ValueError, match="7 layers and 2 steps"):
        ask(session, "frame", layer=7, step=0)
    made = {each["id"]: each["name"] for each in values["pictures"]}[values["picture"]]
    assert made == "a red bird (seed 1)"


def test_ways_of_looking_are_forgotten_in_order() -> None:
    session = Session(Model(load_model("builtin"), "builtin"), bundled())
    looks = [ask(session, "look", source="p0", target="p1")[0]["look"] for _ in range(4)]
    with pytest.raises(Gone):
        ask(session, "row", look=looks[0], token=0)
    ask(session, "row", look=looks[-1], token=0)


def test_large_uploads_are_made_smaller() -> None:
    from explored import png

    found = uploaded("large", png(1200, 1800, kind="JPEG"))
    assert max(found.image.shape) <= 1024 and found.image.dtype == np.float32


# -- wrong starts: each one sentence ---------------------------------------------------------------


def start(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `flashmaps explore` says before it ends with 2."""
    from flashmaps.app.commands import make_app

    with pytest.raises(SystemExit) as ended:
        make_app()(["explore", "--no-browser", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if "FLASHMAPS_DEBUG" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as bound:
        said = start(capsys, "--port", str(bound.getsockname()[1]))
    assert "is taken by another program; choose another with --port" in said


def test_no_such_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no file 'nowhere.png'" in start(capsys, "nowhere.png")


def test_the_extra_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmaps.explorer import run

    def without(name: str) -> object:
        return None if name == "uvicorn" else object()

    monkeypatch.setattr(run, "find_spec", without)
    said = start(capsys)
    assert "needs uvicorn" in said and "pip install 'flashmaps[explore]'" in said


def test_a_bad_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = start(capsys, "--port", "0", "--model", str(tmp_path))
    assert str(tmp_path) in said and "model" in said


def test_no_permission_for_a_port(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import socket

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", denied)
    assert "without more rights; choose one above 1023" in start(capsys, "--port", "80")


@pytest.fixture
def as_nobody() -> Iterator[None]:
    if os.name != "posix" or os.geteuid() != 0:
        yield  # whoever runs this may not read it either
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_no_permission_for_an_image(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        image = Path(folder, "mine.jpg")
        image.write_bytes(ONE.read_bytes())
        image.chmod(0)
        request.getfixturevalue("as_nobody")
        try:
            with pytest.raises(ValueError, match=r"mine\.jpg.*Permission denied"):
                open_pictures([image])
        finally:
            if os.name == "posix" and os.getuid() == 0:
                os.seteuid(0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--port", "70000"), "wanted 0"),
        (("--host", "no.such.host.invalid", "--port", "0"), "no address of this machine"),
        (("--host", "203.0.113.7", "--port", "0"), "no address of this machine"),
    ],
)
def test_other_wrong_starts(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    assert told in start(capsys, *arguments)


def test_no_argument_opens_two_bundled_pictures() -> None:
    check_installed()
    assert [each.name for each in open_pictures([])] == ["one.jpg", "two.jpg"]
    assert len(open_pictures([ONE])) == 2  # a picture with itself
    assert picture("x", ONE).shown.startswith(b"\x89PNG")


def test_the_bundled_pictures_can_be_drawn_again(tmp_path: Path) -> None:
    from flashmaps.diffusion.images import load_image
    from flashmaps.explorer.pictures import draw

    draw(tmp_path)
    for kept in (ONE, TWO):
        # Of two builds of one JPEG encoder a pixel may differ by rounding.
        assert np.abs(load_image(tmp_path / kept.name) - load_image(kept)).mean() < 1 / 255
