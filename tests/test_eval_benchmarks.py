"""Benchmarks: exact truth where it is made here, and hand-computed scores on miniature folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flashmaps.evaluation import points as carried
from flashmaps.evaluation import warps
from flashmaps.evaluation.methods import Outcome
from flashmaps.evaluation.opening import open_benchmark
from flashmaps.evaluation.results import summarise
from flashmaps.evaluation.run import point_rows

Image = pytest.importorskip("PIL.Image")


def save(path, size, colour=(90, 120, 150)):
    """A picture of ``size`` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def identity_scores(benchmark):
    """Scores of the method that leaves every point where it is, relative to the image."""
    rows = []
    for number in range(len(benchmark)):
        pair = benchmark.pair(number)
        sizes = pair.source_image.shape[:2], pair.target_image.shape[:2]
        stays = carried.carry(pair.source_points, np.zeros_like(pair.source_points), *sizes)
        outcome = Outcome({"identity": stays}, {}, ((1, 1), (1, 1)))
        rows.append(point_rows(number, pair, outcome, ["identity"]))
    table = {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}
    return summarise(table, ["identity"], ())


def shares(found, kind):
    pck = found["methods"]["identity"]["pck"]
    return [pck[t][kind] for t in ("0.01", "0.05", "0.1")]


# -- SPair-71k -------------------------------------------------------------------------------------


@pytest.fixture
def spair(tmp_path):
    """Two pairs. Images of one size, so the identity keeps coordinates.

    cat: the target's box is 100 wide; points off by 0, 4 and 9: found at .05, at .1, and exactly.
    dog: the box is 40 high; points off by 3 (.075 of it) and 30.
    """
    root = tmp_path / "SPair-71k"
    for name in ("cat/a", "cat/b", "dog/c", "dog/d"):
        save(root / "JPEGImages" / f"{name}.jpg", (200, 160))
    pairs = {
        "000001-a-b:cat": {
            "category": "cat", "src_imname": "a.jpg", "trg_imname": "b.jpg",
            "src_bndbox": [0, 0, 10, 10], "trg_bndbox": [20, 30, 120, 90],
            "src_kps": [[30, 40], [50, 50], [60, 60]], "trg_kps": [[30, 40], [54, 50], [60, 69]],
        },
        "000002-c-d:dog": {
            "category": "dog", "src_imname": "c.jpg", "trg_imname": "d.jpg",
            "src_bndbox": [0, 0, 10, 10], "trg_bndbox": [20, 30, 50, 70],
            "src_kps": [[30, 40], [50, 50]], "trg_kps": [[33, 40], [80, 50]],
        },
    }  # fmt: skip
    for name, annotation in pairs.items():
        write(root / f"PairAnnotation/test/{name}.json", json.dumps(annotation))
    write(root / "Layout/large/test.txt", "".join(f"{name}\n" for name in pairs))
    return root


def test_spair_has_its_hand_computed_scores(spair):
    found = identity_scores(open_benchmark("spair", data=spair))
    assert (found["points"], found["pairs"]) == (5, 2)
    # cat: 1, 2, 3 of 3 at .01, .05, .1 of 100 px; dog: 0, 0, 1 of 2 at those of 40 px.
    assert shares(found, "per_point") == pytest.approx([1 / 5, 2 / 5, 4 / 5])
    assert shares(found, "per_image") == pytest.approx([1 / 6, 1 / 3, 3 / 4])
    assert found["methods"]["identity"]["error"]["mean_px"] == pytest.approx((4 + 9 + 3 + 30) / 5)
    assert found["categories"]["dog"]["pck"]["identity"]["0.1"]["per_image"] == 0.5


def test_spair_may_be_the_folder_around_it_and_written_without_colons(spair):
    for path in (spair / "PairAnnotation/test").iterdir():
        path.rename(path.with_name(path.name.replace(":", "_")))
    benchmark = open_benchmark("spair", data=spair.parent, pairs=1, seed=1)
    assert len(benchmark) == 1 and benchmark.pair(0).category in ("cat", "dog")


def test_spair_says_what_is_wrong(spair):
    with pytest.raises(FileNotFoundError, match=r"lacks PairAnnotation/val, Layout/large/val\.txt"):
        open_benchmark("spair", data=spair, split="val")
    with pytest.raises(ValueError, match="split='train'; SPair-71k has test, val, trn"):
        open_benchmark("spair", data=spair, split="train")
    first = spair / "PairAnnotation/test/000001-a-b:cat.json"
    first.write_text('{"category": "cat"}')
    with pytest.raises(ValueError, match="is not an annotation of SPair-71k"):
        open_benchmark("spair", data=spair).pair(0)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 000001-a-b:cat\.json"):
        open_benchmark("spair", data=spair).pair(0)


# -- PF-Pascal, PF-Willow --------------------------------------------------------------------------


@pytest.fixture
def pf_pascal(tmp_path):
    """Images of 100 x 80 and 200 x 160: the identity doubles, (x, y) to (2 x + .5, 2 y + .5).

    The base is 200. Of the annotations' four keypoints one is missing in each image; the others
    are off by 0 and by 12 (.06).
    """
    io = pytest.importorskip("scipy.io")
    root = tmp_path / "PF-dataset-PASCAL"
    save(root / "JPEGImages/2008_000001.jpg", (100, 80))
    save(root / "JPEGImages/2008_000002.jpg", (200, 160))
    hole = [np.nan, np.nan]
    for name, points in (
        ("2008_000001", [[10, 10], [20, 30], hole, [5, 5]]),
        ("2008_000002", [[20.5, 20.5], [52.5, 60.5], [7, 7], hole]),
    ):
        (root / "Annotations/bicycle").mkdir(parents=True, exist_ok=True)
        io.savemat(
            root / f"Annotations/bicycle/{name}.mat",
            {"kps": np.array(points), "bbox": np.array([[1, 1, 90, 70]])},
        )
    names = (
        "PF-dataset-PASCAL/JPEGImages/2008_000001.jpg,PF-dataset-PASCAL/JPEGImages/2008_000002.jpg"
    )
    write(root / "trn_pairs.csv", f"source_image,target_image,class,flip\n{names},2,0\n")
    header = "source_image,target_image,class,XA,YA,XB,YB\n"
    # The same by numbers in the list, with a third point that is off by 1 (.005).
    numbers = "10.0;20.0;40.0,10.0;30.0;40.0,20.5;52.5;81.5,20.5;60.5;80.5"
    write(root / "test_pairs_pf_pascal.csv", f"{header}{names},2,{numbers}\n")
    return root


def test_pf_pascal_has_its_hand_computed_scores(pf_pascal):
    from_annotations = identity_scores(open_benchmark("pf-pascal", data=pf_pascal, split="trn"))
    assert from_annotations["points"] == 2
    assert shares(from_annotations, "per_point") == [0.5, 0.5, 1]
    from_list = identity_scores(open_benchmark("pf-pascal", data=pf_pascal.parent))
    assert from_list["points"] == 3 and list(from_list["categories"]) == ["bicycle"]
    assert shares(from_list, "per_image") == pytest.approx([2 / 3, 2 / 3, 1])


def test_pf_pascal_says_what_is_wrong(pf_pascal):
    with pytest.raises(FileNotFoundError, match=r"lacks val_pairs\.csv; wanted the folder PF-data"):
        open_benchmark("pf-pascal", data=pf_pascal, split="val")
    (pf_pascal / "Annotations/bicycle/2008_000002.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*2008_000002\.mat"):
        open_benchmark("pf-pascal", data=pf_pascal, split="trn").pair(0)
    write(pf_pascal / "val_pairs.csv", "a,b,c\nx.jpg,y.jpg,21\n")
    with pytest.raises(ValueError, match="and class, 1 to 20"):
        open_benchmark("pf-pascal", data=pf_pascal, split="val").pair(0)


@pytest.fixture
def pf_willow(tmp_path):
    """Ten keypoints each; the target's span 50 x 40 pixels, so that .1 are 5 pixels.

    Equal sizes. Nine are where they were; one has moved by 4 pixels.
    """
    root = tmp_path / "PF-dataset"
    for name in ("a", "b"):
        save(root / f"car(G)/Cars_{name}.png", (120, 90))
    x, y = np.linspace(10, 60, 10), np.linspace(20, 60, 10)
    moved = x.copy()
    moved[4] += 4
    numbers = ",".join(f"{n:g}" for n in (*x, *y, *moved, *y))
    header = ",".join(["imageA", "imageB", *(f"{c}{i}" for c in "abcd" for i in range(10))])
    names = "PF-dataset/car(G)/Cars_a.png,PF-dataset/car(G)/Cars_b.png"
    write(root / "test_pairs_pf.csv", f"{header}\n{names},{numbers}\n")
    return root


def test_pf_willow_has_its_hand_computed_scores(pf_willow):
    benchmark = open_benchmark("pf-willow", data=pf_willow)
    assert benchmark.pair(0).base == pytest.approx(50)
    found = identity_scores(benchmark)
    assert list(found["categories"]) == ["car(G)"]
    assert shares(found, "per_point") == pytest.approx([0.9, 0.9, 1])


def test_pf_willow_says_what_is_wrong(pf_willow):
    with pytest.raises(ValueError, match="PF-Willow has test only"):
        open_benchmark("pf-willow", data=pf_willow, split="val")
    write(pf_willow / "test_pairs.csv", "a,b\nx/a.png,x/b.png,1,2\n")
    with pytest.raises(ValueError, match="has 4 columns; wanted two images and ten numbers"):
        open_benchmark("pf-willow", data=pf_willow).pair(0)
    with pytest.raises(FileNotFoundError, match=r"lacks test_pairs\.csv; wanted the folder PF-dat"):
        open_benchmark("pf-willow", data=pf_willow / "car(G)")


# -- CUB -------------------------------------------------------------------------------------------


@pytest.fixture
def cub(tmp_path):
    """Two birds to test with, one to train with; parts 1 and 2 in common, part 3 hidden in b."""
    root = tmp_path / "CUB_200_2011"
    for name in ("a", "b", "c"):
        save(root / f"images/001.Finch/{name}.jpg", (100, 100))
    lists = {
        "images.txt": "1 001.Finch/a.jpg\n2 001.Finch/b.jpg\n3 001.Finch/c.jpg\n",
        "train_test_split.txt": "1 0\n2 0\n3 1\n",
        "bounding_boxes.txt": "1 10.0 10.0 50.0 40.0\n2 20.0 20.0 40.0 60.0\n3 0.0 0.0 9.0 9.0\n",
        "parts/part_locs.txt": (
            "1 1 30.0 30.0 1\n1 2 40.0 40.0 1\n1 3 50.0 50.0 1\n"
            "2 1 30.0 30.0 1\n2 2 40.0 45.5 1\n2 3 0.0 0.0 0\n"
            "3 1 1.0 1.0 1\n3 2 1.0 1.0 1\n3 3 1.0 1.0 1\n"
        ),
    }
    for name, text in lists.items():
        write(root / name, text)
    return root


def test_cub_has_its_hand_computed_scores(cub):
    """a to b: off by 0 and 5.5 of a box of 60 (.092), one hidden; b to a: of a box of 50 (.11)."""
    benchmark = open_benchmark("cub", data=cub)
    assert len(benchmark) == 2
    found = identity_scores(benchmark)
    assert (found["points"], found["hidden_points"]) == (4, 1)
    assert shares(found, "per_point") == [0.5, 0.5, 0.75]
    assert shares(found, "per_image") == [0.5, 0.5, 0.75]


def test_cub_says_what_is_wrong(cub):
    with pytest.raises(ValueError, match="no two images that show a part in common"):
        open_benchmark("cub", data=cub, split="trn")
    write(cub / "images.txt", "1 a.jpg extra\n")
    with pytest.raises(ValueError, match=r"line 1 of .* has 3 columns; wanted 2"):
        open_benchmark("cub", data=cub)
    (cub / "parts/part_locs.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks parts/part_locs\.txt; wanted the folder"):
        open_benchmark("cub", data=cub)


# -- what the choice of one says -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spair", "pf-pascal", "pf-willow", "cub"])
def test_a_missing_folder_is_described(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} needs the folder of .* as it is published: the"):
        open_benchmark(name)
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder .*nowhere'; wanted the folder"
    ):
        open_benchmark(name, data=tmp_path / "nowhere")


def test_mistakes_are_named(tmp_path):
    for arguments, message in (
        ({"name": "spare"}, "benchmark 'spare' is not known; choose from world, stereo"),
        ({"name": "warps", "pairs": 0}, "pairs must be a whole number from 1"),
        ({"name": "warps", "points": 0}, "points must be a whole number from 1"),
        ({"name": "stereo", "pairs": 2}, "stereo is a single pair"),
        ({"name": "warps", "data": tmp_path}, "warps needs no folder"),
        ({"name": "warps", "image_size": 64}, "only world draws its images"),
        ({"name": "cub", "points": 9}, "CUB has points of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            open_benchmark(**arguments)


# -- stereo ----------------------------------------------------------------------------------------


def test_stereo_points_are_pixels_with_their_true_disparity():
    pytest.importorskip("skimage")
    from skimage.data import stereo_motorcycle

    benchmark = open_benchmark("stereo", points=500)
    pair = benchmark.pair(0)
    *_, disparity = stereo_motorcycle()
    columns, rows = pair.source_points.astype(int).T
    np.testing.assert_allclose(
        pair.source_points[:, 0] - pair.target_points[:, 0], disparity[rows, columns], atol=1e-4
    )
    assert np.array_equal(pair.source_points[:, 1], pair.target_points[:, 1])
    assert len(np.unique(pair.units)) > 40 and pair.base == 741
    again = open_benchmark("stereo", points=500).pair(0)
    assert np.array_equal(again.source_points, pair.source_points)


# -- warps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", warps.KINDS)
def test_forward_is_the_inverse_of_backward(kind):
    inside = np.random.default_rng(0).random((200, 2))
    for seed in range(3):
        warp = warps.draw_warp(kind, np.random.default_rng(seed))
        there = warp.forward(inside)
        found = np.isfinite(there).all(axis=1)
        assert found.mean() > 0.95
        np.testing.assert_allclose(warp.backward(there[found]), inside[found], atol=1e-8)
        moved = np.abs(there[found] - inside[found]).max()
        assert moved == 0 if kind == "photometric" else moved > 0.02


def test_a_homography_takes_its_corners_where_they_belong():
    of = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]])
    to = np.array([[0.1, 0], [0.9, 0.1], [1, 1], [0, 0.8]])
    apply = warps._by_matrix(warps._homography(of, to))
    np.testing.assert_allclose(apply(of), to, atol=1e-12)


def test_a_fold_is_seen():
    assert warps._folds(lambda p: np.abs(p - 0.5))
    assert not warps._folds(lambda p: 2 * p + 1)


@pytest.fixture(scope="module")
def warped():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    return open_benchmark("warps", pairs=8, points=400, seed=1)


def test_colours_agree_along_the_truth_of_a_warp(warped):
    """The target is drawn by the map back; the truth comes from the map there."""
    from scipy.ndimage import map_coordinates

    for index in (0, 1, 2):
        pair = warped.pair(index)
        seen = np.isfinite(pair.target_points).all(axis=1)
        assert 0.4 < seen.mean() <= 1
        x, y = pair.target_points[seen].T
        columns, rows = pair.source_points[seen].astype(int).T
        shown = [map_coordinates(pair.target_image[:, :, c], (y, x), order=3) for c in range(3)]
        there, here = np.stack(shown, axis=1), pair.source_image[rows, columns]
        still = pair.target_image[rows, columns]
        assert np.abs(there - here).mean() < 0.5 * np.abs(still - here).mean()
        assert np.median(np.abs(there - here)) < 0.03


def test_photometric_changes_move_nothing(warped):
    pair = warped.pair(3)
    assert pair.category == "photometric"
    np.testing.assert_allclose(pair.target_points, pair.source_points, atol=1e-9)
    assert np.abs(pair.target_image - pair.source_image).mean() > 0.01


def test_warps_repeat_with_their_seed_and_a_prefix_stays(warped):
    again = open_benchmark("warps", pairs=3, points=400, seed=1)
    for index in range(3):
        one, other = warped.pair(index), again.pair(index)
        assert np.array_equal(one.target_image, other.target_image)
        assert np.array_equal(one.target_points, other.target_points, equal_nan=True)
    different = open_benchmark("warps", pairs=3, points=400, seed=2).pair(0)
    assert not np.array_equal(different.target_points, warped.pair(0).target_points)


def test_every_photo_meets_every_kind_and_none_is_the_stereo_pair():
    count = sum(len(names) for names in warps.PHOTOS.values())
    benchmark = warps.Warps(pairs=4 * count)
    met = {(benchmark.photo(index), index % 4) for index in range(4 * count)}
    assert len(met) == 4 * count
    assert not any("motorcycle" in name for names in warps.PHOTOS.values() for name in names)


# -- world -----------------------------------------------------------------------------------------


def test_world_points_show_the_same_spot_of_the_same_part():
    from flashmaps import world

    benchmark = open_benchmark("world", pairs=6, points=64, image_size=64)
    scenes = world.pairs("test", 6, seed=0, size=64)
    for index in range(6):
        pair, scene = benchmark.pair(index), scenes[index]
        assert pair.category == scene.category
        seen = np.isfinite(pair.target_points).all(axis=1)
        assert len(seen) <= 64 and seen.any()
        here = scene.a.at(pair.source_points[seen])
        there = scene.b.at(pair.target_points[seen])
        assert (here[0] == scene.instance_a).all() and (there[0] == scene.instance_b).all()
        assert np.array_equal(here[1], there[1])
        np.testing.assert_allclose(here[2], there[2], atol=1e-6)  # drawing units of 100 a side
        symmetric = scene.a.category(scene.instance_a).symmetric
        assert (pair.mirrored_points is not None) == symmetric
        x0, y0, x1, y1 = scene.b.instances[scene.instance_b].box
        assert pair.base == max(x1 - x0, y1 - y0)
