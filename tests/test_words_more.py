"""Words of long prompts in several windows, special tokens, image prompts, videos in motion."""

from __future__ import annotations

import shutil

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.diffusion.animation import maps_of_frames
from flashmaps.diffusion.prompts import spell
from PIL import Image
from tiny_adapters import add_ip_adapter, image_prompts
from tiny_models import FAMILY, tiny_t5_tokenizer
from tiny_pipeline import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

# Letters but for the last of a word are tokens of their own here: a cat has 4 tokens.
LONG = "a cat " * 25 + "and a red dog " + "a cat " * 3


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    built = {}

    def build(name):
        if name not in built:
            built[name] = FAMILY[name].build(tmp_path_factory.mktemp(name))
        return built[name]

    return build


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("clip"))


def chunked(pipe, prompt, windows):
    """Embeddings of a long prompt as tools for long prompts make them: window by window."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    rows = []
    for n in range(windows):
        own = ids[75 * n : 75 * (n + 1)]
        row = [tokenizer.bos_token_id, *own, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (77 - len(row)))
    with torch.no_grad():
        return pipe.text_encoder(torch.tensor(rows))[0].flatten(0, 1)[None], rows


@pytest.mark.parametrize("how", ["pipeline", "tokenizer"])
def test_words_of_a_prompt_in_several_windows(pipes, how):
    pipe = pipes("sd2")
    embeds, rows = chunked(pipe, LONG, 2)
    negative = torch.zeros_like(embeds)
    with fm.capture(pipe, kind="cross", reduce="image_to_text", guidance="conditional") as record:
        pipe(
            prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=1,
            height=32, width=48, output_type="latent",
        )  # fmt: skip
    who = {"pipe": pipe} if how == "pipeline" else {"tokenizer": pipe.tokenizer}
    maps = fm.word_maps(record, LONG, **who)
    ids = pipe.tokenizer.convert_tokens_to_ids(list(maps.tokens))
    assert ids == [each for row in rows for each in row]
    (dog,) = maps.positions("dog")
    assert [maps.tokens[at] for at in dog] == ["d", "o", "g</w>"] and min(dog) >= 77
    (cats,) = maps.positions("cat")
    assert len(cats) == 3 * 28 and any(at >= 77 for at in cats) and any(at < 77 for at in cats)
    for at in cats:
        assert maps.tokens[at] in ("c", "a", "t</w>")
    # The last occurrence is in the second window, all of its tokens in order.
    last = maps.positions("cat", 27)[0]
    assert last == list(range(last[0], last[0] + 3)) and last[0] > 77
    torch.testing.assert_close(maps.of("cat", occurrence=27), maps.token_maps[last].mean(0))
    assert maps.positions("<start>") == [[0, 77]]
    assert maps.positions("<end>")[0][0] == 76
    assert len(maps.words) == 5


def test_a_word_across_two_windows_has_its_tokens_in_both(clip):
    spelling = spell(clip, "a " * 74 + "cat", 154)  # "c" is the 75th token
    cat = spelling.positions((148, 151))
    assert cat == [75, 78, 79]
    assert [spelling.tokens[at] for at in cat] == ["c", "a", "t</w>"]
    assert spelling.tokens[76] == "<|endoftext|>" and spelling.tokens[77] == "<|startoftext|>"
    assert spelling.positions((0, 1)) == [1]


def test_what_no_window_took_was_cut_off(clip):
    spelling = spell(clip, "a " * 150 + "cat", 154)
    assert spelling.positions((300, 303)) == []
    assert spelling.marked("padding") == []


def test_lengths_that_are_no_number_of_windows_are_refused(pipes):
    pipe = pipes("sd2")
    embeds, _ = chunked(pipe, LONG, 2)
    with fm.capture(pipe, kind="cross", reduce="image_to_text") as record:
        pipe(
            prompt_embeds=embeds[:, :100], num_inference_steps=1, guidance_scale=1.0,
            height=32, width=48, output_type="latent",
        )  # fmt: skip
    with pytest.raises(
        ValueError, match="got 100 text tokens, which is no number of windows of 77"
    ):
        fm.word_maps(record, LONG, pipe)


# -- special tokens --------------------------------------------------------------------------------


def test_start_end_and_padding_have_names(clip):
    spelling = spell(clip, "a cat", 77)
    assert (spelling.marked("start"), spelling.marked("end")) == ([0], [5])
    assert spelling.marked("padding") == list(range(6, 77))
    full = spell(clip, "a " * 80, 77)
    assert (full.marked("start"), full.marked("end"), full.marked("padding")) == ([0], [76], [])
    empty = spell(clip, "", 77)
    assert (empty.marked("start"), empty.marked("end")) == ([0], [1])
    t5 = spell(tiny_t5_tokenizer(), "a cat", 16)
    assert (t5.marked("start"), t5.marked("end")) == ([], [4])
    assert t5.tokens[4] == "</s>" and t5.marked("padding") == list(range(5, 16))


def test_maps_of_special_tokens(pipes):
    pipe = pipes("sd3")  # two encoders: CLIP has both ends, T5 the end alone
    with fm.capture(pipe, kind="joint", reduce="image_to_text", guidance="conditional") as record:
        FAMILY["sd3"].run(pipe, prompts=("a cat",), steps=1)
    maps = fm.word_maps(record, "a cat", pipe)
    torch.testing.assert_close(maps["<start>"], maps.token_maps[0])
    ends = maps.positions("<end>")
    assert [maps.tokens[at] for group in ends for at in group] == ["<|endoftext|>", "</s>"]
    both = (maps.token_maps[ends[0][0]] + maps.token_maps[ends[1][0]]) / 2
    torch.testing.assert_close(maps["<end>"], both)
    whole = maps.token_maps.sum(0)
    named = sum(maps.of(each, merge="sum") for each in ("<start>", "<end>", "<padding>", "a cat"))
    torch.testing.assert_close(named, whole, atol=1e-6, rtol=1e-5)
    wan = pipes("wan")
    with fm.capture(wan, kind="cross", reduce="image_to_text", guidance="conditional") as record:
        FAMILY["wan"].run(wan, prompts=("a cat",), steps=1)
    with pytest.raises(KeyError, match=r"this text has no token that is its start: '<start>'"):
        _ = fm.word_maps(record, "a cat", wan)["<start>"]


def test_a_record_without_the_wanted_part_says_what_it_has(pipes):
    pipe = pipes("sd2")
    options = {"kind": "cross", "reduce": "image_to_text"}
    with fm.capture(pipe, **options, guidance="unconditional") as record:
        FAMILY["sd2"].run(pipe, prompts=("a cat",), steps=1)
    with pytest.raises(ValueError, match=r"no conditional pass \(it has: unconditional\)"):
        fm.word_maps(record, "a cat", pipe)

    class Own:
        do_classifier_free_guidance = True
        unet = pipe.unet

    with fm.capture(Own(), **options) as record:
        FAMILY["sd2"].run(pipe, prompts=("a cat",), steps=1)
    with pytest.raises(ValueError, match=r"cannot be told; say the order with batch="):
        fm.word_maps(record, "a cat", pipe)


# -- image prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "flux", "sd3"])
def test_image_prompts_have_heat_maps(name, tmp_path):
    family = FAMILY[name]
    pipe = family.build(tmp_path)
    model = getattr(pipe, family.denoiser)
    adapters = 1 if name == "sd3" else 2
    add_ip_adapter(model, adapters=adapters)
    prompts = image_prompts(model, adapters=adapters)
    options = {"kind": "image_prompt", "guidance": "conditional"}
    with fm.capture(pipe, **options, reduce="image_to_prompt") as record:
        family.run(pipe, steps=2, **prompts)
    with fm.capture(pipe, **options, keep="qk") as full:
        family.run(pipe, steps=2, **prompts)
    for adapter in range(adapters):
        maps = fm.image_prompt_maps(record, adapter=adapter, size=(8, 12))
        means = []
        for layer in full.layers:
            entries = full.select(layer, adapter=adapter)
            scores = [e.query.double() @ e.key.double().mT * e.scale for e in entries]
            p = torch.stack([s.softmax(-1).mean(1)[0] for s in scores]).mean(0)
            p = p[:, entries[0].keys["image_prompt"]]
            grid = p.T.reshape(1, -1, *entries[0].grid)
            means.append(torch.nn.functional.interpolate(grid, size=(8, 12), mode="bilinear")[0])
        wanted = torch.stack(means).mean(0)
        torch.testing.assert_close(maps.token_maps.double(), wanted, atol=1e-6, rtol=1e-5)
        alone = torch.allclose(maps.mass, torch.ones(8, 12), atol=1e-5)
        assert alone == (name != "sd3")
        assert maps.adapter == adapter
    picture = np.zeros((64, 96, 3), np.uint8)
    assert maps.overlay(picture).size == maps.overlay(picture, 0).size == (96, 64)
    with pytest.raises(IndexError, match="token=99 is out of range"):
        maps.overlay(picture, 99)
    if adapters > 1:
        with pytest.raises(ValueError, match=r"adapter \[0, 1\]: choose with adapter="):
            fm.image_prompt_maps(record)
    with pytest.raises(ValueError, match=r"adapter=5: the record has \[0"):
        fm.image_prompt_maps(record, adapter=5)


def test_records_without_image_prompts_say_so(pipes):
    with fm.capture(pipes("sd2"), kind="cross") as record:
        FAMILY["sd2"].run(pipes("sd2"), steps=1)
    with pytest.raises(
        ValueError, match=r"no layer that attends to an image prompt \(it has: cross"
    ):
        fm.image_prompt_maps(record)


# -- videos ----------------------------------------------------------------------------------------


def test_each_frame_has_the_map_that_it_is_decoded_from():
    assert maps_of_frames(3, 2) == [0, 1, 1]  # Wan here: three frames of two latents
    assert maps_of_frames(81, 21) == [0] + [n for n in range(1, 21) for _ in range(4)]
    assert maps_of_frames(16, 16) == list(range(16))  # AnimateDiff
    assert maps_of_frames(8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert maps_of_frames(5, 1) == [0] * 5


def test_a_video_has_an_animation(pipes, tmp_path):
    pipe = pipes("wan")
    with fm.capture(pipe, kind="cross", reduce="image_to_text", guidance="conditional") as record:
        FAMILY["wan"].run(pipe, prompts=("a cat",), steps=1)
    maps = fm.word_maps(record, "a cat", pipe)
    video = [np.full((64, 96, 3), 60 * n, np.uint8) for n in range(3)]
    path = maps.animate("cat", video, tmp_path / "cat.gif", fps=5)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (3, (96, 64), 200)
        shown = []
        for n in range(3):
            gif.seek(n)
            shown.append(np.asarray(gif.convert("RGB")).astype(float))
    values = maps["cat"]
    low, high = values.min(), values.max()
    from matplotlib import colormaps

    for picture, got, at in zip(video, shown, maps_of_frames(3, 2), strict=True):
        heat = torch.nn.functional.interpolate(
            ((values[at] - low) / (high - low))[None, None], size=(64, 96), mode="bilinear"
        )[0, 0]
        wanted = picture / 2 + 255 * colormaps["turbo"](heat.clamp(0, 1).numpy())[..., :3] / 2
        assert np.abs(got - wanted).mean() < 8  # a GIF has 256 colours
    for bad, message in (
        ({"path": tmp_path / "cat.avi"}, r"must end in .gif or .mp4"),
        ({"video": video[:1]}, r"video has 1 frames, but there are 2 maps"),
        ({"fps": 0}, r"fps=0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            maps.animate("cat", **{"video": video, "path": tmp_path / "x.gif", **bad})
    assert not (tmp_path / "x.gif").exists()


def test_a_word_of_an_image_has_no_animation(pipes, tmp_path):
    with fm.capture(pipes("sd2"), kind="cross", reduce="image_to_text") as record:
        FAMILY["sd2"].run(pipes("sd2"), prompts=("a cat",), steps=1)
    with pytest.raises(ValueError, match="maps of an image, not of a video"):
        fm.word_maps(record, "a cat", pipes("sd2")).animate("cat", [], tmp_path / "x.gif")


def test_mp4_needs_ffmpeg(tmp_path, monkeypatch):
    from flashmaps.diffusion.animation import write_animation

    frames = [np.full((33, 47, 3), 80 * n, np.uint8) for n in range(3)]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs the program ffmpeg"):
        write_animation(tmp_path / "x.mp4", frames, 8)
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not here")
def test_mp4_where_ffmpeg_is(tmp_path):
    from flashmaps.diffusion.animation import write_animation

    frames = [np.full((33, 47, 3), 80 * n, np.uint8) for n in range(3)]
    path = write_animation(tmp_path / "x.mp4", frames, 8)
    assert path.read_bytes()[4:8] == b"ftyp"
