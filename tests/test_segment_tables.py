"""Tables of segments: kept features, the protocol, two views, and data sets of classes."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
from flashmaps.app.commands import make_app
from flashmaps.evaluation import segment_consistency as views
from flashmaps.evaluation.benchmark import Pair
from flashmaps.evaluation.kept_features import KeptFeatures
from flashmaps.evaluation.segment_protocol import digest, entry, given_labels, protocol
from flashmaps.evaluation.segments import summarise
from PIL import Image
from typer.testing import CliRunner


def pair_of(labels, shift):
    """A view, and the same moved ``shift`` pixels to the right."""
    height, width = labels.shape
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    source = np.stack((x, y), 1).astype(float)
    target = source + np.array([shift, 0])
    target[target[:, 0] >= width] = np.nan
    blank = np.zeros((height, width, 3), np.float32)
    return Pair("moved", "a", "b", blank, blank, source, target, float(width))


def test_labels_that_move_with_the_picture_agree():
    labels = np.repeat(np.arange(4), 5)[None].repeat(8, 0)
    pair = pair_of(labels, 5)
    moved = np.roll(labels, 5, 1)
    assert views.agreement(pair, labels, moved) == {
        "ari": 1.0, "nmi": pytest.approx(1.0), "same": 1.0, "segments": 3.0,
    }  # fmt: skip
    other = views.agreement(pair, labels, moved + 7)  # other names: the same segments
    assert other["ari"] == 1.0 and other["same"] == 0.0
    stayed = views.agreement(pair, labels, labels)  # every pixel is a segment further on
    assert stayed["ari"] == 1.0 and stayed["same"] == 0.0
    assert views.agreement(pair, labels, np.zeros_like(labels))["ari"] == 0.0


def test_the_protocol_tells_images_apart():
    image, truth = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.int64)
    one = entry("0", [image], [truth])
    assert one["sizes"] == [[4, 5]]
    assert entry("0", [image], [truth + 1])["truth_sha256"] != one["truth_sha256"]
    assert digest(image) != digest(image.reshape(5, 4, 3))
    whole = json.loads(json.dumps(protocol("some", [one])))
    assert whole["entries"] == [one] and whole["rules"]["unmatched_target"] == 0


def test_labels_of_another_method_are_read_and_checked(tmp_path):
    labels = np.arange(20).reshape(4, 5)
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "7.png")
    assert np.array_equal(given_labels(tmp_path, "7", (4, 5)), labels)
    with pytest.raises(ValueError, match="5 x 4 pixels; the truth has 4 x 5"):
        given_labels(tmp_path, "7", (5, 4))
    with pytest.raises(FileNotFoundError, match=r"8\.png"):
        given_labels(tmp_path, "8", (4, 5))


def test_classes_are_summed_over_images_and_drawn_again():
    def image(right, named, true):
        scores = dict.fromkeys(("iou", "ari", "mbo", "nmi", "count"), 0.5)
        return {"classes": {"FlashMaps": {"-": {**scores, "counts": {"1": [right, named, true]}}}}}

    found = summarise([image(4, 8, 8), image(8, 8, 8)], 200, 0)
    told = found["levels"]["classes"]["FlashMaps"]["class_iou"]
    assert told["mean"] == pytest.approx(12 / (16 + 16 - 12))
    low, high = told["interval"]  # both images the one, or both the other
    assert (low, high) == (pytest.approx(4 / 12), pytest.approx(1.0))


def test_rivals_read_the_attention_of_objects_and_that_of_matching():
    """Attention of halves beside features of four kinds: each rival has settings with both."""
    from dataclasses import replace

    import torch
    from flashmaps.evaluation.segment_scenes import LabelledImage
    from flashmaps.evaluation.segments import _rows
    from flashmaps.segmentation.seen import Seen
    from test_cosegment import planted

    (like,) = planted([[0, 0, 1, 2, 2, 3]])
    x = torch.eye(16)[torch.tensor([0, 0, 0, 1, 1, 1] * 6)][None, None]
    image = (like.image * 255).astype(np.uint8)
    truth = {
        "objects": np.repeat(np.tile([0, 0, 0, 1, 1, 1], (24, 1)), 4, 1),
        "parts": np.repeat(np.tile([0, 0, 1, 2, 2, 3], (24, 1)), 4, 1),
    }
    one = LabelledImage("0", image, truth)
    seen = Seen(like, replace(like, query=x, key=x))
    (rows,) = _rows([one], [seen], ("objects", "parts"), True, None)
    for level in truth:
        assert rows[level]["FlashMaps"]["-"]["iou"] == 1.0
        settings = set(rows[level]["spectral, eigengap"])
        assert settings == {"eigengap", "eigengap, matching layers"}
        assert "KL 0.1, matching layers" in rows[level]["DiffSeg"]
        assert set(rows[level]["DiffCut"]) == {f"tau 0.{i}" for i in range(1, 10)}
    (rows,) = _rows([one], [Seen(like, like)], ("objects", "parts"), True, None)
    assert set(rows["objects"]["spectral, eigengap"]) == {"eigengap"}


def test_features_are_kept_and_belong_to_their_images(tmp_path, monkeypatch):
    from flashmaps.batches import features as stage
    from flashmaps.evaluation import kept_features
    from flashmaps.matching.settings import MatchSettings

    calls = []

    def drawn(pipe, images, **options):
        import torch
        from flashmaps.diffusion.features import Features

        calls.append((len(images), options["size"], options["outputs"]))
        x = torch.arange(4.0).reshape(1, 1, 4, 1)
        return [
            Features(query=x + i, key=x, scale=1.0, head_weights=torch.ones(1), grid=(2, 2),
                     image=each, input_size=(4, 4), layers=("one",), timestep=1, seeds=(0,),
                     prompt="", output=x)
            for i, each in enumerate(images)
        ]  # fmt: skip

    monkeypatch.setattr(stage, "features", drawn)
    monkeypatch.setattr(stage, "fit_threads", lambda pipe: nullcontext())
    monkeypatch.setattr(kept_features, "fingerprint", lambda pipe: "w")
    monkeypatch.setattr(kept_features, "settings_of", lambda pipe: MatchSettings())
    images = [np.full((16, 16, 3), i / 2, np.float32) for i in range(2)]
    first = KeptFeatures(None, "these", tmp_path / "kept").see(0, images)
    again = KeptFeatures(None, "these", tmp_path / "kept").see(0, images)
    assert calls == [(2, None, True)]
    for i, (one, two) in enumerate(zip(first, again, strict=True)):
        assert np.array_equal(one.query, two.query) and one.output is not None
        assert np.array_equal(one.image, images[i]) and np.array_equal(two.image, images[i])
    KeptFeatures(None, "others", tmp_path / "kept").see(0, images)
    KeptFeatures(None, "these", tmp_path / "kept", size=8).see(0, images)
    KeptFeatures(None, "these", tmp_path / "kept").see(1, images)
    assert calls[1:] == [(2, None, True), (2, 8, True), (2, None, True)]


@pytest.mark.slow
def test_eval_of_two_views_writes_tables(tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(
        make_app(), ["eval", "segments-warps", "--pairs", "2", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text("utf-8"))
    assert found["scored"] == 2 and "objects, all" in found["agreement"]


def test_options_of_other_tables_are_refused(tmp_path):
    for arguments, told in (
        (("segments-warps", "--features", "x"), "--features"),
        (("segments", "--images", "4"), "--images"),
        (("world", "--labels", "x"), "--labels"),
        (("world", "--no-rivals"), "--no-rivals"),
        (("segments-warps", "--no-rivals"), "--no-rivals"),
        (("segments-stereo", "--pairs", "2"), "stereo is a single pair"),
        (("segments", "--data", str(tmp_path)), "none of the layouts"),
    ):
        result = CliRunner().invoke(
            make_app(), ["eval", *arguments, "--out", str(tmp_path / "out")]
        )
        assert result.exit_code == 2, result.output
        assert told in " ".join(result.output.split())
