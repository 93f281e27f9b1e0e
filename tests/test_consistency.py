"""Cycles through a collection, and matches fused over other images: by the maps' dense truth."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from flashmaps.batches.consistency import consistency
from flashmaps.batches.fuse import HOWS, fused_places, fused_rows
from flashmaps.maps.grids import centres
from flashmaps.matching.confidence import Calibration, Term
from flashmaps.matching.cross_map import at_points, cross_map, place_points
from flashmaps.matching.options import MatchOptions
from test_pairs import random_features

pytestmark = pytest.mark.usefixtures("one_thread")
SOFT = MatchOptions("kk", temperature=0.2, readout="soft")


@pytest.fixture
def sets():
    return [random_features(seed) for seed in range(5)]


def test_cycles_of_a_collection_are_walks_along_best_matches(sets):
    found = consistency(sets, length=3)
    assert len(found.cycles) == 3 * 10
    at = centres((4, 5))
    best = {
        (s, t): cross_map(sets[s], sets[t]).argmax()[0]
        for s in range(5) for t in range(5) if s != t
    }  # fmt: skip
    sums, begun = torch.zeros(5, 20), torch.zeros(5)
    for number, (a, b, c) in enumerate(found.cycles.tolist()):
        home = best[c, a][best[b, c][best[a, b]]]
        away = (at[home] - at).norm(dim=-1)
        torch.testing.assert_close(found.error[number], away.mean())
        assert found.closed[number] == (home == torch.arange(20)).float().mean()
        sums[a] += away
        begun[a] += 1
    for image in range(5):
        torch.testing.assert_close(found.per_token[image], sums[image] / begun[image])
        through = (found.cycles == image).any(1)
        torch.testing.assert_close(found.per_image[image], found.error[through].mean())
    drawn = consistency(sets, length=4, count=2, seed=3)
    assert drawn.cycles.shape == (8, 4)
    with pytest.raises(ValueError, match="a cycle of 6 needs as many images; there are 5"):
        consistency(sets, length=6)


def test_the_image_that_is_not_like_the_others_breaks_cycles(sets):
    # Four are one image with its tokens in another order each, so that every cycle of them closes.
    orders = [torch.randperm(20, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    alike = [replace(sets[0], key=sets[0].key[:, :, order]) for order in orders]
    found = consistency([*alike[:2], sets[1], *alike[2:]], length=3)
    assert int(found.per_image.argmax()) == 2
    without = torch.tensor([2 not in cycle for cycle in found.cycles.tolist()])
    assert without.sum() == 3 * len(list(combinations(range(4), 3)))
    assert (found.closed[without] == 1).all() and (found.error[without] == 0).all()


def test_fused_rows_are_the_mean_over_paths(sets):
    points = centres((4, 5)).double()
    direct = cross_map(sets[0], sets[1], SOFT).to_dense()[0]
    paths = [
        cross_map(sets[0], sets[m], SOFT).to_dense()[0]
        @ cross_map(sets[m], sets[1], SOFT).to_dense()[0]
        for m in (2, 3, 4)
    ]
    rows = fused_rows(sets[0], sets[1], sets[2:], points, SOFT, weight=0.7)
    wanted = (direct + 0.7 * torch.stack(paths).mean(0)) / 1.7
    torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows.sum(-1), torch.ones(20))


def test_without_paths_a_fused_match_is_the_direct_one(sets):
    points = torch.rand(7, 2, generator=torch.Generator().manual_seed(0)).double()
    options = replace(SOFT, between="query")
    direct = place_points(sets[0], sets[1], points[None], options)[0]
    for between, weight in (([], 0.5), (sets[2:], 0)):
        found = fused_places(sets[0], sets[1], between, points, options, weight=weight)
        torch.testing.assert_close(found.places.float(), direct)
        assert found.confidence is None
    with pytest.raises(ValueError, match="weight"):
        fused_rows(sets[0], sets[1], sets[2:], points, SOFT, weight=-1)


def test_ways_to_fuse_are_their_formulas(sets):
    points = torch.rand(6, 2, generator=torch.Generator().manual_seed(1)).double()
    here = at_points(sets[0], points[None])
    direct = cross_map(here, sets[1], SOFT).to_dense()[0]
    first = [cross_map(here, sets[m], SOFT).to_dense()[0] for m in (2, 3)]
    walked = torch.stack([
        f @ cross_map(sets[m], sets[1], SOFT).to_dense()[0]
        for f, m in zip(first, (2, 3), strict=True)
    ])  # fmt: skip
    met = torch.stack([
        f @ cross_map(sets[1], sets[m], SOFT).to_dense()[0].T
        for f, m in zip(first, (2, 3), strict=True)
    ])  # fmt: skip
    met = met / met.sum(-1, keepdim=True)
    trust = walked.amax(-1, keepdim=True)
    product = direct * walked.mean(0) ** 2
    wanted = {
        "mean": (direct + 2 * walked.mean(0)) / 3,
        "sharp": (direct + 2 * (trust * walked).sum(0) / trust.sum(0)) / 3,
        "product": product / product.sum(-1, keepdim=True),
        "meet": (direct + 2 * met.mean(0)) / 3,
    }
    assert set(wanted) == set(HOWS)
    for how, rows in wanted.items():
        found = fused_rows(sets[0], sets[1], sets[2:4], points, SOFT, weight=2, how=how)
        torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="how='median'; wanted mean, sharp, product, meet"):
        fused_rows(sets[0], sets[1], sets[2:], points, SOFT, how="median")


def test_scores_of_a_fused_match_are_of_its_row_and_of_the_way_back(sets):
    points = torch.rand(6, 2, generator=torch.Generator().manual_seed(1)).double()
    terms = (Term("max_probability", 1.0, -2.0, 1.0), Term("soft_distance", -1.0, -2.0, 1.0))
    calibration = Calibration(terms, 0.1, 0.1, "the image")
    found = fused_places(
        sets[0], sets[1], sets[2:], points, SOFT, how="meet", fused_calibration=calibration
    )
    rows = fused_rows(sets[0], sets[1], sets[2:], points, SOFT, how="meet")
    back = at_points(sets[1], found.places[None].double())
    home = cross_map(back, sets[0], SOFT).to_dense()[0]
    at, here = centres((4, 5)), points.float()
    wanted = {
        "max_probability": rows.max(1).values,
        "entropy": -(rows * rows.log()).sum(1),
        "spread": (home * (at - here[:, None]).square().sum(-1)).sum(1).sqrt(),
        "hard_distance": (at[home.argmax(1)] - here).norm(dim=1),
        "soft_distance": (home @ at - here).norm(dim=1),
    }
    assert set(wanted) == set(found.scores)
    for name, values in wanted.items():
        torch.testing.assert_close(found.scores[name], values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.confidence, calibration.probability(wanted))


@pytest.mark.slow
def test_the_study_of_fused_matches_scores_both(tmp_path):
    pytest.importorskip("diffusers")
    from flashmaps.evaluation.fused import TRIED, study

    found = study(pairs=6, test_pairs=3, points=5, out=tmp_path / "out")
    assert {"direct", "fused", "gain", "interval"} == set(found["test"])
    test = found["test"]
    assert test["gain"] == pytest.approx(test["fused"] - test["direct"])
    assert test["interval"][0] <= test["gain"] <= test["interval"][1]
    assert list(found["validation"]) == [str(way) for way in TRIED]
    chosen = "{how}, {images} images, weight {weight:g}".format(**found["chosen"])
    others = [value for name, value in found["validation"].items() if ", 0 " not in name]
    assert found["validation"][chosen] == max(others)
    assert set(found["confidence"]["fused"]) == {"auroc", "calibration_error", "brier"}
    made = (tmp_path / "out/validation/features/000000.safetensors").stat().st_mtime_ns
    again = study(pairs=6, test_pairs=3, points=5, out=tmp_path / "out")
    assert again["test"] == found["test"]
    assert (tmp_path / "out/validation/features/000000.safetensors").stat().st_mtime_ns == made
