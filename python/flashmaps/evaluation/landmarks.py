"""Landmark regression: do the middles of parts say where an object's named points are?

As co-part segmentation is scored since SCOPS (Hung et al., CVPR 2019): a linear regression from the
centres of labels to landmarks, its error in shares of the object's box. Here each image's landmarks
are told from the other images of the collection (leave one out), by a ridge whose strength is
chosen within those (its own leave-one-out, scikit-learn), since a collection is small; a label that
an image lacks lies at the mean of where it is in the others. One label everywhere tells nothing
but the mean place: that is what the error has to be below. The error follows how well points can
be told, not how well parts are cut: NMI and ARI do that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STRENGTHS = 10.0 ** np.arange(-4, 3)


def centres(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Mean (x, y) of each label in each image, in shares of its longer side: [n, k, 2], NaN where
    the image lacks it."""
    count = max(int(each.max()) for each in labels) + 1
    out = np.full((len(labels), count, 2), np.nan)
    for i, each in enumerate(labels):
        height, width = each.shape
        size = np.bincount(each.ravel(), minlength=count)
        y, x = np.divmod(np.arange(each.size), width)
        with np.errstate(invalid="ignore"):
            for axis, place in enumerate((x, y)):
                summed = np.bincount(each.ravel(), place + 0.5, minlength=count)
                out[i, :, axis] = summed / size / max(height, width)
    return out


def landmark_error(
    labels: Sequence[np.ndarray],  # n of [h, w]
    landmarks: Sequence[np.ndarray],  # n of [l, 2], (x, y) in pixels, NaN where not seen
    bases: Sequence[float],  # n, pixels: the longer side of each object's box
) -> float:
    """Mean distance of a landmark from where the other images' parts say it is, in shares of the
    box; NaN where no landmark is seen in three images."""
    from sklearn.linear_model import RidgeCV

    sides = np.array([max(each.shape) for each in labels], dtype=float)
    middle = centres(labels)
    places = (np.stack(landmarks) + 0.5) / sides[:, None, None]
    numbers = np.arange(len(labels))
    errors = []
    for left_out in range(len(labels)):
        others = numbers != left_out
        known = np.isfinite(middle[others]).all(2).sum(0) > 0
        mean = np.nanmean(middle[others][:, known], axis=0)
        x = np.where(np.isfinite(middle[:, known]), middle[:, known] - mean, 0.0)
        x = x.reshape(len(labels), -1)
        for point in range(places.shape[1]):
            seen = np.isfinite(places[:, point]).all(1)
            fit = others & seen
            if not seen[left_out] or fit.sum() < 2:
                continue
            model = RidgeCV(_STRENGTHS).fit(x[fit], places[fit, point])
            told = model.predict(x[left_out : left_out + 1])[0]
            off = np.linalg.norm(told - places[left_out, point]) * sides[left_out]
            errors.append(off / bases[left_out])
    return float(np.mean(errors)) if errors else float("nan")
