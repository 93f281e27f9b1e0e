"""The built-in model: the packaged folder, its vocabulary and data, and the training script."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from flashmaps.models import builtin_folder


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(builtin_folder(), torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def photo_packages():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")


def test_loads_in_float32_and_draws(pipeline):
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(
        "a photo of a cat", num_inference_steps=2, generator=generator, output_type="np"
    ).images
    assert drawn.shape == (1, 128, 128, 3)


def test_weights_are_half_precision_and_under_12_megabytes():
    from safetensors import safe_open

    files = [path for path in builtin_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    for path in builtin_folder().rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():
                tensor = weights.get_tensor(name)
                assert tensor.isfinite().all(), name
                assert tensor.dtype == torch.float16 or not tensor.is_floating_point(), name


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


def test_scheduler_is_that_of_stable_diffusion_2_base(pipeline):
    config = pipeline.scheduler.config
    assert config.prediction_type == "epsilon" and config.beta_schedule == "scaled_linear"
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


def test_packaged_tokenizer_is_the_one_the_code_builds(pipeline):
    from flashmaps.models.vocabulary import build_tokenizer

    assert pipeline.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    folder = builtin_folder() / "tokenizer"
    assert json.loads((folder / "vocab.json").read_text()) == pipeline.tokenizer.get_vocab()


def test_training_data_leaves_the_stereo_pair_out(photo_packages):
    from flashmaps.models.photos import Photos
    from skimage.data import stereo_motorcycle

    photos = Photos()
    assert not any("motorcycle" in name for name in photos.names)
    held_out = {view.shape[:2] for view in stereo_motorcycle()[:2]}
    assert not held_out & {(image.height, image.width) for image in photos.images}


def test_batches_repeat_with_their_seed(photo_packages):
    from flashmaps.models.photos import Photos

    photos = Photos(32)
    pixels, captions = photos.batch(4, (0, 1))
    again, captions_again = photos.batch(4, (0, 1))
    other, _ = photos.batch(4, (0, 2))
    assert pixels.shape == (4, 3, 32, 32) and pixels.abs().max() <= 1
    assert torch.equal(pixels, again) and captions == captions_again
    assert not torch.equal(pixels, other)


def train(folder: Path, *options: str) -> dict[str, torch.Tensor]:
    """Run the training script on its toy sizes; the UNet's last weights."""
    from flashmaps.models.train import main

    # One thread: on layers this small more of them only wait for each other.
    tiny = "--tiny --threads 1 --bank 8 --vae-batch 2 --unet-batch 2 --vae-steps 2 --unet-steps 2"
    places = ["--out", str(folder / "model"), "--checkpoints", str(folder / "state")]
    threads = torch.get_num_threads()
    try:
        main([*places, *tiny.split(), *options])
    finally:
        torch.set_num_threads(threads)
    return torch.load(folder / "state" / "unet.pt", weights_only=False)["modules"]["unet"]


def test_training_resumes_where_it_stopped(tmp_path, photo_packages):
    from diffusers import StableDiffusionPipeline

    # The learning rate of the first steps is warm-up times a cosine of step / steps, so the
    # interrupted run must be stopped by its clock and not by a smaller number of steps.
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", "--unet-minutes", "1e-9")
    steps = logged_steps(tmp_path / "parts")
    assert steps == [1]
    resumed = train(tmp_path / "parts", "--resume")
    assert logged_steps(tmp_path / "parts") == [1, 2]
    assert resumed.keys() == whole.keys()
    for name in whole:
        assert torch.equal(resumed[name], whole[name]), name
    assert not list((tmp_path / "parts").rglob("*.partial"))
    folder = tmp_path / "parts" / "model"
    assert "iterations | 2 | 2 |" in (folder / "README.md").read_text()
    StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def logged_steps(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "state" / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["stage"] == "unet"]
