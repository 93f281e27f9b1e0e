"""The commands of segments, and the scores and rivals that eval shows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flashmaps.app.commands import make_app
from flashmaps.evaluation import segment_scores as scores
from flashmaps.evaluation.segment_rivals import diffseg, recursive_cuts, spectral
from flashmaps.segmentation.map_equation import compact
from PIL import Image
from typer.testing import CliRunner


def run(*arguments):
    return CliRunner().invoke(make_app(), [str(a) for a in arguments])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from flashmaps import world

    folder = tmp_path_factory.mktemp("photos")
    for i, pair in enumerate(world.pairs("validation", 1, size=64, category="cat")):
        Image.fromarray(pair.a.image).save(folder / f"{i}a.png")
        Image.fromarray(pair.b.image).save(folder / f"{i}b.png")
    return folder


def test_segment_writes_labels_and_a_page_for_each_image(photos, tmp_path):
    out = tmp_path / "out"
    result = run("segment", photos, "--size", 64, "--out", out)
    assert result.exit_code == 0, result.output
    for name in ("0000", "0001"):
        assert np.asarray(Image.open(out / name / "objects.png")).shape == (64, 64)
    assert "\n0b.png: " in result.output and "\\n" not in result.output
    assert 'href="0001/index.html"' in (out / "index.html").read_text("utf-8")
    again = run("segment", photos / "0a.png", "--size", 64, "--count", 3, "--out", out)
    assert again.exit_code == 0, again.output
    assert json.loads((out / "segments.json").read_text("utf-8"))["levels"][0]["count"] == 3
    assert not (out / "0000").exists()


def test_cosegment_writes_one_name_for_one_part(photos, tmp_path):
    out = tmp_path / "out"
    result = run("cosegment", photos, "--size", 64, "--out", out)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "cosegments.json").read_text("utf-8"))
    found = [np.asarray(Image.open(out / f"labels-000{i}.png")) for i in (0, 1)]
    assert max(each.max() for each in found) < summary["count"]


def test_mistakes_are_told(photos, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, told in (
        (("segment", empty, "--out", tmp_path / "a"), "holds no images"),
        (("segment", photos, "--count", "0", "--out", tmp_path / "a"), "count"),
        (("cosegment", photos / "0a.png", "--out", tmp_path / "a"), "two images"),
        (("eval", "segments", "--dtype", "float16", "--out", tmp_path / "a"), "--dtype"),
        (("eval", "segments", "--split", "train", "--out", tmp_path / "a"), "split"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert told in result.output
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["segments", "cosegments"])
def test_eval_writes_a_table_and_goes_on(which, tmp_path):
    out = tmp_path / "out"
    given = ("eval", which, "--pairs", 1, "--split", "validation", "--image-size", 64)
    for _ in range(2):
        result = run(*given, "--out", out)
        assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text("utf-8"))
    assert found["scored"] == 1
    for rows in found["levels"].values():
        assert {"FlashMaps", "single segment"} <= set(rows)


TRUTH = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [-1, -1, -1, -1], [-1, -1, -1, -1]])


def test_perfect_labels_score_one_and_names_do_not_matter():
    labels = TRUTH + 5
    found = scores.score(labels, TRUTH)
    assert found == {"iou": 1.0, "ari": 1.0, "mbo": 1.0, "nmi": pytest.approx(1.0), "count": 3.0}


def test_one_segment_scores_by_hand():
    found = scores.score(np.zeros_like(TRUTH), TRUTH)
    assert found["iou"] == pytest.approx((4 / 16) / 2)  # one target matched, the other counts 0
    assert found["mbo"] == pytest.approx(4 / 16)
    assert found["ari"] == pytest.approx(0.0)


def test_scores_agree_with_scikit_learn_and_void_is_not_counted():
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 4, 500), rng.integers(-2, 5, 500)
    found, kept = scores.score(labels, truth), truth != scores.VOID
    assert found["ari"] == pytest.approx(adjusted_rand_score(truth[kept], labels[kept]))
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(truth[kept], labels[kept]))


def test_no_target_gives_no_iou():
    assert np.isnan(scores.score(TRUTH, np.full_like(TRUTH, -1))["iou"])


def test_rivals_find_planted_groups_at_some_setting():
    labels = np.repeat([0, 1, 2], 48)  # 12 x 12 tokens, four rows each
    rng = np.random.default_rng(0)
    A = np.where(labels[:, None] == labels, 1.0, 0.01) * rng.uniform(0.9, 1.1, (144, 144))
    A /= A.sum(1, keepdims=True)
    W = (A + A.T) / 2
    for made in (diffseg(A, (12, 12)), recursive_cuts(W), spectral(W)):
        assert any(np.array_equal(compact(found), labels) for _, found in made)


def test_a_cut_costs_what_the_definition_says():
    from flashmaps.evaluation.segment_rivals import _cut_tree

    rng = np.random.default_rng(1)
    W = rng.random((12, 12))
    W = W + W.T
    _, cost, left, _ = _cut_tree(W, np.arange(12), 10.0, 1)
    side = np.isin(np.arange(12), left[0])
    across = W[side][:, ~side].sum()
    assert cost == pytest.approx(across / W[side].sum() + across / W[~side].sum())
