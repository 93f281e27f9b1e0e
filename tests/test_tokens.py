"""Token optimisation: it lands on its targets, repeats, resumes, and diffusers loads it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flashmaps as fm
import pytest
import torch
from flashmaps.diffusion.tokens import _text
from tiny_pipeline import tiny_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    made = tiny_pipeline(tmp_path / "tokenizer")
    return made


def pictures(count: int = 2) -> list[Any]:
    """A bright square on grey, elsewhere in each."""
    found = []
    for index in range(count):
        image = torch.full((64, 64, 3), 0.5)
        image[8 + 24 * index : 24 + 24 * index, 8:24, 0] = 1.0
        found.append(image)
    return found


OPTIONS: dict[str, Any] = {"layers": "*.attn2", "size": (64, 64), "progress": False, "seed": 3}
POINTS = [[(0.25, 0.25)], [(0.25, 0.625)]]


def learn(pipe: Any, steps: int, **more: Any) -> fm.LearnedToken:
    return fm.optimize_tokens(pipe, pictures(), POINTS, steps=steps, **{**OPTIONS, **more})


def test_the_loss_falls_and_repeats(pipe: Any) -> None:
    learned = learn(pipe, 30, rate=1.0)
    losses = torch.tensor(learned.losses)
    assert losses[-8:].mean() < losses[:4].mean()
    assert torch.equal(learn(pipe, 30, rate=1.0).embedding, learned.embedding)
    found = learned.find(pipe, pictures()[0], size=(64, 64), seeds=(0,))
    assert abs(float(found.map.sum()) - 1) < 1e-5 and 0 < found.point[0] < 1


def test_it_goes_on_to_the_same_bits(pipe: Any, tmp_path: Path) -> None:
    whole = learn(pipe, 6)
    learn(pipe, 3, folder=tmp_path / "run", save_every=2)
    again = learn(pipe, 6, folder=tmp_path / "run", save_every=2)
    assert torch.equal(again.embedding, whole.embedding) and again.losses == whole.losses
    with pytest.raises(ValueError, match="was begun with seed=3"):
        learn(pipe, 6, folder=tmp_path / "run", seed=4)


def test_diffusers_loads_what_is_saved(pipe: Any, tmp_path: Path) -> None:
    learned = learn(pipe, 2, prompt="a {} b", token="<part>")
    states, at = _text(pipe, learned.prompt, learned.token, learned.embedding)
    path = learned.save(tmp_path / "part.safetensors")
    pipe.load_textual_inversion(str(path))
    loaded = pipe.encode_prompt("a <part> b", "cpu", 1, False)[0]
    torch.testing.assert_close(loaded, states)
    ids = pipe.tokenizer("a <part> b").input_ids
    assert ids[at] == pipe.tokenizer.convert_tokens_to_ids("<part>")


def test_masks_and_a_word_to_begin_with(pipe: Any) -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[4:12, 4:12] = True
    learned = fm.optimize_tokens(pipe, pictures(1), [mask], steps=2, initial="cat", **OPTIONS)
    assert len(learned.losses) == 2 and learned.embedding.isfinite().all()


def test_the_pipeline_stays_as_it_was(pipe: Any) -> None:
    before = {name: x.clone() for name, x in pipe.text_encoder.state_dict().items()}
    learn(pipe, 2)
    after = pipe.text_encoder.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_bad_input(pipe: Any) -> None:
    for targets, words in (
        (POINTS[:1], "2 images and 1 targets"),
        ([[(2.0, 0.5)], [(0.5, 0.5)]], "outside of the unit square"),
        ([torch.zeros(8, 8)] * 2, "nothing in it"),
        ([torch.zeros(3)] * 2, "points .K, 2."),
    ):
        with pytest.raises(ValueError, match=words):
            fm.optimize_tokens(pipe, pictures(), targets, steps=1, **OPTIONS)
    with pytest.raises(ValueError, match="once"):
        learn(pipe, 1, prompt="a cat")
    with pytest.raises(ValueError, match="one text encoder"):
        fm.optimize_tokens(pipe.unet, pictures(), POINTS, steps=1, **OPTIONS)
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler")
    two = SimpleNamespace(**dict.fromkeys((*parts, "encode_prompt"), pipe))
    with pytest.raises(ValueError, match="SimpleNamespace: it has two text encoders"):
        fm.optimize_tokens(two, pictures(), POINTS, steps=1, **OPTIONS)
