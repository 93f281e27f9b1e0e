"""`flashmaps eval parts`: its scenes, its scores on known answers, and a run that goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flashmaps.evaluation.part_missing import missing_summary, visible_shares
from flashmaps.evaluation.part_scenes import lone_images, part_groups
from flashmaps.evaluation.part_scores import (
    _right,
    nearest_category,
    noise_loss,
    pair_up,
)
from flashmaps.evaluation.parts import FOUND, TRUE, evaluate_parts, jobs, tables
from flashmaps.world import CATEGORIES, Options, Split
from tiny_pipeline import tiny_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


def test_alike_parts_are_one() -> None:
    names, group = part_groups("cat")
    assert names == ("body", "tail", "leg", "head")
    assert group.tolist() == [0, 1, 2, 2, 2, 2, 3]


def test_lone_images_show_their_category_and_nothing_before_it() -> None:
    some = lone_images("car", "validation", 2, first=3, size=32)
    again = lone_images("car", "validation", 5, size=32)
    assert np.array_equal(some.images[1], again.images[4])
    for scene, labels in zip(some.scenes, some.labels, strict=True):
        assert [each.category for each in scene.instances] == ["car"]
        assert not scene.occluder.any() and labels.max() < len(some.names)
        assert np.array_equal(labels >= 0, scene.instance == 0)


def test_visible_shares_are_those_of_masks() -> None:
    options = Options(categories=("cat",), objects=(1, 1), occluders=(3, 3))
    scene = Split("validation", size=48, count=1, options=options)[0]
    shares = visible_shares(scene, "cat")
    legs = [name for name in scene.instances[0].parts if "leg" in name]
    free = Split("validation", size=48, count=1, options=replace(options, occluders=(0, 0)))[0]
    whole = np.any([free.mask(0, name) for name in legs], 0)
    seen = np.any([scene.mask(0, name) for name in legs], 0)
    assert shares[2] == pytest.approx(seen.sum() / whole.sum())
    assert (visible_shares(free, "cat") == 1).all() and (shares < 1).any()


def test_missing_parts_on_known_answers() -> None:
    """A score that knows has 1, one that knows nothing a half; in between is not scored."""
    rng = np.random.default_rng(0)
    scenes = []
    for _ in range(40):
        shares = rng.random(4)
        noise = rng.random((3, 4)).tolist()
        scenes.append({
            "visible": [*shares.tolist(), None], "probability": [*shares.tolist(), 0.5],
            "hidden": [False] * 5, "size": [0.1] * 5,
            "area": [*noise[0], 0.0], "peak": [*noise[1], 0.0], "gain": [*noise[2], 0.0],
            "sight": [0.0] * 5,
        })  # fmt: skip
    found = missing_summary(scenes)
    assert found["scores"]["find_parts"]["auroc"] == 1
    assert found["scores"]["size in the collection"]["auroc"] == 0.5
    low, high = found["scores"]["area"]["interval"]
    assert low < 0.5 < high
    shares = np.array([v for each in scenes for v in each["visible"][:4]])
    assert found["missing"] == (shares < 0.25).sum() and found["seen"] == (shares >= 0.5).sum()


def test_learned_parts_are_paired_with_those_they_are_most_of() -> None:
    truth = [np.array([[0, 0, 1], [1, 1, -1]])]
    labels = [np.array([[2, 2, 0], [0, 2, 0]])]
    assert pair_up(labels, truth) == {0: 1, 2: 0}


def test_jobs_in_the_order_of_their_worth() -> None:
    found = jobs(("cat", "dog"), ("noise", "both"), 2)
    assert [(j.category, j.loss, j.seed, j.masks) for j in found[:5]] == [
        ("cat", "both", 0, TRUE), ("dog", "both", 0, TRUE), ("cat", "noise", 0, TRUE),
        ("cat", "both", 0, FOUND), ("dog", "noise", 0, TRUE),
    ]  # fmt: skip
    assert len(found) == len(set(found)) == 10


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), sample_size=8)


def test_the_noise_loss_is_the_same_for_the_same_prompt(pipe: Any) -> None:
    latents, masks = torch.randn(3, 4, 8, 8), torch.ones(3, 32, 32)
    masks[:, :16] = 0
    one = noise_loss(pipe, latents, masks, "a b", {})
    assert one == noise_loss(pipe, latents, masks, "a b", {})
    assert one["whole"] != noise_loss(pipe, latents, masks, "", {})["whole"]
    all_of_it = noise_loss(pipe, latents, torch.ones_like(masks), "a b", {})
    np.testing.assert_allclose(all_of_it["whole"], all_of_it["inside"], rtol=1e-5)


def test_the_nearest_word_of_a_word_is_itself(pipe: Any) -> None:
    table = pipe.text_encoder.get_input_embeddings().weight
    token = pipe.tokenizer("horse", add_special_tokens=False).input_ids[0]
    name, rank = nearest_category(pipe, table[token][None].float())
    first = {pipe.tokenizer(each, add_special_tokens=False).input_ids[0]: each
             for each in reversed(CATEGORIES)}  # fmt: skip
    assert rank == 1 and name == first[token]


def test_a_run_goes_on_and_tells_what_there_is(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmaps.evaluation import parts as module

    asked: dict[str, Any] = {
        "split": "validation", "categories": ("car",), "losses": ("noise", "both"), "images": 2,
        "held_out": 2, "size": 32, "model": pipe, "learning": {"steps": 1, "batch": 1},
        "pictures": 0, "scenes": 1, "resamples": 20,
    }  # fmt: skip
    learn = module.learn_parts

    def killed(*args: Any, **given: Any) -> Any:
        if given["loss"] == "noise":
            raise KeyboardInterrupt
        return learn(*args, **given)

    monkeypatch.setattr(module, "learn_parts", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate_parts(out, **asked)
    done = out / "learned" / "true-both-0-car.json"
    when = done.stat().st_mtime_ns
    monkeypatch.setattr(module, "learn_parts", learn)
    results = evaluate_parts(out, **asked)
    assert done.stat().st_mtime_ns == when
    assert json.loads((out / "results.json").read_text()) == results
    groups = results["groups"]
    assert {"both, true masks", "noise, true masks"} <= set(groups)
    assert len(results["failed"]) + len(results["rows"]) == 3
    for row in results["rows"]:
        assert 0 <= row["accuracy"]["mean"] <= 1
        assert ("sight_accuracy" in row) == (row["loss"] == "both")
    assert len(tables(results)) >= 3 and "Part" in (out / "results.md").read_text()
    with pytest.raises(ValueError, match="size: 32 there, 48 now"):
        evaluate_parts(out, **{**asked, "size": 48})


def test_a_pixel_is_right_whose_largest_plane_is_its_part() -> None:
    truth = torch.tensor([[[0, 0, 1, 1], [-1, 1, 1, -1]]])
    planes = torch.stack([(truth[0] == 1).float(), (truth[0] == 0) * 0.9 + 0.05])[None]
    assert _right(planes, truth, {0: 1, 1: 0}) == [6]  # learned part 0 is the true part 1
    assert _right(planes, truth, {0: 1}) == [4]  # a part that is none of the true ones
    assert _right(planes, truth, {0: 0, 1: 1}) == [0]


def test_pictures_are_read_row_by_row(tmp_path: Path) -> None:
    from flashmaps.evaluation.part_pictures import _write, read_pictures
    from flashmaps.files import open_run

    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 256, (6, 8, 3)).astype(np.uint8) for _ in range(3)] for _ in range(2)]
    with open_run(tmp_path / "run", "parts-evaluation", {}) as run:
        _write(run, "drawn/some", rows)
        found = read_pictures(run, "drawn/some", (6, 8))
    np.testing.assert_array_equal(np.array(found), np.array(rows))
