"""What a capture says of layers that it does not know, and what it is told of them."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from flashmaps import Record, register_layout
from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.layouts import order
from flashmaps.diffusion.observe import attention_layers
from tiny_families import CASES, HEIGHT, TEXT, TOKENS, WIDTH, random

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = {case.model: case for case in CASES}


class Joins:
    """Text before image in one sequence, as a research model might have it."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        joined = torch.cat([encoder_hidden_states, hidden_states], 1)
        return AttnProcessor2_0()(attn, joined)[:, encoder_hidden_states.shape[1] :]


class Inherits(Joins):
    """Nothing of its own."""


class Overrides(Joins):
    """A call of its own, which may do anything."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return AttnProcessor2_0()(attn, hidden_states)


class Research(torch.nn.Module):
    """A model that is none of diffusers': joint attention and cross-attention."""

    def __init__(self, processor):
        super().__init__()
        torch.manual_seed(0)
        self.joint = Attention(16, heads=2, dim_head=8, processor=processor)
        self.cross = Attention(16, heads=2, dim_head=8, processor=AttnProcessor2_0())

    def forward(self, hidden_states, encoder_hidden_states, timestep=None):
        hidden_states = self.joint(hidden_states, encoder_hidden_states=encoder_hidden_states)
        return self.cross(hidden_states, encoder_hidden_states=encoder_hidden_states)


def research(processor=None, **options):
    model = Research(processor or Joins()).eval().requires_grad_(False)
    given = random(1, TOKENS, 16), random(1, TEXT, 16, seed=1)
    plain = model(*given)
    with capture(model, **options) as record:
        assert torch.equal(plain, model(*given))
    return record


TEXT_IMAGE = {"text": slice(0, TEXT), "image": slice(TEXT, TEXT + TOKENS)}


def test_a_model_that_is_not_known_is_not_guessed():
    for entry in research():
        assert (entry.kind, entry.grid, entry.queries, entry.keys) == ("unknown", None, {}, {})
        assert "in Research is not known here; give parts=, grid= or leave" in entry.why
    with pytest.raises(
        ValueError,
        match=r"layer 'joint' have no 'image'; there are: none: the layout of Joins in Research is "
        r"not known here; give parts=, grid= or leave the layer out",
    ):
        entry = research()[0]
        entry.map("image->text")
    with pytest.raises(ValueError, match=r"'joint' has no grid of frames: the layout of Joins in"):
        entry.frame(0)
    assert entry.map().to_dense().shape == (1, TEXT + TOKENS, TEXT + TOKENS)


@pytest.mark.parametrize(
    "parts",
    [
        "text + image",
        "text+image",
        TEXT_IMAGE,
        {"text": (0, TEXT), "image": (TEXT, TEXT + TOKENS)},
        {"queries": TEXT_IMAGE, "keys": TEXT_IMAGE},
        {"joi*": "text + image", "*": "image -> text"},
    ],
    ids=str,
)
def test_parts_that_the_user_says(parts):
    record = research(layers="joint", parts=parts, grid=(HEIGHT, WIDTH))
    entry = record[0]
    assert (entry.kind, entry.grid, entry.frames) == ("joint", (HEIGHT, WIDTH), 1)
    assert entry.queries == entry.keys == TEXT_IMAGE
    assert entry.map("image->image").query_grid == (HEIGHT, WIDTH)


def test_parts_by_layer_and_a_grid_with_frames():
    parts = {"joint": "text + image", "cross": "image -> text"}
    record = research(parts=parts, grid=(2, HEIGHT // 2, WIDTH))
    joint, cross = record
    assert (cross.kind, cross.queries, cross.keys) == (
        "cross",
        {"image": slice(0, TOKENS)},
        {"text": slice(0, TEXT)},
    )
    assert (joint.grid, joint.frames) == (cross.grid, cross.frames) == ((HEIGHT // 2, WIDTH), 2)
    assert joint.frame(1) == slice(TEXT + TOKENS // 2, TEXT + TOKENS)


def test_one_part_may_be_what_is_left():
    """Without a grid the image is what the text leaves; what the user names is free."""
    entry = research(layers="joint", parts="text + picture")[0]
    assert entry.queries["picture"] == slice(TEXT, TEXT + TOKENS)
    assert entry.grid is None


def test_parts_of_a_model_that_is_known():
    """They win over what the table says, and are a layer's own where a pattern names it."""
    case = CASE["PixArtTransformer2DModel"]
    record = record_of(case, parts={"*.attn2": "image -> words"})
    assert [(e.kind, set(e.keys)) for e in record] == [("self", {"image"}), ("cross", {"words"})]


def record_of(case, **options):
    model = case.build()
    with torch.no_grad(), capture(model, **options) as record:
        model(**case.inputs(), return_dict=False)
    return record


@pytest.mark.parametrize(
    ("parts", "grid", "message"),
    [
        ("text + image", (3, 3), r"not those of 'text \+ image' \(image: 3 x 3, text: 5\)"),
        ({"image": slice(0, 99)}, None, r"'image' of the queries is tokens 0 to 99, but the layer"),
        ({"image": slice(0, 9)}, (2, 2), r"9 image queries, which is not 1 x 2 x 2; give grid="),
    ],
    ids=["order", "beyond", "grid"],
)
def test_parts_that_a_layer_has_not_are_an_error(parts, grid, message):
    with pytest.raises(ValueError, match=message) as caught:
        research(layers="joint", parts=parts, grid=grid)
    assert caught.value.__notes__ == ["Raised for layer 'joint'."]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parts": "text + text"}, ValueError, "is no order of tokens; write the names"),
        ({"parts": "a -> b -> c"}, ValueError, "is no order of tokens"),
        ({"parts": ""}, ValueError, "is no order of tokens"),
        ({"parts": 3}, TypeError, "wanted an order such as 'text"),
        ({"parts": {}}, TypeError, "wanted an order such as 'text"),
        ({"parts": {"text": slice(None)}}, TypeError, "ranges by name such as"),
        ({"parts": {"text": slice(4, 2)}}, ValueError, "'text' at tokens 4 to 2; wanted a start"),
        ({"grid": (3,)}, ValueError, r"grid=\(3,\); wanted \(height, width\)"),
        ({"grid": (0, 3)}, ValueError, "all at least 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_words_are_refused_before_anything_runs(options, error, message):
    with pytest.raises(error, match=message):
        capture(Research(Joins()), **options)


@pytest.fixture
def registered():
    register_layout(Joins, "text + image")
    yield
    register_layout(Joins, None)


def test_a_class_that_was_registered(registered):
    entry = research(layers="joint")[0]
    assert (entry.kind, entry.queries) == ("joint", TEXT_IMAGE)
    inherited = research(Inherits(), layers="joint")[0]
    assert inherited.queries == TEXT_IMAGE
    other = research(Overrides(), layers="joint")[0]
    assert other.kind == "unknown" and not other.queries


def test_what_is_no_class_cannot_be_registered():
    with pytest.raises(TypeError, match=r"wants the class of a processor, got .*; give Joins"):
        register_layout(Joins(), "text + image")
    with pytest.raises(ValueError, match="is no order of tokens"):
        register_layout(Joins, "text image")
    assert research(layers="joint")[0].kind == "unknown"


def test_kinds_follow_from_parts():
    kinds = {
        "image": "self",
        "text": "self",
        "frames": "temporal",
        "text + image": "joint",
        "image -> text": "cross",
        "image -> text + image": "joint",
        "image -> image_prompt": "image_prompt",
        "image + __fill": "self",
        "image + _text": "joint",
    }
    assert {text: order(text).kind for text in kinds} == kinds


# -- processors that change the tokens -------------------------------------------------------------


class SeesMore:
    """Keys of a reference image beside the layer's own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        both = torch.cat([context, context.flip(1)], 1)
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states=both)


class Merges:
    """Pairs of tokens merged into one, as token merging does."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        few = hidden_states.unflatten(1, (-1, 2)).mean(2)
        return AttnProcessor2_0()(attn, few).repeat_interleave(2, 1)


class MergesToACoarserGrid(Merges):
    """As many tokens as the level below has."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        few = hidden_states.unflatten(1, (-1, 4)).mean(2)
        return AttnProcessor2_0()(attn, few).repeat_interleave(4, 1)


class FewerKeys:
    """Keys and values of every other token."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states=hidden_states[:, ::2])


def unet_with(processor, pattern="*.attn1"):
    case = CASE["UNet2DConditionModel"]
    model = case.build()
    for name, layer in attention_layers(model).items():
        if name.startswith("down_blocks.0") and name.endswith(pattern[2:]):
            layer.set_processor(processor)
    inputs = case.inputs()
    with torch.no_grad():
        plain = model(**inputs, return_dict=False)[0]
        with capture(model, f"down_blocks.0.{pattern}") as record:
            assert torch.equal(plain, model(**inputs, return_dict=False)[0])
    return record[0]


@pytest.mark.parametrize("processor", [SeesMore, FewerKeys])
def test_keys_that_are_not_the_layers_own_have_no_name(processor):
    entry = unet_with(processor())
    assert (entry.queries, entry.keys) == ({"image": slice(0, TOKENS)}, {})
    assert (entry.kind, entry.grid, entry.key_grid) == ("unknown", (HEIGHT, WIDTH), None)
    keys = entry.key.shape[2]
    assert (
        f"its {TOKENS} queries and {keys} keys are not those of 'image' (image: 4 x 6)" in entry.why
    )
    with pytest.raises(
        ValueError, match=r"the keys of layer .* have no 'image'; there are: none: i"
    ):
        entry.map("image->image")


@pytest.mark.parametrize("processor", [Merges, MergesToACoarserGrid])
def test_merged_tokens_have_no_grid(processor):
    entry = unet_with(processor())
    assert (entry.queries, entry.keys, entry.grid) == ({}, {}, None)
    assert entry.kind == "self"  # queries and keys are the same tokens, whatever these are
    assert entry.map().query_grid is None


def test_keys_of_another_image_are_not_called_the_layers_own():
    from flashmaps import CrossSelfAttnProcessor

    case = CASE["UNet2DConditionModel"]
    model, inputs = case.build(), case.inputs()
    two = {
        name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in inputs.items() if name != "timestep"
    }
    with torch.no_grad(), CrossSelfAttnProcessor.on(model, "*.attn1", keys="other", guidance=False):
        with capture(model, "down_blocks.0.*") as record:
            model(**two, timestep=5, return_dict=False)
    own, text = record
    assert (own.kind, own.queries, own.keys) == ("self", {"image": slice(0, TOKENS)}, {})
    assert "may attend to another image's keys" in own.why
    assert text.keys == {"text": slice(0, TEXT)}


def test_text_that_is_not_the_models_has_no_name():
    entry = unet_with(SeesMore(), "*.attn2")
    assert (entry.kind, entry.keys) == ("unknown", {})


def test_parts_never_reach_beyond_the_tensors():
    """Whatever a processor does: a range that an entry has lies within its tokens."""
    for processor in (SeesMore, Merges, MergesToACoarserGrid, FewerKeys):
        entry = unet_with(processor())
        for parts, tensor in ((entry.queries, entry.query), (entry.keys, entry.key)):
            assert all(0 <= p.start < p.stop <= tensor.shape[2] for p in parts.values())


def test_a_joint_processor_that_is_not_listed_is_not_known():
    from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor

    class Mine(Flux2AttnProcessor):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    Mine.__call__.__signature__ = inspect.signature(Flux2AttnProcessor.__call__)

    class Same(Flux2AttnProcessor):
        pass

    case = CASE["Flux2Transformer2DModel"]
    kinds = {}
    for processor in (Mine, Same):
        model = case.build()
        model.transformer_blocks[0].attn.set_processor(processor())
        with torch.no_grad(), capture(model, "transformer_blocks.*") as record:
            model(**case.inputs(), return_dict=False)
        kinds[processor.__name__] = (record[0].kind, list(record[0].queries))
    assert kinds == {"Mine": ("unknown", []), "Same": ("joint", ["text", "image"])}


def test_a_model_with_a_forward_of_its_own_is_not_known():
    from diffusers import PixArtTransformer2DModel

    class Mine(PixArtTransformer2DModel):
        def forward(self, hidden_states, **more):
            return super().forward(hidden_states.transpose(2, 3), **more)

    class Same(PixArtTransformer2DModel):
        pass

    case = CASE["PixArtTransformer2DModel"]
    for kind, known in ((Mine, False), (Same, True)):
        model = kind(**case.config).eval()
        with torch.no_grad(), capture(model) as record:
            model(**case.inputs(), return_dict=False)
        assert all(bool(entry.queries) == known for entry in record)


# -- families with more than one order -------------------------------------------------------------


def test_flux2_with_cached_keys_of_a_reference():
    """FLUX.2 klein's KV pipeline: a first pass that keeps them, others that attend to them."""
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2KVAttnProcessor,
        Flux2KVParallelSelfAttnProcessor,
    )

    case = CASE["Flux2Transformer2DModel"]
    model = case.build()
    model.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    model.single_transformer_blocks[0].attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    inputs = case.inputs()
    more = {
        "hidden_states": torch.cat([random(1, 6, 8, seed=9), inputs["hidden_states"]], 1),
        "img_ids": torch.cat([torch.ones(1, 6, 4), inputs["img_ids"]], 1),
    }
    reference = slice(TEXT, TEXT + 6)
    with torch.no_grad(), capture(model) as record:
        _, cache = model(
            **{**inputs, **more}, kv_cache_mode="extract", num_ref_tokens=6, return_dict=False
        )
        model(**inputs, kv_cache_mode="cached", kv_cache=cache, return_dict=False)
        model(**inputs, return_dict=False)
    for step in (0, 1):
        for entry in record.select(step=step):
            if entry.call == 1:  # the reference attends to itself
                assert (set(entry.queries), set(entry.keys)) == ({"reference"}, {"reference"})
                continue
            assert entry.queries == TEXT_IMAGE
            assert entry.keys["reference"] == reference
            assert entry.keys["image"] == slice(TEXT + 6, TEXT + 6 + TOKENS)
            assert (entry.kind, entry.grid) == ("joint", (HEIGHT, WIDTH))
    assert [entry.call for entry in record.select(step=0)] == [0, 1, 0, 1]
    assert all(entry.keys == entry.queries == TEXT_IMAGE for entry in record.select(step=2))


def test_hunyuan_video_without_an_image_prompt():
    """Its tokens are hidden, and stand behind the text."""
    case = CASE["HunyuanVideo15Transformer3DModel"]
    model, inputs = case.build(), case.inputs()
    inputs["image_embeds"] = torch.zeros_like(inputs["image_embeds"])
    with torch.no_grad(), capture(model, "transformer_blocks.*") as record:
        model(**inputs, return_dict=False)
    image = case.frames * TOKENS
    assert record[0].queries == {"image": slice(0, image), "text": slice(image, image + TEXT + 1)}


def test_z_image_with_texts_of_different_lengths():
    """Where theirs differ, the text of a batch has no place in common; each part's has."""
    case = CASE["ZImageTransformer2DModel"]
    model, inputs = case.build(), case.inputs()
    image = inputs["x"][0]
    both = {"x": [image, image], "t": inputs["t"].repeat(2)}
    texts = [random(40, 16, seed=4), inputs["cap_feats"][0]]
    with torch.no_grad(), capture(model, "layers.*") as record:
        model(**both, cap_feats=texts, return_dict=False)
    assert (record[0].kind, record[0].queries) == ("joint", {"image": slice(0, TOKENS)})
    assert "texts of this batch have different lengths" in record[0].why
    order = ("conditional", "unconditional")
    for which, length in zip(order, (40, TEXT), strict=True):
        with torch.no_grad(), capture(model, "layers.*", guidance=which, batch=order) as record:
            model(**both, cap_feats=texts, return_dict=False)
        text = record[0].queries["text"]
        assert (text.start, text.stop) == (32, 32 + length)
        assert record[0].query.shape[0] == 1


def test_mochi_attends_to_each_image_by_itself():
    case = CASE["MochiTransformer3DModel"]
    model, inputs = case.build(), case.inputs()
    two = {
        "hidden_states": inputs["hidden_states"].repeat(2, 1, 1, 1, 1),
        "encoder_hidden_states": random(2, TEXT + 2, 16, seed=7),
        "timestep": inputs["timestep"].repeat(2),
        "encoder_attention_mask": torch.tensor([[True] * 3 + [False] * 4, [True] * 7]),
    }
    order = ("unconditional", "conditional")
    with torch.no_grad(), capture(model, "*.0.attn1", batch=order) as record:
        model(**two, return_dict=False)
    found = [(e.call, e.guidance, e.keys["text"].stop - e.keys["text"].start) for e in record]
    assert found == [(0, "unconditional", 3), (1, "conditional", 7)]
    with torch.no_grad():
        with capture(model, "*.0.attn1", batch=order, guidance="conditional") as record:
            model(**two, return_dict=False)
    assert [(e.call, len(e.query)) for e in record] == [(1, 1)]


def test_linear_attention_has_no_map():
    case = CASE["SanaTransformer2DModel"]
    assert {entry.layer.split(".")[-1] for entry in record_of(case)} == {"attn2"}
    with pytest.raises(
        RuntimeError, match=r"SanaLinearAttnProcessor2_0: linear attention .* has no map; choose"
    ):
        capture(case.build(), "*.attn1")


@pytest.mark.parametrize(
    ("model", "config", "inputs"),
    [
        (
            "Ideogram4Transformer2DModel",
            {
                "in_channels": 8, "num_layers": 1, "attention_head_dim": 16,
                "num_attention_heads": 2, "intermediate_size": 16, "adaln_dim": 8,
                "llm_features_dim": 16, "mrope_section": (4, 2, 2),
            },
            lambda: {
                "hidden_states": random(1, 9, 8), "timestep": torch.tensor([0.5]),
                "encoder_hidden_states": random(1, 9, 16),
                "position_ids": torch.zeros(1, 9, 3, dtype=torch.long),
                "segment_ids": torch.zeros(1, 9), "indicator": torch.ones(1, 9),
            },
        ),
    ],
    ids=["Ideogram 4"],
)  # fmt: skip
def test_families_that_are_not_listed_have_no_labels(model, config, inputs):
    import diffusers

    built = getattr(diffusers, model)(**config).eval()
    with torch.no_grad(), capture(built) as record:
        built(**inputs(), return_dict=False)
    assert len(record) > 0
    for entry in record:
        assert (entry.kind, entry.grid, entry.queries, entry.keys) == ("unknown", None, {}, {})
        assert f"in {model} is not known here" in entry.why


# -- nothing was recorded --------------------------------------------------------------------------


def nothing(case, **options):
    model = case.build()
    with pytest.warns(UserWarning, match="nothing was recorded") as caught:
        with torch.no_grad(), capture(model, **options) as record:
            model(**case.inputs(), return_dict=False)
    assert len(record) == 0
    return str(caught[0].message)


def test_why_nothing_was_recorded_layer_by_layer():
    case = CASE["PixArtTransformer2DModel"]
    text = nothing(case, kind="joint")
    assert "transformer_blocks.0.attn1: kind 'self', grid 4 x 6, no guidance: kind='joint'" in text
    assert "transformer_blocks.0.attn2: kind 'cross', grid 4 x 6, no guidance: kind='joint'" in text
    text = nothing(case, resolution=8, kind=("self", "cross"))
    assert "attn1: kind 'self', grid 4 x 6, no guidance: resolution=8 leaves them out" in text
    text = nothing(case, guidance="unconditional")
    assert "no guidance: guidance='unconditional' leaves them out" in text
    text = nothing(case, layers="*.attn1", reduce="image_to_text")
    assert "in them no image token attends to text, which reduce='image_to_text' is of" in text


def test_why_nothing_was_recorded_of_layers_that_are_not_known():
    model = Research(Joins()).eval()
    with pytest.warns(UserWarning, match="nothing was recorded") as caught:
        with torch.no_grad(), capture(model, kind="joint"):
            model(random(1, TOKENS, 16), random(1, TEXT, 16))
    text = str(caught[0].message)
    assert "joint: kind 'unknown', no grid, no guidance: kind='joint' leaves them out" in text
    assert "the layout of Joins in Research is not known here; give parts=, grid=" in text


def test_what_is_known_survives_a_file(tmp_path):
    record = record_of(CASE["UNetMotionModel"])
    record.save(tmp_path / "record.safetensors")
    loaded = Record.load(tmp_path / "record.safetensors")
    assert [(e.kind, e.rows, e.why, e.queries) for e in record] == [
        (e.kind, e.rows, e.why, dict(e.queries)) for e in loaded
    ]
    assert math.prod(loaded[0].grid) == TOKENS
