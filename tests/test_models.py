"""The built-in model: the packaged folder, its vocabulary and data, and the training script."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from flashmaps.models import NAMES, builtin_folder


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(builtin_folder(), torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def photo_packages():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", NAMES)
def test_every_built_in_model_loads_by_its_name_and_has_a_card(name):
    from flashmaps.diffusion.loading import load_model

    pipe = load_model(name)
    assert Path(pipe.config._name_or_path) == builtin_folder(name)
    card = (builtin_folder(name) / "README.md").read_text()
    assert f"# FlashMaps {name}:" in card


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"no built-in model 'bultin'; there are: builtin$"):
        builtin_folder("bultin")


def test_the_built_in_model_learned_without_labels_and_says_so():
    folder = builtin_folder()
    rows = json.loads((folder / "training.json").read_text())
    assert rows and all(row["alignment"] == 0 for row in rows)
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    steps = [line for line in log if line["stage"] == "unet"]
    assert steps and not any("aligned" in line for line in steps)
    runs = [line for line in log if line["stage"] == "run"]
    assert "unet" not in runs[0].get("init", "")  # the later ones go on from it
    assert all(row["alignment"] == 0 for run in runs for row in run.get("earlier", []))
    card = (folder / "README.md").read_text()
    assert "No label of the world takes part" in card and "supervision" not in card


def test_loads_in_float32_and_draws(pipeline):
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(
        "a photo of a cat", num_inference_steps=2, generator=generator, output_type="np"
    ).images
    assert drawn.shape == (1, 128, 128, 3)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_half_precision_and_under_12_megabytes(name):
    from safetensors import safe_open

    folder = builtin_folder(name)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():
                tensor = weights.get_tensor(name)
                assert tensor.isfinite().all(), name
                assert tensor.dtype == torch.float16 or not tensor.is_floating_point(), name


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_it_names_a_folder_of_the_machine_it_was_made_on(name):
    for path in builtin_folder(name).rglob("*.json*"):
        if path.parent.name != "tokenizer":
            assert '"/' not in path.read_text() and "_name_or_path" not in path.read_text(), path


def test_self_attention_runs_at_32_16_and_8(pipeline):
    tokens = {}

    def note(name):
        def hook(module, args):
            tokens[name] = args[0].shape[1]

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in pipeline.unet.named_modules()
        if name.endswith("attn1")
    ]
    text = torch.zeros(1, 77, pipeline.unet.config.cross_attention_dim)
    with torch.no_grad():
        pipeline.unet(torch.zeros(1, 4, 32, 32), 500, text)
    for hook in hooks:
        hook.remove()
    assert set(tokens.values()) == {1024, 256, 64}
    assert all(tokens[name] == 64 for name in tokens if name.startswith("mid_block"))


def test_scheduler_has_the_steps_of_stable_diffusion_2(pipeline):
    config = pipeline.scheduler.config
    assert config.prediction_type in ("epsilon", "v_prediction")
    assert config.beta_schedule == "scaled_linear"
    assert (config.beta_start, config.beta_end) == (0.00085, 0.012)
    assert config.num_train_timesteps == 1000


def test_tokenizer_round_trip(pipeline):
    tokenizer = pipeline.tokenizer
    assert tokenizer.model_max_length == 77
    for text in ("a photo of a cat", "a cup of coffee", "unheard-of wørds, 42."):
        ids = tokenizer(text, padding="max_length").input_ids
        assert len(ids) == 77
        decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", "")


def test_each_listed_word_is_one_token():
    from flashmaps.models.vocabulary import WORDS, build_tokenizer

    tokenizer = build_tokenizer()
    assert [tokenizer.tokenize(word) for word in WORDS] == [[f"{word}</w>"] for word in WORDS]


def test_packaged_vocabulary_is_the_one_of_its_tokenizer(pipeline):
    folder = builtin_folder() / "tokenizer"
    assert json.loads((folder / "vocab.json").read_text()) == pipeline.tokenizer.get_vocab()


def test_packaged_tokenizer_is_the_one_the_code_builds(pipeline):
    from flashmaps.models.vocabulary import build_tokenizer

    assert pipeline.tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_each_word_of_the_world_is_one_token():
    from flashmaps import world
    from flashmaps.models.vocabulary import build_tokenizer

    tokenizer = build_tokenizer()
    for word in world.vocabulary():
        assert tokenizer.tokenize(word) == [f"{word}</w>"]


def test_training_data_leaves_the_stereo_pair_out(photo_packages):
    from flashmaps.models.photos import Photos
    from skimage.data import stereo_motorcycle

    photos = Photos()
    assert not any("motorcycle" in name for name in photos.names)
    held_out = {view.shape[:2] for view in stereo_motorcycle()[:2]}
    assert not held_out & {(image.height, image.width) for image in photos.images}


def test_pictures_repeat_with_their_number(photo_packages):
    from flashmaps.models.pictures import Pictures

    pictures, again = (Pictures(size=32, count=12, photos=0.5, labelled=True) for _ in range(2))
    captions, kinds = set(), set()
    for index in range(12):
        one, two = pictures[index], again[index]
        assert one.images.shape == (3, 32, 32, 3) and one.images.dtype == np.uint8
        assert one.labels.shape == (8, 8, 2)
        known = (one.labels >= 0).all(), (one.labels < 0).all()
        kinds.add("known" if known[0] else "unknown" if known[1] else "both")
        for name in ("images", "labels"):
            assert np.array_equal(getattr(one, name), getattr(two, name)), name
        assert one.captions == two.captions
        for texts in one.captions:
            assert len(texts) == 3
            captions.update(texts)
    assert kinds == {"known", "unknown"}  # scenes and photos
    assert any("photo of" in text for text in captions)  # of both kinds
    assert any(text.startswith("a ") and "photo" not in text for text in captions)


def test_pictures_of_other_splits_and_seeds_are_others():
    from flashmaps.models.pictures import Pictures

    kinds = {"split": "validation"}, {"seed": 1}, {}
    for place in range(3):  # the picture, the second one, the view
        seen = [
            Pictures(size=32, count=1, photos=0.0, **kind)[0].images[place].tobytes()
            for kind in kinds
        ]
        assert len(set(seen)) == 3


def test_a_bank_keeps_examples_and_labels_only_where_they_are_asked_for(tmp_path, photo_packages):
    from flashmaps.models.architecture import TINY, build
    from flashmaps.models.bank import open_bank
    from flashmaps.models.pictures import Pictures

    tokenizer = build(TINY).tokenizer
    for labelled in (False, True):
        pictures = Pictures(size=32, count=4, photos=0.5, labelled=labelled)
        bank = open_bank(tmp_path, pictures, 0)  # drawn anew for another recipe
        assert (bank.labels is not None) == labelled
        ids = bank.tokens(tokenizer)
        assert ids.shape == (4, 2, 3, 77)
        assert bank.pixels(torch.device("cpu")).shape == (12, 32, 32, 3)
        for index in range(4):
            example = pictures[index]
            assert np.array_equal(bank.images[index], example.images)
            told = tokenizer(list(example.captions[1]), padding="max_length").input_ids
            assert ids[index, 1].tolist() == told
            if labelled:
                assert np.array_equal(bank.labels[index], example.labels)


class Killed(Exception):
    """In place of a signal."""


def train(folder: Path, *options: str) -> None:
    """Run the training script on its toy sizes."""
    from flashmaps.models.train import main

    places = ["--out", str(folder / "model"), "--work", str(folder / "work")]
    threads = torch.get_num_threads()
    try:
        # One thread: on layers this small more of them only wait for each other.
        main([*places, "--preset", "tiny", "--threads", "1", "--cpu", *options])
    finally:
        torch.set_num_threads(threads)


def last_state(folder: Path) -> list[torch.Tensor]:
    """All tensors of the UNet stage's checkpoint: weights, optimizer, averages."""
    paths = sorted((folder / "work" / "unet").glob("custom_checkpoint_*.pkl"))
    assert len(paths) == 5
    states = [torch.load(path, weights_only=False) for path in paths[:4]]
    return [leaf for leaf in tree_leaves(states) if isinstance(leaf, torch.Tensor)]


def logged(folder: Path, stage: str) -> list[dict]:
    lines = map(json.loads, (folder / "work" / "log" / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == stage]


def test_training_resumes_to_the_bit_and_exports_a_pipeline(
    tmp_path, photo_packages, monkeypatch, capsys
):
    from diffusers import StableDiffusionPipeline
    from flashmaps.models.loop import Loop

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole)
    for bank in ("bank", "held-out-world", "held-out-photos"):  # drawing them takes a while
        shutil.copytree(whole / "work" / bank, parts / "work" / bank)
    save = Loop.save
    for stage in ("vae", "unet"):  # killed in the middle of both, after a checkpoint

        def save_and_die(loop, stage=stage):
            save(loop)
            if loop.name == stage:
                raise Killed

        monkeypatch.setattr(Loop, "save", save_and_die)
        with pytest.raises(Killed):
            train(parts, "--resume")
        assert logged(parts, stage)[-1]["step"] == 2
    monkeypatch.setattr(Loop, "save", save)
    train(parts, "--resume", "--pause-after", "0")
    assert "paused at unet, step 2" in capsys.readouterr().out
    train(parts, "--resume")

    expected, found = last_state(whole), last_state(parts)
    assert len(found) == len(expected) > 100
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for stage in ("vae", "unet"):
        lines = logged(parts, stage)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["loss"] for line in lines] == [line["loss"] for line in logged(whole, stage)]
    assert not list(parts.rglob("*.partial"))
    assert (parts / "work" / "samples" / "last.jpg").is_file()
    card = (parts / "model" / "README.md").read_text()
    for config in (parts / "model").glob("*/config.json"):  # the VAE was loaded from a checkpoint
        assert "_name_or_path" not in config.read_text()
    assert "VAE: 4 iterations, 8 pictures" in card and "| iterations | 4 |" in card
    assert "No label of the world takes part" in card and "supervision" not in card
    pipe = StableDiffusionPipeline.from_pretrained(parts / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red cat", num_inference_steps=1).images[0].size == (32, 32)


def test_training_can_start_from_an_exported_pipeline(tmp_path, photo_packages):
    from flashmaps.models.architecture import TINY, build
    from flashmaps.models.export import export
    from safetensors.torch import load_file

    parts = build(TINY, seed=5)
    export(parts, tmp_path / "first", "", [{"pixels": 16, "iterations": 7}], '{"step": 7}\n')
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.md").write_text("It draws cats as dogs.\n")
    still = ["--vae-steps", "0", "--unet-steps", "1", "--unet-lr", "0"]
    train(tmp_path, "--init", str(tmp_path / "first"), *still)
    for name in ("unet", "vae"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        first, model = (load_file(tmp_path / folder / file) for folder in ("first", "model"))
        assert first.keys() == model.keys()
        assert all(torch.equal(first[key], model[key]) for key in first)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "\n\nIt draws cats as dogs.\n\n" in card and "Pictures are 32 x 32 pixels" in card
    assert "one training after the other" in card and "| iterations | 7 | 1 |" in card
    log = (tmp_path / "model" / "training.jsonl").read_text().splitlines()
    assert log[0] == '{"step": 7}' and json.loads(log[-1])["stage"] == "unet"
    assert "VAE: as it was in the weights that the training started from" in card


def test_labels_are_used_only_where_they_are_asked_for_and_the_card_says_so(
    tmp_path, photo_packages
):
    from flashmaps.models.architecture import TINY, build
    from flashmaps.models.export import export

    export(build(TINY), tmp_path / "first", "", [{"iterations": 7, "alignment": 0.3}])
    still = ["--init", str(tmp_path / "first"), "--vae-steps", "0", "--unet-steps", "1"]
    train(tmp_path, *still)  # of labels it has none, its weights have seen some
    assert "aligned" not in logged(tmp_path, "unet")[-1]
    assert "0.3 times the alignment loss" in (tmp_path / "model" / "README.md").read_text()
    train(
        tmp_path, *still, "--alignment", "0.2", "--mutual", "0", "--agreement", "0", "--walks", "0"
    )
    line = logged(tmp_path, "unet")[-1]
    assert line["aligned"] > 0 and "features" not in line
    card = (tmp_path / "model" / "README.md").read_text()
    assert "That is supervision" in card and "No label" not in card
    assert "seen without captions" not in card


def test_a_training_deletes_nothing_of_anybody_s(tmp_path, photo_packages):
    work = tmp_path / "work"
    for name in ("latents", "log", "unet"):
        (work / name).mkdir(parents=True)
        mine = work / name / "mine.txt"
        mine.write_text("kept")
        for options in ((), ("--resume",)):
            with pytest.raises(ValueError, match=f"{name}' holds other files .'mine.txt'."):
                train(tmp_path, *options)
        assert mine.read_text() == "kept" and not (tmp_path / "model").exists()
        mine.unlink()
    (work / "log.jsonl").write_text("not of this training\n")
    train(tmp_path, "--vae-steps", "0", "--unet-steps", "1")
    train(tmp_path, "--vae-steps", "0", "--unet-steps", "1", "--unet-optimizer", "muon")
    assert (work / "log.jsonl").read_text() == "not of this training\n"
    assert [line["step"] for line in logged(tmp_path, "unet")] == [1]  # the second's alone
    assert "Muon (convolutions" in (tmp_path / "model" / "README.md").read_text()


def test_a_stream_adds_to_what_a_training_has_drawn(tmp_path, photo_packages):
    train(tmp_path, "--vae-steps", "0", "--unet-steps", "2", "--stream", "8", "--workers", "1")
    (line, last) = logged(tmp_path, "unet")
    assert 8 <= line["drawn"] <= last["drawn"] <= 16
    (row,) = json.loads((tmp_path / "model" / "training.json").read_text())
    assert row["pictures drawn"] == last["drawn"]
    with pytest.raises(ValueError, match="--stream draws no labels, which --alignment needs"):
        train(tmp_path, "--stream", "8", "--alignment", "0.2")
    with pytest.raises(SystemExit):
        train(tmp_path, "--stream", "-1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replayed_losses_and_gradients_are_those_of_plain_calls():
    from flashmaps.models.replay import Replayed

    layer = torch.nn.Linear(8, 3).cuda()
    parameters = list(layer.parameters())

    def loss(squared, x):
        found = layer(x)
        value = (found.square() if squared else found.abs()).mean()
        return value, {"sum": found.sum().detach()}

    replayed = Replayed(loss, parameters)
    for turn in range(6):
        x = torch.randn(5, 8, device="cuda")
        key = turn % 2 == 0
        wanted = torch.autograd.grad(loss(key, x)[0], parameters)
        value, numbers = replayed(key, x)
        assert not value.requires_grad
        torch.testing.assert_close(value, loss(key, x)[0].detach())
        torch.testing.assert_close(numbers["sum"], layer(x).sum().detach())
        for parameter, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
            parameter.grad = None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replayed_steps_are_those_of_plain_ones():
    from flashmaps.models.replay import Replayed

    layer = torch.nn.Linear(8, 3).cuda()
    other = copy.deepcopy(layer)
    parameters, rate = list(layer.parameters()), torch.zeros((), device="cuda")

    @torch.no_grad()
    def descend():
        for parameter in parameters:
            parameter.sub_(rate * parameter.grad)

    def loss(_key, x):
        return layer(x).square().mean(), {}

    replayed = Replayed(loss, parameters, descend, lambda: None)
    for turn in range(6):
        x = torch.randn(5, 8, device="cuda")
        rate.fill_(0.1 * turn)
        replayed(turn % 2 == 0, x)
        gradients = torch.autograd.grad(other(x).square().mean(), list(other.parameters()))
        for mine, found, gradient in zip(parameters, other.parameters(), gradients, strict=True):
            found.data.sub_(0.1 * turn * gradient)
            torch.testing.assert_close(mine, found)


def test_weights_of_other_sizes_are_refused_as_a_start(tmp_path):
    with pytest.raises(ValueError, match=r"its unet does not fit .* --init-parts"):
        train(tmp_path, "--init", str(builtin_folder()), "--init-parts", "unet")


def test_the_check_asks_a_classifier_about_every_category(tmp_path):
    from flashmaps.models.architecture import TINY, build
    from flashmaps.models.check import NAMES, check
    from flashmaps.models.export import as_pipeline

    tiny = {"training": 24, "held_out": 12, "epochs": 1, "size": 32, "steps": 1, "workers": 0}
    found = check(as_pipeline(build(TINY)), count=12, **tiny)
    for kind in ("scenes", "reconstructions", "generated"):
        assert 0 <= found[kind] <= 1 and 0 <= found["colours"][kind] <= 1
    assert tuple(found["by_category"]) == NAMES
    assert np.isclose(np.mean(list(found["by_category"].values())), found["generated"])


def test_the_classifier_learns():
    from flashmaps.models.bank import as_input
    from flashmaps.models.check import fit, named

    number = torch.arange(24) % 12
    labels = torch.stack([number, number // 6], 1)
    shades = (number * 20).to(torch.uint8)  # one grey for each category
    images = shades[:, None, None, None].expand(-1, 16, 16, 3)
    model = fit(images, labels, epochs=40, seed=0, device=torch.device("cpu"), batch=12)
    right = (named(model, as_input(images)) == labels).float().mean(0)
    assert right[0] > 0.5 and right[1] > 0.5
