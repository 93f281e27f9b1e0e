"""Scores of matches: exact where the answer is known, and as scikit-learn has them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flashmaps import evaluation
from flashmaps.evaluation import bootstrap, metrics, results
from flashmaps.evaluation import points as carried
from flashmaps.evaluation.benchmark import Pair
from flashmaps.evaluation.methods import Outcome
from flashmaps.evaluation.run import point_rows
from flashmaps.matching.confidence import SCORES
from flashmaps.matching.points import pixel_field

RNG = np.random.default_rng(0)
BLANK = np.zeros((100, 200, 3), np.float32)


def pair_of(points, truth, base=100.0, category="thing", **more):
    return Pair(
        category, "a", "b", BLANK, BLANK, np.array(points, float), np.array(truth, float), base,
        **more,
    )  # fmt: skip


def table_of(pairs, finds, names, compare=(), scores=None):
    """The table of a run whose methods found ``finds[name](pair)``."""
    rows = []
    for number, pair in enumerate(pairs):
        found = {name: np.asarray(finds[name](pair), float) for name in names}
        given = {c: {s: scores[s][number] for s in SCORES} for c in compare}
        rows.append(point_rows(number, pair, Outcome(found, given, ((4, 8), (4, 8))), names))
    return {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}


# -- PCK and errors --------------------------------------------------------------------------------


@pytest.fixture
def some_pairs():
    truth = [RNG.uniform(20, 80, (n, 2)) for n in (3, 5, 8)]
    return [pair_of(RNG.uniform(0, 99, t.shape), t, base=100.0) for t in truth]


def test_the_truth_scores_exactly_one_and_a_shifted_match_what_it_should(some_pairs):
    shifts = {"truth": 0, "shift 3": 3, "shift 7": 7, "shift 20": 20}
    finds = {
        n: (lambda pair, s=s: pair.target_points + np.array([s, 0])) for n, s in shifts.items()
    }
    table = table_of(some_pairs, finds, list(shifts))
    found = results.summarise(table, list(shifts), ())["methods"]
    wanted = {"truth": (1, 1, 1), "shift 3": (0, 1, 1), "shift 7": (0, 0, 1), "shift 20": (0, 0, 0)}
    for name, shares in wanted.items():
        for threshold, share in zip(("0.01", "0.05", "0.1"), shares, strict=True):
            one = found[name]["pck"][threshold]
            assert (one["per_point"], one["per_image"]) == (share, share)
            assert one["per_point_interval"] == one["per_image_interval"] == [share, share]
        assert found[name]["error"]["mean_px"] == pytest.approx(shifts[name], abs=1e-4)
        assert found[name]["error"]["median_of_base"] == pytest.approx(shifts[name] / 100, abs=1e-6)


def test_pck_per_image_weighs_pairs_and_per_point_weighs_points():
    """One pair with one point, found; one with three, none of them found."""
    pairs = [pair_of([[0, 0]], [[5, 5]]), pair_of([[0, 0]] * 3, [[50, 50]] * 3)]
    table = table_of(pairs, {"m": lambda pair: [[5, 5]] * len(pair.source_points)}, ["m"])
    found = results.summarise(table, ["m"], ())
    one = found["methods"]["m"]["pck"]["0.1"]
    assert one["per_point"] == 0.25 and one["per_image"] == 0.5
    assert one["per_point_interval"] == [0, 1] and one["per_image_interval"] == [0, 1]
    assert (found["points"], found["pairs"], found["hidden_points"]) == (4, 2, 0)


def test_the_base_is_each_pairs_own():
    pairs = [pair_of([[0, 0]], [[5, 0]], base=b) for b in (40, 60)]
    table = table_of(pairs, {"m": lambda pair: pair.source_points}, ["m"])
    one = results.summarise(table, ["m"], ())["methods"]["m"]
    assert one["pck"]["0.1"]["per_point"] == 0.5  # 5 px of 60 and not of 40
    assert one["error"]["mean_of_base"] == pytest.approx((5 / 40 + 5 / 60) / 2)


def test_hidden_points_are_not_scored():
    pairs = [pair_of([[0, 0], [1, 1]], [[0, 0], [np.nan, np.nan]])]
    table = table_of(pairs, {"m": lambda pair: pair.source_points}, ["m"])
    found = results.summarise(table, ["m"], ())
    assert (found["points"], found["hidden_points"]) == (1, 1)
    assert found["methods"]["m"]["pck"]["0.01"]["per_point"] == 1
    table["true_x"][:] = np.nan
    with pytest.raises(ValueError, match="no point of any pair has a known place"):
        results.summarise(table, ["m"], ())


def test_a_match_on_the_other_side_is_counted_apart():
    """Three points, found: on their own side, on the other one, nowhere."""
    truth, mirrored = [[10, 10]] * 3, [[90, 10]] * 3
    pairs = [
        pair_of([[0, 0]] * 3, truth, mirrored_points=np.array(mirrored, float)),
        pair_of([[0, 0]], [[10, 10]]),  # not symmetric: not counted here
    ]
    finds = {"m": lambda pair: [[10, 10], [90, 10], [50, 50]][: len(pair.source_points)]}
    found = results.summarise(table_of(pairs, finds, ["m"]), ["m"], ())
    assert found["methods"]["m"]["pck"]["0.1"]["per_point"] == 0.5
    assert (found["mirrored"]["points"], found["mirrored"]["pairs"]) == (3, 1)
    one = found["mirrored"]["pck"]["m"]["0.1"]
    assert one == {"own_side": pytest.approx(1 / 3), "either_side": pytest.approx(2 / 3)}


def test_units_that_are_not_pairs_have_no_interval_per_image():
    pair = pair_of([[0, 0]] * 4, [[0, 0]] * 2 + [[50, 50]] * 2, units=np.array([0, 1, 2, 3]))
    table = table_of([pair], {"m": lambda pair: pair.source_points}, ["m"])
    one = results.summarise(table, ["m"], ())["methods"]["m"]["pck"]["0.1"]
    assert one["per_image"] == 0.5 and one["per_image_interval"] is None
    low, high = one["per_point_interval"]
    assert 0 <= low < 0.5 < high <= 1


def test_categories_and_differences_are_plain_shares(some_pairs):
    some_pairs[0] = pair_of(some_pairs[0].source_points, some_pairs[0].target_points,
                            category="other")  # fmt: skip
    finds = {"good": lambda pair: pair.target_points, "bad": lambda pair: pair.target_points + 50}
    found = results.summarise(table_of(some_pairs, finds, list(finds)), list(finds), ())
    assert set(found["categories"]) == {"thing", "other"}
    assert found["categories"]["other"]["points"] == 3
    assert found["categories"]["thing"]["pck"]["good"]["0.05"] == {"per_point": 1, "per_image": 1}
    assert found["against"]["bad"]["0.01"] == {"per_point": 1, "per_point_interval": [1, 1]}


def test_old_scores_of_fields_are_as_they_were():
    truth = np.zeros((2, 2, 2))
    truth[0, 0] = np.nan
    field = np.array([[[9, 9], [3, 4]], [[0, 0], [0, 0.5]]], float)
    errors = evaluation.endpoint_errors(field, truth)
    assert np.isnan(errors[0, 0]) and errors[0, 1] == 5
    assert evaluation.pck(errors, 100, (0.01, 0.05)) == [pytest.approx(2 / 3), 1.0]
    assert evaluation.score_field(field, truth, 100)["median_error_px"] == 0.5
    with pytest.raises(ValueError, match="nothing to score"):
        evaluation.pck(np.full(3, np.nan), 1)


# -- scores ----------------------------------------------------------------------------------------


@pytest.fixture(params=["all different", "ties"])
def scored(request):
    positive = RNG.random(60) < 0.4
    score = RNG.normal(size=60) + positive
    return (np.round(score) if request.param == "ties" else score), positive


def test_auroc_is_the_share_of_pairs_in_order(scored):
    score, positive = scored
    difference = score[positive][:, None] - score[~positive][None, :]
    wanted = ((difference > 0) + 0.5 * (difference == 0)).mean()
    assert evaluation.auroc(score, positive) == pytest.approx(wanted)
    score = np.append(score, np.nan)
    assert evaluation.auroc(score, np.append(positive, True)) == pytest.approx(wanted)
    assert evaluation.auroc(score[:60], np.ones(60, bool)) is None


def test_resampled_auroc_is_auroc_of_the_copies(scored):
    score, positive = scored
    weights = np.stack((np.ones(60), RNG.integers(0, 4, 60), positive)).astype(np.float32)
    found = metrics.resampled_auroc(score, positive, weights)
    assert found[0] == pytest.approx(evaluation.auroc(score, positive))
    copies = np.repeat(np.arange(60), weights[1].astype(int))
    assert found[1] == pytest.approx(evaluation.auroc(score[copies], positive[copies]))
    assert np.isnan(found[2])  # no negative was drawn


def test_risk_is_the_mean_loss_of_the_kept():
    coverage, risk = metrics.risk_coverage(np.array([3.0, 1, 2]), np.array([1.0, 0, 1]))
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert risk.tolist() == pytest.approx([0, 1 / 2, 2 / 3])
    assert metrics.aurc(np.array([3.0, 1, 2]), np.array([1.0, 0, 1])) == pytest.approx(7 / 18)


def test_equal_scores_have_the_mean_risk_of_their_orders():
    """Of two with one score, one wrong: half the orders have risk 1 at first, half 0."""
    _, risk = metrics.risk_coverage(np.array([0.0, 0, 1]), np.array([1.0, 0, 0]))
    assert risk.tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 3])
    nothing = metrics.aurc(np.zeros(50), RNG.random(50) < 0.3)
    assert nothing == pytest.approx(metrics.aurc(np.zeros(50), np.full(50, nothing)))


def test_resampled_aurc_of_one_copy_each_is_aurc(scored):
    score, wrong = scored
    found = metrics.resampled_aurc(score, wrong, np.ones((2, 60), np.float32))
    assert found == pytest.approx([metrics.aurc(score, wrong)] * 2)
    assert metrics.aurc(wrong, wrong) < metrics.aurc(score, wrong) < metrics.aurc(-score, wrong)


def test_resampled_median_is_the_median_of_the_copies():
    values = RNG.normal(size=7)
    weights = np.array([[1] * 7, [0, 3, 0, 0, 0, 0, 0]], np.float32)
    assert metrics.resampled_median(values, weights).tolist() == [np.median(values), values[1]]


def test_rows_of_resamples_in_chunks_are_the_same(monkeypatch, scored):
    score, positive = scored
    weights = RNG.integers(0, 3, (10, 60)).astype(np.float32)
    whole = metrics.resampled_auroc(score, positive, weights)
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS", 3 * 60)
    assert np.array_equal(metrics.resampled_auroc(score, positive, weights), whole)


def test_reliability_bins_hold_equally_many_and_never_part_equal_scores():
    score, right = np.arange(100) / 100, np.arange(100) >= 50
    bins = metrics.reliability(score, right)
    assert [each["count"] for each in bins] == [10] * 10
    assert [each["right"] for each in bins] == [0] * 5 + [1] * 5
    assert bins[0]["score"] == pytest.approx(0.045)
    tied = metrics.reliability(np.repeat([0.0, 1.0], 50), right)
    assert tied == [
        {"score": 0.0, "right": 0.0, "count": 50},
        {"score": 1.0, "right": 1.0, "count": 50},
    ]
    assert metrics.calibration_error(tied) == 0
    assert metrics.calibration_error([{"score": 0.9, "right": 0.5, "count": 3}]) == pytest.approx(
        0.4
    )


def test_directions_of_scores_are_measured():
    """Matches of ten pairs, every other wrong; some scores know, some know the other way round."""
    rng = np.random.default_rng(1)
    truth = np.zeros((20, 2)) + 50
    wrong = np.arange(20) % 2 == 1
    pairs = [pair_of(np.zeros((20, 2)), truth) for _ in range(10)]
    finds = {"keys on keys, hard": lambda pair: truth + np.where(wrong, 30, 0)[:, None]}
    scores = {name: [rng.normal(size=20) for _ in pairs] for name in SCORES}
    scores["hard_distance"] = [wrong + 0.1 * rng.random(20) for _ in pairs]
    scores["return_probability"] = [1.0 - wrong for _ in pairs]
    scores["density"] = [np.where(wrong, 3.0, 1.0) for _ in pairs]
    scores["nims"] = [np.where(wrong, np.nan, 1.0) for _ in pairs]
    names = list(finds)
    table = table_of(pairs, finds, names, ("kk",), scores)
    found = results.summarise(table, names, ("kk",))["scores"]["kk"]
    assert found["wrong_share"] == {"0.01": 0.5, "0.05": 0.5, "0.1": 0.5}
    scores = found["scores"]
    one = scores["hard_distance"]
    assert (one["wrong"]["0.1"]["auroc"], one["wrong"]["0.1"]["high_means"]) == (1, "wrong")
    assert one["risk_coverage"]["keep_first"] == "low"
    assert one["risk_coverage"]["aurc_keep_low"] == pytest.approx(found["perfect_aurc"]["0.1"])
    one = scores["return_probability"]
    assert (one["wrong"]["0.1"]["auroc"], one["wrong"]["0.1"]["high_means"]) == (0, "right")
    assert one["risk_coverage"]["keep_first"] == "high" and one["calibration_error"] == 0
    assert scores["entropy"]["wrong"]["0.1"]["high_means"] == "nothing"
    assert scores["nims"]["defined_share"] == 0.5
    assert scores["nims"]["wrong"]["0.1"]["auroc"] is None  # only right ones are left
    assert scores["nims"]["hidden"]["auroc"] is None  # none is hidden


def test_a_score_may_tell_hidden_points():
    pairs = [
        pair_of(np.zeros((4, 2)), [[0, 0], [0, 0], [np.nan] * 2, [np.nan] * 2]) for _ in range(4)
    ]
    scores = {name: [np.arange(4.0) for _ in pairs] for name in SCORES}
    name = "keys on keys, hard"
    table = table_of(pairs, {name: lambda pair: pair.source_points}, [name], ("kk",), scores)
    found = results.summarise(table, [name], ("kk",))["scores"]["kk"]
    assert found["hidden_share"] == 0.5
    hidden = found["scores"]["entropy"]["hidden"]
    assert (hidden["auroc"], hidden["auroc_interval"]) == (1.0, [1.0, 1.0])


# -- intervals -------------------------------------------------------------------------------------


def test_resamples_draw_as_many_units_as_there_are():
    counts = bootstrap.resample(7, 50, seed=3)
    assert counts.shape == (50, 7) and (counts.sum(1) == 7).all()
    assert np.array_equal(counts, bootstrap.resample(7, 50, seed=3))
    assert not np.array_equal(counts, bootstrap.resample(7, 50, seed=4))


def test_an_interval_of_a_mean_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(5).normal(size=80)
    counts = bootstrap.resample(80, 4000, seed=0)
    low, high = bootstrap.interval(counts @ values / 80)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # Both are quantiles of 4000 draws with deviation s / sqrt(80): a tenth of that is four of the
    # standard errors of a 2.5 % quantile.
    within = 0.1 * values.std() / np.sqrt(80)
    assert low == pytest.approx(wanted.low, abs=within)
    assert high == pytest.approx(wanted.high, abs=within)


def test_a_single_pair_has_no_interval():
    scores = {name: [np.arange(3.0)] for name in SCORES}
    name = "keys on keys, hard"
    pair = pair_of(np.zeros((3, 2)), [[0, 0], [50, 50], [0, 0]])
    table = table_of([pair], {name: lambda pair: pair.source_points}, [name], ("kk",), scores)
    found = results.summarise(table, [name], ("kk",))
    one = found["methods"][name]
    assert one["pck"]["0.1"]["per_point"] == pytest.approx(2 / 3)
    assert one["pck"]["0.1"]["per_point_interval"] is None
    assert one["error"]["median_px_interval"] is None
    wrong = found["scores"]["kk"]["scores"]["entropy"]["wrong"]["0.1"]
    assert (wrong["auroc"], wrong["auroc_interval"], wrong["high_means"]) == (0.5, None, "unknown")


def test_no_interval_where_most_resamples_are_undefined():
    assert bootstrap.interval(np.array([np.nan, np.nan, 1.0])) is None
    assert bootstrap.interval(np.array([np.nan, 1.0, 1.0])) == [1.0, 1.0]


# -- points ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "other"), [((40, 90), (40, 90)), ((33, 50), (64, 48))])
def test_points_move_as_pixels_of_a_match_do(size, other):
    generator = torch.Generator().manual_seed(0)
    grid, target_grid = (4, 6), (5, 3)
    matched = torch.rand(24, 2, generator=generator)
    rows, columns = np.mgrid[: size[0], : size[1]]
    pixels = np.stack((columns.ravel(), rows.ravel()), axis=1).astype(float)
    field = pixel_field(matched, grid, size, other, smooth=True).reshape(-1, 2)
    found = carried.soft(pixels, matched, grid, size, other)
    np.testing.assert_allclose(found, field, atol=1e-3)
    chosen = torch.randint(15, (24,), generator=generator)
    from flashmaps.maps.grids import centres

    field = pixel_field(centres(target_grid)[chosen], grid, size, other, smooth=False)
    tokens = carried.tokens_at(pixels, grid, size)
    found = carried.hard(pixels, chosen.numpy()[tokens], grid, target_grid, size, other)
    np.testing.assert_allclose(found, field.reshape(-1, 2), atol=1e-3)


def test_points_between_pixels_and_outside_have_a_token():
    size, grid = (40, 90), (4, 6)
    points = np.array([[-3.0, -3], [14.49, 9.49], [14.51, 9.51], [500, 500], [np.nan, np.nan]])
    assert carried.tokens_at(points, grid, size).tolist() == [0, 0, 7, 23, 0]


def test_dense_sift_is_of_unit_length_and_blind_to_light():
    pytest.importorskip("skimage")
    from flashmaps.evaluation.baselines import dense_sift, nearest

    image = np.random.default_rng(0).random((32, 48, 3)).astype(np.float32) * 0.5
    grid = (8, 12)
    found = dense_sift(image, grid)
    assert found.shape == (96, 128)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(96))
    brighter = dense_sift(image + np.float32(0.3), grid)
    assert (nearest(found, brighter) == torch.arange(96)).float().mean() > 0.99
    assert dense_sift(np.full((32, 48, 3), 0.5, np.float32), grid).abs().sum() == 0
    assert dense_sift(image, (2, 3)).shape == (6, 128)


def test_the_nearest_of_equals_is_the_first():
    from flashmaps.evaluation.baselines import nearest

    keys = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    assert nearest(torch.tensor([[0.0, 2], [3, 0]]), keys).tolist() == [1, 0]


def test_unknown_headlines_are_refused():
    table = table_of([pair_of([[0, 0]], [[0, 0]])], {"m": lambda p: p.source_points}, ["m"])
    with pytest.raises(ValueError, match=r"headline=0\.2"):
        results.summarise(table, ["m"], (), headline=0.2)


def test_models_of_other_weights_have_other_fingerprints():
    from flashmaps.evaluation.methods import fingerprint

    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    prints = {fingerprint(SimpleNamespace(unet=each)) for each in (first, second, first)}
    assert len(prints) == 2
