"""The matching study: stored passes are those of fm.match, the search finds what is better, and
the confidence learns what there is to learn."""

from __future__ import annotations

import json

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.app.commands import make_app
from flashmaps.diffusion.threads import fit_threads
from flashmaps.evaluation import calibrate
from flashmaps.evaluation import study as study_module
from flashmaps.evaluation.search import Questions, Search, passes
from flashmaps.evaluation.store import Store
from flashmaps.evaluation.study import study
from flashmaps.evaluation.study_report import best_of, confidence_auroc, short
from flashmaps.evaluation.worlds import Worlds
from flashmaps.matching.confidence import SCORES
from flashmaps.matching.cross_map import cross_map
from flashmaps.matching.options import COMPARE
from flashmaps.matching.settings import FILE, MatchSettings, settings_of
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

pytest.importorskip("pyarrow")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

FINE = "up_blocks.2.attentions.0.transformer_blocks.0.attn1"  # 16 x 16 tokens at 64 pixels
OTHER = "up_blocks.2.attentions.1.transformer_blocks.0.attn1"
COARSE = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"  # 8 x 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(tmp_path_factory.mktemp("tokenizer")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    from flashmaps.diffusion.features import load_model

    return load_model(str(folder))


@pytest.fixture(scope="module")
def asked():
    return Questions.of(Worlds(2, 5, split="validation", side=64, hidden=False))


@pytest.fixture(scope="module")
def store(pipe, asked, tmp_path_factory):
    return Store(tmp_path_factory.mktemp("passes"), pipe, asked[1])


# -- passes ----------------------------------------------------------------------------------------


def test_questions_are_the_points_of_the_benchmark(asked):
    questions, images = asked
    benchmark = Worlds(2, 5, split="validation", side=64, hidden=False)
    assert len(images) == 4 and questions.unit.shape == (2, 5, 2) and questions.size == (64, 64)
    pair = benchmark.pair(1)
    assert np.isfinite(pair.target_points).all()  # both scenes show them
    np.testing.assert_allclose(questions.true[1], pair.target_points)
    np.testing.assert_allclose(questions.unit[1], (pair.source_points + 0.5) / 64, rtol=1e-6)
    assert not np.array_equal(images[0], Worlds(2, 5, side=64).pair(0).source_image)


@pytest.mark.parametrize("same_noise", [True, False], ids=["same", "different"])
@pytest.mark.parametrize("compare", COMPARE)
def test_stored_passes_make_the_maps_of_match(store, pipe, asked, compare, same_noise):
    settings = MatchSettings(
        compare=compare, layers=(FINE, OTHER), timestep=(1, 101), seeds=(0, 1),
        temperature=0.2, same_noise=same_noise,
    )  # fmt: skip
    source, target = store.features(settings)
    A = cross_map(source, target, compare=compare, temperature=0.2)
    assert A.shape == (2, 256, 256)
    match = fm.match(
        asked[1][2], asked[1][3], model=pipe, compare=compare, layers=(FINE, OTHER),
        timestep=(1, 101), seeds=(0, 1), temperature=0.2, same_noise=same_noise,
    )  # fmt: skip
    mine, theirs = A.to_dense()[1], match.forward_map.to_dense()[0]
    # Stored in halves: scores of order one, rounded by 2^-11, over the temperature.
    torch.testing.assert_close(mine, theirs, rtol=0.1, atol=1e-6)


def test_a_pass_is_computed_once(store, asked, monkeypatch):
    from flashmaps.evaluation import store as module

    settings = MatchSettings(layers=(COARSE,), timestep=7)
    first = store.features(settings)[0].key
    with monkeypatch.context() as patch:
        patch.setattr(module, "features", None)  # would be called for a pass that is not there
        again = Store(store.folder, store.pipe, asked[1])
        assert torch.equal(again.features(settings)[0].key, first)
        assert again.grid(COARSE, None, 7) == (8, 8)
    made = sorted(path.name for path in store.folder.rglob("t7-*"))
    assert made == ["t7-seed0-source", "t7-seed0-target"]
    # What is damaged is made again, and nothing else.
    (one,) = [path for path in store.folder.rglob("t7-*source/*/000001*") if COARSE in str(path)]
    whole = one.read_bytes()
    one.write_bytes(whole[:-1])
    repaired = Store(store.folder, store.pipe, asked[1])
    assert torch.equal(repaired.features(settings)[0].key, first) and one.read_bytes() == whole


# -- the search ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(store, asked):
    search = Search(store, asked[0], timesteps=(1, 101), noises=(1, 2), resamples=20)
    return search, search.run()


def test_the_best_of_all_trials_is_chosen(searched):
    search, best = searched
    assert best.order == max(trial.order for trial in search.trials.values())
    tried = [trial.settings for trial in search.trials.values()]
    for name, values in (
        ("compare", set(COMPARE)), ("normalize", {"block", "rows", "columns"}),
        ("readout", {"hard", "soft", "window", "parabola", "consensus"}),
        ("same_noise", {True, False}),
        ("between", {"token", "bilinear", "query"}), ("seeds", {(0,), (0, 1)}),
    ):  # fmt: skip
        assert {getattr(each, name) for each in tried} == values, name
    assert {each.layers for each in tried} >= {(layer,) for layer in search.store.layers}
    assert any(len(each.layers) > 1 for each in tried)
    assert any(isinstance(each.timestep, tuple) and len(each.timestep) > 1 for each in tried)


def test_forward_passes_have_a_price(searched):
    search, _ = searched
    for trial in search.trials.values():
        pck = trial.scores["pck"]["0.1"]["per_point"]
        assert trial.value == pytest.approx(pck - 0.005 * np.log2(passes(trial.settings)))


def test_a_trial_scores_what_match_finds(searched, asked, pipe):
    """The same points through fm.match, in every way that points are carried."""
    search, _ = searched
    questions, images = asked
    for between in ("token", "bilinear", "query"):
        settings = MatchSettings(layers=(FINE,), readout="window", between=between, temperature=0.1)
        scores = search._score(settings)
        errors = []
        for place in range(2):
            match = fm.match(
                images[2 * place], images[2 * place + 1], model=pipe, compare="kk", layers=(FINE,),
                readout="window", between=between, temperature=0.1,
            )  # fmt: skip
            points = questions.unit[place].double().numpy() * 64 - 0.5
            errors.append(np.linalg.norm(match.transfer(points) - questions.true[place], axis=1))
        # Halves may turn a near tie; the points of this seed have none.
        assert scores["error"]["mean_px"] == pytest.approx(np.concatenate(errors).mean(), rel=0.02)


# -- the confidence --------------------------------------------------------------------------------


def made_scores(count, rng):
    scores = {name: rng.random(count) for name in calibrate.TAKEN}
    pair = np.repeat(np.arange(count // 20), 20)
    return scores, pair


def test_calibration_finds_the_score_that_tells():
    rng = np.random.default_rng(0)
    scores, pair = made_scores(4000, rng)
    chance = 1 / (1 + np.exp(-(3 - 6 * scores["entropy"])))
    right = rng.random(4000) < chance
    fitted, found = calibrate.fit(
        scores, right, pair, tolerance=0.1, of="the box", fitted_on="made up"
    )
    assert found["entropy"]["auroc"] > 0.8 and abs(found["spread"]["auroc"] - 0.5) < 0.05
    assert min(found, key=lambda name: found[name]["log_loss"]) in ("entropy", calibrate.ALL)
    said = fitted.probability({n: torch.from_numpy(v) for n, v in scores.items()}).numpy()
    assert np.abs(said - chance).mean() < 0.03
    assert found["entropy"]["calibration_error"] < 0.04
    assert set(calibrate.TAKEN) == set(SCORES) - {"nims"}


def test_there_is_no_calibration_where_there_is_nothing_to_learn():
    scores, pair = made_scores(200, np.random.default_rng(0))
    kept = {"tolerance": 0.1, "of": "", "fitted_on": ""}
    for right in (np.ones(200, bool), np.zeros(200, bool)):
        assert calibrate.fit(scores, right, pair, **kept) == (None, {})
    assert calibrate.fit(scores, pair % 2 == 0, np.zeros(200), **kept) == (None, {})


# -- the whole ------------------------------------------------------------------------------------

SMALL = {
    "pairs": 6, "points": 4, "test_pairs": 2, "image_size": 64, "compare": ("kk",),
    "timesteps": (1,), "noises": (1,), "resamples": 20, "plots": False,
}  # fmt: skip


@pytest.mark.slow
def test_a_study_from_scenes_to_settings(folder, tmp_path, monkeypatch):
    out = tmp_path / "study"
    results = study(out, model=str(folder), keep=True, **SMALL)
    assert sorted(path.name for path in out.iterdir()) == [
        "flashmaps.jsonl", "match-settings.json", "results.json", "results.md",
    ]  # fmt: skip
    assert json.loads((out / "results.json").read_text()) == results
    page = (out / "results.md").read_text()
    for part in (
        "## Chosen",
        "## Confidence",
        "## On the test split",
        "| SIFT |",
        "cosine of feat",
    ):
        assert part in page
    assert len(results["test"]["noises"]) == 3 and results["test"]["pairs"] == 2
    assert results["test"]["points"] == 3 * 2 * 4

    from flashmaps.diffusion.features import load_model

    found = settings_of(load_model(str(folder)))
    assert json.loads((folder / FILE).read_text()) == json.loads((out / FILE).read_text())
    assert list(found.layers) == results["chosen"]["layers"]
    # A finished study is only read again; one of other settings is refused.
    monkeypatch.setattr(study_module, "Search", None)
    assert study(out, model=str(folder), **SMALL) == results
    with pytest.raises(ValueError, match=r"other settings \(points: 4 there, 5 now\)"):
        study(out, model=str(folder), **{**SMALL, "points": 5})
    (folder / FILE).unlink()


def test_bad_arguments_are_named_before_the_work(tmp_path):
    for given, text in (
        ({"pairs": 0}, "pairs must be a whole number from 1 to 10000000, got 0"),
        ({"timesteps": ()}, "timesteps is empty"),
        ({"noises": (0,)}, "noises must be a whole number from 1 to 64, got 0"),
        ({"compare": ("kv",)}, "compare='kv' is not known"),
    ):
        with pytest.raises(ValueError, match=text):
            study(tmp_path / "out", model="not even looked at", **given)
    assert not (tmp_path / "out").exists()


def test_settings_can_only_lie_beside_a_model_in_a_folder(tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="keep: the model was not loaded from a folder"):
        study(tmp_path / "out", model=pipe, keep=True)


def test_the_report_ranks_the_values_of_an_axis():
    def trial(readout, value):
        pck = {t: {"value": value, "interval": [0, 1]} for t in ("0.05", "0.1")}
        return {"readout": readout, "window": None, "value": value, "pck": pck, "mean_error": 1.0}

    trials = [trial("hard", 0.2), trial("soft", 0.5), trial("hard", 0.3)]
    title, rows = best_of(trials, "readout")
    assert title == "readout" and [row[0] for row in rows] == ["soft", "hard"]
    assert rows[1][2] == "30.0 [0.0, 100.0]"
    assert short(FINE) == "up 2.0" and short("mid_block.attentions.0.x.attn1") == "mid.0"


def test_the_confidence_is_told_the_way_it_points():
    wrong = {"0.1": {"auroc": 0.2, "auroc_interval": [0.1, 0.4]}}
    test = {
        "headline": {"pck": "0.1"},
        "scores": {"kk": {"scores": {"confidence": {"wrong": wrong}}}},
    }
    area, interval = confidence_auroc(test)
    assert area == pytest.approx(0.8) and interval == pytest.approx([0.6, 0.9])
    assert confidence_auroc({**test, "scores": {"kk": {"scores": {}}}}) is None


def test_the_command_passes_its_options_on(monkeypatch, tmp_path):
    asked = {}

    def stop(out, **options):
        asked.update(out=out, **options)
        raise ValueError("stop here")

    monkeypatch.setattr(study_module, "study", stop)
    result = CliRunner().invoke(
        make_app(),
        ["study", "--pairs", "7", "--timestep", "1", "--timestep", "51", "--size", "64",
         "--compare", "qk", "--noises", "2", "--keep", "--out", str(tmp_path / "x")],
    )  # fmt: skip
    assert result.exit_code == 2 and "stop here" in result.stderr
    assert (asked["pairs"], asked["timesteps"], asked["sizes"]) == (7, [1, 51], [64])
    assert (asked["compare"], asked["noises"], asked["keep"]) == (["qk"], [2], True)


def test_small_models_run_in_one_thread_and_threads_come_back(pipe):
    torch.set_num_threads(2)
    try:
        with fit_threads(pipe):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
