"""Completion: exemplars laid over an image, shapes, pixels that stay, files, scores, layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps import world
from flashmaps.diffusion.features import Features
from flashmaps.evaluation.amodal_folders import AmodalFolder, decode
from flashmaps.evaluation.completion import OURS, convex_hull, evaluate_completion, tables
from flashmaps.evaluation.hidden_objects import WorldHidden
from flashmaps.matching.options import MatchOptions
from flashmaps.parts.completion import part_labels
from flashmaps.parts.inpaint import inpaint, rough_fill
from flashmaps.parts.masks import find_masks, likeness
from flashmaps.parts.registration import fit_affine, lay, to_pixels, to_places
from flashmaps.parts.result import Parts
from flashmaps.parts.shapes import Exemplar, covered, whole_shape
from PIL import Image as Pil
from scipy.ndimage import distance_transform_edt
from test_parts import collection, learn
from tiny_pipeline import tiny_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 64


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), sample_size=8)


@pytest.fixture(scope="module")
def parts(pipe: Any) -> Parts:
    return learn(pipe, steps=1)


def cross(x: float, y: float, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """A cross with one longer arm, its middle at (x, y): like no mirror image of itself."""
    rows, columns = np.indices(size)
    dx, dy = columns - x, rows - y
    return ((abs(dx) < 4) & (-10 < dy) & (dy < 18)) | ((abs(dy) < 4) & (-14 < dx) & (dx < 9))


def seen_by_place(mask: np.ndarray, x: float, y: float) -> Features:
    """Features in which every token of an object knows its place on the object, and others say
    that they are none of it. 4 x 4 pixels a token."""
    grid = mask.shape[0] // 4, mask.shape[1] // 4
    rows, columns = np.indices(grid)
    place = np.stack((columns * 4 + 1.5 - x, rows * 4 + 1.5 - y), -1).reshape(-1, 2) / 20
    on = covered(mask, grid) >= 0.5
    angle = np.where(on[:, None], place, 0)
    vectors = np.column_stack((np.cos(angle), np.sin(angle), np.where(on, 2.0, -2.0)))
    output = torch.from_numpy(vectors).float()[None, None]
    image = np.repeat(mask[..., None], 3, 2).astype(np.float32)
    return Features(
        query=output, key=output, scale=1.0, head_weights=torch.ones(1), grid=grid, image=image,
        input_size=image.shape[:2], layers=("x",), timestep=1, seeds=(0,), prompt="", output=output,
    )  # fmt: skip


def test_an_affine_map_is_found_among_wrong_matches() -> None:
    """A third of the points lie anywhere; the others are exact, so the map is, to rounding."""
    rng = np.random.default_rng(0)
    source = rng.uniform(-1, 1, (60, 2))
    true = np.array(((0.6, 0.3), (-0.4, 0.7), (0.1, -0.2)))
    target = source @ true[:2] + true[2]
    target[::3] = rng.uniform(-1, 1, (20, 2))
    found = fit_affine(source, target, np.ones(60), slack=1e-4)
    # A wrong point at distance r counts (slack / r)^2 of a right one: 1e-8 at a tenth.
    assert abs(found - true).max() < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_places_are_isotropic_and_come_back(size: tuple[int, int]) -> None:
    pixels = np.array(((0.0, 0.0), (size[1] - 1.0, size[0] - 1.0), (10.0, 20.0)))
    places = to_places(pixels, size)
    assert np.allclose(to_pixels(places, size), pixels)
    assert np.allclose(np.diff(places[:2], axis=0), np.diff(pixels[:2], axis=0) / (max(size) / 2))


def test_an_exemplar_is_laid_where_matches_and_outline_say() -> None:
    """The same shape elsewhere in a picture of another size: its outline is met within two pixels,
    also behind the occluder."""
    whole, front = cross(30, 28), np.zeros((SIDE, SIDE), bool)
    front[30:50, 26:44] = True
    other = cross(50, 40, (80, 96))
    rows, columns = np.nonzero(whole & ~front)
    here = np.stack((columns, rows), 1)[::7]
    there = here + np.array((20, 12))
    rng = np.random.default_rng(1)
    noisy = there + rng.normal(0, 3, there.shape)  # a match is off by some pixels
    laid = lay(
        whole & ~front, ~front, [other], to_places(here, (SIDE, SIDE)),
        to_places(noisy, (80, 96))[None], np.ones((1, len(here))),
    )  # fmt: skip
    from_outline = np.where(whole, distance_transform_edt(whole), distance_transform_edt(~whole))
    assert np.array_equal((laid.depth[0] > 0)[from_outline > 2], whole[from_outline > 2])
    moved = laid.places[0][whole] - np.argwhere(whole)[:, ::-1]
    assert abs(np.median(moved, 0) - (20, 12)).max() < 1
    assert laid.inside[0][whole].all()


def test_hidden_shape_comes_from_the_collection() -> None:
    """Two exemplars of the shape outvote one of another, and a hidden arm is told from nothing."""
    whole, front = cross(30, 28), np.zeros((SIDE, SIDE), bool)
    front[34:60, 20:50] = True  # the long arm, and ground beside it
    found = seen_by_place(whole & ~front, 30, 28)
    square = np.zeros((SIDE, SIDE), bool)
    square[20:44, 20:44] = True
    exemplars = [
        Exemplar(seen_by_place(cross(x, y), x, y), cross(x, y), np.where(cross(x, y), 0, -1))
        for x, y in ((26, 30), (36, 24))
    ] + [Exemplar(seen_by_place(square, 32, 32), square, np.where(square, 1, -1))]
    options = MatchOptions("features")
    shape = whole_shape(found, whole & ~front, front, exemplars, options)
    answer = shape.amodal > 0.5
    assert (shape.amodal[whole & ~front] == 1).all() and (shape.amodal[~whole & ~front] == 0).all()
    outline = np.where(whole, distance_transform_edt(whole), distance_transform_edt(~whole))
    assert np.array_equal(answer[outline > 2], whole[outline > 2])
    assert np.isclose(shape.weights.sum(), 1) and shape.weights[:2].sum() > 0.99
    assert (part_labels(shape, exemplars)[whole & (outline > 2)] == 0).all()


def test_masks_are_found_by_likeness() -> None:
    whole = cross(30, 28)
    exemplars = [Exemplar(seen_by_place(cross(34, 30), 34, 30), cross(34, 30))]
    options = MatchOptions("features")
    found = seen_by_place(whole, 30, 28)
    share = likeness(found, exemplars, options)
    # The five nearest tokens vote with what the object covers of them: none of the ground's do.
    on = covered(whole, found.grid) >= 0.5
    assert (share[on] > 0.5).all() and (share[~on] < 0.5).all()
    front = np.zeros((SIDE, SIDE), bool)
    front[40:50, 20:50] = True
    given, same = find_masks(found, exemplars, options, visible=whole, front=front)
    assert given is whole and same is front
    nothing = seen_by_place(np.zeros((SIDE, SIDE), bool), 0, 0)
    with pytest.raises(ValueError, match="no object of the collection's kind is seen"):
        find_masks(nothing, exemplars, options)
    with pytest.raises(ValueError, match="0 of 256 tokens show the object, too few"):
        whole_shape(found, np.zeros_like(whole), front, exemplars, options)


def test_pixels_outside_the_region_stay_and_samples_repeat(pipe: Any) -> None:
    image = np.random.default_rng(0).random((40, 32, 3)).astype(np.float32)
    region = np.zeros((40, 32), bool)
    region[8:20, 5:19] = True
    states = pipe.encode_prompt(["a", ""], "cpu", 1, False)[0]
    scheduler, modes = pipe.scheduler, [m.training for m in pipe.unet.modules()]
    given: dict[str, Any] = {"steps": 2, "guidance": 2.0, "strength": 1.0}

    def made(seeds: tuple[int, ...], **more: Any) -> list[np.ndarray]:
        return inpaint(pipe, image, region, states[:1], states[1:], seeds=seeds, **given, **more)

    first, second = made((3, 4))
    assert first.dtype == image.dtype and first.shape == image.shape
    for each in (first, second):
        assert np.array_equal(each[~region], image[~region])
        assert (each[region] != image[region]).any()
    assert (first != second).any()
    # Alone in its batch: the same but for rounding of products in another order.
    np.testing.assert_allclose(made((3,))[0], first, atol=1e-4)
    beside = made((3,), beside=image[::-1].copy())[0]
    assert np.array_equal(beside[~region], image[~region]) and (beside != first).any()
    assert pipe.scheduler is scheduler and [m.training for m in pipe.unet.modules()] == modes


def test_a_rough_fill_takes_the_nearest_of_its_kind() -> None:
    image = np.zeros((8, 8, 3), np.float32)
    image[:, :3], image[:, 3:6], image[:, 6:] = 0.2, 0.5, 0.8  # object, occluder, ground
    visible, front = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    visible[:, :3], front[:, 3:6] = True, True
    hidden = np.zeros((8, 8), bool)
    hidden[:, 3:5] = True
    filled = rough_fill(image, visible, front, hidden)
    assert (filled[:, :5] == np.float32(0.2)).all() and (filled[:, 5:] == np.float32(0.8)).all()


def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first image of the tiny collection with a bar over the middle of its two squares."""
    image = collection(1)[0][0].copy()
    front = np.zeros(image.shape[:2], bool)
    front[:, 18:22] = True
    visible = (collection(1)[1][0] >= 0) & ~front
    image[front] = (0, 255, 0)
    return image, visible, front


def test_complete_keeps_what_is_seen_and_writes_a_folder(
    pipe: Any, parts: Parts, tmp_path: Path
) -> None:
    image, visible, front = scene()
    whole = fm.complete(
        image, parts, visible=visible, occluder=front, samples=2, seed=5, steps=4, model=pipe
    )
    assert whole.hidden.any() and len(whole.images) == len(whole.scores) == 2
    shown = image.astype(np.float32) / 255
    for each in whole.images:
        assert np.array_equal(each[~whole.hidden], shown[~whole.hidden])
    assert (whole.amodal[visible] == 1).all() and (whole.amodal[~visible & ~front] == 0).all()
    assert whole.best == int(np.argmax(whole.scores)) and set(whole.missing) <= set(parts.names)
    again = fm.complete(
        image, parts, visible=visible, occluder=front, samples=2, seed=5, steps=4, model=pipe
    )
    assert np.array_equal(again.images[1], whole.images[1]) and again.scores == whole.scores
    whole.save(tmp_path / "out")
    told = json.loads((tmp_path / "out/completion.json").read_text("utf-8"))
    assert told["samples"] == 2 and told["settings"]["masks_given"] == ["visible", "occluder"]
    with Pil.open(tmp_path / "out/sample-01.png") as written:
        pixels = np.asarray(written)
    assert np.array_equal(pixels[~whole.hidden], image[~whole.hidden])
    page = (tmp_path / "out/index.html").read_text("utf-8")
    assert "completion.png" in page and "best.png" in page
    whole.save(tmp_path / "out")  # an earlier one is replaced
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/a.txt").write_text("mine")
    with pytest.raises(ValueError, match="which flashmaps has not written"):
        whole.save(tmp_path / "taken")


def test_nothing_hidden_imagines_nothing(pipe: Any, parts: Parts) -> None:
    image, visible, _ = scene()
    aside = np.zeros_like(visible)
    aside[0, 31] = True  # a corner, far from the object
    whole = fm.complete(image, parts, visible=visible, occluder=aside, model=pipe)
    assert not whole.hidden.any() and whole.scores == () and whole.best == 0
    assert np.array_equal(whole.images[0], image.astype(np.float32) / 255)


def test_worlds_hidden_objects_are_its_scenes() -> None:
    objects = WorldHidden("validation", 3, side=32, exemplars=2, categories=("cat", "fish"))
    one = objects[1]
    assert one.category == "fish" and np.array_equal(one.whole, one.visible | one.hidden)
    assert not (one.hidden & ~one.front).any()
    options = world.Options(objects=(1, 1), occluders=(0, 0), categories=("fish",))
    drawn = world.Split("train", size=32, options=options)[2]
    image, mask = objects.exemplars("fish")[0]
    assert np.array_equal(image, drawn.image) and np.array_equal(mask, drawn.mask(0))
    with pytest.raises(IndexError):
        objects[3]


def test_the_convex_hull_is_that_of_pixels() -> None:
    mask = np.zeros((9, 9), bool)
    mask[1, 1] = mask[7, 1] = mask[1, 7] = True
    hull = convex_hull(mask)
    assert hull[2:6, 1].all() and hull[3, 3] and not hull[7, 7]
    assert not convex_hull(np.zeros((4, 4), bool)).any()


def test_an_evaluation_goes_on_where_it_was(pipe: Any, tmp_path: Path) -> None:
    objects = WorldHidden("validation", 2, side=32, exemplars=2, categories=("cat",))
    given: dict[str, Any] = {"model": pipe, "imagined": 0, "resamples": 20}
    results = evaluate_completion(objects, tmp_path / "out", **given)
    seen = results["methods"]["what is seen"]
    share = [one.visible.sum() / one.whole.sum() for one in (objects[0], objects[1])]
    assert np.isclose(seen["iou"]["mean"], np.mean(share)) and seen["hidden"]["mean"] == 0
    ours = results["methods"][OURS]
    less = seen["ours_minus_this"]["iou"]["mean"]
    assert np.isclose(less, ours["iou"]["mean"] - seen["iou"]["mean"])
    ((_, header, rows),) = tables(results)
    assert len(rows) == 6 and all(len(row) == len(header) for row in rows)
    (tmp_path / "out/parts/000001.json").unlink()
    assert evaluate_completion(objects, tmp_path / "out", **given) == results


@pytest.mark.slow
def test_an_evaluation_imagines_the_first(pipe: Any, tmp_path: Path) -> None:
    objects = WorldHidden("validation", 2, side=32, exemplars=2, categories=("cat",))
    results = evaluate_completion(
        objects, tmp_path / "out", model=pipe, imagined=1, samples=2, resamples=20
    )
    names = set(results["methods"])
    assert {"inpainting, the word", "inpainting, empty prompt", "rough fill"} <= names
    assert f"{OURS}, exemplar injected: mean of samples" in names
    shapes, pixels = tables(results)
    assert len(shapes[2]) == 8 and len(pixels[2]) == 6


def box(x: int, y: int, w: int, h: int) -> list[float]:
    """COCO's polygon around pixels x to x + w - 1, y to y + h - 1."""
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths, uncompressed: down the columns, not set first."""
    flat = mask.T.ravel().astype(int)
    counts, value = [], 0
    while len(flat):
        change = np.flatnonzero(flat != value)
        length = int(change[0]) if len(change) else len(flat)
        counts.append(length)
        flat, value = flat[length:], 1 - value
    return {"size": list(mask.shape), "counts": counts}


def masks_of(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole, seen and, in front of it, another object; in image 0 a third of it is hidden."""
    whole, other = np.zeros((60, 90), bool), np.zeros((60, 90), bool)
    whole[10:40, 20:65] = True
    if number == 0:
        other[5:50, 50:80] = True
    return whole, whole & ~other, other


def kins(root: Path) -> None:
    folder = root / "testing/image_2"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(3):
        Pil.new("RGB", (90, 60), (number * 80, 90, 90)).save(folder / f"{number:06d}.png")
        images.append({"id": number, "file_name": f"{number:06d}.png", "width": 90, "height": 60})
        _, seen, other = masks_of(number)
        entries = [(1, box(20, 10, 45, 30), seen)]
        if other.any():
            entries.append((2, box(50, 5, 30, 45), other))
        for category, polygon, visible in entries:
            annotations.append(
                {
                    "id": len(annotations), "image_id": number, "category_id": category,
                    "bbox": [polygon[0], polygon[1], polygon[2] - polygon[0],
                             polygon[5] - polygon[1]],
                    "segmentation": [polygon], "inmodal_seg": runs(visible),
                }
            )  # fmt: skip
    about = {
        "images": images, "annotations": annotations,
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "tram"}],
    }  # fmt: skip
    (root / "instances_test.json").write_text(json.dumps(about))


def coco_a(root: Path) -> None:
    folder = root / "COCOA/val2014"
    folder.mkdir(parents=True)
    (root / "COCOA/annotations").mkdir()
    images, annotations = [], []
    for number in range(3):
        name = f"COCO_val2014_{number:012d}.jpg"
        Pil.new("RGB", (90, 60), (number * 80, 90, 90)).save(folder / name)
        images.append({"id": number, "file_name": name, "width": 90, "height": 60})
        whole, seen, other = masks_of(number)
        region: dict[str, Any] = {"segmentation": box(20, 10, 45, 30), "name": "car", "order": 2}
        regions = [region]
        if other.any():
            region["visible_mask"] = runs(seen)
            region["invisible_mask"] = runs(whole & ~seen)
            regions.append({"segmentation": box(50, 5, 30, 45), "name": "tram", "order": 1})
        regions.append({"segmentation": box(0, 0, 90, 60), "name": "road", "isStuff": 1})
        annotations.append({"id": number, "image_id": number, "regions": regions})
    about = {"images": images, "annotations": annotations}
    (root / "COCOA/annotations/COCO_amodal_val2014.json").write_text(json.dumps(about))


@pytest.mark.parametrize("write", [kins, coco_a])
def test_public_layouts(write: Any, tmp_path: Path) -> None:
    write(tmp_path)
    objects = AmodalFolder(tmp_path)
    assert len(objects) == 1 and "1 hidden objects" in objects.what
    one = objects[0]
    whole, seen, other = masks_of(0)
    cut = (slice(0, 52), slice(8, 77))  # a border of a quarter of 44 pixels, and one more
    assert one.category == "car" and np.array_equal(one.whole, whole[cut])
    assert np.array_equal(one.visible, seen[cut]) and np.array_equal(one.front, other[cut])
    assert one.image.shape == (52, 69, 3) and one.uncovered is None
    exemplars = objects.exemplars("car")
    assert len(exemplars) == 2
    for image, mask in exemplars:
        assert mask.sum() == 45 * 30 and image.shape[:2] == mask.shape


def test_public_layouts_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="in none of the layouts that are known"):
        AmodalFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        AmodalFolder(tmp_path / "nowhere")
    kins(tmp_path)
    with pytest.raises(ValueError, match="KINS in"):
        AmodalFolder(tmp_path, split="val")
    (tmp_path / "instances_test.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="is not in the form of KINS: KeyError"):
        AmodalFolder(tmp_path)
    (tmp_path / "instances_test.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": []})
    )
    with pytest.raises(ValueError, match="has no object of which 15 to 60 % are hidden"):
        AmodalFolder(tmp_path)


def test_masks_of_coco_are_decoded() -> None:
    mask = masks_of(0)[1]
    assert np.array_equal(decode(runs(mask), mask.shape), mask)
    assert decode(box(3, 4, 5, 6), (20, 20)).sum() == 30
    with pytest.raises(ValueError, match="its image"):
        decode(runs(mask), (50, 50))
