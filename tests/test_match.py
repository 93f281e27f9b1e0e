"""Models in, features out, and matches whose answer is known."""

from __future__ import annotations

import copy
import dataclasses
import json

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps import evaluation
from flashmaps.diffusion.features import Features, features
from flashmaps.maps.grids import centres
from flashmaps.matching.confidence import Calibration, Term
from flashmaps.matching.cross_map import TEMPERATURE, cross_map, place_points
from flashmaps.matching.match import match_features
from flashmaps.matching.options import BETWEEN
from flashmaps.matching.points import pixel_field, token_at
from flashmaps.matching.readout import READOUTS
from safetensors.torch import load_file
from tiny_pipeline import tiny_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTO = np.random.default_rng(0).random((60, 90, 3), dtype=np.float32)
LAYERS = "up_blocks.1.*.attn1"  # 8 x 8 tokens at 64 pixels


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(path)
    return path


def known_features(codes, grid, size):
    """Features whose tokens have the given codes [N, d] as query and key alike, in two heads."""
    heads = torch.stack((codes, codes.roll(1, dims=1)))[None]
    image = np.zeros((*size, 3), np.float32)
    return Features(
        query=heads, key=heads, output=heads[:, :1], scale=50.0,
        head_weights=torch.tensor([0.25, 0.75]), grid=grid, image=image,
        input_size=size, layers=("known",), timestep=0, seeds=(0,), prompt="",
    )  # fmt: skip


@pytest.fixture(scope="module")
def shifted():
    """Every target token is the source token one row up and two columns to the left, cyclically."""
    grid, size = (4, 6), (40, 90)
    source = torch.eye(24)
    target = source.reshape(4, 6, 24).roll((1, 2), dims=(0, 1)).reshape(24, 24)
    return match_features(known_features(source, grid, size), known_features(target, grid, size))


# -- matches with a known answer -------------------------------------------------------------------


def test_permutation_is_found_and_comes_back(shifted):
    where = torch.arange(24).reshape(4, 6).roll((-1, -2), dims=(0, 1)).flatten()
    assert torch.equal(shifted.forward, where)
    assert torch.equal(shifted.backward, where.argsort())
    assert shifted.mutual.all()
    numbers = shifted.summary()
    assert numbers["hard_ims"] == 0 and numbers["soft_ims"] < 1e-4
    assert (numbers["density_min"], numbers["density_max"]) == (1, 1)
    assert numbers["mean_ime_nats"] < 1e-4 and numbers["mutual_share"] == 1
    torch.testing.assert_close(shifted.confidence, torch.ones(24))


def test_pixels_move_with_their_token(shifted):
    """One row of 4 in 40 pixels is 10 pixels, two columns of 6 in 90 are 30."""
    hard, soft = shifted.source_to_target, shifted.source_to_target_soft
    assert hard.shape == soft.shape == (40, 90, 2) and hard.dtype == np.float32
    np.testing.assert_allclose(hard[12, 20], (50, 22), atol=1e-4)
    np.testing.assert_allclose(soft[12, 20], (50, 22), atol=1e-3)
    np.testing.assert_allclose(
        shifted.transfer([(20, 12), (20.25, 12.5)]), [(50, 22), (50.25, 22.5)]
    )
    np.testing.assert_allclose(shifted.target_to_source[22, 50], (20, 12), atol=1e-4)
    back = shifted.target_to_source_soft[22, 50]
    np.testing.assert_allclose(back, (20, 12), atol=1e-3)


@pytest.mark.parametrize("smooth", [False, True], ids=["nearest", "bilinear"])
def test_tokens_that_stay_give_exactly_the_identity(smooth):
    for grid, size in (((4, 6), (40, 90)), ((3, 5), (41, 37))):
        field = pixel_field(centres(grid), grid, size, size, smooth=smooth)
        rows, columns = np.indices(size)
        np.testing.assert_allclose(field, np.stack((columns, rows), -1), atol=1e-4)


def test_images_and_grids_may_differ():
    codes = torch.eye(24)
    source = known_features(codes, (4, 6), (40, 60))
    target = known_features(codes[:12].repeat_interleave(1, 0), (3, 4), (90, 120))
    match = match_features(source, target)
    assert match.forward_map.shape == (1, 24, 12)
    assert match.source_to_target.shape == (40, 60, 2)
    assert match.target_to_source.shape == (90, 120, 2)
    assert match.source_to_target[..., 0].max() <= 119 and match.source_to_target.min() >= 0


def test_keys_or_queries_are_compared_by_cosine(pipe):
    """With keys on keys an image finds itself, however long its keys are."""
    (found,) = features(pipe, PHOTO, layers=LAYERS, size=64)
    for compare in ("kk", "qq"):
        match = match_features(found, found, compare=compare)
        assert match.mutual.all() and match.summary()["compare"] == compare
    keys = torch.nn.functional.normalize(found.key, dim=-1)
    dense = (keys @ keys.mT / TEMPERATURE).softmax(-1).mean(1)
    measured = match_features(found, found, compare="kk").forward_map.to_dense()
    torch.testing.assert_close(measured, dense, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=r"compare='best' is not known; choose 'qk'"):
        fm.match(PHOTO, PHOTO, model=pipe, compare="best")


def test_points_and_kinds_are_checked(shifted):
    with pytest.raises(ValueError, match=r"\(90, 3\) lies outside the source image of 90 x 40"):
        shifted.transfer([(90, 3)])
    with pytest.raises(ValueError, match=r"shape \(3,\); wanted \[n, 2\]"):
        shifted.transfer([1, 2, 3])
    with pytest.raises(ValueError, match="kind='best'; wanted 'hard', 'soft', 'window'"):
        shifted.field(kind="best")
    with pytest.raises(ValueError, match="origin='left'"):
        shifted.field("left")
    assert token_at((0, 0), (4, 6), (40, 90)) == 0
    assert token_at((89.4, 39.4), (4, 6), (40, 90)) == 23
    with pytest.raises(ValueError, match="lies outside the image of 90 x 40"):
        token_at((0, 40), (4, 6), (40, 90))


# -- what the two sides are, and how rows become places --------------------------------------------


def test_features_are_what_the_blocks_put_out(pipe):
    """One head of a layer's block, by cosine; the same as running the block's output by hand."""
    (found,) = features(pipe, PHOTO, layers=LAYERS, size=64, outputs=True, seeds=(0, 1))
    assert found.output.shape[1] == 2 * len(found.layers)  # a head for each layer and noise
    assert found.output.shape[2:] == (found.key.shape[2], 32)
    match = match_features(found, found, compare="features", temperature=0.1)
    unit = torch.nn.functional.normalize(found.output, dim=-1)
    dense = (unit @ unit.mT / 0.1).softmax(-1).mean(1)
    torch.testing.assert_close(match.forward_map.to_dense(), dense, atol=1e-5, rtol=1e-3)
    (without,) = features(pipe, PHOTO, layers=LAYERS, size=64)
    with pytest.raises(ValueError, match="take the features with outputs=True"):
        match_features(without, without, compare="features")


def test_temperature_divides_the_scores(pipe):
    (found,) = features(pipe, PHOTO, layers=LAYERS, size=64)
    plain = cross_map(found, found, compare="qk")
    assert torch.equal(cross_map(found, found, compare="qk", temperature=1).to_dense(),
                       plain.to_dense())  # fmt: skip
    cold = cross_map(found, found, compare="qk", temperature=0.5).to_dense()
    scores = 2 * found.scale * found.query @ found.key.mT
    torch.testing.assert_close(cold, scores.softmax(-1).mean(1), atol=1e-5, rtol=1e-3)
    rows = cross_map(found, found, normalize="rows").to_dense().reshape(1, -1, *found.grid)
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:3]), atol=1e-4, rtol=0)


def test_every_way_between_tokens_follows_a_shift(shifted):
    """Columns move by two sixths and rows by a quarter, for points anywhere in the image."""
    points = np.array([(41, 22), (38.5, 17.25), (47, 9)])
    for kind in READOUTS:
        for between in BETWEEN:
            found = shifted.transfer(points, kind, between=between)
            # Interpolated features meet one-hot codes: what is nearest is then the nearer token.
            slack = (7.6, 5.1) if between == "query" else (0.01, 0.01)
            assert (np.abs(found - points - (30, 10)) <= slack).all(), (kind, between)


def test_points_on_token_centres_have_the_tokens_own_row(shifted):
    at = centres((4, 6)).double()[None, [8, 9, 14]]
    options = {"compare": "kk", "readout": "window", "window": 1}
    found = [
        place_points(shifted.source, shifted.target, at, between=between, **options)
        for between in BETWEEN
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=0, check_dtype=False)


def test_bad_options_are_named_before_the_model_runs():
    for given, text in (
        ({"temperature": 0}, r"temperature must be a finite number >= 1e-12, got 0"),
        ({"normalize": "lines"}, r"normalize='lines'; wanted 'block', 'rows', 'columns'"),
        (
            {"readout": "best"},
            r"readout='best'; wanted 'hard', 'soft', 'window', 'parabola' or 'consensus'",
        ),
        ({"window": 0}, r"window must be a whole number >= 1, got 0"),
        ({"between": "pixels"}, r"between='pixels'; wanted 'token', 'bilinear' or 'query'"),
    ):
        with pytest.raises(ValueError, match=text):
            fm.match(PHOTO, PHOTO, model="./nowhere", **given)


@pytest.mark.parametrize("temperature", [True, "cold", float("nan"), 1e-300, -1.0, 10**400])
def test_a_temperature_is_a_number_that_scores_can_hold(temperature, shifted):
    with pytest.raises(ValueError, match="temperature must be a finite number >= 1e-12, got"):
        match_features(shifted.source, shifted.target, temperature=temperature)


@pytest.mark.parametrize("compare", ["kk", "qk"])
def test_extreme_temperatures_give_right_values(compare, shifted):
    cold = match_features(shifted.source, shifted.target, compare=compare, temperature=1e-12)
    assert torch.equal(cold.forward, shifted.forward)
    assert (cold.entropy == 0).all() and (cold.max_probability == 1).all()
    hot = match_features(shifted.source, shifted.target, compare=compare, temperature=1e300)
    torch.testing.assert_close(hot.entropy, torch.full((24,), np.log(24), dtype=torch.float32))
    assert np.isfinite([v for v in hot.summary().values() if isinstance(v, float)]).all()


def test_a_model_with_damaged_weights_gives_no_match(pipe, shifted):
    damaged = copy.deepcopy(pipe)
    layer = damaged.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1
    with torch.no_grad():
        layer.to_k.weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"layer 'up_blocks\.1\..*attn1' of the model puts out NaN"
    ):
        fm.match(PHOTO, PHOTO, model=damaged, layers=LAYERS, size=64)
    key = shifted.source.key.clone()
    key[0, 0, 3, 1] = torch.inf
    spoiled = dataclasses.replace(shifted.source, key=key)
    with pytest.raises(ValueError, match="key of the target's features has 1 values that are NaN"):
        match_features(shifted.source, spoiled)


# -- confidence ------------------------------------------------------------------------------------


def sure(bias=0.0):
    term = Term("return_probability", weight=1.0, mean=0.0, deviation=1.0)
    return Calibration((term,), bias, 0.1, "the image")


def test_confidence_is_a_probability_where_there_is_a_calibration(shifted):
    assert not shifted.calibrated
    assert torch.equal(shifted.confidence, shifted.round_trip.return_probability[0])
    options = dataclasses.replace(shifted.options, calibration=sure(bias=1.0))
    match = dataclasses.replace(shifted, options=options)
    wanted = torch.sigmoid(1 + shifted.round_trip.return_probability[0].log())
    torch.testing.assert_close(match.confidence, wanted)
    assert match.calibrated and match.summary()["calibrated"]
    np.testing.assert_allclose(match.confidence_at([(20, 12)]), wanted[7], rtol=1e-6)


def test_points_below_the_wanted_confidence_are_nan(shifted):
    confidence = shifted.round_trip.return_probability.clone()
    confidence[0, 7] = 0.2  # the token of (20, 12)
    trip = dataclasses.replace(shifted.round_trip, return_probability=confidence)
    match = dataclasses.replace(shifted, round_trip=trip)
    found = match.transfer([(20, 12), (50, 12)], min_confidence=0.5)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], match.transfer([(50, 12)])[0])
    assert np.isfinite(match.transfer([(20, 12)], min_confidence=0.1)).all()
    with pytest.raises(ValueError, match=r"min_confidence must be .* number from 0 to 1, got 70"):
        match.transfer([(20, 12)], min_confidence=70)


# -- the whole way ---------------------------------------------------------------------------------


def test_match_from_pixels_to_files(pipe, tmp_path):
    match = fm.match(PHOTO, PHOTO[::-1].copy(), model=pipe, layers=LAYERS, size=64)
    assert match.source_to_target.shape == (60, 90, 2)
    out = match.save(tmp_path / "out")
    numbers = json.loads((out / "match.json").read_text())
    assert numbers["source_grid"] == [6, 8] and 0 <= numbers["hard_ims"] <= 2**0.5
    tensors = load_file(out / "correspondences.safetensors")
    assert torch.equal(tensors["forward"], match.round_trip.forward)
    assert tensors["target_to_source_soft"].shape == (60, 90, 2)
    pictures = {path.stem for path in out.glob("*.png")}
    assert pictures == {"matches", "heatmap", "entropy", "density", "cycle_error"}
    match.save(out)  # replaces its own
    assert "hard IMS" in repr(match)


def test_saving_is_whole_or_not_at_all(shifted, tmp_path, monkeypatch):
    from flashmaps.matching import plots

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match=r"holds other files \('thesis\.txt'\)"):
        shifted.save(taken)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        shifted.save(taken / "thesis.txt")

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(plots, "density", fail)
    with pytest.raises(OSError, match="disk full"):
        shifted.save(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (taken / "thesis.txt").read_text() == "important"


# -- scores ----------------------------------------------------------------------------------------


def test_pck_counts_known_pixels_within_the_base():
    truth = np.zeros((1, 4, 2), np.float32)
    truth[0, 3] = np.nan
    field = np.zeros((1, 4, 2), np.float32)
    field[0, :, 0] = (0, 1, 3, 100)
    scores = evaluation.score_field(field, truth, base=20)
    assert scores["pck@0.05"] == pytest.approx(2 / 3) and scores["pck@0.01"] == pytest.approx(1 / 3)
    assert scores["median_error_px"] == 1
    with pytest.raises(ValueError, match="no pixel has a known correspondence"):
        evaluation.score_field(field, np.full_like(truth, np.nan), base=20)


def test_auroc_on_known_cases():
    yes = np.array([0, 0, 1, 1])
    assert evaluation.auroc(np.array([1.0, 2, 3, 4]), yes) == 1
    assert evaluation.auroc(np.array([4.0, 3, 2, 1]), yes) == 0
    assert evaluation.auroc(np.array([1.0, 1, 1, 1]), yes) == 0.5
    assert evaluation.auroc(np.array([1.0, np.nan, 1, 2]), yes) == 0.75
    assert evaluation.auroc(np.array([1.0, 2, 3, 4]), np.ones(4)) is None
