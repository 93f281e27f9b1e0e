"""Records as data: slices and sums, tables, pictures, streaming to disk, estimates."""

from __future__ import annotations

import math

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.diffusion import streaming
from flashmaps.diffusion.capture import capture
from tiny_models import FAMILY

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    return FAMILY["sd2"].build(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def each(sd2):
    """Statistics of every step of every self-attention layer, two images under guidance."""
    with capture(
        sd2, kind="self", reduce=("entropy", "argmax", "expectation"), keep="statistics"
    ) as rec:
        FAMILY["sd2"].run(sd2, prompts=["a cat", "a dog"], steps=3)
    return rec


# -- slices and sums -------------------------------------------------------------------------------


def test_slices_and_sums_are_records(each):
    part = each[3:7]
    assert isinstance(part, fm.Record) and list(part) == list(each)[3:7]
    both = each[:3] + each[3:]
    assert isinstance(both, fm.Record) and list(both) == list(each)
    assert each[-1] is list(each)[-1]
    assert len(both.select(step=1)) == 10
    with pytest.raises(TypeError):
        _ = each + 1


# -- tables ----------------------------------------------------------------------------------------


def test_a_data_frame_has_a_row_for_each_statistic_of_each_image(each):
    frame = each.to_pandas()
    assert len(frame) == 3 * 10 * 4 * 3  # steps, layers, two images in two parts, statistics
    one = frame[(frame.layer == FIRST) & (frame.step == 2) & (frame.statistic == "entropy")]
    assert list(one.guidance) == ["unconditional"] * 2 + ["conditional"] * 2
    assert list(one.image) == [0, 1, 0, 1]
    entropy = each.select(FIRST, step=2)[0].entropy.double()
    np.testing.assert_allclose(one["mean"], entropy.mean(1), rtol=1e-14)
    np.testing.assert_allclose(one["std"], entropy.std(1, correction=0), rtol=1e-14)
    np.testing.assert_array_equal(one["min"], entropy.amin(1))
    np.testing.assert_array_equal(one["max"], entropy.amax(1))
    assert set(one.height) == {8} and set(one.width) == {12} and set(one["count"]) == {1}
    assert frame.groupby("step").size().tolist() == [120, 120, 120]


def test_a_data_frame_of_tokens_has_every_value(each):
    chosen = each.select(FIRST, step=0)
    frame = chosen.to_pandas(tokens=True)
    entry = chosen[0]
    of = frame[(frame.statistic == "expectation") & (frame.guidance == "conditional")]
    got = of[of.image == 1].sort_values(["token", "channel"])["value"].to_numpy().reshape(96, 2)
    np.testing.assert_array_equal(got, entry.expectation[3].double().numpy())
    argmax = frame[frame.statistic == "argmax"]
    np.testing.assert_array_equal(argmax["value"], entry.argmax.flatten().double())
    assert argmax.channel.isna().all() and len(argmax) == 4 * 96


def test_means_have_no_step_in_a_data_frame(sd2):
    with capture(sd2, FIRST, reduce="entropy") as record:
        FAMILY["sd2"].run(sd2, steps=2)
    frame = record.to_pandas()
    assert frame.step.isna().all() and frame.timestep.isna().all()
    assert set(frame["count"]) == {2}


@pytest.mark.parametrize("tokens", [False, True])
def test_parquet_holds_what_the_data_frame_holds(each, tokens, tmp_path):
    from pyarrow import parquet

    chosen = each[:4]
    path = chosen.to_parquet(tmp_path / "record.parquet", tokens=tokens)
    table, frame = parquet.read_table(path).to_pydict(), chosen.to_pandas(tokens=tokens)
    assert list(table) == list(frame.columns)
    for name in table:
        missing = frame[name].isna()
        assert [v is None for v in table[name]] == list(missing)
        assert [v for v in table[name] if v is not None] == list(frame[name][~missing])


def test_records_without_statistics_have_no_table(sd2, tmp_path):
    with capture(sd2, FIRST) as record:
        FAMILY["sd2"].run(sd2, steps=1)
    for make in (record.to_pandas, lambda: record.to_parquet(tmp_path / "x"), record.plot):
        with pytest.raises(ValueError, match=r"none of the 1 entries has statistics.*reduce="):
            make()
    assert not (tmp_path / "x").exists()


# -- pictures --------------------------------------------------------------------------------------


def test_the_picture_is_layer_by_step(each):
    figure = each.plot("entropy")
    (image,) = figure.axes[0].images
    values = image.get_array()
    assert values.shape == (10, 3)
    for row, layer in enumerate(each.layers):
        for step in range(3):
            wanted = float(each.select(layer, step=step)[0].entropy.double().mean())
            assert math.isclose(values[row, step], wanted, rel_tol=1e-12)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == each.layers
    with pytest.raises(ValueError, match=r"statistic='colour'; the record has entropy, argmax"):
        each.plot("colour")


def test_means_are_a_column_of_their_own(sd2):
    with capture(sd2, kind="cross", reduce="entropy") as record:
        FAMILY["sd2"].run(sd2, steps=2)
    figure = record.plot()
    assert figure.axes[0].images[0].get_array().shape == (10, 1)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["mean"]


# -- streaming -------------------------------------------------------------------------------------


def test_a_stream_holds_what_memory_would(sd2, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PART_BYTES", 200_000)  # several parts, cut within a step
    folder = tmp_path / "run"
    options = {"keep": "qk", "reduce": "entropy"}
    plain = FAMILY["sd2"].run(sd2, steps=3)
    with capture(sd2, **options) as wanted:
        FAMILY["sd2"].run(sd2, steps=3)
    with capture(sd2, **options, to=folder) as got:
        streamed = FAMILY["sd2"].run(sd2, steps=3)
    assert torch.equal(plain, streamed)
    parts = streaming.parts_of(folder)
    assert len(parts) > 3
    for record in (got, fm.Record.load(folder)):
        assert len(record) == len(wanted) == 60
        for one, other in zip(record, wanted, strict=True):
            assert (one.layer, one.step, one.timestep) == (other.layer, other.step, other.timestep)
            assert (one.queries, one.keys, one.guidance) == (
                other.queries,
                other.keys,
                other.guidance,
            )
            assert torch.equal(one.query, other.query) and torch.equal(one.key, other.key)
            assert torch.equal(one.entropy, other.entropy)
    assert torch.equal(got.select(FIRST).map().entropy(), wanted.select(FIRST).map().entropy())


def test_a_run_that_breaks_off_leaves_what_was_written(sd2, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PART_BYTES", 1)

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), capture(sd2, FIRST, to=tmp_path / "run"):
        FAMILY["sd2"].run(sd2, steps=3, callback_on_step_end=stop)
    assert len(fm.Record.load(tmp_path / "run")) == 1


def test_memory_does_not_grow_while_streaming(tmp_path, monkeypatch):
    """Tensors of what was written are views of files: the process owns no memory for them."""
    monkeypatch.setattr(streaming, "PART_BYTES", 8 << 20)
    from flashmaps.diffusion.entry import Entry
    from flashmaps.diffusion.recorder import Recorder

    recorder = Recorder(keep="qk", to=tmp_path / "run")
    q = torch.zeros(1, 8, 4096, 64)  # 8 MB; with K 16 MB an entry
    for step in range(20):
        recorder.take(Entry("layer", step, "self", q + step, q, 1.0))
    recorder.end()
    assert len(recorder.record) == 20
    assert float(recorder.record[7].query[0, 0, 0, 0]) == 7
    for entry in recorder.record:
        for tensor in (entry.query, entry.key):
            assert _mapped_from(tensor.data_ptr()).startswith(str(tmp_path / "run"))


def _mapped_from(address):
    """The file that an address of this process is a view of; empty where it is memory."""
    with open("/proc/self/maps") as file:
        for line in file:
            fields = line.split(maxsplit=5)
            start, stop = (int(each, 16) for each in fields[0].split("-"))
            if start <= address < stop:
                return fields[5].strip() if len(fields) > 5 else ""
    raise AssertionError("not an address of this process")


def test_folders_of_other_runs_are_refused(sd2, tmp_path):
    with capture(sd2, FIRST, to=tmp_path / "run"):
        FAMILY["sd2"].run(sd2, steps=1)
    with pytest.raises(ValueError, match=r"holds the record of another run.*Record.load"):
        capture(sd2, FIRST, to=tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is a file; give a folder"):
        capture(sd2, FIRST, to=tmp_path / "file")
    with pytest.raises(ValueError, match=r"means take constant memory.*keep='qk'"):
        capture(sd2, FIRST, reduce="entropy", to=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match="holds no parts of a record"):
        fm.Record.load(tmp_path)


# -- estimates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"keep": "qk"},
        {"keep": "qk", "dtype": torch.float16, "kind": "self", "steps": range(1, 4)},
        {"keep": "statistics", "reduce": ("entropy", "argmax", "column_sum")},
        {"reduce": ("entropy", "image_to_text"), "guidance": "conditional"},
        {"keep": "qk", "kind": "cross", "reduce": "image_to_text", "guidance": "conditional"},
    ],
    ids=["qk", "half", "statistics", "means", "both"],
)
def test_an_estimate_is_what_the_run_keeps(sd2, options):
    run = FAMILY["sd2"].run
    cap = capture(sd2, **options)
    found = cap.estimate(lambda: run(sd2, steps=1), steps=4)
    with cap as record:
        run(sd2, steps=4)
    kept = sum(streaming.bytes_of(entry) for entry in record)
    assert (found.bytes, found.entries) == (kept, len(record))
    assert {entry.step for entry in record} <= {None, 0, 1, 2, 3}


def test_an_estimate_needs_a_run(sd2):
    cap = capture(sd2, FIRST)
    with pytest.raises(ValueError, match="the model did not run"):
        cap.estimate(lambda: None)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        cap.estimate(lambda: FAMILY["sd2"].run(sd2, steps=1), steps=0)


# -- heads apart -----------------------------------------------------------------------------------


def test_statistics_of_each_head(sd2, tmp_path):
    names = ("entropy", "argmax", "max_logit", "density")
    layers = "mid_block.*"
    with capture(sd2, layers, kind="self", keep="qk") as full:
        FAMILY["sd2"].run(sd2, steps=2)
    options = {"reduce": names, "per_head": True}
    with capture(sd2, layers, kind="self", **options, keep="statistics") as each:
        FAMILY["sd2"].run(sd2, steps=2)
    with capture(sd2, layers, kind="self", **options, guidance="conditional") as mean:
        FAMILY["sd2"].run(sd2, steps=2)
    for got, entry in zip(each, full, strict=True):
        scores = entry.query.double() @ entry.key.double().mT * entry.scale
        p = scores.softmax(-1)
        near = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(got.entropy.double(), -(p * p.log()).sum(-1), **near)
        torch.testing.assert_close(got.max_logit.double(), scores.amax(-1), **near)
        assert (got.density.sum(-1) == entry.query.shape[2]).all()
        assert got.density.shape == (*entry.query.shape[:2], entry.key.shape[2])
    wanted = torch.stack([e.entropy for e in each.select(guidance="conditional")]).mean(0)
    torch.testing.assert_close(mean[0].entropy, wanted)
    frame = each.to_pandas()
    heads = full[0].query.shape[1]
    assert set(frame["head"]) == set(range(heads))
    each.save(tmp_path / "heads.safetensors")
    assert fm.Record.load(tmp_path / "heads.safetensors")[0].per_head


def test_what_is_of_the_mean_over_heads_is_refused(sd2):
    for reduce in ("pool", "image_to_text", lambda A: A.entropy()):
        with pytest.raises(ValueError, match="is of the mean over heads; with per_head=True"):
            capture(sd2, reduce=reduce, per_head=True)
    with pytest.raises(ValueError, match=r"it is of single heads: per_head=True"):
        capture(sd2, reduce="max_logit")
