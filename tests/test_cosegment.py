"""Co-segmentation: one graph over a collection, and what its result says."""

from __future__ import annotations

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.diffusion.features import Features
from flashmaps.segmentation.cosegment import EVIDENCE, Links, link, link_weights


def planted(kinds: list[list[int]], seed: int = 0) -> list[Features]:
    """Images of 6 x 6 tokens, whose columns show kinds of stuff with vectors far apart."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.eye(16)
    made = []
    for columns in kinds:
        tokens = torch.tensor(columns * 6)
        x = middle[tokens] + 0.1 * torch.randn(36, 16, generator=generator)
        image = np.repeat(np.repeat(tokens.reshape(6, 6).numpy(), 4, 0), 4, 1)[..., None] / 16
        made.append(
            Features(
                query=x[None, None],
                key=x[None, None],
                scale=12.0,  # attention stays with what looks alike, as that of a model does
                head_weights=torch.ones(1),
                grid=(6, 6),
                image=image.repeat(3, 2).astype(np.float32),
                input_size=(24, 24),
                layers=("one",),
                timestep=1,
                seeds=(0,),
                prompt="",
                output=x[None, None],
            )
        )
    return made


KINDS = [[0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]]  # the last has no 2


def test_one_label_is_one_kind_in_every_image_and_absent_parts_are_absent():
    found = fm.cosegment(planted(KINDS))
    assert found.count == 3
    kind = [np.tile(columns, 6) for columns in KINDS]
    pairs = {(int(a), int(b)) for t, k in zip(found.tokens, kind, strict=True)
             for a, b in zip(t, k, strict=True)}  # fmt: skip
    assert len(pairs) == 3
    names = {k: label for label, k in pairs}
    assert found.parts[names[2]].absent == (2,)
    assert found.parts[names[0]].absent == ()
    assert found.parts[names[0]].shares == pytest.approx([1 / 3, 1 / 3, 1 / 2])
    for labels, tokens in zip(found.labels, found.tokens, strict=True):
        assert labels.shape == (24, 24)
        assert np.array_equal(labels[2::4, 2::4].ravel(), tokens)
    assert [each.shape for each in found.confidence] == [(36,)] * 3
    for part in found.parts:
        assert np.linalg.norm(part.prototype) == pytest.approx(1, abs=1e-5)


def test_matches_stay_within_parts_and_skip_absent_ones():
    found = fm.cosegment(planted(KINDS))
    here, there = found.match(0, 2)
    assert here.shape == there.shape == (24, 2)  # a third of image 0 shows what image 2 lacks

    def at(index, points):
        columns, rows = np.rint((points + 0.5) / 4 - 0.5).astype(int).T
        return found.tokens[index].reshape(6, 6)[rows, columns]

    assert np.array_equal(at(0, here), at(2, there))
    with pytest.raises(IndexError, match="no image 3"):
        found.match(0, 3)


@pytest.mark.parametrize("evidence", [(), "return_probability", EVIDENCE])
def test_flows_and_shares_are_those_of_the_dense_walk(evidence):
    sets = planted(KINDS)
    nodes = [np.arange(36) % 5, np.arange(36) % 4, np.arange(36) % 3]
    names = (evidence,) if isinstance(evidence, str) else evidence
    blocks = []
    for s in sets:
        row = []
        for t in sets:
            dense = link(s, t, 0.05).to_dense()[0].double()
            weights = None if s is t else link_weights(s, t, 0.05, names)
            if weights is not None:
                dense = dense * weights[0].double()[:, None] * weights[1].double()
            row.append(dense)
        blocks.append(row)
    ends = (0, 5, 9, 12)
    hot = torch.zeros(108, 12, dtype=torch.float64)
    for i, each in enumerate(nodes):
        hot[torch.arange(36) + 36 * i, torch.from_numpy(each) + ends[i]] = 1
    scaled = torch.cat([torch.cat(row, 1) for row in blocks])  # all images have as many tokens
    want = hot.T @ scaled @ hot
    want = (want + want.T) / (2 * want.sum())
    links = Links(sets, 0.05, names, "auto")
    np.testing.assert_allclose(links.flows(nodes), want.numpy(), rtol=2e-5, atol=1e-9)
    labels = [each % 3 for each in nodes]
    hot = torch.nn.functional.one_hot(torch.from_numpy(np.concatenate(labels))).double()
    whole = torch.cat([torch.cat(row, 1) for row in blocks])
    want = whole @ hot + whole.T @ hot
    want = want / want.sum(1, keepdim=True)
    torch.testing.assert_close(torch.cat(links.shares(labels)).double(), want, rtol=2e-5, atol=1e-6)


def test_nodes_of_many_images_are_joined_within_their_images(monkeypatch):
    from flashmaps.segmentation import cosegment as module

    monkeypatch.setattr(module, "_NODES", 9)
    seen = []
    flows = Links.flows
    monkeypatch.setattr(
        Links, "flows", lambda self, nodes, *rest: seen.append(nodes) or flows(self, nodes, *rest)
    )
    found = fm.cosegment(planted(KINDS))
    assert all(int(each.max()) < 3 for each in seen[0])
    assert found.count == 3  # what was joined is of one kind


@pytest.mark.slow
def test_two_hundred_images_take_bounded_memory():
    """Beyond the features: (4096 nodes)^2 a few times over, and what each token flows to."""
    from resident import rise_of

    kinds = [list(np.random.default_rng(i).permutation(6) % 5) for i in range(200)]
    sets = planted(kinds)
    found, peak = rise_of(lambda: fm.cosegment(sets, boundaries=False))
    assert found.count >= 5 and len(found.labels) == 200
    # flow and its transpose in float64, and what moving nodes keeps: at most eight matrices.
    assert peak < 8 * 4096**2 * 8 + 200 * 36 * 64 * 8


def test_a_collection_is_saved_and_the_same_again(tmp_path):
    from PIL import Image

    sets = planted(KINDS)
    found, again = fm.cosegment(sets), fm.cosegment(sets, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(found.labels, again.labels, strict=True))
    folder = found.save(tmp_path / "out")
    assert np.array_equal(np.asarray(Image.open(folder / "labels-0002.png")), found.labels[2])
    assert (folder / "index.html").is_file()
    assert fm.cosegment(sets, count=2).count == 2
    assert fm.cosegment(sets, count=5, boundaries=False).count == 5


def test_what_cannot_be_a_collection_is_refused():
    sets = planted(KINDS)
    for given, options, told in (
        ("one.png", {}, "list of images"),
        (sets[:1], {}, "two images"),
        ([sets[0], np.zeros((32, 32, 3))], {}, "Features and images"),
        (sets, {"evidence": "luck"}, "evidence 'luck'"),
        (sets, {"count": 0}, "count"),
        (sets, {"count": 1000}, "segments to name"),
    ):
        with pytest.raises(ValueError, match=told):
            fm.cosegment(given, **options)
