"""The drawn world: the same everywhere, as asked for, with splits that share nothing."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flashmaps import world
from flashmaps.world import render
from flashmaps.world.anatomy import AXIS
from flashmaps.world.dice import Dice, hashed, noise_bytes, turn

ALONE = world.Options(objects=(1, 1), occluders=(0, 0), clutter=(0, 0))

# Of `digest` below. A change of it is a change of every image in the world: raise VERSION in
# scene.py, and say so.
GOLDEN = "6db87905ebe6893b7a8e73cbc0464e0b48f657761c151f8ad7df9d2a59391828"

DIGEST = """
import hashlib
from flashmaps import world

def digest():
    found = hashlib.sha256()
    scenes = [world.Split("train")[0], world.Split("test", size=96)[7]]
    pair = world.pairs("validation", 1, size=80, category="horse")[0]
    for scene in (*scenes, pair.a, pair.b):
        for array in (scene.image, scene.instance, scene.part, scene.occluder, scene.coordinates):
            found.update(array.tobytes())
        found.update(repr((scene.captions, scene.instances)).encode())
        for each in scene.instances:
            found.update(repr(scene.keypoints(each.index)).encode())
    points = world.sample_points(pair.a, pair.instance_a, pair.b, pair.instance_b, 50)
    field = world.correspondence(pair.a, pair.instance_a, pair.b, pair.instance_b).field
    for array in (points.source, points.target, field):
        found.update(array.tobytes())
    return found.hexdigest()
"""


def digest() -> str:
    names: dict = {}
    exec(DIGEST, names)
    return names["digest"]()


def test_scenes_are_bit_for_bit_what_was_recorded():
    assert digest() == GOLDEN


def test_a_fresh_process_without_vector_instructions_makes_the_same_bits_and_import_is_light():
    # numpy refuses to switch off what the machine does not have, so only what it has found.
    off = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    script = (
        "import sys, flashmaps\n"
        "assert not [name for name in sys.modules if name.startswith('flashmaps.world')]\n"
        f"{DIGEST}\nprint(digest())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(off), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == GOLDEN


def test_a_scene_is_the_same_at_every_size():
    small, large = world.Split("test", size=64)[3], world.Split("test", size=256)[3]
    assert small.captions == large.captions
    grid = (np.arange(64) + 0.5) * 4 - 0.5  # centres of small's pixels, in pixels of large
    points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    instance, part, _ = large.at(points)
    assert np.array_equal(instance.reshape(64, 64), small.instance)
    assert np.array_equal(part.reshape(64, 64), small.part)


def test_no_two_keys_of_any_split_give_the_same_dice():
    keys = [
        (split, kind, seed, index)
        for split in world.SPLITS
        for kind in ("scene", "pair")
        for seed in range(3)
        for index in range(400)
    ]
    assert len({hashed(*key) for key in keys}) == len(keys)
    assert hashed("a", "b1") != hashed("a", "b", 1) != hashed("ab", 1)


def test_splits_share_no_image():
    images = [
        scene.image.tobytes()
        for split in world.SPLITS
        for scene in itertools.chain(
            (world.Split(split, size=32)[index] for index in range(4)),
            (world.Split(split, size=32, seed=1)[index] for index in range(2)),
            (pair.a for pair in world.pairs(split, 2, size=32)),
        )
    ]
    assert len(set(images)) == len(images)


def test_a_split_is_a_dataset_for_pytorch():
    import torch
    from torch.utils.data import DataLoader

    def collate(scenes):
        images = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes])
        return images, [scene.caption for scene in scenes]

    split = world.Split("train", count=6, options=ALONE)
    batches = list(DataLoader(split, batch_size=4, collate_fn=collate))
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 64, 64), (2, 3, 64, 64)]
    assert len(list(split)) == len(split) == 6
    again = pickle.loads(pickle.dumps(split))
    assert np.array_equal(again[5].image, split[5].image)
    scene = pickle.loads(pickle.dumps(split[0]))
    assert np.array_equal(scene.coordinates, split[0].coordinates, equal_nan=True)


@pytest.mark.parametrize("name", world.CATEGORIES)
def test_every_category_has_named_parts_in_reach_of_their_joints(name):
    category = world.CATEGORIES[name]
    assert 4 <= len(category.parts) <= 8
    assert len(set(category.keypoint_names)) == len(category.keypoint_names) >= 5
    for part in category.parts:
        assert part.keypoints, part.name
        x, y = np.array(list(part.keypoints.values()), dtype=float).T
        assert (part.shape.distance(x, y) < 0).all(), f"{part.name}: a keypoint lies outside"
        low, high = part.taper
        assert -0.9 < low <= high  # a part never tapers to nothing, so its map has an inverse
    carriers = {part.name: part for part in category.parts}
    for part in category.parts[1:]:
        x0, y0, x1, y1 = carriers[part.parent].shape.box
        assert x0 - 6 <= part.joint[0] <= x1 + 6 and y0 - 6 <= part.joint[1] <= y1 + 6, part.name


@pytest.mark.parametrize("name", world.CATEGORIES)
def test_every_part_is_seen_somewhere_at_64_pixels(name):
    category = world.CATEGORIES[name]
    split = world.Split("test", options=replace(ALONE, categories=(name,)))
    unseen, unmarked = set(range(len(category.parts))), set(category.keypoint_names)
    for index in range(20):
        scene = split[index]
        assert [each.category for each in scene.instances] == [name]
        unseen -= set(np.unique(scene.part))
        unmarked -= {point.name for point in scene.keypoints(0) if point.visible}
        if not unseen and not unmarked:
            return
    raise AssertionError(f"never seen: {[category.part_names[n] for n in unseen]} {unmarked}")


@pytest.mark.parametrize(
    "name", [name for name, category in world.CATEGORIES.items() if category.symmetric]
)
def test_symmetric_categories_are_their_own_mirror_image(name):
    category = world.CATEGORIES[name]
    x0, y0, x1, y1 = category.box
    x, y = np.meshgrid(np.linspace(x0, x1, 60), np.linspace(y0, y1, 60))
    for part, twin in zip(category.parts, category.twins, strict=True):
        other = category.parts[twin]
        assert category.twins[twin] == category.parts.index(part)
        assert ("left" in part.name) == ("right" in other.name)
        # Both outlines stand in tables, whose cells may lie a little differently.
        there, here = part.shape.distance(x, y), other.shape.distance(2 * AXIS - x, y)
        near = np.minimum(np.abs(there), np.abs(here)) < 2
        assert np.abs(there - here)[near].max() < part.shape.cell


def test_both_kinds_of_category_exist():
    symmetric = [category.symmetric for category in world.CATEGORIES.values()]
    assert len(symmetric) >= 8 and 3 <= sum(symmetric) <= len(symmetric) - 3


def test_captions_use_the_vocabulary_and_tell_the_truth():
    words = set(world.vocabulary())
    for scene in (world.Split("train", size=32)[index] for index in range(30)):
        assert len(scene.captions) == 3
        for caption in scene.captions:
            assert set(caption.replace(",", "").split()) <= words, caption
        for each in scene.instances:
            texture = "" if each.texture == "plain" else f"{each.texture} "
            phrase = f"{texture}{each.colour} {each.category}"
            article = "an" if phrase[0] in "aeiou" else "a"
            assert f"{article} {phrase}" in scene.caption
            assert each.category in scene.captions[2]


def test_relations_in_captions_hold():
    options = world.Options(objects=(2, 2), occluders=(0, 0), grain=0)
    seen = set()
    for scene in (world.Split("train", size=32, options=options)[index] for index in range(30)):
        a, b = scene.instances
        if a.category == b.category:
            continue
        first, second = sorted((a, b), key=lambda each: scene.captions[2].index(each.category))
        dx, dy = (
            first.box[n] + first.box[n + 2] - second.box[n] - second.box[n + 2] for n in (0, 1)
        )
        (relation,) = (
            name
            for name in ("beside", "left of", "right of", "above", "below", "in front of", "behind")
            if f" {name} " in scene.captions[2]
        )
        seen.add(relation)
        assert {
            "beside": abs(dx) >= abs(dy),
            "left of": dx < 0,
            "right of": dx > 0,
            "above": dy < 0,
            "below": dy > 0,
            "in front of": first.index > second.index,
            "behind": first.index < second.index,
        }[relation]
    assert len(seen) >= 5


def test_options_narrow_what_scenes_hold():
    options = replace(
        ALONE, categories=("cat",), textures=("striped",), backgrounds=("sand",), flip=False,
        rotation=0,
    )  # fmt: skip
    for scene in (world.Split("train", size=32, options=options)[index] for index in range(8)):
        (cat,) = scene.instances
        assert (cat.category, cat.texture, cat.flipped, cat.angle) == ("cat", "striped", False, 0)
        assert scene.background == "sand" and not scene.occluder.any()
        assert scene.caption.startswith("a striped")
    still = replace(options, articulation=0, proportions=0)
    first, second = (world.Split("train", size=32, options=still)[index] for index in range(2))
    bend = [(each.bend.along, each.bend.curve) for each in first.plan.things[0].maps]
    assert bend == [(each.bend.along, each.bend.curve) for each in second.plan.things[0].maps]


def test_leaving_out_occluders_leaves_the_rest_as_it_was():
    crowded = world.Options(visible=0.0, occluders=(2, 2))
    for index in range(4):
        full = world.Split("train", size=48, options=crowded)[index]
        free = world.Split("train", size=48, options=replace(crowded, occluders=(0, 0)))[index]
        assert full.caption == free.caption
        shown = ~full.occluder
        assert np.array_equal(full.instance[shown], free.instance[shown])
        assert full.occluder.any() and not free.occluder.any()


def test_every_object_can_be_seen():
    options = world.Options(objects=(3, 3), occluders=(2, 2), visible=0.5)
    # The world looks at its plans at 48 pixels.
    for scene in (world.Split("train", size=48, options=options)[index] for index in range(20)):
        assert min(scene.visible_share(each.index) for each in scene.instances) >= 0.5


def test_occluded_scenes_hide_what_they_are_asked_to():
    options = replace(world.OCCLUDED, visible=0.4)
    for index in range(12):
        # The world looks at its plans at 48 pixels.
        scene = world.Split("train", size=48, options=options)[index]
        assert 0.15 <= scene.hidden(0).sum() / scene.amodal(0).sum() <= 0.6
        assert 2 <= len(scene.plan.occluders) <= 4


def test_a_scene_without_its_occluders_is_the_same_scene():
    for index in range(6):
        options = replace(world.OCCLUDED, objects=(1, 2), light=1.0)
        scene = world.Split("train", size=64, options=options)[index]
        last = len(scene.instances) - 1  # nothing but occluders is in front of it
        bare = scene.uncovered()
        assert not bare.occluder.any()
        assert np.array_equal(bare.mask(last), scene.amodal(last))
        assert np.array_equal(bare.hidden(last), np.zeros_like(bare.occluder))
        assert np.array_equal(scene.hidden(last), bare.mask(last) & ~scene.mask(last))
        untouched = np.ones_like(scene.occluder)  # an occluder's rim is blurred
        for flat in scene.plan.occluders:
            patch = render.cut(flat.shape, flat.map, scene.size)
            if patch is not None:
                untouched[patch.window] &= render._Edge(patch, flat.map, scene.size).alpha == 0
        assert untouched.any() and np.array_equal(bare.image[untouched], scene.image[untouched])
        assert np.array_equal(bare.part[~scene.occluder], scene.part[~scene.occluder])
        first = scene.uncovered(0)  # the objects in front of it are gone too
        assert len(first.instances) == 1
        assert np.array_equal(first.mask(0), scene.amodal(0))


def test_pairs_hold_one_object_of_their_category_each_and_take_turns():
    found = world.pairs("test", 13, size=32)
    assert len(found) == 13
    assert [pair.category for pair in found] == [*world.CATEGORIES, "bird"]
    for pair in found:
        for scene, instance in ((pair.a, pair.instance_a), (pair.b, pair.instance_b)):
            names = [each.category for each in scene.instances]
            assert names.count(pair.category) == 1 and names[instance] == pair.category
        assert not np.array_equal(pair.a.image, pair.b.image)
    only = world.pairs("test", 2, size=32, options=world.Options(categories=("cat",)))
    assert {pair.category for pair in only} == {"cat"}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: world.Split("dev"), "no split 'dev'; there are: train, validation, test"),
        (lambda: world.Split("train", count=0), "count must be a whole number >= 1, got 0"),
        (lambda: world.Split("train", size=8)[0], "size must be a whole number from 16"),
        (lambda: world.Split("train", size=64.0)[0], "size must be a whole number from 16"),
        (lambda: world.pairs("test", 3, category="dog"), "no category 'dog'; there are: bird"),
        (lambda: world.pairs("tset", 3), "no split 'tset'"),
        (lambda: world.Options(categories=("dog",)), "categories: there is no 'dog'; there are"),
        (lambda: world.Options(categories="cat"), "must be a tuple of names"),
        (lambda: world.Options(textures=()), "textures=() must be a tuple of names, at least one"),
        (lambda: world.Options(objects=(0, 2)), "objects=(0, 2) must be (fewest, most), two whole"),
        (lambda: world.Options(objects=3), "objects=3 must be (fewest, most)"),
        (lambda: world.Options(scale=(0.9, 0.5)), "scale=(0.9, 0.5) must be (fewest, most)"),
        (lambda: world.Options(hidden=-1), "hidden must be a finite number from 0 to 0.9"),
        (lambda: world.Options(visible=0.5, hidden=0.5), "leave less than a tenth between them"),
        (
            lambda: world.Options(objects=(1, 1), occluders=(0, 0), hidden=0.2),
            "hidden=0.2: one object and no occluders have nothing to hide it",
        ),
        (lambda: world.Options(light=2), "light must be a finite number from 0 to 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)


def test_the_document_runs_and_names_every_category_and_part():
    text = (Path(__file__).parents[1] / "docs/world.md").read_text("utf-8")
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        exec(compile(block, "docs/world.md", "exec"), names)
    assert len(names["points"]) > 0 and len(names["loader"]) > 0
    assert f"{len(world.vocabulary())} of them" in text
    for name, category in world.CATEGORIES.items():
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", text, re.M)
        assert ("symmetric" in row) == category.symmetric
        for part in category.part_names:
            assert part.removeprefix("left ").removeprefix("right ") in row, part


def test_an_index_beyond_the_count_is_an_index_error():
    for sequence in (world.Split("test", count=3), world.pairs("test", 3)):
        for index in (3, -1):
            with pytest.raises(IndexError, match=f"index {index} is not in 0 to 2"):
                sequence[index]


def test_questions_about_what_is_not_there_are_refused():
    scene = world.Split("test", options=replace(ALONE, categories=("cat",)))[0]
    with pytest.raises(ValueError, match="there is no instance 1; the scene has 1"):
        scene.mask(1)
    with pytest.raises(ValueError, match="a cat has no part 'wing'; it has: body, tail"):
        scene.amodal(0, "wing")
    with pytest.raises(ValueError, match="wanted one 'dog' in the scene, which holds: cat"):
        scene.find("dog")


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 133.3, 180, 270, -45, -200, 719])
def test_turn_is_cosine_and_sine(degrees):
    cosine, sine = turn(degrees)
    # Two roundings of the argument and a few of the series, at most 4 ulp of 1.
    assert abs(cosine - math.cos(math.radians(degrees))) <= 1e-15 * (1 + abs(degrees) / 45)
    assert abs(sine - math.sin(math.radians(degrees))) <= 1e-15 * (1 + abs(degrees) / 45)


def test_dice_keep_to_their_ranges():
    dice = Dice("ranges")
    assert {dice.whole(2, 4) for _ in range(100)} == {2, 3, 4}
    assert all(-1 <= dice.near(-1, 1) < 1 and 3 <= dice.between(3, 5) < 5 for _ in range(100))
    assert dice.pick("a") == "a" and dice.chance(1.0) and not dice.chance(0.0)
    assert noise_bytes(1, 11).shape == (11,) and noise_bytes(1, 0).shape == (0,)
    assert hashlib.sha256(noise_bytes(5, 64).tobytes()).hexdigest()[:12] == "6950ff91ec36"
