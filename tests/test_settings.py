"""match-settings.json beside a model's weights: what it holds, and when it counts."""

from __future__ import annotations

import json
import warnings

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.diffusion.loading import load_model
from flashmaps.matching.confidence import SCORES, Calibration, Term, term
from flashmaps.matching.settings import FILE, MatchSettings, fingerprint, settings_of
from tiny_pipeline import tiny_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTO = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
LAYER = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
CALIBRATION = Calibration((Term("entropy", -2.0, 1.0, 0.5),), 0.25, 0.1, "the box", "scenes")
OWN = MatchSettings(
    compare="features", layers=(LAYER,), timestep=(1, 101), seeds=(0, 1), size=64,
    temperature=0.05, readout="window", window=2, between="query", calibration=CALIBRATION,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(tmp_path_factory.mktemp("tokenizer")).save_pretrained(path)
    return path


@pytest.fixture
def own(folder):
    """The folder with settings of its own."""
    file = folder / FILE
    file.write_text(json.dumps(OWN.to_file(fingerprint(load_model(folder)), measured={"pck": 1})))
    yield folder
    file.unlink()


def test_settings_survive_the_file(own):
    assert settings_of(load_model(own)) == OWN


def test_match_uses_them_and_its_arguments_win(own):
    match = fm.match(PHOTO, PHOTO, model=str(own))
    assert (match.compare, match.readout, match.window, match.between) == (
        "features", "window", 2, "query",
    )  # fmt: skip
    assert match.source.timestep == (1, 101) and match.source.seeds == (0, 1)
    assert match.source.layers == (LAYER,) and match.temperature == 0.05
    assert match.calibrated and ((match.confidence > 0) & (match.confidence < 1)).all()
    # An image finds itself, at any point and not only at its tokens' centres.
    points = np.array([(20.3, 31.8), (40, 12)])
    assert np.abs(match.transfer(points) - points).max() < 8  # less than a token

    other = fm.match(PHOTO, PHOTO, model=str(own), compare="kk", seeds=0)
    assert other.compare == "kk" and other.source.seeds == (0,)
    assert other.temperature is None  # that was of the features
    assert not other.calibrated
    same = fm.match(PHOTO, PHOTO, model=str(own), size=64, compare="features")
    assert same.calibrated
    for changed in ({"size": 96}, {"prompt": "a cat"}, {"readout": "hard"}):
        assert not fm.match(PHOTO, PHOTO, model=str(own), **changed).calibrated


def test_a_model_without_a_file_keeps_the_plain_defaults(folder):
    assert settings_of(load_model(folder)) == MatchSettings()
    match = fm.match(PHOTO, PHOTO, model=str(folder))
    assert (match.compare, match.readout, match.source.timestep) == ("kk", "hard", 1)
    assert torch.equal(match.confidence, match.round_trip.return_probability[0])


def test_settings_of_other_weights_are_left_aside(own):
    file = own / FILE
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "weights": "0123456789abcdef"}))
    with pytest.warns(UserWarning, match="belongs to other weights"):
        assert settings_of(load_model(own)) == MatchSettings()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"format": "9"}, "its format is '9'"),
        ({"settings": {"colour": 1}}, r"\['colour'\], which are not known"),
        ({"confidence": {"bias": 1}}, "it is no calibration"),
        (
            {"confidence": {**CALIBRATION.to_json(), "terms": []}},
            "its terms are of nothing; wanted some of return_probability",
        ),
    ],
    ids=["format", "settings", "confidence", "terms"],
)
def test_a_file_that_cannot_be_read_is_an_error(own, changed, text):
    file = own / FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ValueError, match=text):
        settings_of(load_model(own))


def test_the_built_in_model_has_settings_that_fit_its_weights_or_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings_of(load_model("builtin"))


# -- the probability -------------------------------------------------------------------------------


def test_the_probability_is_the_logistic_function_of_its_terms():
    entropy = torch.tensor([0.0, 1.0, 2.0])
    found = CALIBRATION.probability({"entropy": entropy})
    torch.testing.assert_close(found, torch.sigmoid(0.25 - 2 * (entropy - 1) / 0.5))
    assert CALIBRATION.scores == ("entropy",)
    assert Calibration.from_json(json.loads(json.dumps(CALIBRATION.to_json()))) == CALIBRATION


def test_terms_are_finite_where_scores_are_zero():
    for name in SCORES:
        assert term(name, torch.zeros(3)).isfinite().all(), name


def test_settings_are_only_written_over_settings(folder):
    from flashmaps.matching.settings import check_beside

    check_beside(folder)
    file = folder / FILE
    file.write_text('{"mine": true}')
    with pytest.raises(
        ValueError, match="is none that `flashmaps study` has written; move it away"
    ):
        check_beside(folder)
    file.unlink()
