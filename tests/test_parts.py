"""Learned parts: losses, resuming, files that diffusers loads, what is found, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.diffusion.images import load_image
from flashmaps.diffusion.latents import encode, noised, prediction_target, to_levels
from flashmaps.diffusion.learned_words import prompt_states
from flashmaps.parts.head import fit_head
from flashmaps.parts.losses import column_divergence, noise_errors, step_losses
from flashmaps.parts.pasted import pasted
from flashmaps.parts.places import expected_places, similarity
from flashmaps.parts.presence import logistic
from flashmaps.parts.reading import probabilities
from flashmaps.parts.regions import hard_labels, part_masks
from flashmaps.parts.result import Parts
from flashmaps.parts.sight import _principal, fit_sight
from flashmaps.segmentation.segment import see
from tiny_pipeline import tiny_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 32


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), sample_size=8)


def collection(count: int = 3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A red square beside a blue one, elsewhere in each image; labels 0 and 1."""
    images, labels = [], []
    for index in range(count):
        image = np.full((SIDE, SIDE, 3), 128, np.uint8)
        label = np.full((SIDE, SIDE), -1, np.int64)
        at = 4 + 3 * index
        image[at : at + 10, 4:14], image[at : at + 10, 14:24] = (255, 0, 0), (0, 0, 255)
        label[at : at + 10, 4:14], label[at : at + 10, 14:24] = 0, 1
        images.append(image)
        labels.append(label)
    return images, labels


def learn(pipe: Any, **more: Any) -> Parts:
    images, labels = collection()
    options = {"steps": 3, "batch": 2, "size": SIDE, "progress": False, "segments": labels, **more}
    return fm.learn_parts(images, model=pipe, **options)


@pytest.fixture(scope="module")
def learned(pipe: Any) -> Parts:
    return learn(pipe)


def test_learned_words_stand_where_they_are_written(pipe: Any) -> None:
    """States of a prompt with known words' own embeddings are those of the known words."""
    table = pipe.text_encoder.get_input_embeddings().weight
    ids = [pipe.tokenizer(x, add_special_tokens=False).input_ids[0] for x in "bc"]
    words = {"<one>": table[ids[:1]], "<two>": table[[ids[1], ids[0]]]}
    states, places = prompt_states(pipe, ["a <one> d <two>", "<two>"], words)
    wanted = pipe.encode_prompt(["a b d c b", "c b"], "cpu", 1, False)[0]
    torch.testing.assert_close(states, wanted)
    assert places == ({"<one>": (2,), "<two>": (4, 5)}, {"<two>": (1, 2)})
    with pytest.raises(ValueError, match="this model reads 75"):
        prompt_states(pipe, ["<two> " * 40], words)


def test_noise_and_targets_are_those_of_the_scheduler(pipe: Any) -> None:
    z, e = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t = [7, 400]
    x = to_levels(pipe, z, e, t)
    torch.testing.assert_close(x, pipe.scheduler.add_noise(z, e, torch.tensor(t)))
    ((_, one),) = noised(pipe, z[:1], [7], [[3]])
    drawn = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(3))[None]
    torch.testing.assert_close(one, to_levels(pipe, z[:1], drawn, [7]))
    assert prediction_target(pipe, z, e, t) is e
    config = pipe.scheduler.config["prediction_type"]
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    try:
        velocity = pipe.scheduler.get_velocity(z, e, torch.tensor(t))
        torch.testing.assert_close(prediction_target(pipe, z, e, t), velocity)
    finally:
        pipe.scheduler.register_to_config(prediction_type=config)


def test_the_attention_loss_is_a_divergence() -> None:
    target = torch.rand(2, 12, 3)
    here = torch.tensor([[True, True, False], [True, False, True]])
    assert abs(float(column_divergence(5 * target, target, here))) < 1e-6
    other = torch.rand(2, 12, 3)
    p, q = target / target.sum(1, keepdim=True), other / other.sum(1, keepdim=True)
    each = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(column_divergence(other, target, here), each[here].mean())


def test_both_losses_of_one_pass(pipe: Any, learned: Parts) -> None:
    """L_n with a capture is that without, and both have gradients at the words."""
    images, labels = collection()
    z = encode(pipe, [load_image(x) for x in images])
    masks = part_masks(labels, 3, (SIDE, SIDE))
    masks = torch.cat((masks.amax(1, keepdim=True), masks), 1)
    words = {k: v.clone().requires_grad_() for k, v in learned.words.items()}
    told = (pipe, z, torch.randn(z.shape), [50, 300, 700], [learned.prompt()] * 3, words)
    noise, attention = step_losses(*told, masks, tuple(words), ("*.attn2",))
    torch.testing.assert_close(noise, noise_errors(*told).mean())
    for loss in (noise, attention):
        for slope in torch.autograd.grad(loss, list(words.values()), retain_graph=True):
            assert slope.isfinite().all() and slope.abs().max() > 0


def test_checkpointing_changes_no_gradient(pipe: Any) -> None:
    plain, again = learn(pipe), learn(pipe, checkpointing=True)
    assert not pipe.unet.is_gradient_checkpointing
    torch.testing.assert_close(plain.embeddings, again.embeddings)


@pytest.mark.parametrize("loss", ["noise", "attention", "both"])
def test_the_loss_falls(pipe: Any, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one draw of images and noise, seen again and again."""
    from flashmaps.parts import learn as module

    draw = module._Job.draw
    monkeypatch.setattr(module._Job, "draw", lambda job, step, images: draw(job, 0, images))
    made = learn(pipe, loss=loss, steps=16)
    assert len(made.losses) == 16
    assert made.losses[7] < made.losses[0] and made.losses[15] < made.losses[8]


def test_it_repeats_and_leaves_the_model_alone(pipe: Any, learned: Parts) -> None:
    before = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    again = learn(pipe)
    assert torch.equal(again.embeddings, learned.embeddings) and again.losses == learned.losses
    assert all(torch.equal(v, before[k]) for k, v in pipe.text_encoder.state_dict().items())
    assert not torch.equal(learn(pipe, seed=1).embeddings, learned.embeddings)


def test_it_goes_on_to_the_same_bits(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashmaps.parts import learn as module

    monkeypatch.setattr(module, "_EVERY", 2)
    whole = learn(pipe, steps=5, held_out=1)
    times = []
    look = module._look

    def killed(*args: Any) -> None:
        look(*args)
        times.append(1)
        if len(times) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_look", killed)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        learn(pipe, steps=5, held_out=1, folder=folder)
    assert (folder / "state.safetensors").is_file()
    made = learn(pipe, steps=5, held_out=1, folder=folder)
    assert made.losses == whole.losses and torch.equal(made.embeddings, whole.embeddings)
    assert not (folder / "state.safetensors").exists()
    read = learn(pipe, steps=5, held_out=1, folder=folder)
    assert torch.equal(read.embeddings, whole.embeddings) and len(times) == 3
    with pytest.raises(ValueError, match="seed: 0 there, 3 now"):
        learn(pipe, steps=5, held_out=1, folder=folder, seed=3)


def test_it_stops_when_images_held_out_say_so(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmaps.parts import learn as module

    monkeypatch.setattr(module, "_EVERY", 1)
    told = iter([3.0, 1.0, 2.0, 2.0])
    kept: list[torch.Tensor] = []

    def held_out(job: Any, average: torch.Tensor, images: Any, *, attend: bool) -> float:
        assert attend
        kept.append(average)
        return next(told)

    monkeypatch.setattr(module._Job, "held_out", held_out)
    made = learn(pipe, steps=50, held_out=1, patience=2)
    assert len(made.losses) == 29  # looks begin in the second half
    assert torch.equal(made.category_embedding, kept[1][0])


def test_files_are_whole_and_diffusers_loads_them(
    pipe: Any, learned: Parts, tmp_path: Path
) -> None:
    folder = learned.save(tmp_path / "parts")
    read = Parts.load(folder)
    assert read.names == learned.names == ("<part-0>", "<part-1>")
    assert torch.equal(read.embeddings, learned.embeddings)
    assert all(np.array_equal(a, b) for a, b in zip(read.labels, learned.labels, strict=True))
    assert np.array_equal(
        read.masks(collection()[0][0], model=pipe), learned.masks(collection()[0][0], model=pipe)
    )
    other = tiny_pipeline(tmp_path / "tokenizer", sample_size=8)
    other.load_textual_inversion(str(folder / "part-1.safetensors"))
    states, _ = prompt_states(pipe, ["a <part-1>"], learned.words)
    torch.testing.assert_close(other.encode_prompt("a <part-1>", "cpu", 1, False)[0], states)
    with pytest.raises(FileNotFoundError, match="holds no parts"):
        Parts.load(tmp_path)
    (folder / "parts.json").write_text("{}")
    with pytest.raises(ValueError, match="not readable as parts"):
        Parts.load(folder)


def test_several_tokens_a_word(pipe: Any, tmp_path: Path) -> None:
    made = learn(pipe, tokens=2)
    assert made.embeddings.shape[:2] == (2, 2)
    folder = made.save(tmp_path / "parts")
    other = tiny_pipeline(tmp_path / "tokenizer", sample_size=8)
    other.load_textual_inversion(str(folder / "part-0.safetensors"))
    states, _ = prompt_states(pipe, ["a <part-0>"], made.words)
    torch.testing.assert_close(other.encode_prompt("a <part-0>", "cpu", 1, False)[0], states)


def test_probabilities_sum_to_one(pipe: Any, learned: Parts) -> None:
    image = np.random.default_rng(0).random((48, 32, 3)).astype(np.float32)
    masks = learned.masks(image, model=pipe)
    assert masks.shape == (2, 48, 32) and masks.min() >= 0 and masks.sum(0).max() <= 1 + 1e-5


def test_the_head_finds_what_separates() -> None:
    """Classes that a linear rule tells apart are told apart."""
    masks = torch.zeros(2, 2, 8, 8)
    masks[:, 0, :4], masks[:, 1, 4:, :4] = 1, 1
    logs = torch.randn(2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    logs[:, 1] += 8 * masks
    found = probabilities(logs, fit_head(logs, masks))
    wanted = torch.cat((masks, 1 - masks.sum(1, keepdim=True)), 1)
    assert bool((found.argmax(1) == wanted.argmax(1)).all())
    torch.testing.assert_close(found.sum(1), torch.ones(2, 8, 8))


def test_parts_of_cosegments_and_of_weights() -> None:
    labels = collection()[1]
    weights = [np.stack([x == 0, x == 1]).astype(np.float32) for x in labels]
    torch.testing.assert_close(part_masks(labels, 3, (16, 16)), part_masks(weights, 3, (16, 16)))
    hard = hard_labels(part_masks(labels, 3, (SIDE, SIDE)))
    assert all(np.array_equal(a, b) for a, b in zip(hard, labels, strict=True))


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([np.full((8, 8), -1)] * 3, "segments are empty"),
        ([np.zeros((2, 8, 8))] * 3, "segments are empty"),
        ([np.zeros((8, 8), int)] * 2, "segments are of 2 images, and there are 3"),
        ([np.full((8, 8), 1)] * 3, "part 0 is empty in every image"),
        ([np.zeros((8, 8))] * 3, "labels are whole numbers"),
        ([np.full((1, 8, 8), 2.0)] * 3, "not in 0..1"),
        ([np.zeros(8)] * 3, "labels .h, w., or weights .P, h, w."),
        ([np.ones((1, 8, 8)), np.ones((2, 8, 8)), np.ones((1, 8, 8))], "every image has to have"),
        ("parts.png", "must be a CoSegments"),
    ],
)
def test_segments_that_are_none(pipe: Any, segments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        learn(pipe, segments=segments)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss": "pixels"}, "choose from noise, attention, both"),
        ({"steps": 0}, "steps must be a whole number >= 1"),
        ({"timesteps": (500, 100)}, "must be in order from 0 to 999"),
        ({"held_out": 3}, "held_out must be a whole number"),
        ({"category": "cat"}, "must be letters"),
        ({"category": "<part-x>"}, "could be the name of a part"),
        ({"layers": "nowhere"}, "nowhere"),
        ({"tokens": 40}, "this model reads 75"),
    ],
)
def test_arguments_that_are_none(pipe: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        learn(pipe, **given)


def test_no_object(pipe: Any) -> None:
    """A collection of nothing but ground has no part in common."""
    rng = np.random.default_rng(0)
    images = [rng.random((SIDE, SIDE, 3)).astype(np.float32) for _ in range(2)]
    found = fm.cosegment(images, model=pipe, size=SIDE)
    bare = replace(found, parts=tuple(replace(p, border=2.0) for p in found.parts))
    with pytest.raises(ValueError, match="no object"):
        fm.learn_parts(images, segments=bare, model=pipe, size=SIDE, progress=False)


def test_parts_of_another_model_are_refused(pipe: Any, learned: Parts, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "tokenizer", sample_size=8)
    with torch.no_grad():
        next(other.unet.parameters()).add_(1)
    image = collection()[0][0]
    for call in (
        lambda: fm.find_parts(image, learned, model=other),
        lambda: learned.masks(image, model=other),
    ):
        with pytest.raises(ValueError, match="and mean nothing to the model given"):
            call()
    with pytest.raises(ValueError, match="learned with a pipeline that has no name"):
        learned.masks(image)
    with pytest.raises(ValueError, match=r"wanted what fm.learn_parts gives"):
        fm.find_parts(image, "parts")


def test_find_parts(pipe: Any, learned: Parts, tmp_path: Path) -> None:
    found = fm.find_parts(collection()[0][1], learned, model=pipe)
    assert found.probability.shape == (2,) and set(found.state) <= {"present", "hidden", "absent"}
    assert found.masks.shape == (2, SIDE, SIDE) and found.labels.shape == (SIDE, SIDE)
    for p, state in enumerate(found.state):
        assert (state == "present") == (found.probability[p] >= 0.5)
    found.save(tmp_path / "found")
    assert (tmp_path / "found" / "index.html").is_file()
    every = fm.find_parts(collection()[0][1], learned, model=pipe, threshold=0)
    assert every.state == ("present", "present") and not every.missing()
    none = fm.find_parts(collection()[0][1], learned, model=pipe, threshold=1)
    assert none.state == ("absent", "absent")  # where nothing is seen nothing says where


def test_places_follow_the_parts_that_are_seen() -> None:
    """A turned, mirrored, scaled copy: the missing part is where the same map carries it."""
    points = np.array([[0.3, 0.3], [0.6, 0.35], [0.5, 0.6], [0.4, 0.45]])
    z = (points[:, 0] - 1j * points[:, 1]) * (0.6 + 0.3j) + (0.1 + 0.8j)
    there = np.stack((z.real, z.imag), -1)
    move, error = similarity(points[:3], there[:3])
    assert error < 1e-12
    np.testing.assert_allclose(move(points), there)
    move, error = similarity(points[:1], there[:1])
    np.testing.assert_allclose(move(points[1:2]) - there[:1], points[1:2] - points[:1])


def test_expected_places_of_a_shifted_copy() -> None:
    labels = collection()[1]
    masks = np.stack([labels[2] == 0, labels[2] == 1]).astype(np.float32)
    told = expected_places(masks, np.array([True, False]), labels[:2])
    full = expected_places(masks, np.array([True, True]), labels[:2])
    np.testing.assert_allclose(told, full, atol=1e-6)
    assert np.isnan(expected_places(masks, np.array([False, False]), labels)).all()


def test_things_cover_what_is_said() -> None:
    """Pixels change under things alone; they hide some of the object; where is none, none is."""
    images, labels = collection()
    others = [each.astype(np.float32) / 255 for each in images]
    rng = np.random.default_rng(0)
    for image, own in zip(others, labels, strict=True):
        changed, front = pasted(image, own, others, rng)
        np.testing.assert_array_equal(changed[~front], image[~front])
        assert front[own >= 0].any() and changed.min() >= 0 and changed.max() <= 1
        same, nothing = pasted(image, np.full_like(own, -1), others, rng)
        assert same is image and not nothing.any()


def test_sight_tells_a_part_from_one_that_is_covered(pipe: Any) -> None:
    """A red and a blue square, and the blue one covered: it is less probable then, whatever the
    model is."""
    images, labels = collection(6)
    shown = [each.astype(np.float32) / 255 for each in images]
    sight = fit_sight(pipe, shown, [each.astype(np.int16) for each in labels], 2)
    covered = shown[2].copy()
    covered[labels[2] == 1] = (0.9, 0.9, 0.1)
    plain, hidden = (sight.read(pipe, see(pipe, [image])[0]) for image in (shown[2], covered))
    torch.testing.assert_close(plain.sum(0), torch.ones(plain.shape[1:]))
    (before, _), (after, _) = sight.probability(plain), sight.probability(hidden)
    assert sight.weights[0] > 0 and after[1] < before[1]


def test_principal_directions_hold_what_varies() -> None:
    """Of 100 features that lie in two directions, 64 directions keep all."""
    x = torch.randn(400, 2) @ torch.randn(2, 100)
    some = SimpleNamespace(output=x[None, None], query=None)
    directions = _principal([some])
    assert directions is not None and directions.shape == (100, 64)
    torch.testing.assert_close(x @ directions @ directions.T, x, atol=1e-3, rtol=1e-3)


def test_presence_rises_with_its_evidence() -> None:
    """The regression that says how evidence counts, on evidence that is plain."""
    drawn = torch.Generator().manual_seed(0)
    y = torch.rand(200, generator=drawn) < 0.8
    x = torch.randn(200, 1, generator=drawn)
    x[:, 0] += 3 * y
    slope, bias = logistic(x, y.float())
    told = torch.sigmoid(x[:, 0] * slope + bias)
    assert float(((told >= 0.5) == y).float().mean()) > 0.85 and slope > 0
