"""Records: statistics on the fly, lazy maps of what was kept, across layers, steps and images."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import warnings
import weakref

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.diffusion.capture import capture
from tiny_models import FAMILY

pytestmark = pytest.mark.usefixtures("one_thread")

STATISTICS = ("entropy", "max", "argmax", "column_sum", "density", "pool")


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    return FAMILY["sd2"].build(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return FAMILY["flux"].build(tmp_path_factory.mktemp("flux"))


def run(pipe, **options):
    return FAMILY["sd2"].run(pipe, **options)


def close(got, wanted):
    """Equal up to the rounding of float32 sums of a few hundred terms of order one."""
    torch.testing.assert_close(got, wanted, atol=5e-6, rtol=5e-5)


def weigh(record):
    """Bytes of every tensor that a record holds."""
    tensors = [
        tensor
        for entry in record
        for tensor in (entry.query, entry.key, entry.lse, *entry.statistics.values())
        if tensor is not None
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# -- statistics on the fly -------------------------------------------------------------------------


def test_statistics_are_those_of_the_map(sd2):
    with capture(sd2, kind="self", keep="qk", reduce=STATISTICS, pool_to=(4, 4)) as record:
        run(sd2)
    for entry in record:
        A = entry.map()
        found = A.reduce("entropy", "max", "argmax", "column_sum")
        for name in ("entropy", "max", "column_sum"):
            close(getattr(entry, name), getattr(found, name))
        assert torch.equal(entry.argmax, found.argmax)
        counts = torch.stack([row.bincount(minlength=A.shape[2]) for row in entry.argmax])
        assert torch.equal(entry.density, counts.float())
        grid = tuple(min(4, n) for n in entry.grid)
        close(entry.pool, A.pool(grid, grid))
    with pytest.raises(AttributeError, match=r"'diagonal' is neither .* \(entropy, max, argmax"):
        record[0].diagonal  # noqa: B018


def test_the_mean_over_steps_takes_constant_memory_and_is_the_mean(sd2):
    with capture(sd2, kind="self", reduce=STATISTICS, keep="statistics") as each:
        run(sd2, steps=4)
    with capture(sd2, kind="self", reduce=STATISTICS) as mean:
        run(sd2, steps=4)
    assert len(each) == 4 * len(mean) == 4 * 10
    for entry in mean:
        passes = each.select(entry.layer)
        assert (entry.count, entry.step, entry.timestep) == (4, None, None)
        for name in ("entropy", "max", "column_sum", "density", "pool"):
            close(getattr(entry, name), torch.stack([getattr(e, name) for e in passes]).mean(0))
        assert torch.equal(entry.argmax, passes[-1].argmax)  # indices do not average


def test_fifty_steps_hold_what_five_hold(sd2):
    """With statistics of every layer: all tensors alive, as the garbage collector sees them."""
    held = {}

    def look(pipe, step, timestep, kwargs):
        if step + 1 in (5, 50):
            gc.collect()
            # Not subclasses: a compiled model of another test leaves fake ones behind.
            alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
            held[step + 1] = (weigh(record), sum(storages.values()))
        return kwargs

    with capture(sd2, reduce=(*STATISTICS[:5], "image_to_text")) as record:
        run(sd2, steps=50, callback_on_step_end=look)
    assert held[5] == held[50]


def test_functions_of_the_map_are_statistics_too(sd2):
    def top_mass(A):
        return A.topk(3)[0].sum(-1)

    ranks = {"first": lambda A: A.topk(1)[1]}
    with capture(sd2, kind="self", reduce=["entropy", top_mass]) as record:
        run(sd2)
    with capture(sd2, kind="self", keep="qk", reduce=ranks) as kept:
        run(sd2, steps=1)
    assert all(entry.top_mass.shape == entry.entropy.shape for entry in record)
    for entry in kept:
        assert torch.equal(entry.first, entry.map().topk(1)[1])


@pytest.mark.parametrize(
    ("function", "got"),
    [(lambda A: float(A.max().mean()), "float"), (lambda A: A.max().mean(), r"\(\)")],
    ids=["number", "scalar"],
)
def test_functions_that_return_no_batch_are_refused(sd2, function, got):
    message = rf"function 'mine' in reduce= must return a tensor, batch first: \[2, .*got {got}"
    with pytest.raises(TypeError, match=message):
        with capture(sd2, kind="self", reduce={"mine": function}):
            run(sd2, steps=1)


def test_functions_need_names_of_their_own(sd2):
    for functions in (
        [lambda A: A.max(), lambda A: A.entropy()],
        {"grid": lambda A: A.max()},
        {"layer": lambda A: A.max()},
        {"entropy": lambda A: A.max()},
    ):
        with pytest.raises(ValueError, match=r"a function named '.*', a name that is taken"):
            capture(sd2, reduce=functions)


def test_errors_of_reduce_say_which_layer(sd2):
    with pytest.raises(ValueError, match="diagonal needs a square map") as caught:
        with capture(sd2, kind="cross", reduce="diagonal"):
            run(sd2, steps=1)
    assert caught.value.__notes__[0].startswith("Raised by reduce= on layer 'down_blocks.0.")


def test_statistics_under_autocast_are_computed_in_full(sd2):
    def entropy(A):  # by a backend that torch runs, as on devices without kernels of their own
        p = A.problem
        query, key = p.query.float(), p.key.float()
        return fm.AttentionMap(query, key, scale=p.scale, backend="reference").entropy()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with capture(sd2, kind="self", reduce={"mine": entropy}, keep="qk") as record:
            run(sd2, steps=1)
    for entry in record:
        close(entry.mine, entry.map().entropy())


def test_image_to_text_is_the_cross_map(sd2):
    with capture(sd2, kind="cross", keep="qk", reduce="image_to_text") as record:
        run(sd2, steps=1)
    for entry in record:
        close(entry.image_to_text, entry.map().to_dense())
        assert entry.image_to_text.shape[2] == 77


def test_joint_layers_are_reduced_whole_or_by_block(flux):
    family = FAMILY["flux"]
    names = ("entropy", "expectation")
    with capture(flux, reduce=names, block="image->image", keep="qk", steps=0) as record:
        family.run(flux, guidance=False)
    for entry in record:
        close(entry.entropy, entry.map("image->image").entropy())
        assert entry.expectation.shape == (1, 96, 2)
    with pytest.raises(ValueError, match=r"no grid for expectation; give block='image->image'"):
        with capture(flux, reduce=names):
            family.run(flux, guidance=False)
    with pytest.raises(
        ValueError, match=r"the keys of layer .* have no 'txt'; there are: text, image"
    ):
        record[0].map("image->txt")
    with pytest.raises(ValueError, match="write it as 'image->text'"):
        record[0].map("image")


def test_shapes_that_change_start_a_new_mean(sd2):
    with capture(sd2, "down_blocks.0.*.attn1", reduce="entropy") as record:
        run(sd2, steps=2)
        run(sd2, steps=3, height=48, width=48)
    assert [(entry.grid, entry.count) for entry in record] == [((8, 12), 2), ((12, 12), 3)]


def test_as_many_tokens_on_another_grid_start_a_new_mean(sd2):
    with capture(sd2, "down_blocks.0.*.attn1", reduce="entropy") as record:
        run(sd2, steps=1)
        run(sd2, steps=1, height=48, width=32)
    assert [(entry.grid, entry.count) for entry in record] == [((8, 12), 1), ((12, 8), 1)]


def test_indices_of_any_integer_type_choose_steps(sd2):
    with capture(sd2, "mid_block.*", steps=np.arange(1, 3)) as record:
        run(sd2, steps=3)
    assert {entry.step for entry in record} == {1, 2}
    assert len(record.select(step=np.int64(1))) == len(record.select(step=torch.tensor([1]))) == 2
    for steps in (0.5, [0.5], -1, "1"):
        with pytest.raises(ValueError, match="must be indices of denoising steps, 0 or more"):
            capture(sd2, steps=steps)


def test_clearing_the_record_starts_again(sd2):
    with capture(sd2, "down_blocks.*", kind="self", reduce="entropy") as record:
        run(sd2, steps=2)
        record.clear()
        run(sd2, steps=1)
    assert [entry.count for entry in record] == [1, 1, 1]


def test_captures_of_two_tasks_do_not_hear_each_other(sd2):
    """They share a thread; each hears its own model runs, and those of tasks that it starts."""

    async def captured(steps, mine, theirs):
        with capture(sd2, "down_blocks.*", kind="self", keep="qk") as record:
            mine.set()
            await theirs.wait()  # both are entered now
            run(sd2, steps=steps)
            await asyncio.sleep(0)

            async def again():
                run(sd2, steps=1)

            await asyncio.create_task(again())
        return {entry.step for entry in record}

    async def both():
        one, other = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(captured(2, one, other), captured(3, other, one))

    assert asyncio.run(both()) == [{0, 1, 2}, {0, 1, 2, 3}]


def test_nothing_recorded_says_why(sd2):
    with pytest.warns(UserWarning, match="ran 2 steps, of which steps= chose none"):
        with capture(sd2, steps=[7]):
            run(sd2)
    with pytest.warns(UserWarning, match="ran in another thread or task than the one that"):
        with capture(sd2):
            thread = threading.Thread(target=run, args=(sd2,))
            thread.start()
            thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with capture(sd2):
            pass
        with capture(sd2, reduce="entropy") as record:  # recorded, and cleared by the user
            run(sd2, steps=1)
            record.clear()


# -- choosing --------------------------------------------------------------------------------------


def test_kind_and_resolution_choose_layers(sd2):
    with capture(sd2, kind="cross", resolution=(4, 6), steps=0) as record:
        run(sd2)
    assert {(entry.kind, entry.grid) for entry in record} == {("cross", (4, 6))}
    with capture(sd2, kind=("self", "cross"), resolution=[(4, 6), (8, 12)], steps=0) as record:
        run(sd2)
    assert {entry.grid for entry in record} == {(4, 6), (8, 12)}
    assert record.select(resolution=(4, 6), kind="self", step=0).layers == [
        entry.layer for entry in record if entry.grid == (4, 6) and entry.kind == "self"
    ]
    with capture(sd2, resolution=4, kind="self", steps=0) as record:
        run(sd2, height=32, width=32)
    assert {entry.grid for entry in record} == {(4, 4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "attn1"}, "kind='attn1'; choose from self, cross, joint, temporal, image"),
        ({"kind": ()}, r"kind=\(\)"),
        ({"resolution": "32x32"}, r"resolution='32x32'; wanted a side such as 32"),
        ({"resolution": []}, "resolution is empty"),
        ({"guidance": "cond"}, "guidance='cond'; choose 'conditional', 'unconditional' or None"),
        ({"reduce": "entropie"}, "reduce='entropie' is unknown; choose from entropy, max,"),
        ({"keep": "mean"}, "keep='mean' keeps statistics, but reduce names none"),
        ({"reduce": {"a": "entropy"}}, "reduce='entropy' is unknown"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_anything_runs(sd2, options, message):
    with pytest.raises(ValueError, match=message):
        capture(sd2, **options)


def test_layers_must_be_patterns(sd2):
    with pytest.raises(TypeError, match="layers must be patterns of layer names, got 3"):
        capture(sd2, [3])


# -- maps later ------------------------------------------------------------------------------------


def test_layers_and_steps_average_as_one_map(sd2):
    with capture(sd2, kind="self", resolution=(8, 12)) as record:
        run(sd2)
    A = record.map()
    assert A.problem.heads == sum(entry.heads for entry in record)
    each = torch.stack([entry.map().to_dense() for entry in record])
    close(A.to_dense(), each.mean(0))
    weights = torch.linspace(1, 2, len(record))
    weights = (weights / weights.sum()).tolist()
    close(
        record.map(weights=weights).to_dense(),
        torch.einsum("l,lbnm->bnm", torch.tensor(weights), each),
    )
    with capture(sd2, kind="self", steps=0) as mixed:
        run(sd2)
    with pytest.raises(ValueError, match=r"different sizes do not average.*select\(resolution="):
        mixed.map()
    with pytest.raises(ValueError, match=r"no entries.*select\(\) chose none"):
        mixed.select("nothing").map()


def test_blocks_average_exactly(flux):
    """The rows' log-sum-exp goes along: a block of a mean is the mean of the blocks."""
    with capture(flux, steps=0) as record:
        FAMILY["flux"].run(flux, guidance=False)
    dense = torch.stack([entry.map().to_dense() for entry in record]).mean(0)
    parts = record[0].queries
    close(record.map("image->text").to_dense(), dense[:, parts["image"], parts["text"]])
    close(record.map("text->image").to_dense(), dense[:, parts["text"], parts["image"]])


def test_keys_of_another_image_and_of_another_text(sd2):
    """Cross-self-attention, note eq. 2.4; and the words of another prompt."""
    records = []
    for seed, prompt in ((0, "a cat"), (1, "a dog")):
        with capture(sd2, steps=0, guidance="conditional") as record:
            run(sd2, seed=seed, prompts=[prompt])
        records.append(record)
    source, target = (record.select(resolution=(8, 12), kind="self") for record in records)
    A_st, A_ts = source.map(to=target), target.map(to=source)
    one, other = source[0], target[0]
    scores = one.scale * one.query.double() @ other.key.double().mT
    close(one.map(to=other).to_dense(), scores.softmax(-1).mean(1).float())
    trip = fm.round_trip(A_st, A_ts)
    assert trip.forward.shape == (1, 96) and torch.isfinite(trip.hard_ims).all()
    image, text = (record.select(kind="cross", resolution=(4, 6)) for record in records)
    assert image.map(to=text).shape == (1, 24, 77)
    with pytest.raises(ValueError, match="to has 4 entries for 3; make the same selection"):
        source.map(to=fm.Record([*target, target[0]]))


def test_options_win_over_what_was_recorded(sd2):
    with capture(sd2, "down_blocks.0.*.attn1", steps=0) as record:
        run(sd2, prompts=["a cat", "a dog"], guidance=False)
    entry = record[0]
    pairs = [[0, 1], [1, 0], [0, 0]]
    A = entry.map(pairs=pairs, scale=0.5, backend="reference")
    assert A.shape[0] == 3 and A.problem.scale == 0.5 and A.backend == "reference"
    scores = 0.5 * entry.query[[0, 1, 0]].double() @ entry.key[[1, 0, 0]].double().mT
    close(A.to_dense(), scores.softmax(-1).mean(1).float())


def test_statistics_alone_make_no_map(sd2):
    with capture(sd2, kind="self", reduce="entropy") as record:
        run(sd2, steps=1)
    with pytest.raises(ValueError, match=r"were not kept, only statistics \(entropy\).*keep='qk'"):
        record[0].map()


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd2", "flux", "pixart", "wan"])
def test_saved_and_loaded_records_are_alike(name, tmp_path):
    family = FAMILY[name]
    pipe = family.build(tmp_path / "pipe")
    with capture(pipe, keep="qk", reduce=("entropy", "density"), dtype=torch.bfloat16) as record:
        family.run(pipe)
    file = record.save(tmp_path / "record.safetensors")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["record.safetensors"]
    again = fm.Record.load(file)
    assert len(again) == len(record)
    for one, other in zip(record, again, strict=True):
        assert repr(one) == repr(other)
        assert (one.queries, one.keys, one.scale) == (other.queries, other.keys, other.scale)
        for field in ("query", "key", "entropy", "density"):
            assert torch.equal(getattr(one, field), getattr(other, field))
        assert torch.equal(one.map().entropy(), other.map().entropy())
        if one.rotary is not None:
            same = [each.map(positions="removed").entropy() for each in (one, other)]
            assert torch.equal(*same)


def test_halves_save_too(sd2, tmp_path):
    with capture(sd2, "mid_block.*", steps=0, keep="qk", reduce="entropy") as record:
        run(sd2)
    halves = fm.Record([*record.select(guidance="conditional"), record[0].unconditional])
    again = fm.Record.load(halves.save(tmp_path / "halves.safetensors"))
    for one, other in zip(halves, again, strict=True):
        assert one.guidance == other.guidance
        assert torch.equal(one.query, other.query) and torch.equal(one.entropy, other.entropy)


def test_rotary_embeddings_are_written_once_a_pass(flux, tmp_path):
    from safetensors import safe_open

    with capture(flux, steps=0) as record:
        FAMILY["flux"].run(flux, guidance=False)
    with safe_open(record.save(tmp_path / "record.safetensors"), "pt") as file:
        names = list(file.keys())
    assert len(record) == 4
    assert sum(name.startswith("rotary") for name in names) == 2  # a cosine and a sine


def test_other_files_are_refused_and_nothing_is_half_written(sd2, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="there is no file"):
        fm.Record.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        fm.Record.load(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"is not a record .* format is None"):
        fm.Record.load(tmp_path / "weights.safetensors")
    record = fm.Record()
    with pytest.raises(ValueError, match="is a folder; give a file"):
        record.save(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        record.save(tmp_path / "none" / "record.safetensors")
    assert len(fm.Record.load(record.save(tmp_path / "empty.safetensors"))) == 0


# -- threads, and what is left behind --------------------------------------------------------------


def test_each_thread_records_its_own(sd2):
    """Two captures of one model at once, each with a generation of its own; and one without."""
    unet = sd2.unet
    wanted = {
        n: torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2)
    }
    text = torch.randn(1, 5, 32)
    plain = {n: unet(x, n, text).sample for n, x in wanted.items()}
    records, outputs = {}, {}
    start = threading.Barrier(3)

    def work(n):
        with capture(unet, "*.attn1") as records[n]:
            start.wait()
            outputs[n] = [unet(wanted[n], n, text).sample for _ in range(5)]
            start.wait()

    threads = [threading.Thread(target=work, args=(n,)) for n in wanted]
    for thread in threads:
        thread.start()
    start.wait()
    unet(wanted[1], 99, text)
    start.wait()
    for thread in threads:
        thread.join()
    for n in wanted:
        assert all(torch.equal(plain[n], each) for each in outputs[n])
        assert len(records[n]) == 5 * 10
        assert {entry.timestep for entry in records[n]} == {float(n)}
        assert [entry.step for entry in records[n].select(records[n].layers[0])] == list(range(5))
    assert not any("processor" in m.__dict__ and type(m.processor).__name__ == "StandIn"
                   for m in unet.modules())  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"reduce": "entropy"}], ids=["qk", "reduce"])
def test_nothing_outlives_the_record(sd2, options):
    seen = []

    def remember(module, args, output):
        seen.append(weakref.ref(output))

    layers = [m for n, m in sd2.unet.named_modules() if n.endswith(("to_q", "to_k"))]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    again = capture(sd2, **options)
    with again as record:
        run(sd2, steps=2)
    for hook in hooks:
        hook.remove()
    kept = [
        weakref.ref(x) for e in record for x in (e.query, *e.statistics.values()) if x is not None
    ]
    gc.collect()
    assert seen and not any(ref() is not None for ref in seen)  # the layer's own, at once
    assert all(ref() is not None for ref in kept)
    del record, again
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_timesteps_do_not_keep_the_schedule(sd2):
    with capture(sd2, "mid_block.*.attn1") as record:
        run(sd2, steps=2)
    assert all(entry._timestep.untyped_storage().nbytes() == 8 for entry in record)


def test_a_record_knows_the_mass_of_its_blocks(flux):
    """What falls on the text and on the image makes up the whole row."""
    with capture(flux, steps=0) as record:
        FAMILY["flux"].run(flux, guidance=False)
    for entry in record:
        mass = [entry.map(f"image->{part}").to_dense().sum(-1) for part in ("text", "image")]
        close(sum(mass), torch.ones(1, 96))
        assert math.isclose(entry.map("image->text", renormalize=True).to_dense().sum().item(), 96,
                            rel_tol=1e-5)  # fmt: skip
