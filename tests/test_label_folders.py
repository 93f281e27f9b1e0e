"""Data sets in their published layouts, in miniature, and the metrics of their papers by hand."""

from __future__ import annotations

import numpy as np
import pytest
from flashmaps.evaluation import segment_scores as scores
from flashmaps.evaluation.cub_parts import CubCollections
from flashmaps.evaluation.label_folders import COCO_GROUPS, LAYOUTS, LabelFolder
from flashmaps.evaluation.landmarks import centres, landmark_error
from flashmaps.evaluation.segment_scores import BACKGROUND, VOID

Image = pytest.importorskip("PIL.Image")


def put(path, values):
    """A picture, or a file of labels where ``values`` is one number a pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def put_list(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


PICTURE = np.full((20, 24, 3), 100)


def labels(*values):
    """Labels in stripes."""
    return np.array(values)[np.arange(24) * len(values) // 24][None].repeat(20, 0)


def voc(root):
    top = root / "VOCdevkit/VOC2012"
    put_list(top / "ImageSets/Segmentation/val.txt", ["b", "a"])
    for name in "ab":
        put(top / f"JPEGImages/{name}.jpg", PICTURE)
        put(top / f"SegmentationClass/{name}.png", labels(0, 1, 255, 20))
        put(top / f"SegmentationObject/{name}.png", labels(0, 1, 255, 2))
    return [BACKGROUND, 0, VOID, 19]


def coco(root):
    top = root / "cocostuff"
    put_list(top / "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt", ["b", "a"])
    for name in "abc":
        put(top / f"images/val2017/{name}.jpg", PICTURE)
        put(top / f"annotations/val2017/{name}.png", labels(0, 2, 255, 105, 181))
    group = COCO_GROUPS.index
    return [group("person things"), group("vehicle things"), VOID, group("sky stuff"),
            group("solid stuff")]  # fmt: skip


def cityscapes(root):
    top = root / "cityscapes"
    for city, name in (("ulm", "a"), ("bonn", "b")):
        put(top / f"leftImg8bit/val/{city}/{name}_leftImg8bit.png", PICTURE)
        put(top / f"gtFine/val/{city}/{name}_gtFine_labelIds.png", labels(0, 7, 33, 34))
    return [VOID, 0, 26, VOID]


def ade(root):
    top = root / "ADEChallengeData2016"
    for name in "ba":
        put(top / f"images/validation/{name}.jpg", PICTURE)
        put(top / f"annotations/validation/{name}.png", labels(0, 1, 150))
    return [VOID, 0, 149]


@pytest.mark.parametrize(
    ("make", "name", "classes", "order"),
    [(voc, "voc", 20, "ba"), (coco, "coco-stuff-27", 27, "ba"),
     (cityscapes, "cityscapes", 27, "ba"), (ade, "ade20k", 150, "ab")],
)  # fmt: skip
def test_a_published_layout_is_read_as_it_is(make, name, classes, order, tmp_path):
    want = make(tmp_path)
    found = LabelFolder(tmp_path)
    assert (found.name, len(found), found.classes["classes"]) == (name, 2, classes)
    assert "".join(found[i].name[0] for i in range(2)) == order
    assert np.array_equal(found[0].truth["classes"], labels(*want))
    assert found[0].image.shape == (20, 24, 3)
    assert len(LabelFolder(tmp_path, count=1)) == 1


def test_voc_knows_objects_and_no_border(tmp_path):
    voc(tmp_path)
    found = LabelFolder(tmp_path / "VOCdevkit/VOC2012")
    assert found.levels == ("classes", "objects")
    assert np.array_equal(found[0].truth["objects"], labels(BACKGROUND, 0, VOID, 1))


def test_every_label_of_coco_is_in_one_of_27_groups():
    table = next(each.table for each in LAYOUTS if each.name == "coco-stuff-27")
    assert set(table[:182]) == set(range(27)) and (table[182:] == VOID).all()
    assert len(COCO_GROUPS) == 27


def test_what_is_no_data_set_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        LabelFolder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="Cityscapes: cityscapes/"):
        LabelFolder(tmp_path)
    ade(tmp_path)
    with pytest.raises(ValueError, match="ADE20K there has validation"):
        LabelFolder(tmp_path, split="val")
    top = tmp_path / "ADEChallengeData2016/annotations/validation"
    put(top / "a.png", labels(1)[:10])
    with pytest.raises(ValueError, match="24 x 10 pixels, its image 24 x 20"):
        LabelFolder(tmp_path)[0]
    put(top / "a.png", PICTURE)
    with pytest.raises(ValueError, match="one byte for each pixel"):
        LabelFolder(tmp_path)[0]
    (top / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="no label file"):
        LabelFolder(tmp_path)[0]


def test_class_iou_sums_over_images_and_names_the_rest_background():
    # Image 1: class 3 (8 pixels) is found with 2 of background; the other segment is background.
    truth = np.array([3] * 8 + [BACKGROUND] * 8)
    found = np.array([5] * 10 + [6] * 6)
    one = scores.class_counts(*scores.contingency(found, truth))
    assert one == {3: (8, 10, 8), BACKGROUND: (6, 6, 8)}
    # Image 2: class 3 has no segment of its own.
    truth = np.array([3] * 4 + [1] * 12)
    two = scores.class_counts(*scores.contingency(np.zeros(16, int), truth))
    assert two == {1: (12, 16, 12), 3: (0, 0, 4)}
    names = (BACKGROUND, 1, 3)
    sums = np.array([np.add(one.get(c, (0, 0, 0)), two.get(c, (0, 0, 0))) for c in names])
    want = np.mean([6 / 8, 12 / 16, 8 / (10 + 12 - 8)])
    assert scores.class_iou(*sums.T) == pytest.approx(want)


# -- CUB -------------------------------------------------------------------------------------------


def cub(root, images=5):
    top = root / "CUB_200_2011"
    (top / "parts").mkdir(parents=True)
    lists = {"images.txt": [], "train_test_split.txt": [], "bounding_boxes.txt": [],
             "parts/part_locs.txt": []}  # fmt: skip
    for i in range(images):
        put(top / f"images/001.Auk/{i}.jpg", PICTURE)
        lists["images.txt"].append(f"{i} 001.Auk/{i}.jpg")
        lists["train_test_split.txt"].append(f"{i} 0")
        lists["bounding_boxes.txt"].append(f"{i} 1.0 1.0 12.0 8.0")
        lists["parts/part_locs.txt"] += [f"{i} 1 {5 + i}.0 6.0 1", f"{i} 2 0.0 0.0 0"]
    for name, lines in lists.items():
        put_list(top / name, lines)
    return top


def test_cub_is_looked_at_where_its_points_are(tmp_path):
    cub(tmp_path)
    found = CubCollections(tmp_path)
    assert len(found) == 1
    one = found[0]
    assert (one.category, len(one.images), one.bases) == ("001.Auk", 5, [12.0] * 5)
    for i, truth in enumerate(one.truth):
        assert truth[6, 5 + i] == 0 and (truth != VOID).sum() == 1
        assert np.isnan(one.keypoints[i][1]).all()
    with pytest.raises(ValueError, match="split"):
        CubCollections(tmp_path, split="val")


def moved(shift):
    """Two parts and their surroundings; and two points that go with them."""
    found = np.zeros((40, 40), int)
    found[5:15, 5 + shift : 15 + shift] = 1
    found[20:30, 8:18] = 2
    return found, np.array([[9.5 + shift, 9.5], [12.5, 24.5]])


def test_landmarks_that_go_with_parts_are_told_by_them():
    # Chance of a mean place is the spread of the shifts; parts tell it.
    pairs = [moved(shift) for shift in (0, 4, 8, 12, 16, 20)]
    found, points = [p[0] for p in pairs], [p[1] for p in pairs]
    plain = landmark_error([np.zeros_like(each) for each in found], points, [20.0] * 6)
    own = landmark_error(found, points, [20.0] * 6)
    # Leave one out, the mean of the five others is off by 6 / 5 of the distance to the mean of all
    # for the first point, and right for the second.
    spread = np.abs(np.arange(0, 21, 4) - 10.0).mean() * 6 / 5 / 20
    assert plain == pytest.approx(spread / 2)
    assert own < 0.1 * plain


def test_centres_are_means_of_pixel_middles():
    found = np.zeros((4, 8), int)
    found[0, 6:] = 1
    middle = centres([found, np.zeros((4, 8), int)])
    np.testing.assert_allclose(middle[0, 1], [7 / 8, 0.5 / 8])
    assert np.isnan(middle[1, 1]).all()
