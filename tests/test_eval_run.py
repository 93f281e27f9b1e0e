"""Runs of `flashmaps eval`: what they write, that they go on, and that a known match scores 1."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flashmaps.app.commands import make_app
from flashmaps.diffusion.features import Features
from flashmaps.evaluation import methods as methods_module
from flashmaps.evaluation import run as run_module
from flashmaps.evaluation.benchmark import Pair
from flashmaps.evaluation.methods import FREE, Methods, method_names
from flashmaps.evaluation.results import THRESHOLDS, TITLES
from flashmaps.evaluation.run import evaluate
from flashmaps.matching.confidence import SCORES
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

pytest.importorskip("pyarrow")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = "up_blocks.1.*.attn1"  # 8 x 8 tokens at 64 pixels
OPTIONS = {"layers": LAYERS, "size": 64, "resamples": 50, "plots": False}


class Toy:
    """Noise pictures and the same moved by 8 pixels (one token of 8) to the right, cyclically."""

    name, what, base, unit, headline = "toy", "noise that moves", "the image", "pairs", 0.1

    def __init__(self, count=3, stop=None):
        self.count, self.stop, self.asked = count, stop, []

    def __len__(self):
        return self.count

    def pair(self, index):
        self.asked.append(index)
        if index == self.stop:
            raise KeyboardInterrupt
        rng = np.random.default_rng(index)
        image = rng.random((64, 64, 3), dtype=np.float32)
        points = rng.integers(0, 64, (20, 2)).astype(float)
        target = points + np.array([8, 0])
        target[target[:, 0] > 63] = np.nan
        return Pair(
            "even" if index % 2 == 0 else "odd", f"{index} a", f"{index} b",
            image, np.roll(image, 8, axis=1), points, target, 64.0,
        )  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def done(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "out"
    results = evaluate(Toy(), out, model=pipe, compare=("kk", "qk"), **OPTIONS)
    return out, results


# -- a known match ---------------------------------------------------------------------------------


def known_features(pipe, images, **_):
    """Features whose tokens have a code that moves with the picture: 8 x 8 one-hot codes."""
    found = []
    for number, image in enumerate(images):
        codes = torch.eye(64).reshape(8, 8, 64)
        if number % 2:  # targets
            codes = codes.roll(1, dims=1)
        heads = codes.reshape(1, 1, 64, 64)
        found.append(
            Features(
                query=heads, key=heads, output=heads, scale=50.0, head_weights=torch.ones(1),
                grid=(8, 8), image=image, input_size=(64, 64), layers=("known",), timestep=0,
                seeds=(0,), prompt="",
            )
        )  # fmt: skip
    return found


def test_a_model_that_knows_the_way_scores_exactly_one(monkeypatch, tmp_path, pipe):
    monkeypatch.setattr(methods_module, "features", known_features)
    found = evaluate(Toy(2), tmp_path / "out", model=pipe, **OPTIONS)
    for name in ("keys on keys, hard", "cosine of keys", "best token there is"):
        for threshold in THRESHOLDS:
            assert found["methods"][name]["pck"][f"{threshold:g}"]["per_point"] == 1.0
    # The identity is off by 8 of 64 pixels, one eighth: beyond every threshold.
    assert found["methods"]["identity"]["pck"]["0.1"]["per_point"] == 0
    assert found["methods"]["identity"]["error"]["mean_px"] == pytest.approx(8)
    assert found["methods"]["keys on keys, soft"]["error"]["mean_px"] < 8
    # Where the picture only moves colour is enough, but for tokens at its edge: the filter that
    # makes their mean colours ends there.
    assert found["methods"]["raw colour"]["pck"]["0.1"]["per_point"] > 0.9


# -- what a run writes -----------------------------------------------------------------------------


def test_results_hold_every_method_and_score(done):
    out, results = done
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results["methods"]) == method_names(("kk", "qk"))
    assert set(results["scores"]) == {"kk", "qk"}
    for found in results["scores"].values():
        assert tuple(found["scores"]) == SCORES == tuple(TITLES)[1:]  # no calibration
    assert results["points"] + results["hidden_points"] == 60 and results["pairs"] == 3
    assert results["tokens"] == {"source": ["8 x 8"], "target": ["8 x 8"]}
    assert sorted(path.name for path in out.iterdir()) == [
        "flashmaps.jsonl", "points.parquet", "results.json", "results.md",
    ]  # fmt: skip


def test_the_page_names_every_method_and_score(done):
    out, results = done
    page = (out / "results.md").read_text()
    for name in (*results["methods"], *list(TITLES.values())[1:], "even", "odd"):
        assert f"| {name} |" in page
    assert "nan" not in page.lower().split()


def test_points_in_parquet_are_those_of_the_numbers(done):
    from pyarrow import parquet

    out, results = done
    table = parquet.read_table(out / "points.parquet").to_pydict()
    x, y = (np.array(table[f"{axis}: random"]) for axis in "xy")
    error = np.hypot(x - table["true_x"], y - table["true_y"])
    seen = np.isfinite(error)
    assert (error[seen] <= 6.4).mean() == results["methods"]["random"]["pck"]["0.1"]["per_point"]
    assert len(table["pair"]) == 60 and set(table["category"]) == {"even", "odd"}


def test_a_run_repeats_bit_for_bit(done, pipe, tmp_path):
    again = evaluate(Toy(), tmp_path / "out", model=pipe, compare=("kk", "qk"), **OPTIONS)
    assert again == done[1]


@pytest.mark.slow  # matplotlib takes its seconds
def test_plots_are_drawn(pipe, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    out = tmp_path / "out"
    evaluate(Toy(), out, model=pipe, compare=("kk", "qk"), **{**OPTIONS, "plots": True})
    page = (out / "results.md").read_text()
    names = {"pck", "scores", "risk", "reliability", "examples"}
    assert {path.stem for path in out.glob("*.png")} == names
    for name in names:
        assert f"({name}.png)" in page
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 200


# -- going on --------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_was(pipe, tmp_path, monkeypatch):
    # Other chunks would be other batches, which round differently.
    monkeypatch.setattr(run_module, "CHUNK", 1)
    whole = evaluate(Toy(), tmp_path / "whole", model=pipe, compare=("kk", "qk"), **OPTIONS)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Toy(stop=2), out, model=pipe, compare=("kk", "qk"), **OPTIONS)
    parts = sorted(path.name for path in (out / "parts").iterdir())
    assert parts == ["000000.parquet", "000001.parquet"]
    assert not (out / "results.json").exists()
    rest = Toy()
    found = evaluate(rest, out, model=pipe, compare=("kk", "qk"), **OPTIONS)
    assert rest.asked == [2]
    assert found == whole and not (out / "parts").exists()


def test_a_finished_run_is_only_reported_again(pipe, tmp_path):
    out = tmp_path / "out"
    first = evaluate(Toy(2), out, model=pipe, **OPTIONS)
    again = Toy(2)
    found = evaluate(again, out, model=pipe, **{**OPTIONS, "resamples": 60})
    assert again.asked == [] and found["resamples"] == 60
    assert found["methods"]["random"]["pck_curve"] == first["methods"]["random"]["pck_curve"]


def test_a_run_of_other_settings_is_refused_unless_told(pipe, tmp_path):
    out = tmp_path / "out"
    evaluate(Toy(1), out, model=pipe, **OPTIONS)
    before = (out / "results.json").read_text()
    with pytest.raises(
        ValueError, match=r"other settings \(timestep: 1 there, 7 now\); give anoth"
    ):
        evaluate(Toy(1), out, model=pipe, timestep=7, **OPTIONS)
    assert (out / "results.json").read_text() == before
    evaluate(Toy(1), out, model=pipe, timestep=7, overwrite=True, **OPTIONS)
    assert json.loads((out / "results.json").read_text())["settings"]["timestep"] == 7


def test_other_weights_are_other_settings(pipe, tmp_path):
    out = tmp_path / "out"
    evaluate(Toy(1), out, model=pipe, **OPTIONS)
    other = methods_module.untrained(pipe, seed=5)
    with pytest.raises(ValueError, match="weights: "):
        evaluate(Toy(1), out, model=other, **OPTIONS)


def test_a_folder_with_other_things_is_refused_before_the_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    toy = Toy()
    with pytest.raises(ValueError, match=r"holds other files \('notes\.txt'\)"):
        evaluate(toy, tmp_path, model="not even looked at")
    with pytest.raises(ValueError, match="compare='kv' is not known"):
        evaluate(toy, tmp_path / "out", model="not even looked at", compare="kv")
    with pytest.raises(ValueError, match="dtype='half' is not known; wanted float32"):
        evaluate(toy, tmp_path / "out", model="not even looked at", dtype="half")
    with pytest.raises(ValueError, match="compare is empty"):
        evaluate(toy, tmp_path / "out", model="not even looked at", compare=())
    assert toy.asked == []


def test_damaged_points_are_told_and_the_numbers_stay(pipe, tmp_path):
    out = tmp_path / "out"
    evaluate(Toy(1), out, model=pipe, **OPTIONS)
    before = (out / "results.json").read_text()
    (out / "points.parquet").write_bytes((out / "points.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not what was written: it is damaged or was changed"):
        evaluate(Toy(1), out, model=pipe, **OPTIONS)
    assert (out / "results.json").read_text() == before


def test_damaged_parts_are_made_again_before_they_are_used(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "CHUNK", 1)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Toy(stop=2), out, model=pipe, **OPTIONS)
    part = out / "parts" / "000001.parquet"
    part.write_bytes(part.read_bytes()[:-4] + b"PAR2")
    rest = Toy()
    found = evaluate(rest, out, model=pipe, **OPTIONS)
    assert rest.asked == [1, 2]
    assert found == evaluate(Toy(), tmp_path / "whole", model=pipe, **OPTIONS)


def test_a_report_that_fails_leaves_the_one_before(pipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    evaluate(Toy(1), out, model=pipe, **OPTIONS)
    before = {name: (out / name).read_text() for name in ("results.json", "results.md")}
    monkeypatch.setattr(run_module, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(Toy(1), out, model=pipe, **{**OPTIONS, "resamples": 60})
    assert {name: (out / name).read_text() for name in before} == before


def test_files_of_ones_own_stay_in_a_run(pipe, tmp_path):
    out = tmp_path / "out"
    evaluate(Toy(1), out, model=pipe, **OPTIONS)
    (out / "note.txt").write_text("mine")
    evaluate(Toy(1), out, model=pipe, **{**OPTIONS, "resamples": 60})
    with pytest.raises(ValueError, match=r"holds other files \('note.txt'\).*before you overwrite"):
        evaluate(Toy(1), out, model=pipe, timestep=7, overwrite=True, **OPTIONS)
    assert (out / "note.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "wrong",
    [{"size": -1}, {"resamples": 0}, {"timestep": 1000}, {"seeds": (-1,)}, {"seed": -1},
     {"layers": "x"}, {"device": "nonsense"}, {"same_noise": "no"}],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_written(pipe, tmp_path, wrong):
    out, toy = tmp_path / "out", Toy(1)
    (name,) = wrong
    with pytest.raises((ValueError, TypeError), match=name):
        evaluate(toy, out, model=pipe, **{**OPTIONS, **wrong})
    assert toy.asked == [] and not out.exists()
    evaluate(toy, out, model=pipe, **OPTIONS)


# -- images through the model once -----------------------------------------------------------------


def counted(monkeypatch):
    seen = []
    original = methods_module.features

    def features(pipe, images, **options):
        seen.extend(options["prompt"])
        return original(pipe, images, **options)

    monkeypatch.setattr(methods_module, "features", features)
    return seen


def test_an_image_of_several_pairs_is_described_once(pipe, monkeypatch):
    seen = counted(monkeypatch)
    pair = Toy().pair(0)
    methods = Methods(pipe, options={"layers": LAYERS, "size": 64})
    first = list(methods.run([(0, pair), (1, pair)]))
    assert len(seen) == 4  # two images, two models
    again = list(methods.run([(0, pair)]))
    assert len(seen) == 4
    for name, places in first[0][1].found.items():
        assert np.array_equal(places, again[0][1].found[name])
    # The same pair under another number: all but what is drawn by number is the same.
    for name in set(first[0][1].found) - {"random"}:
        assert np.array_equal(first[0][1].found[name], first[1][1].found[name])
    assert not np.array_equal(first[0][1].found["random"], first[1][1].found["random"])


def test_old_images_are_forgotten_when_there_are_too_many(pipe, monkeypatch):
    monkeypatch.setattr(methods_module, "KEPT_BYTES", 0)
    seen = counted(monkeypatch)
    methods = Methods(pipe, options={"layers": LAYERS, "size": 64})
    toy = Toy()
    for index in (0, 1, 0):
        list(methods.run([(index, toy.pair(index))]))
    assert len(seen) == 12 and len(methods._kept) == 2


def test_the_prompt_may_name_the_category(pipe, monkeypatch):
    seen = counted(monkeypatch)
    options = {"layers": LAYERS, "size": 64, "prompt": "a {category}"}
    list(Methods(pipe, options=options).run([(0, Toy().pair(0))]))
    assert set(seen) == {"a even"}


def test_noise_of_ones_own_belongs_to_the_image_and_not_to_its_place(pipe):
    options = {"layers": LAYERS, "size": 64, "same_noise": False, "timestep": 500}
    pairs = [(i, Toy().pair(i)) for i in range(2)]
    together = dict(Methods(pipe, options=options).run(pairs))
    alone = dict(Methods(pipe, options=options).run(pairs[1:]))
    name = "keys on keys, hard"
    assert np.array_equal(together[1].found[name], alone[1].found[name])
    same = dict(Methods(pipe, options={**options, "same_noise": True}).run(pairs[1:]))
    assert not np.array_equal(same[1].found[name], alone[1].found[name])


def test_methods_that_look_at_nothing_are_baselines(pipe):
    assert set(FREE) <= set(method_names(("kk",)))


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """Runs `flashmaps eval` with the work replaced; gives the result and what was asked for."""
    asked = {}

    def evaluate(benchmark, out, **options):
        asked.update(benchmark=benchmark, out=out, **options)
        raise ValueError("stop here")

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    return lambda *arguments: (CliRunner().invoke(make_app(), ["eval", *arguments]), asked)


def test_the_command_passes_its_options_on(command):
    result, asked = command(
        "spair", "--pairs", "7", "--seed", "3", "--data", "x", "--compare", "kk", "--compare", "qk",
        "--noise-seed", "1", "--noise-seed", "2", "--different-noise", "--timestep", "261",
        "--prompt", "a {category}", "--out", "there", "--overwrite",
    )  # fmt: skip
    assert result.exit_code == 2 and "stop here" in result.stderr
    assert (asked["benchmark"], str(asked["out"]), str(asked["data"])) == ("spair", "there", "x")
    assert (asked["pairs"], asked["seed"], asked["timestep"]) == (7, 3, [261])
    assert (asked["compare"], asked["seeds"], asked["same_noise"]) == (["kk", "qk"], [1, 2], False)
    assert asked["prompt"] == "a {category}" and asked["overwrite"]


def test_the_command_has_its_defaults(command):
    _, asked = command("world")
    assert str(asked["out"]) == "flashmaps-eval-world" and not asked["overwrite"]
    for name in ("compare", "seeds", "timestep", "same_noise", "layers", "size", "pairs"):
        assert asked[name] is None, name  # the model's own


def test_the_command_shows_tables_that_fit(pipe, done, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "evaluate", lambda *_, **__: done[1])
    result = CliRunner().invoke(make_app(), ["eval", "world", "--out", str(tmp_path / "x")])
    assert result.exit_code == 0, result.output
    assert "best token there is" in result.output and "IME at the match" in result.output
    assert max(len(line.rstrip()) for line in result.output.splitlines()[:-1]) <= 80


def test_mistakes_of_the_command_exit_with_2(tmp_path):
    for arguments, text in (
        (["nonsense"], "benchmark 'nonsense' is not known"),
        (["spair"], "spair needs the folder of SPair-71k"),
        (["cub", "--data", str(tmp_path)], "lacks images.txt"),
    ):
        out = tmp_path / "out"
        result = CliRunner().invoke(make_app(), ["eval", *arguments, "--out", str(out)])
        assert result.exit_code == 2 and text in result.stderr
        assert not out.exists()


@pytest.mark.slow
def test_the_command_takes_any_stable_diffusion_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["world", "--pairs", "2", "--points", "20", "--model", str(tmp_path / "model"),
                 "--layers", LAYERS, "--size", "64", "--out", str(out)]  # fmt: skip
    result = CliRunner().invoke(make_app(), ["eval", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text())
    assert found["tokens"] == {"source": ["8 x 8"], "target": ["8 x 8"]}
    again = CliRunner().invoke(make_app(), ["eval", *arguments])
    assert again.exit_code == 0 and json.loads((out / "results.json").read_text()) == found


@pytest.mark.slow
def test_the_built_in_model_on_a_little_of_everything(tmp_path):
    for name in ("world", "warps"):
        found = evaluate(name, tmp_path / name, pairs=4, points=64, plots=False)
        assert found["pairs"] == 4
        ours = found["methods"]["fm.match"]["pck"]["0.1"]["per_point"]
        assert ours > found["methods"]["random"]["pck"]["0.1"]["per_point"]


def test_a_fingerprint_passes_over_what_is_offloaded():
    weights = {"a": torch.zeros(3), "b": torch.zeros(3, device="meta")}
    unet = SimpleNamespace(state_dict=lambda: weights)
    assert len(methods_module.fingerprint(SimpleNamespace(unet=unet))) == 16
