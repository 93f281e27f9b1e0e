"""The world's truth is exact: labels, masks, keypoints, coordinates and correspondences agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flashmaps import world
from flashmaps.world.anatomy import AXIS
from flashmaps.world.dice import turn
from flashmaps.world.maps import Bend, PartMap
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE = 64
# Drawing coordinates go up to 100, images to 1 and pixels to 64. A map and its inverse round about
# twenty times, each by half an ulp of numbers below 400, and parts are at least a fifth of their
# drawn width and a hundredth of the image: 1e-8 is a thousand times what that adds up to.
EXACT = 1e-8

examples = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)
names = st.sampled_from(sorted(world.CATEGORIES))


def scene_of(seed: int, **options: object) -> world.Scene:
    return world.Split("train", size=SIZE, seed=seed, options=world.Options(**options))[0]  # type: ignore[arg-type]


def pair_of(seed: int, name: str) -> world.Pair:
    return world.pairs("train", 1, seed=seed, size=SIZE, category=name)[0]


def pixel_centres() -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return np.stack((columns.ravel(), rows.ravel()), axis=1).astype(float)


numbers = st.floats(-0.5, 0.5)


@examples
@given(
    angle=st.floats(-180, 180),
    along=st.floats(0.5, 2),
    across=st.floats(0.5, 2),
    taper=st.floats(-0.8, 0.8),
    curve=numbers,
    wave=numbers,
    skew=numbers,
    flip=st.booleans(),
    points=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=20),
)
def test_a_part_map_has_an_exact_inverse(
    angle, along, across, taper, curve, wave, skew, flip, points
):
    c, s = turn(angle)
    reach = 120.0
    bend = Bend(along, across, taper / reach, curve / reach, wave / reach**2, (-reach, reach))
    matrix = (-0.01 * c if flip else 0.01 * c, -0.01 * s + 0.01 * skew * c, 0.01 * s, 0.01 * c)
    if abs(matrix[0] * matrix[3] - matrix[1] * matrix[2]) < 1e-5:
        return  # flipped and turned onto itself
    part_map = PartMap((50.0, 40.0), (s, c), bend, matrix, (0.3, 0.6))
    x, y = np.array(points).T
    back = part_map.to_drawing(*part_map.to_image(x, y))
    assert np.abs(np.array(back) - (x, y)).max() < EXACT
    # Floats take the same steps as arrays, so they give the same bits.
    assert part_map.to_image(float(x[0]), float(y[0])) == tuple(
        float(each[0]) for each in part_map.to_image(x, y)
    )


@examples
@given(seed=seeds)
def test_labels_are_what_the_scene_shows_at_pixel_centres(seed):
    scene = scene_of(seed)
    instance, part, drawing = scene.at(pixel_centres())
    assert np.array_equal(instance.reshape(SIZE, SIZE), scene.instance)
    assert np.array_equal(part.reshape(SIZE, SIZE), scene.part)
    assert np.array_equal(np.isnan(drawing[:, 0]).reshape(SIZE, SIZE), scene.instance < 0)
    assert np.array_equal(np.isnan(scene.coordinates).any(axis=2), scene.instance < 0)
    known = scene.coordinates[scene.instance >= 0]
    # A table's outline may bulge over the drawn one by a small part of a cell, 1 / 72 of the box.
    assert (known > -1 / 72).all() and (known < 1 + 1 / 72).all()
    at_rest = scene.rest.reshape(-1, 2)[instance >= 0] * 100
    assert np.abs(at_rest - drawing[instance >= 0]).max(initial=0) < EXACT


@examples
@given(seed=seeds)
def test_masks_agree(seed):
    scene = scene_of(seed, objects=(1, 4), occluders=(0, 3))
    hidden = scene.occluder.copy()
    for each in reversed(scene.instances):
        seen, there = scene.mask(each.index), scene.amodal(each.index)
        parts = [scene.mask(each.index, name) for name in each.parts]
        assert np.array_equal(sum(part.astype(int) for part in parts), seen.astype(int))
        amodal = [scene.amodal(each.index, name) for name in each.parts]
        assert np.array_equal(np.any(amodal, axis=0), there)
        for part, whole in zip(parts, amodal, strict=True):
            assert not (part & ~whole).any()
        # What is in front of an object is all that hides it.
        assert np.array_equal(seen, there & ~hidden)
        hidden |= there
    assert not (scene.occluder & (scene.instance >= 0)).any()
    assert np.array_equal(scene.part >= 0, scene.instance >= 0)


@examples
@given(seed=seeds)
def test_amodal_masks_of_parts_are_their_outlines(seed):
    scene = scene_of(seed)
    for each in scene.instances:
        for label, name in enumerate(each.parts):
            thing = scene.plan.things[each.index]
            x, y = ((pixel_centres() + 0.5) / SIZE).T
            shape = world.CATEGORIES[each.category].parts[label].shape
            inside = shape.distance(*thing.maps[label].to_drawing(x, y)) <= 0
            assert np.array_equal(inside.reshape(SIZE, SIZE), scene.amodal(each.index, name))


@examples
@given(seed=seeds)
def test_keypoints_are_visible_where_their_part_is_seen(seed):
    scene = scene_of(seed)
    for each in scene.instances:
        points = scene.keypoints(each.index)
        assert tuple(point.name for point in points) == scene.category(each.index).keypoint_names
        for point in points:
            column, row = int(np.floor(point.x + 0.5)), int(np.floor(point.y + 0.5))
            framed = 0 <= column < SIZE and 0 <= row < SIZE
            shown = framed and bool(scene.mask(each.index, point.part)[row, column])
            instance, part, _ = scene.at(np.array([[point.x, point.y]]))
            covers = instance[0] != each.index or each.parts[part[0]] != point.part
            assert point.visible == (shown and not covers)


def nearer(scene: world.Scene, instance: int, label: int, shown: tuple[int, int]) -> bool:
    """Whether what is shown stands before that part of that instance."""
    if shown[0] != instance:
        return shown[0] > instance
    order = scene.category(instance).drawing_order
    return order.index(shown[1]) > order.index(label)


@examples
@given(seed=seeds, name=names)
def test_warping_coordinates_onto_another_scene_gives_its_labels(seed, name):
    pair = pair_of(seed, name)
    a, b, j = pair.a, pair.b, pair.instance_b
    found = world.correspondence(a, pair.instance_a, b, j)
    assert np.array_equal(found.valid, a.mask(pair.instance_a))
    assert np.array_equal(np.isnan(found.field[:, :, 0]), ~found.valid)
    assert not (found.visible & ~found.valid).any()
    points, labels = found.field[found.valid], a.part[found.valid]
    at_rest = a.rest[found.valid] * 100
    instance, part, drawing = b.at(points)
    same = (instance == j) & (part == labels)
    # The same point of the same part of the drawing.
    assert np.abs(drawing[same] - at_rest[same]).max(initial=0) < EXACT
    covered = np.zeros(len(points), dtype=bool)
    for flat in b.plan.occluders:
        covered |= flat.shape.distance(*flat.map.to_drawing(*((points + 0.5) / SIZE).T)) <= 0
    for n in np.flatnonzero(~same):
        # Or else something stands in front of it. The point is there all the same.
        assert covered[n] or nearer(b, j, labels[n], (instance[n], part[n]))
    assert same[found.visible[found.valid]].all()
    # And back again: the pixel it came from.
    back = a.locate(pair.instance_a, part[same], drawing[same])
    rows, columns = np.nonzero(found.valid)
    pixels = np.stack((columns, rows), axis=1)[same]
    assert np.abs(back - pixels).max(initial=0) < EXACT


@examples
@given(seed=seeds, name=names)
def test_what_is_visible_agrees_with_the_labels_of_the_other_scene(seed, name):
    pair = pair_of(seed, name)
    found = world.correspondence(pair.a, pair.instance_a, pair.b, pair.instance_b)
    columns, rows = np.floor(found.field[found.visible] + 0.5).astype(int).T
    assert (pair.b.instance[rows, columns] == pair.instance_b).all()
    assert np.array_equal(pair.b.part[rows, columns], pair.a.part[found.visible])


@examples
@given(seed=seeds)
def test_an_object_corresponds_to_itself_where_it_is(seed):
    scene = scene_of(seed)
    for each in scene.instances:
        found = world.correspondence(scene, each.index, scene, each.index)
        own = pixel_centres().reshape(SIZE, SIZE, 2)
        assert np.abs(found.field - own)[found.valid].max(initial=0) < EXACT
        # Up to pixel centres that lie on an outline, which rounding may put on either side.
        assert (found.valid & ~found.visible).sum() == 0


@examples
@given(seed=seeds, name=st.sampled_from([n for n, c in world.CATEGORIES.items() if c.symmetric]))
def test_the_mirrored_correspondence_goes_to_the_other_side(seed, name):
    pair = pair_of(seed, name)
    a, b, i, j = pair.a, pair.b, pair.instance_a, pair.instance_b
    category = world.CATEGORIES[name]
    there = world.correspondence(a, i, b, j, mirrored=True)
    columns, rows = np.floor(there.field[there.visible] + 0.5).astype(int).T
    twins = np.array(category.twins)[a.part[there.visible]]
    assert np.array_equal(b.part[rows, columns], twins)
    _, _, drawing = b.at(there.field[there.visible])
    mirrored = a.rest[there.visible] * 100
    mirrored[:, 0] = 2 * AXIS - mirrored[:, 0]
    assert np.abs(drawing - mirrored).max(initial=0) < EXACT
    assert not any(each.flipped for each in (*a.instances, *b.instances) if each.category == name)


def test_a_side_view_has_no_mirrored_correspondence():
    pair = pair_of(0, "horse")
    with pytest.raises(ValueError, match="a horse has no mirrored correspondence"):
        world.correspondence(pair.a, pair.instance_a, pair.b, pair.instance_b, mirrored=True)


def test_near_legs_stay_near_when_a_side_view_is_flipped():
    alone = world.Options(objects=(1, 1), occluders=(0, 0), categories=("cat",), rotation=0)
    split = world.Split("train", size=SIZE, options=alone)
    scenes = {scene.instances[0].flipped: scene for scene in (split[n] for n in range(20))}
    right, left = scenes[False], scenes[True]
    found = world.correspondence(right, 0, left, 0)
    leg = right.mask(0, "near front leg")
    columns, rows = np.floor(found.field[leg & found.visible] + 0.5).astype(int).T
    assert left.mask(0, "near front leg")[rows, columns].all() and len(rows) > 0
    # The one faces right, the other left.
    for scene, sign in ((right, 1), (left, -1)):
        places = {point.name: point.x for point in scene.keypoints(0)}
        assert sign * (places["nose"] - places["rump"]) > 0


def test_objects_of_two_categories_do_not_correspond():
    cat, car = (scene_of(0, objects=(1, 1), categories=(name,)) for name in ("cat", "car"))
    with pytest.raises(ValueError, match="is a cat, instance 0 of the second a car"):
        world.correspondence(cat, 0, car, 0)


@examples
@given(seed=seeds, name=names, count=st.integers(1, 60), even=st.booleans())
def test_sampled_points_are_distinct_visible_and_repeatable(seed, name, count, even):
    pair = pair_of(seed, name)
    given_ = (pair.a, pair.instance_a, pair.b, pair.instance_b, count)
    points = world.sample_points(*given_, seed=seed, even=even)
    found = world.correspondence(*given_[:4])
    assert len(points) == min(count, int(found.visible.sum()))
    columns, rows = points.source.astype(int).T
    assert found.visible[rows, columns].all()
    assert len(np.unique(points.source, axis=0)) == len(points)
    assert np.array_equal(found.field[rows, columns], points.target)
    assert np.array_equal(pair.a.part[rows, columns], points.part)
    again = world.sample_points(*given_, seed=seed, even=even)
    assert np.array_equal(again.source, points.source)
    if even and len(points) == count:
        # No part has more than one point more than any other that has some left.
        left = np.bincount(pair.a.part[found.visible]) - np.bincount(
            points.part, minlength=pair.a.part[found.visible].max() + 1
        )
        taken = np.bincount(points.part, minlength=len(left))
        if (left > 0).any():
            assert taken.max() <= taken[left > 0].min() + 1


def test_sampling_says_what_it_wants():
    pair = pair_of(0, "cat")
    for mistake, text in (
        ({"count": 0}, "count must be"),
        ({"count": 3, "seed": -1}, "seed must be"),
    ):
        with pytest.raises(ValueError, match=text):
            world.sample_points(pair.a, pair.instance_a, pair.b, pair.instance_b, **mistake)


def test_the_picture_shows_what_the_labels_say():
    # No light, texture, grain or outline: each part is filled with the colour of its role, so away
    # from edges and marks the colour tells the part.
    flat = world.Options(
        objects=(1, 1), occluders=(0, 0), clutter=(0, 0), light=0, grain=0, textures=("plain",),
        categories=("boat",), backgrounds=("plain",),
    )  # fmt: skip
    scene = world.Split("test", size=256, options=flat)[0]
    roles = scene.plan.things[0].palette.roles
    for name in ("main sail", "jib", "mast"):
        part = next(each for each in scene.category(0).parts if each.name == name)
        mask = scene.mask(0, name)
        inner = mask.copy()
        for axis in (0, 1):  # well inside the outline
            for shift in range(-7, 8):
                inner &= np.roll(mask, shift, axis)
        if name != "mast":
            assert inner.any()
        assert (
            np.abs(scene.image[inner] / 255 - roles[part.paint]).max(initial=0) <= 0.5 / 255 + 1e-9
        )


def test_scenes_of_other_options_stay_exact_at_the_extremes():
    wild = replace(world.Options(), articulation=2, proportions=1.5, rotation=3, scale=(1.2, 1.5))
    for index in range(6):
        scene = world.Split("train", size=SIZE, options=wild)[index]
        instance, part, _ = scene.at(pixel_centres())
        assert np.array_equal(instance.reshape(SIZE, SIZE), scene.instance)
        assert np.array_equal(part.reshape(SIZE, SIZE), scene.part)
