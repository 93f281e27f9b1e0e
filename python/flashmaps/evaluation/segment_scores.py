"""How well labels of pixels agree with the truth: the metrics of segmentation's papers.

The rules, the same for every method and every data set, so that anyone gets the same numbers:

- Labels and truth are compared at the pixels of the truth. Nothing is left out but what a data set
  calls void (``VOID``).
- Matching: segments and targets are paired one to one so that the summed IoU is largest
  (Hungarian); a target without a segment counts 0.
- Background (``BACKGROUND``) is no target: a segment on it earns nothing. It counts in unions, and
  in ARI and NMI as one more group, since they are of all pixels. (ARI of foreground pixels alone is
  best for one segment, and is not given.)
- A score is of an image, and the mean is of images; intervals draw images again. A collection is
  scored as one image: a label that changes its part from image to image is punished.
"""

from __future__ import annotations

import numpy as np

BACKGROUND = -1  # of the truth: no target
VOID = -2  # of the truth: not counted at all


def contingency(labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each label and each value of the truth: [k, t]; and those values, [t]."""
    labels, truth = labels.ravel(), truth.ravel()
    counted = truth != VOID
    _, rows = np.unique(labels[counted], return_inverse=True)
    values, columns = np.unique(truth[counted], return_inverse=True)
    shape = (int(rows.max(initial=-1)) + 1, len(values))
    flat = np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1])
    return flat.reshape(shape), values


def iou_table(table: np.ndarray) -> np.ndarray:
    """Intersection over union of every label with every value of the truth: [k, t]."""
    union = table.sum(1)[:, None] + table.sum(0) - table
    return np.asarray(table / np.maximum(union, 1))


def hungarian_iou(table: np.ndarray, values: np.ndarray) -> float:
    """Mean IoU over targets under the one-to-one matching with the largest sum; NaN for none."""
    from scipy.optimize import linear_sum_assignment

    iou = iou_table(table)[:, values != BACKGROUND]
    if iou.shape[1] == 0:
        return float("nan")
    rows, columns = linear_sum_assignment(-iou)
    return float(iou[rows, columns].sum() / iou.shape[1])


def best_overlap(table: np.ndarray, values: np.ndarray) -> float:
    """mBO: mean over targets of the largest IoU with any label; NaN for no target."""
    iou = iou_table(table)[:, values != BACKGROUND]
    return float(iou.max(0).mean()) if iou.shape[1] else float("nan")


def adjusted_rand(table: np.ndarray) -> float:
    """Adjusted Rand index of all pixels (Hubert and Arabie, 1985); 1 for equal partitions."""

    def pairs(x: np.ndarray) -> float:
        x = x.astype(np.float64)
        return float((x * (x - 1) / 2).sum())

    whole = pairs(table.sum(keepdims=True))
    same, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    by_chance = rows * columns / whole if whole else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == by_chance else (same - by_chance) / (most - by_chance)


def mutual_information(table: np.ndarray) -> float:
    """NMI of all pixels: I / ((H + H') / 2); 1 for equal partitions."""
    joint = table / table.sum()
    rows, columns = joint.sum(1), joint.sum(0)

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    both = entropy(rows) + entropy(columns)
    return 1.0 if both == 0 else 2 * (both - entropy(joint.ravel())) / both


SCORES = {
    "class_iou": "mIoU of classes",  # of data sets of classes alone; see `class_iou`
    "iou": "Hungarian IoU",
    "ari": "ARI",
    "mbo": "mBO",
    "nmi": "NMI",
    "landmark": "landmark error",  # of collections alone; see `landmarks`
    "count": "segments",
}


def score(labels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Every score of one image, or of a collection whose pixels are put together."""
    table, values = contingency(labels, truth)
    return {
        "iou": hungarian_iou(table, values),
        "ari": adjusted_rand(table),
        "mbo": best_overlap(table, values),
        "nmi": mutual_information(table),
        "count": float(table.shape[0]),
    }


def class_counts(table: np.ndarray, values: np.ndarray) -> dict[int, tuple[int, int, int]]:
    """Of one image of a data set of classes: pixels right, named so, and truly so, by class.

    Segments are named by the class of the image that they are matched to one to one (Hungarian, by
    IoU); those without a partner are background, and wrong where the image has none.
    """
    from scipy.optimize import linear_sum_assignment

    targets = np.flatnonzero(values != BACKGROUND)
    rows, columns = linear_sum_assignment(-iou_table(table)[:, targets])
    named = dict(zip(targets[columns].tolist(), rows.tolist(), strict=True))
    out = {}
    for column in targets.tolist():
        right, so = 0, 0
        if column in named:
            right, so = int(table[named[column], column]), int(table[named[column]].sum())
        out[int(values[column])] = (right, so, int(table[:, column].sum()))
    rest = np.setdiff1d(np.arange(table.shape[0]), rows)
    for column in np.flatnonzero(values == BACKGROUND).tolist():
        out[BACKGROUND] = (
            int(table[rest, column].sum()), int(table[rest].sum()), int(table[:, column].sum()),
        )  # fmt: skip
    return out


def class_iou(right: np.ndarray, named: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mean over classes of right / (named + true - right), sums over images: [..., classes] each.

    Classes that no image shows are left out.
    """
    union = named + true - right
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(true > 0, right / np.maximum(union, 1), np.nan)
        return np.asarray(np.nanmean(each, axis=-1))
