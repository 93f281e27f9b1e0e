"""The main job in small: real photographs and truth, a tiny random model."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from flashmaps.app import costs, demo, demo_completion, report
from flashmaps.diffusion.features import features
from flashmaps.matching.match import match_features
from tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def done(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SCENES", 2)
        patch.setattr(demo_completion, "EXEMPLARS", 2)
        patch.setattr(demo_completion, "STEPS", 4)
        results = demo.run(out, model=pipe, size=64, layers="up_blocks.2.*.attn1")
    return out, results


def test_pair_has_the_truth_of_its_photographs():
    pair = demo.load_pair()
    assert pair.left.shape == pair.right.shape == (500, 741, 3)
    known = np.isfinite(pair.truth).all(-1)
    assert 0.85 < known.mean() < 0.9266
    rows, columns = np.nonzero(known)
    moved = columns - pair.truth[rows, columns, 0]
    assert 7 < moved.min() and moved.max() < 60
    assert np.array_equal(pair.truth[rows, columns, 1], rows)
    # The truth is the truth: colours agree along it, and not where nothing moves.
    there = np.rint(pair.truth[rows, columns, 0]).astype(int).clip(0)
    colour = pair.left[rows, columns]
    agree = np.abs(colour - pair.right[rows, there]).mean()
    assert agree < 0.5 * np.abs(colour - pair.right[rows, columns]).mean()


def test_results_hold_every_number_and_are_strict_json(done):
    out, results = done
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    methods = results["methods"]
    assert {"queries on keys, hard", "keys on keys, soft", "raw colour", "random"} <= set(methods)
    identity = methods["identity"]
    assert identity["pck@0.1"] == 1  # nothing moves more than 60 pixels
    assert identity["median_error_px"] == pytest.approx(results["truth"]["disparity_px_median"])
    for score in methods.values():
        assert score["pck@0.01"] <= score["pck@0.02"] <= score["pck@0.05"] <= score["pck@0.1"]
    settings = results["settings"]
    assert settings["source_grid"] == [12, 16] and settings["hard_ims"] >= 0


def test_drawn_scenes_are_scored_beside_simple_ways(done):
    _, results = done
    scenes = results["scenes"]
    assert scenes["pairs"] == 2 and scenes["points"] == 2 * demo.SCENE_POINTS
    assert not scenes["calibrated"]  # a model without a match-settings.json
    assert next(iter(scenes["methods"])) == scenes["method"] == "queries on keys, hard"
    assert list(scenes["methods"])[1] == "keys on keys, hard"  # a model's own way without settings
    assert {"identity", "random", "SIFT", "best token there is"} <= set(scenes["methods"])
    shares = {name: score["pck@0.1"] for name, score in scenes["methods"].items()}
    assert shares.pop("best token there is") > max(shares.values())


def test_points_of_a_scene_are_spread():
    from flashmaps.evaluation.worlds import Worlds

    whole = Worlds(1, 200, side=64, hidden=False).pair(0)
    few = demo._spread(whole, 5)
    distances = np.linalg.norm(few.source_points[:, None] - few.source_points[None], axis=-1)
    nearest = (distances + 1e9 * np.eye(5)).min()
    drawn = np.linalg.norm(whole.source_points[:5, None] - whole.source_points[None, :5], axis=-1)
    assert len(few.target_points) == 5 and nearest > (drawn + 1e9 * np.eye(5)).min()
    assert (few.source_points[:, None] == whole.source_points[None]).all(-1).any(1).all()


def test_eager_torch_agrees_and_both_are_measured(done):
    _, results = done
    ours, eager = results["cost"]["flashmaps"], results["cost"]["eager"]
    for name in ("soft_ims", "mean_ime"):
        assert ours[name] == pytest.approx(eager[name], rel=1e-3)
    assert ours["hard_ims"] == pytest.approx(results["maps"]["queries on keys"]["hard_ims"])
    for cost in (ours, eager):
        assert cost["seconds"] > 0 and cost["peak_mb"] >= 0


def test_report_is_one_file_with_everything_in_it(done):
    out, results = done
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert (
        page.count("data:image/png;base64,") == len(report.CAPTIONS) == len(list(out.glob("*.png")))
    )
    for name in results["methods"]:
        assert name in page
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower().split()
    for table in report.tables(results):
        assert table.row_count > 0


def test_eager_round_trip_is_the_definition(pipe):
    pair = demo.load_pair()
    left, right = features(pipe, [pair.left, pair.right], size=64, layers="up_blocks.2.*.attn1")
    ours = match_features(left, right, compare="qk", backend="reference").round_trip
    theirs = costs.eager_round_trip(
        left.query, left.key, right.query, right.key, left.head_weights, left.scale, left.grid
    )
    for name in ("soft_distance", "return_probability", "inverse_entropy", "soft_density"):
        torch.testing.assert_close(getattr(ours, name)[0], theirs[name], atol=1e-4, rtol=1e-3)


def test_an_occupied_folder_is_refused_before_the_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \('notes\.txt'\)"):
        demo.run(tmp_path, model="not even looked at")
