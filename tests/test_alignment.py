"""The alignment loss of the built-in model's training, against what the world itself says."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from flashmaps import world
from flashmaps.models import alignment
from flashmaps.models.alignment import PARTS, PLACES, SQUARES, Alignment, labels, unknown
from flashmaps.world.categories import CATEGORIES


def test_labels_are_the_scene_s_own():
    for scene in (world.Split("train", size=32, count=8)[i] for i in range(8)):
        found = labels(scene, 32)
        nothing = scene.instance < 0
        assert np.array_equal(found[..., 0] == PARTS, nothing)
        assert np.array_equal(found[..., 1] == PLACES, nothing)
        first = 0
        for place, (name, category) in enumerate(CATEGORIES.items()):
            for each in scene.instances:
                if each.category != name:
                    continue
                here = scene.instance == each.index
                assert np.array_equal(found[here, 0] - first, scene.part[here])
                at = found[here, 1] - place * SQUARES**2
                square = np.floor(scene.rest[here] * SQUARES).clip(0, SQUARES - 1)
                assert np.array_equal(at, square[:, 1] * SQUARES + square[:, 0])
            first += len(category.parts)
        assert first == PARTS


def test_coarser_labels_are_those_of_the_cells_centres():
    scene = world.Split("train", size=48, count=1)[0]
    # With an odd number of pixels to a cell its centre is that of a pixel.
    assert np.array_equal(labels(scene, 16), labels(scene, 48)[1::3, 1::3])


def told(truth: np.ndarray, logits: torch.Tensor, weights: list[float]) -> float:
    """The loss where both heads put out ``logits`` [b, N, PARTS + 1 + PLACES + 1]."""
    reader = Alignment([logits.shape[-1]] * 2)
    reader.norms = torch.nn.ModuleList([torch.nn.Identity()] * 2)
    reader.heads = reader.norms
    return reader([logits] * 2, torch.from_numpy(truth), torch.tensor(weights)).item()


def test_loss_is_the_cross_entropy_of_every_cell_of_a_token():
    truth = unknown(2)[None].copy()
    truth[0, 0, 0] = 3, 70
    truth[0, 0, 1] = PARTS, PLACES
    torch.manual_seed(0)
    logits = torch.randn(1, 1, PARTS + 1 + PLACES + 1, dtype=torch.float64)
    part, place = logits[0, 0].split((PARTS + 1, PLACES + 1))
    low = alignment._NOTHING
    wanted = [
        (-(x.log_softmax(0)[label]) - low * x.log_softmax(0)[nothing]) / (1 + low)
        for x, label, nothing in ((part, 3, PARTS), (place, 70, PLACES))
    ]
    assert told(truth, logits, [0.5]) == pytest.approx(sum(wanted).item() / 2, rel=1e-6)


def test_what_is_unknown_and_what_has_no_weight_teaches_nothing():
    logits = torch.zeros(2, 4, PARTS + 1 + PLACES + 1)
    known = np.zeros((2, 2, 2), np.int16)
    guess = (math.log(PARTS + 1) + math.log(PLACES + 1)) / 2
    assert told(np.stack([known, unknown(2)]), logits, [1.0, 1.0]) == pytest.approx(guess, rel=1e-5)
    assert told(np.stack([unknown(2), unknown(2)]), logits, [1.0, 1.0]) == 0
    logits[1, :, 0] = 50.0
    logits[1, :, PARTS + 1] = 50.0
    assert told(np.stack([known, known]), logits, [0.0, 1.0]) == pytest.approx(0, abs=1e-4)


def test_layers_exist_in_the_miniature():
    from flashmaps.models.architecture import TINY, build

    parts = build(TINY)
    for name in alignment.LAYERS:
        assert parts.unet.get_submodule(name + ".attn1") is not None


@pytest.mark.parametrize("size", [64, 128])
def test_plain_attention_computes_the_same(size):
    from flashmaps.models.architecture import Sizes, build
    from flashmaps.models.unet import _use_plain_attention

    parts = build(
        Sizes(unet=(8, 8, 16), heads=(1, 1, 2), text=8, text_layers=1, groups=4, image=size)
    )
    ids = torch.arange(77)[None]

    def predicted():
        latents = torch.randn(
            1, 4, size // 4, size // 4, generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            return parts.unet(latents, 500, parts.text_encoder(ids)[0]).sample

    fused = predicted()
    _use_plain_attention(parts)
    kinds = [type(processor).__name__ for processor in parts.unet.attn_processors.values()]
    assert kinds.count("AttnProcessor2_0") == (3 if size == 128 else 0)  # of the 1024 tokens
    torch.testing.assert_close(predicted(), fused)
