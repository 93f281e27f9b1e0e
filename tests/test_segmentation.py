"""Segments: the map equation on graphs whose answer is known, and images end to end."""

from __future__ import annotations

import itertools

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.segmentation import boundaries
from flashmaps.segmentation import map_equation as me
from flashmaps.segmentation.boundaries import (
    borders,
    patch_weights,
    patches,
    pixel_labels,
    to_pixels,
)
from flashmaps.segmentation.temperatures import grain, part_temperature
from flashmaps.segmentation.walk import (
    components,
    find_atoms,
    nearest_tokens,
    told_by,
    walk_segments,
)


def blocks(sizes, inside=1.0, across=0.02, seed=0):
    """A symmetric flow with planted groups, and their labels."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(seed)
    weights = np.where(labels[:, None] == labels, inside, across)
    weights = weights * rng.uniform(0.8, 1.2, weights.shape)
    weights = weights + weights.T
    return weights / weights.sum(), labels


def length(flow, labels):
    pi = flow.sum(1)
    return me.codelength(me.merged(flow, labels), float(me.plogp(pi).sum()))


def same(a, b) -> bool:
    return np.array_equal(me.compact(np.asarray(a)), me.compact(np.asarray(b)))


# Rosvall and Bergstrom's equation, written from their text: the rate of naming modules times the
# entropy of their names, and for each module its rate of use times the entropy of what is named in
# it. It is what `codelength` simplifies.
def by_the_book(flow, labels):
    def entropy(p):
        p = p[p > 0] / p.sum()
        return float(-(p * np.log2(p)).sum())

    pi = flow.sum(1)
    groups = range(labels.max() + 1)
    leaves = np.array(
        [flow[np.ix_(labels == m, labels != m)].sum() if (labels != m).any() else 0 for m in groups]
    )
    total = leaves.sum() * entropy(leaves) if leaves.sum() else 0.0
    for m in groups:
        inside = np.append(pi[labels == m], leaves[m])
        total += inside.sum() * entropy(inside)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_codelength_is_the_published_formula(seed):
    rng = np.random.default_rng(seed)
    flow = rng.random((9, 9))
    flow = (flow + flow.T) / (2 * flow.sum())
    labels = me.compact(rng.integers(0, 4, 9))
    assert length(flow, labels) == pytest.approx(by_the_book(flow, labels), rel=1e-12)


def test_one_segment_takes_the_entropy_of_the_walk():
    flow, _ = blocks([4, 3])
    pi = flow.sum(1)
    one = np.zeros(7, dtype=int)
    assert length(flow, one) == pytest.approx(-(pi * np.log2(pi)).sum())


@pytest.mark.parametrize("sizes", [[5, 5], [3, 8, 20], [4] * 12])
def test_planted_groups_are_found(sizes):
    flow, labels = blocks(sizes)
    assert same(me.shortest(flow, np.random.default_rng(0)), labels)


def test_shortest_is_the_best_of_all_partitions_of_a_small_graph():
    flow, _ = blocks([3, 2, 2], across=0.15)
    found = me.shortest(flow, np.random.default_rng(0))
    every = {tuple(me.compact(np.array(p))) for p in itertools.product(range(4), repeat=7)}
    best = min(length(flow, np.array(p)) for p in every)
    assert length(flow, found) == pytest.approx(best, abs=1e-12)


def test_moves_keep_their_books():
    """The code is never longer after moves than before, from any start."""
    flow, _ = blocks([6, 6, 6], across=0.4, seed=3)
    for seed in range(10):
        start = me.compact(np.random.default_rng(seed).integers(0, 6, 18))
        after = me.compact(me.move_nodes(flow, start, np.random.default_rng(seed)))
        assert length(flow, after) <= length(flow, start) + 1e-9


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_merge_to_leaves_the_count_asked_for(count):
    flow, labels = blocks([3, 2, 2])
    merged = me.merge_to(flow, np.arange(7), count)
    assert merged.max() + 1 == count
    if count == 3:
        assert same(merged, labels)


def test_merges_below_a_cost_take_the_cheapest_and_stop():
    flow, labels = blocks([3, 2, 2], across=0.15)
    for bits in (0.0, 0.01, 0.05, 0.3, 10.0):
        found = me.merge_below(flow, labels, bits)
        # What the books say a merge costs is what the code grows by, and none cheaper is left.
        assert length(flow, found) - length(flow, labels) <= bits * (3 - found.max() - 1) + 1e-12
        for a, b in itertools.combinations(range(found.max() + 1), 2):
            joint = me.compact(np.where(found == b, a, found))
            assert length(flow, joint) - length(flow, found) >= bits - 1e-12
    assert me.merge_below(flow, labels, 10.0).max() == 0
    assert same(me.merge_below(flow, labels, 0.0), labels)


def test_what_moves_say_of_the_code_is_what_it_changes_by():
    flow, _ = blocks([4, 5, 3], across=0.4, seed=2)
    labels = me.compact(np.random.default_rng(1).integers(0, 4, 12))
    books = me._Books(flow, labels.copy())
    books.move(3, int(labels[3] + 1) % (labels.max() + 1))
    told = books.changes(slice(0, 12))
    now = me.compact(books.labels)
    for i in range(12):
        for k in range(told.shape[1]):
            moved = books.labels.copy()
            moved[i] = k
            change = length(flow, me.compact(moved)) - length(flow, now)
            assert told[i, k] == pytest.approx(change, abs=1e-12)
    assert set(books.wishes()) == {i for i in range(12) if told[i].min() < -1e-10}


def test_grain_is_the_distance_that_nine_in_ten_have_to_the_nearest_other():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(2, 40, 6, generator=generator), dim=-1)
    cosines = (x @ x.mT).mean(0).fill_diagonal_(-2)
    near = cosines.argmax(1)
    assert grain(x, near) == pytest.approx(
        float((1 - cosines.max(1).values).quantile(0.9)), rel=1e-5
    )
    assert grain(torch.ones(1, 5, 1), torch.tensor([1, 0, 1, 2, 3])) == 0.0


def test_parts_are_the_same_whatever_the_unit_of_distances():
    """Vectors that all share a direction have cosines near one: grain follows, and so do parts."""
    from dataclasses import replace

    from test_cosegment import planted

    (one,) = planted([[0, 0, 1, 1, 2, 2]])
    x = torch.nn.functional.normalize(one.output, dim=-1)
    crowded = replace(one, output=torch.cat((x, 3 * torch.ones_like(x[..., :1])), -1))
    found, other = fm.segment(one, compare="features"), fm.segment(crowded, compare="features")
    assert found.count == 3 and same(found.tokens, other.tokens)
    A = fm.AttentionMap(x, x, scale=10.0)
    warm, cold = (part_temperature(f, "features", nearest_tokens(A)) for f in (one, crowded))
    assert warm == pytest.approx(10 * cold, rel=1e-3)


def test_components_are_those_of_scipy():
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(0)
    for count in (2, 10, 300):
        to = rng.integers(0, count, count)
        graph = coo_matrix((np.ones(count), (np.arange(count), to)), (count, count))
        assert same(components(count, to), connected_components(graph, directed=False)[1])


def planted_map(groups=4, each=16, width=8):
    """A map of tokens in far apart bunches, and their labels."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.eye(groups, width) * 6
    labels = torch.arange(groups * each) % groups
    x = middle[labels] + 0.3 * torch.randn(groups * each, width, generator=generator)
    x = torch.nn.functional.normalize(x, dim=-1)[None, None]
    return fm.AttentionMap(x, x, scale=10.0, query_grid=(groups, each)), labels.numpy()


def test_segments_of_a_map_with_bunches_are_the_bunches():
    A, labels = planted_map()
    found = fm.segment(A)
    assert same(found.tokens, labels)
    assert found.count == 4 and found.labels.shape == (4, 16)
    assert found.codelength < found.level(0).alone
    assert found.confidence.shape == (64,) and float(found.confidence.min()) > 0.5
    share = told_by(A, found.tokens).share
    torch.testing.assert_close(share.sum(1), torch.ones(64))


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_count_is_kept(count):
    A, _ = planted_map()
    assert fm.segment(A, count=count).count == count


def test_every_atom_has_two_tokens_at_least():
    A, _ = planted_map()
    assert np.bincount(find_atoms(nearest_tokens(A))).min() >= 2


def test_the_same_seed_gives_the_same_and_backends_agree():
    A, labels = planted_map()
    atoms = find_atoms(nearest_tokens(A))
    one, two = (walk_segments(A, atoms, seed=5) for _ in range(2))
    assert np.array_equal(one.tokens, two.tokens)
    for name, state in fm.backends().items():
        if state.available and name in ("cpu", "reference"):
            q = A.problem.query
            B = fm.AttentionMap(q, q, scale=10.0, query_grid=(4, 16), backend=name)
            assert same(fm.segment(B).tokens, labels)


def test_patches_decide_together_and_borders_are_on_both_sides(monkeypatch):
    image = np.zeros((32, 32, 3), np.float32)
    image[:, 21:] = 1.0  # a blur before the search makes patches of the columns 19 to 22
    voters = patches(image)
    share = torch.zeros(16, 2)  # a token grid of 4 x 4, whose border lies at pixel 16
    share[:, 0] = (torch.arange(16) % 4 < 2).float()
    share[:, 1] = 1 - share[:, 0]
    labels = pixel_labels(share, (4, 4), (32, 32), voters)
    for patch in np.unique(voters):
        assert len(np.unique(labels[voters == patch])) == 1
    assert (labels[:, :19] == 0).all() and (labels[:, 23:] == 1).all()
    rough = np.stack([np.bincount(voters.ravel(), plane.ravel())
                      for plane in to_pixels(share, (4, 4), (32, 32))], 1)  # fmt: skip
    monkeypatch.setattr(boundaries, "_ENTRIES", 5 * 32)  # strips of rows, the last a short one
    votes = patch_weights(voters, (4, 4)) @ share.numpy()
    np.testing.assert_allclose(votes, rough, rtol=1e-5, atol=1e-4)
    plain = pixel_labels(share, (4, 4), (32, 32), None)
    assert np.array_equal(np.flatnonzero(borders(plain)[0]), [15, 16])


@pytest.fixture(scope="module")
def seen():
    from flashmaps import world
    from flashmaps.segmentation.segment import see

    scene = world.Split("validation", size=128)[3]
    return scene, see("builtin", [scene.image], size=128)[0]


def test_an_image_has_objects_and_parts(seen, tmp_path):
    from PIL import Image

    scene, features = seen
    found = fm.segment(features)
    assert [level.name for level in found.tree] == ["objects", "parts"]
    assert found.labels.shape == scene.instance.shape == found.boundary.shape
    objects, parts = found.tree
    assert parts.count > objects.count >= 2
    assert parts.parents.shape == (parts.count,) and parts.parents.max() < objects.count
    assert found.level(-1) is parts
    with pytest.raises(IndexError, match="level 2"):
        found.level(2)
    folder = found.save(tmp_path / "out")
    for level in found.tree:
        drawn = Image.open(folder / f"{level.name}.png")
        assert drawn.mode == "P"
        assert np.array_equal(np.asarray(drawn), level.labels)
    assert (folder / "index.html").is_file() and (folder / "segments.json").is_file()
    again = fm.segment(features)
    assert all(
        np.array_equal(a.labels, b.labels) for a, b in zip(found.tree, again.tree, strict=False)
    )
    assert fm.segment(features, count=7).count == 7
    single = fm.segment(features, compare="features", boundaries=False)
    assert [level.name for level in single.tree] == ["features"]


def test_bad_arguments_are_refused_before_the_model_runs(seen):
    _, features = seen
    for given, told in (
        ({"count": 0}, "count"),
        ({"count": 2000}, "1024 tokens"),
        ({"seed": -1}, "seed"),
        ({"compare": "q"}, "compare"),
        ({"temperature": 0.0}, "temperature"),
        ({"backend": "none"}, "backend"),
    ):
        with pytest.raises(ValueError, match=told):
            fm.segment(features, **given)
    q = torch.randn(1, 1, 6, 4)
    with pytest.raises(ValueError, match="square"):
        fm.segment(fm.AttentionMap(q, torch.randn(1, 1, 5, 4)))
    with pytest.raises(ValueError, match="query_grid"):
        fm.segment(fm.AttentionMap(q, q))
    two = torch.randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match="batch of 2"):
        fm.segment(fm.AttentionMap(two, two))


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 96])
def test_memory_beyond_the_features_is_small(side):
    """64 MB at 4096 tokens, and no more for each token at 9216: nothing of N x N."""
    from flashmaps.segmentation.segment import see
    from resident import rise_of
    from skimage.data import astronaut

    features = see("builtin", [astronaut()], size=(4 * side, 4 * side))[0]
    small = see("builtin", [astronaut()], size=(64, 64))[0]
    fm.segment(small)  # what is loaded once
    found, rise = rise_of(lambda: fm.segment(features))
    assert len(found.tokens) == side**2
    assert rise < 64e6 * side**2 / 64**2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tiny_pipeline import tiny_pipeline

    image = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    return tiny_pipeline(tmp_path_factory.mktemp("tiny")), image


def test_objects_are_those_of_their_layer_and_parts_those_of_the_other():
    """Features of four kinds of stuff, and attention that stays in either half of the image."""
    from dataclasses import replace

    from flashmaps.segmentation.seen import Seen
    from test_cosegment import planted

    (like,) = planted([[0, 0, 1, 2, 2, 3]])
    halves = torch.tensor([0, 0, 0, 1, 1, 1] * 6)
    x = torch.eye(16)[halves][None, None]
    found = fm.segment(Seen(like, replace(like, query=x, key=x, layers=("two",))))
    objects, parts = found.tree
    assert same(objects.tokens, halves.numpy())
    assert same(parts.tokens, np.tile([0, 0, 1, 2, 2, 3], 6))
    assert parts.parents.tolist() == [0, 0, 1, 1]
    # Features alone are read for both: their attention knows of no halves.
    assert same(fm.segment(like).tokens, np.tile([0, 0, 1, 2, 2, 3], 6))


def test_an_image_without_layers_given_is_seen_by_two(tiny, monkeypatch):
    from flashmaps.segmentation import segment as module
    from flashmaps.segmentation.seen import OBJECT_LAYERS

    pipe, image = tiny
    ours = "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    (seen,) = module.see_objects(pipe, [image])
    assert seen.attention.layers == (OBJECT_LAYERS,)
    assert seen.likeness.layers[0] == ours and OBJECT_LAYERS not in seen.likeness.layers
    assert seen.attention.grid == seen.likeness.grid
    assert seen.attention.seeds == seen.likeness.seeds
    torch.testing.assert_close(seen.attention.image, seen.likeness.image)
    plain = module.see(pipe, [image], layers=OBJECT_LAYERS)[0]
    assert torch.equal(plain.query, seen.attention.query)  # of the very image and noise
    (given,) = module.see_objects(pipe, [image], layers=ours)
    assert given.attention is given.likeness and given.likeness.layers == (ours,)

    asked = []
    levels = module._levels
    monkeypatch.setattr(
        module, "_levels", lambda seen, *others: asked.append(seen) or levels(seen, *others)
    )
    whole = fm.segment(image, model=pipe)
    assert np.array_equal(whole.tokens, fm.segment(seen).tokens)
    fm.segment(image, model=pipe, layers=ours)
    fm.segment(seen.likeness)
    assert asked[0].attention.layers == (OBJECT_LAYERS,)
    for each, layers in zip(asked[-2:], [(ours,), seen.likeness.layers], strict=True):
        assert each.attention is each.likeness and each.likeness.layers == layers


@pytest.mark.parametrize("lacking", ["layer", "grid"])
def test_a_model_without_that_layer_is_seen_once(tiny, tmp_path, lacking, monkeypatch):
    from flashmaps.segmentation import seen as module
    from flashmaps.segmentation.segment import see, see_objects
    from tiny_pipeline import tiny_pipeline

    pipe, image = tiny
    if lacking == "layer":  # as SDXL
        pipe = tiny_pipeline(
            tmp_path,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        )
        found = see_objects(pipe, [image])
    else:  # as SD1, which matches at half the resolution of its first layer
        sets = see(pipe, [image], layers="up_blocks.1.*.attn1")
        found = module.with_object_layers(pipe, sets)
        monkeypatch.setattr(module, "features", None)  # not called
        assert module.with_object_layers(pipe, sets)[0].attention is sets[0]
    assert found[0].attention is found[0].likeness
