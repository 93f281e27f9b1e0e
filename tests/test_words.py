"""Word maps: against dense maps of every family, how words find their tokens, and each error."""

from __future__ import annotations

from types import SimpleNamespace

import flashmaps as fm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.prompts import find, spell, words_of
from flashmaps.diffusion.record import Record
from flashmaps.models.vocabulary import build_tokenizer
from tiny_models import FAMILY, tiny_t5_tokenizer
from tiny_pipeline import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a Red car, a cat"
JOINT = ("sd3", "flux", "qwen")
SPELLING_OUT = ("sd15", "sd2", "sdxl", "sd3", "flux", "pixart", "wan")  # those with a tokenizer


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


def record_of(pipe, name, *, guided=True, prompts=(PROMPT,), **options):
    kind = "joint" if name in JOINT else "cross"
    with fm.capture(pipe, kind=kind, **options) as record:
        FAMILY[name].run(pipe, prompts=prompts, guidance=guided, steps=2)
    return record


def dense(entry, image=0):
    """[image tokens, text tokens] from Q, K and mask by softmax, of the half that saw the prompt.

    Returns None for a pass that did not.
    """
    if entry.guidance == "unconditional":
        return None
    halves = 2 if entry.guidance == "both" else 1
    query, key = (x.chunk(halves)[-1][image].double() for x in (entry.query, entry.key))
    scores = entry.scale * query @ key.mT
    if entry._mask is not None:
        mask = entry._mask.chunk(halves)[-1][image]
        bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        scores = scores + bias.double()
    return scores.softmax(-1).mean(0)[entry.queries["image"], entry.keys["text"]]


def dense_maps(record, size, image=0):
    """[tokens, frames, H, W]: the mean over the steps of each layer, then over layers."""
    means = []
    for layer in record.layers:
        entries = [entry for entry in record if entry.layer == layer]
        maps = [found for entry in entries if (found := dense(entry, image)) is not None]
        mean, (height, width) = torch.stack(maps).mean(0), entries[0].grid
        mean = mean.T.reshape(-1, entries[0].frames, height, width)
        means.append(F.interpolate(mean, size=size, mode="bilinear", align_corners=False))
    return torch.stack(means).mean(0)


def close(found, wanted):
    """Probabilities of at most 1, through one float32 softmax and means of a few tens of maps."""
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)


# -- the maps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", SPELLING_OUT)
def test_maps_are_the_dense_softmax_of_what_was_captured(pipes, name, guided):
    pipe = pipes(name)
    record = record_of(pipe, name, guided=guided)
    maps = fm.word_maps(record, PROMPT, pipe)
    wanted = dense_maps(record, (8, 12))
    if FAMILY[name].frames == 1:
        wanted = wanted[:, 0]
    close(maps.token_maps, wanted)
    assert maps.grid == (8, 12)
    assert maps.token_maps.dtype == torch.float32
    assert maps.words == ["a", "Red", "car", "cat"]


@pytest.mark.parametrize("name", SPELLING_OUT)
def test_statistic_in_constant_memory_gives_the_same_maps(pipes, name):
    pipe = pipes(name)
    kept = fm.word_maps(record_of(pipe, name), PROMPT, pipe)
    record = record_of(pipe, name, reduce="image_to_text", guidance="conditional")
    assert len(record) == len(record.layers)
    assert all(entry.query is None for entry in record)
    found = fm.word_maps(record, PROMPT, pipe)
    close(found.token_maps, kept.token_maps)
    assert found.tokens == kept.tokens
    both = record_of(pipe, name, reduce="image_to_text")  # and the half without the prompt
    close(fm.word_maps(both, PROMPT, pipe).token_maps, kept.token_maps)


@pytest.mark.parametrize("name", ["sd2", "pixart", "wan"])
def test_all_tokens_of_cross_attention_sum_to_one(pipes, name):
    maps = fm.word_maps(record_of(pipes(name), name), PROMPT, pipes(name))
    total = maps.token_maps.sum(0)
    close(total, torch.ones_like(total))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_leaves_the_rest_to_the_image(pipes, name):
    record = record_of(pipes(name), name)
    total = fm.word_maps(record, PROMPT, pipes(name)).token_maps.sum(0)
    assert (total > 0).all() and (total < 1).all()


def test_layers_of_two_resolutions_meet_on_the_finest_or_on_the_size_asked_for(pipes):
    pipe = pipes("sd2")
    record = record_of(pipe, "sd2").select("up_blocks.*", resolution=[(8, 12), (4, 6)])
    assert {entry.grid for entry in record} == {(8, 12), (4, 6)}
    close(fm.word_maps(record, PROMPT, pipe).token_maps, dense_maps(record, (8, 12))[:, 0])
    wide = fm.word_maps(record, PROMPT, pipe, size=(20, 31))
    assert wide["cat"].shape == (20, 31)
    close(wide.token_maps, dense_maps(record, (20, 31))[:, 0])
    small = fm.word_maps(record.select(resolution=(4, 6)), PROMPT, pipe)
    assert small["cat"].shape == (4, 6)


def test_a_smaller_size_averages_and_keeps_the_sum_over_tokens(pipes):
    record = record_of(pipes("sd2"), "sd2")
    maps = fm.word_maps(record, PROMPT, pipes("sd2"), size=(3, 5))
    total = maps.token_maps.sum(0)
    close(total, torch.ones(3, 5))


def entry_of(values, layer="one", count=1, grid=None):
    """An entry that holds the statistic alone: [N, tokens]."""
    return Entry(
        layer, 0, "cross", None, None, 1.0, grid=grid or (1, len(values)), count=count,
        queries={"image": slice(0, len(values))}, keys={"text": slice(0, values.shape[1])},
        statistics={"image_to_text": values[None]},
    )  # fmt: skip


def test_passes_weigh_by_count_and_layers_alike(clip):
    first, second, third = torch.rand(3, 4, 77)
    record = [entry_of(first, "a", 3), entry_of(second, "a", 1), entry_of(third, "b", 9)]
    maps = fm.word_maps(record, "a cat", tokenizer=clip)
    close(maps.token_maps[:, 0], ((3 * first + second) / 4 / 2 + third / 2).T)


def test_every_image_of_a_batch_has_its_own_maps(pipes):
    pipe, prompts = pipes("sd2"), ("a cat", "a dog and a car")
    record = record_of(pipe, "sd2", prompts=prompts)
    for image, prompt in enumerate(prompts):
        maps = fm.word_maps(record, prompt, pipe, image=image)
        close(maps.token_maps, dense_maps(record, (8, 12), image)[:, 0])
    close(fm.word_maps(record, prompts[1], pipe, image=-1).token_maps, maps.token_maps)


def test_a_batch_without_guidance_keeps_all_its_images(pipes):
    """Two images without guidance are not [unconditional, conditional]."""
    pipe, prompts = pipes("sd2"), ("a cat", "a car")
    record = record_of(pipe, "sd2", prompts=prompts, guided=False)
    first = fm.word_maps(record, "a cat", pipe, image=0)
    close(first.token_maps, dense_maps(record, (8, 12), 0)[:, 0])
    assert not torch.allclose(first["cat"], fm.word_maps(record, "a car", pipe, image=1)["car"])


def test_the_unconditional_half_has_the_words_of_the_negative_prompt(pipes):
    pipe = pipes("flux")
    record = record_of(pipe, "flux")
    maps = fm.word_maps(record, "blurry", pipe, guidance="unconditional")
    assert maps.words == ["blurry"]
    passes = [entry for entry in record if entry.guidance == "unconditional"]
    wanted = torch.stack([
        entry.map("image->text").to_dense()[0] for entry in passes
    ]).mean(0)  # fmt: skip
    close(maps.token_maps.flatten(1), wanted.T)


def test_video_has_a_map_for_every_frame(pipes):
    pipe = pipes("wan")
    record = record_of(pipe, "wan")
    maps = fm.word_maps(record, PROMPT, pipe)
    assert maps.token_maps.shape == (16, 2, 8, 12)
    assert maps["cat"].shape == (2, 8, 12)
    picture = np.zeros((64, 96, 3), np.uint8)
    assert maps.overlay("cat", picture, frame=1).size == (96, 64)
    assert len(maps.plot(picture, frame=0).axes) == 8
    with pytest.raises(ValueError, match=r"frame=None: these are maps of 2 frames"):
        maps.overlay("cat", picture)


def test_layers_that_do_not_attend_to_text_are_passed_over(pipes):
    pipe = pipes("sd2")
    with fm.capture(pipe) as record:
        FAMILY["sd2"].run(pipe, prompts=(PROMPT,))
    both = fm.word_maps(record, PROMPT, pipe)
    close(both.token_maps, fm.word_maps(record.select(kind="cross"), PROMPT, pipe).token_maps)


# -- words and their tokens ------------------------------------------------------------------------


def maps_of(tokenizer, prompt, tokens=77, **options):
    """Word maps over four places, in which token t has the values 1000 * place + t."""
    values = torch.arange(4.0)[:, None] * 1000 + torch.arange(float(tokens))
    return fm.word_maps([entry_of(values)], prompt, tokenizer=tokenizer, **options)


def test_a_word_is_the_mean_of_its_tokens_or_their_sum(clip):
    maps = maps_of(clip, PROMPT)
    spelt = {word: [maps.tokens[at] for at in maps.positions(word)[0]] for word in maps}
    assert spelt == {
        "a": ["a</w>", "a</w>"],
        "Red": ["r", "e", "d</w>"],
        "car": ["c", "a", "r</w>"],
        "cat": ["c", "a", "t</w>"],
    }
    first = maps.positions("car")[0][0]
    assert maps.positions("car") == [[first, first + 1, first + 2]]
    assert maps["car"][0].tolist() == [1000 * place + first + 1 for place in range(4)]
    assert maps.of("car", merge="sum")[0, 0] == 3 * first + 3
    summed = maps_of(clip, PROMPT, merge="sum")
    assert torch.equal(summed["car"], maps.of("car", merge="sum"))


def test_several_words_case_punctuation_and_white_space(clip):
    maps = maps_of(clip, "A  Red\ncar, (the cat's) close-up!")
    assert maps.words == ["A", "Red", "car", "the", "cat's", "close-up"]
    whole = [at for word in ("red", "car") for at in maps.positions(word)[0]]
    assert maps.positions("red car") == maps.positions("RED   car") == [whole]
    assert maps.positions("cat")[0] == maps.positions("cat's")[0][:3]
    assert maps.positions("close")[0] == maps.positions("close-up")[0][:5]
    assert len(maps.positions("car,")[0]) == 4
    for word in ("ca", "at", "ed car", "car cat"):
        assert word not in maps


def test_special_tokens_and_padding_belong_to_no_word(clip):
    maps = maps_of(clip, "a cat", size=None)
    assert maps.tokens[:6] == ("<|startoftext|>", "a</w>", "c", "a", "t</w>", "<|endoftext|>")
    assert set(maps.tokens[6:]) == {"<|endoftext|>"}
    assert maps.positions("a cat") == [[1, 2, 3, 4]]
    # Unknown to this tokenizer, so written like the end of the text: yet part of the word.
    assert maps_of(clip, "cat's").positions("cat's") == [[1, 2, 3, 4, 5]]
    # SD2 pads with a sign that prompts may hold too.
    assert maps_of(build_tokenizer(), "cat !").positions("cat !") == [[1, 2]]


def test_all_occurrences_count_unless_one_is_chosen(clip):
    maps = maps_of(clip, "a cat and a Cat")
    first, second = maps.positions("cat", 0)[0], maps.positions("cat", 1)[0]
    assert maps.positions("cat")[0] == first + second
    close(maps["cat"], (maps.of("cat", occurrence=0) + maps.of("cat", occurrence=1)) / 2)
    assert not torch.equal(maps.of("cat", occurrence=0), maps.of("cat", occurrence=1))
    with pytest.raises(IndexError, match=r"occurrence=2: 'cat' occurs 2 times, from 0"):
        maps.of("cat", occurrence=2)


def test_t5_spells_the_same_words():
    maps = maps_of(tiny_t5_tokenizer(), "a red car", 16)
    assert [maps.tokens[at] for at in maps.positions("red")[0]] == ["▁r", "e", "d"]
    assert maps.positions("a") == [[0]]
    assert maps.positions("car") == [[4, 5, 6]]


def test_the_space_that_some_tokenizers_count_to_a_word_is_not_part_of_it():
    """Umt5's and Qwen's tokens begin at the space before the word, and may be that space alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<unk>", "▁a", "▁red", "▁", "car"]
    inner = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=1))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    assert tokenizer("a red car", return_offsets_mapping=True)["offset_mapping"][1] == (1, 5)
    maps = maps_of(tokenizer, "a red car", 6)
    assert maps.tokens == ("▁a", "▁red", "▁", "car", "<pad>", "<pad>")
    assert [maps.positions(word) for word in ("a", "red", "car")] == [[[0]], [[1]], [[3]]]
    assert maps.positions("red car") == [[1, 3]]


def test_accents_are_found_however_they_are_written(clip):
    composed, apart = "na\u00efve", "nai\u0308ve"
    for prompt in (composed, apart):
        maps = maps_of(clip, f"a {prompt} cat")
        assert maps.positions(composed) == maps.positions(apart)
        assert len(maps.positions(composed)[0]) == 6  # the accent is two bytes, unknown both


def test_scripts_without_spaces_are_searched_inside():
    assert find("猫", "一只猫坐着") == [(2, 3)]
    assert find("кот", "скоты") == []
    assert words_of("Ein Hund und ein Hund") == ["Ein", "Hund", "und"]


def test_built_in_vocabulary_merges_rare_words_only():
    maps = maps_of(build_tokenizer(), "a photo of a zebra")
    assert len(maps.positions("photo")[0]) == 1
    assert len(maps.positions("zebra")[0]) > 1


class WithoutOffsets:
    """A tokenizer that does not tell the places of its tokens, as those in Python do not."""

    def __init__(self, tokenizer):
        self._tokenizer, self.is_fast = tokenizer, False

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("which", ["clip", "t5", "builtin"])
def test_without_offsets_tokens_are_decoded_one_by_one(clip, which):
    fast = {"clip": clip, "t5": tiny_t5_tokenizer(), "builtin": build_tokenizer()}[which]
    text = "a red car and a zebra on grass and a cat and a zebra"
    slow = WithoutOffsets(fast)
    assert spell(slow, text, 60) == spell(fast, text, 60)
    maps = maps_of(slow, text)
    for word in maps.words:
        assert maps.positions(word) == maps_of(fast, text).positions(word)
    with pytest.raises(KeyError, match="cut off"):
        maps_of(slow, "cat " * 80 + "dog")["dog"]


def test_two_text_encoders_give_the_mean_of_both(pipes):
    pipe = pipes("sd3")
    maps = fm.word_maps(record_of(pipe, "sd3"), PROMPT, pipe)
    clip, t5 = maps.positions("cat")
    assert [maps.tokens[at] for at in clip] == ["c", "a", "t</w>"] and max(clip) < 77
    assert [maps.tokens[at] for at in t5] == ["▁c", "a", "t"] and min(t5) >= 77
    close(maps["cat"], (maps.token_maps[clip].mean(0) + maps.token_maps[t5].mean(0)) / 2)
    close(maps.of("cat", merge="sum"), maps.token_maps[clip + t5].sum(0))


def test_a_word_that_one_encoder_did_not_get_is_that_of_the_other(pipes):
    pipe, prompt = pipes("sd3"), "a cat and a very small red car"  # T5 has 16 tokens here
    maps = fm.word_maps(record_of(pipe, "sd3", prompts=(prompt,)), prompt, pipe)
    clip, t5 = maps.positions("car")
    assert t5 == []
    close(maps["car"], maps.token_maps[clip].mean(0))


def test_sd3_without_t5_has_the_words_of_clip(pipes):
    pipe = pipes("sd3")
    record = record_of(pipe, "sd3")
    parts = {**pipe.components, "text_encoder_3": None, "tokenizer_3": None}
    maps = fm.word_maps(record, PROMPT, type(pipe)(**parts))
    assert len(maps.positions("cat")) == 1
    assert maps.tokens[77:] == ("",) * 16


def test_pixart_lowers_the_prompt_before_t5_sees_it(pipes):
    """The tiny T5 knows small letters only: "Red" itself would have an unknown token."""
    maps = fm.word_maps(record_of(pipes("pixart"), "pixart"), PROMPT, pipes("pixart"))
    assert [maps.tokens[at] for at in maps.positions("Red")[0]] == ["▁r", "e", "d"]


def test_wan_cleans_the_prompt_before_t5_sees_it(pipes):
    pipe, prompt = pipes("wan"), "cat &lt; dog"
    maps = fm.word_maps(record_of(pipe, "wan", prompts=(prompt,)), prompt, pipe)
    assert [maps.tokens[at] for at in maps.positions("dog")[0]] == ["▁d", "o", "g"]
    assert max(maps.positions("dog")[0]) < 9  # "<" has two tokens, "&lt;" has five


def test_textual_inversion_of_several_vectors_is_one_word(tmp_path):
    pipe = FAMILY["sd2"].build(tmp_path)
    vectors = torch.randn(2, pipe.text_encoder.config.hidden_size)
    pipe.load_textual_inversion(vectors, token="<toy>")
    prompt = "a <toy> cat"
    maps = fm.word_maps(record_of(pipe, "sd2", prompts=(prompt,)), prompt, pipe)
    assert [maps.tokens[at] for at in maps.positions("<toy>")[0]] == ["<toy>", "<toy>_1"]
    assert maps.positions("cat") == [[4, 5, 6]]


def test_qwen_drops_the_template_around_the_prompt(pipes):
    from transformers import Qwen2Tokenizer

    pipe = pipes("qwen")
    letters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    tokenizer = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(["<|endoftext|>", *letters])}, merges=[]
    )
    before, after = pipe.prompt_template_encode.split("{}")
    drop = len(before)
    fake = SimpleNamespace(
        transformer=pipe.transformer,
        tokenizer=tokenizer,
        prompt_template_encode=pipe.prompt_template_encode,
        prompt_template_encode_start_idx=drop,
    )
    record = record_of(pipe, "qwen", prompts=("a user" + "." * len(after),))
    maps = fm.word_maps(record, "a user", fake)
    assert "".join(maps.tokens) == ("a user" + after).replace(" ", "Ġ").replace("\n", "Ċ")
    assert maps.positions("user") == [[2, 3, 4, 5]]  # not the one of the template
    assert maps.words == ["a", "user"]
    fake.processor = object()
    with pytest.raises(ValueError, match="is not known here"):
        fm.word_maps(record, "a user", fake)


def test_another_model_takes_a_tokenizer_and_where_its_tokens_begin(clip):
    maps = maps_of(clip, "a cat", 100, text_offset=23)
    assert maps.positions("cat") == [[25, 26, 27]]
    assert maps.tokens[:23] == ("",) * 23
    with pytest.raises(ValueError, match=r"text_offset=100: the model has 100 text tokens"):
        maps_of(clip, "a cat", 100, text_offset=100)


# -- pictures --------------------------------------------------------------------------------------


def bright_token(size=(8, 12)):
    """Word maps of "a cat" in which "cat" is attended to in the top right corner only."""
    values = torch.zeros(*size, 77)
    values[:2, -3:, 2:5] = 1.0
    tokenizer = build_tokenizer()
    entry = entry_of(values.flatten(0, 1), grid=size)
    return fm.word_maps([entry], "a cat", tokenizer=tokenizer)


def test_overlay_has_the_images_size_and_is_upright():
    from PIL import Image

    maps = bright_token()
    picture = Image.new("RGB", (96, 64), (128, 128, 128))
    shown = maps.overlay("cat", picture, alpha=1.0, cmap="gray")
    assert isinstance(shown, Image.Image) and shown.size == (96, 64) and shown.mode == "RGB"
    pixels = np.asarray(shown)
    assert pixels.dtype == np.uint8
    assert (pixels[:8, -16:] == 255).all()
    assert (pixels[24:] == 0).all() and (pixels[:, :64] == 0).all()
    half = np.asarray(maps.overlay("cat", picture, alpha=0.5, cmap="gray"))
    assert (half[0, -1] == 192).all() and (half[-1, 0] == 64).all()
    assert np.array_equal(np.asarray(maps.overlay("cat", picture, alpha=0.0)), np.asarray(picture))


def test_a_flat_map_is_drawn_flat():
    """Nothing to stretch: no division by zero."""
    shown = np.asarray(
        bright_token().overlay("a", np.zeros((32, 48, 3), np.uint8), alpha=1.0, cmap="gray")
    )
    assert (shown == 0).all()


def test_plot_shows_the_image_and_every_word():
    maps = bright_token()
    picture = np.zeros((32, 48, 3), np.float32)
    titles = [ax.get_title(loc="left") for ax in maps.plot(picture).axes]
    assert titles == ["image", "a\n0 to 0", "cat\n0 to 1"]
    chosen = maps.plot(picture, ["cat", "a"], same_scale=True)
    titles = [ax.get_title(loc="left") for ax in chosen.axes]
    assert titles == ["image", "cat\n0 to 1", "a\n0 to 1"]


# -- errors ----------------------------------------------------------------------------------------


def test_a_word_that_is_not_there_is_a_key_error_with_the_words_there_are(clip):
    maps = maps_of(clip, PROMPT)
    with pytest.raises(KeyError) as caught:
        maps["dog"]
    assert str(caught.value) == "'dog' is not in the prompt; its words are: a, Red, car, cat"
    with pytest.raises(ValueError, match=r"a word, or several neighbouring ones, is wanted"):
        maps[" "]


def test_a_word_that_was_cut_off_says_so(clip):
    maps = maps_of(clip, "cat " * 24 + "zebra and dog")  # 1 + 72 tokens, then four of "zebra"
    assert maps.words == ["cat"]
    for word in ("dog", "zebra", "cat zebra"):
        with pytest.raises(KeyError, match=r"cut off: the model takes 77 tokens, and the prompt"):
            maps[word]
    once_kept = maps_of(clip, "dog " + "cat " * 25 + "dog")
    assert once_kept.positions("dog") == [[1, 2, 3]]
    with pytest.raises(KeyError, match="cut off"):
        once_kept.of("dog", occurrence=1)


def test_what_the_record_lacks_is_said(pipes, clip):
    pipe = pipes("sd2")
    with fm.capture(pipe, kind="self") as record:
        FAMILY["sd2"].run(pipe, steps=1)
    with pytest.raises(ValueError, match=r"no layer in which image tokens attend to text.*self"):
        fm.word_maps(record, "a cat", pipe)
    with pytest.raises(ValueError, match=r"no layer .* none at all"):
        fm.word_maps(Record(), "a cat", pipe)
    only = record_of(pipe, "sd2", reduce="entropy")
    with pytest.raises(ValueError, match=r"neither 'image_to_text' nor Q and K .* only entropy"):
        fm.word_maps(only, PROMPT, pipe)
    negative = record_of(pipe, "sd2", reduce="image_to_text", guidance="unconditional")
    with pytest.raises(ValueError, match=r"holds no conditional pass"):
        fm.word_maps(negative, PROMPT, pipe)


def test_arguments_that_do_not_fit_are_named(pipes, clip):
    values = torch.rand(4, 77)
    record = [entry_of(values)]

    def make(*args, record=record, tokenizer=clip, **options):
        return fm.word_maps(record, *(args or ("a cat",)), tokenizer=tokenizer, **options)

    with pytest.raises(TypeError, match=r"prompt must be the text of one image, got \['a cat'\]"):
        make(["a cat"])
    with pytest.raises(TypeError, match=r"give the pipeline, or its tokenizer="):
        make(tokenizer=None)
    with pytest.raises(ValueError, match=r"image=1 is out of range: layer 'one' saw 1"):
        make(image=1)
    with pytest.raises(ValueError, match=r"size=\(3, 0\); wanted \(height, width\)"):
        make(size=(3, 0))
    with pytest.raises(ValueError, match=r"merge='max'; choose from mean, sum"):
        make(merge="max")
    with pytest.raises(ValueError, match=r"guidance='both'; choose from"):
        make(guidance="both")
    with pytest.raises(ValueError, match=r"alpha must be a finite number from 0 to 1, got 2"):
        make().overlay("cat", np.zeros((32, 32, 3), np.uint8), alpha=2)
    with pytest.raises(ValueError, match=r"frame=0: these are maps of an image"):
        make().overlay("cat", np.zeros((32, 32, 3), np.uint8), frame=0)
    shorter = [*record, entry_of(values[:, :5], "two")]
    with pytest.raises(ValueError, match=r"different numbers of text tokens .* 5 in 'two'"):
        make(record=shorter)
    unknown = Entry(**{**vars(record[0]), "grid": None})
    with pytest.raises(ValueError, match=r"layer 'one': the grid of its image tokens is not known"):
        make(record=[unknown])


def test_a_pipeline_that_is_not_known_wants_a_tokenizer(clip):
    class Bare(torch.nn.Module):
        pass

    record = [entry_of(torch.rand(4, 77))]
    with pytest.raises(ValueError, match=r"SimpleNamespace with its Bare .* give the tokenizer="):
        fm.word_maps(record, "a cat", SimpleNamespace(transformer=Bare()))


def test_a_pipeline_without_its_tokenizer_says_which(pipes):
    pipe = pipes("flux")
    record = record_of(pipe, "flux")
    bare = SimpleNamespace(transformer=pipe.transformer)
    with pytest.raises(ValueError, match=r"the pipeline has no tokenizer_2"):
        fm.word_maps(record, PROMPT, bare)
