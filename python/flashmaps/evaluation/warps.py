"""Photographs that ship inside scikit-image and scikit-learn, under warps that are known exactly.

Source and target are two views of one photograph. The source is a window of it; the target shows
the photograph through a seeded map b from target to source, in the unit square of the window:

- "affine": turned, scaled, sheared and shifted;
- "homography": the window's corners moved;
- "thin-plate": a small affine change, and a grid of control points moved, with a thin-plate spline
  between them;
- "photometric": nothing moved; gains, gamma, blur and noise.

The truth is the inverse of b: in closed form for matrices, by Newton's method (to 1e-8 of the side)
for splines, which are drawn until they fold nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import numpy as np

from flashmaps.diffusion.images import Image, load_image, resize
from flashmaps.evaluation.benchmark import Pair, draw

KINDS = ("affine", "homography", "thin-plate", "photometric")

# package: photographs of things. The stereo pair is never among them.
PHOTOS = {
    "skimage.data": (
        "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "coins.png", "camera.png",
        "clock_motion.png", "retina.jpg", "hubble_deep_field.jpg", "brick.png", "grass.png",
        "gravel.png",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}  # fmt: skip

SIDE = 256  # longer side of both views in pixels
WINDOW = 0.7  # the source's share of the photograph's sides; what lies around it may come into view
_NEWTON_STEPS = 30
_DRAWS = 100

Map = Callable[[np.ndarray], np.ndarray]  # [n, 2] in the unit square to [n, 2]


@dataclass(frozen=True)
class Warp:
    """A known map between two views, both as unit squares with (x, y) points."""

    kind: str
    backward: Map  # target to source: b
    forward: Map  # source to target: the inverse of b; NaN where it was not found


def draw_warp(kind: str, rng: np.random.Generator) -> Warp:
    """A warp of one of KINDS."""
    if kind == "photometric":
        return Warp(kind, lambda points: points, lambda points: points)
    if kind == "affine":
        return _matrix_warp(kind, _affine(rng))
    if kind == "homography":
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
        return _matrix_warp(kind, _homography(corners, corners + rng.uniform(-0.16, 0.16, (4, 2))))
    if kind == "thin-plate":
        for _ in range(_DRAWS):
            warp = _spline_warp(rng)
            if not _folds(warp.backward):
                return warp
        raise RuntimeError(f"no thin-plate warp without a fold in {_DRAWS} draws")
    raise ValueError(f"kind={kind!r}; wanted one of {', '.join(KINDS)}")


class Warps:
    """``pairs`` photographs in turn, each under the next kind of warp, with ``points`` each."""

    name = "warps"
    what = (
        "photographs that ship inside scikit-image and scikit-learn (never the stereo pair), under "
        "seeded affine, homography, thin-plate and photometric changes; points that leave the "
        "target have no match. The built-in model was trained on crops of the same photographs"
    )
    base = "the longer side of the target image"
    unit = "pairs"
    headline = 0.05

    def __init__(self, pairs: int = 50, points: int = 256, seed: int = 0) -> None:
        self._pairs, self._points, self._seed = pairs, points, seed
        names = [(package, name) for package, several in PHOTOS.items() for name in several]
        order = np.random.default_rng([seed, 0]).permutation(len(names))
        self._photos = [names[i] for i in order]

    def __len__(self) -> int:
        """How many pairs."""
        return self._pairs

    def photo(self, index: int) -> tuple[str, str]:
        """(package, name) of the photograph of pair ``index``.

        Kinds take turns with pairs. Photographs go a step further every len(KINDS) pairs, and each
        kind begins at another one, so that every photograph meets every kind.
        """
        turn = index // len(KINDS) + index % len(KINDS) * 5
        return self._photos[turn % len(self._photos)]

    def pair(self, index: int) -> Pair:
        """Photograph ``index`` (in a seeded order, round and round) under warp ``index``."""
        rng = np.random.default_rng([self._seed, 1, index])
        kind = KINDS[index % len(KINDS)]
        photo = self.photo(index)
        source, show = _window(*photo)
        warp = draw_warp(kind, rng)
        height, width = source.shape[:2]
        target = show(warp.backward)
        if kind == "photometric":
            target = change_light(target, rng)
        pixels = draw(rng, self._points, height * width)
        points = np.stack((pixels % width, pixels // width), axis=1).astype(float)
        size = np.array([width, height], float)
        unit = warp.forward((points + 0.5) / size)
        unit[((unit < 0) | (unit >= 1)).any(axis=1)] = np.nan
        return Pair(
            category=kind,
            source=photo[1],
            target=f"{photo[1]}, warp {index}",
            source_image=source,
            target_image=target,
            source_points=points,
            target_points=unit * size - 0.5,
            base=float(max(height, width)),
        )


@lru_cache(maxsize=32)
def _window(package: str, name: str) -> tuple[Image, Callable[[Map], Image]]:
    """The source view of a photograph, and what shows the photograph through a map."""
    from scipy.ndimage import map_coordinates

    photo = _read(package, name)
    longer = max(photo.shape[:2])
    whole = [round(side * SIDE / WINDOW / longer) for side in photo.shape[:2]]
    photo = resize(photo, (whole[0], whole[1]))
    height, width = (round(side * WINDOW) for side in whole)
    top, left = (whole[0] - height) // 2, (whole[1] - width) // 2

    def show(backward: Map) -> Image:
        rows, columns = np.mgrid[:height, :width]
        here = np.stack((columns.ravel() + 0.5, rows.ravel() + 0.5), axis=1) / (width, height)
        x, y = (backward(here) * (width, height) - 0.5 + (left, top)).T
        channels = [
            map_coordinates(photo[:, :, c], (y, x), order=3, mode="mirror") for c in range(3)
        ]
        shown = np.stack(channels, axis=-1).reshape(height, width, 3)
        return shown.clip(0, 1).astype(np.float32)

    return np.ascontiguousarray(photo[top : top + height, left : left + width]), show


def _read(package: str, name: str) -> Image:
    try:
        file = resources.files(package) / name
    except ImportError as error:
        raise ImportError(
            f"the photographs of warps come with scikit-image and scikit-learn ({error}); "
            "install them with: pip install scikit-image scikit-learn"
        ) from error
    with resources.as_file(file) as path:
        return load_image(path, name)


def change_light(image: Image, rng: np.random.Generator) -> Image:
    """Gamma, a gain for each channel, brightness, blur and noise; nothing moves."""
    from scipy.ndimage import gaussian_filter

    changed = image.astype(float) ** np.exp(rng.uniform(-0.5, 0.5))
    changed = changed * rng.uniform(0.75, 1.25, 3) + rng.uniform(-0.1, 0.1)
    sigma = rng.uniform(0, 1.2)
    changed = gaussian_filter(changed, (sigma, sigma, 0))
    changed += rng.normal(0, rng.uniform(0, 0.03), image.shape)
    return changed.clip(0, 1).astype(np.float32)


# -- maps ------------------------------------------------------------------------------------------


def _affine(rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:  # [3, 3]
    """About the centre: rotation, scale, shear, shift."""
    angle, shear, size = strength * rng.uniform(-1, 1, 3) * (0.5, 0.15, 0.3)
    scale = np.exp(size)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * turn @ np.array([[1, shear], [0, 1]])
    shift = 0.5 - linear @ [0.5, 0.5] + strength * rng.uniform(-0.12, 0.12, 2)
    return np.block([[linear, shift[:, None]], [np.zeros((1, 2)), np.ones((1, 1))]])


def _homography(of: np.ndarray, to: np.ndarray) -> np.ndarray:  # [4, 2], [4, 2] -> [3, 3]
    """The projective map that takes four points to four others."""
    rows = []
    for (x, y), (u, v) in zip(of, to, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    return np.append(np.linalg.solve(np.array(rows), to.ravel()), 1).reshape(3, 3)


def _matrix_warp(kind: str, matrix: np.ndarray) -> Warp:
    return Warp(kind, _by_matrix(matrix), _by_matrix(np.linalg.inv(matrix)))


def _by_matrix(matrix: np.ndarray) -> Map:
    def apply(points: np.ndarray) -> np.ndarray:
        moved = np.hstack((points, np.ones((len(points), 1)))) @ matrix.T
        return moved[:, :2] / moved[:, 2:]

    return apply


def _spline_warp(rng: np.random.Generator) -> Warp:
    from scipy.interpolate import RBFInterpolator

    lines = np.linspace(-0.1, 1.1, 5)
    control = np.stack(np.meshgrid(lines, lines), axis=-1).reshape(-1, 2)
    about = _by_matrix(_affine(rng, 0.6))
    moved = about(control) + rng.normal(0, 0.035, control.shape)
    spline = RBFInterpolator(control, moved, kernel="thin_plate_spline", degree=1)

    def backward(points: np.ndarray) -> np.ndarray:
        return spline(np.ascontiguousarray(points))

    return Warp("thin-plate", backward, lambda points: invert(backward, points))


def invert(function: Map, values: np.ndarray, tolerance: float = 1e-8) -> np.ndarray:
    """Points where ``function`` takes the ``values`` [n, 2]: Newton's method from the values.

    NaN where a residual above ``tolerance`` is left.
    """
    points = values.copy()
    for _ in range(_NEWTON_STEPS):
        residual = function(points) - values
        if np.abs(residual).max(initial=0) <= tolerance / 10:
            break
        points = points - np.linalg.solve(_jacobian(function, points), residual[:, :, None])[..., 0]
    off = np.abs(function(points) - values).max(axis=1)
    points[~(off <= tolerance)] = np.nan
    return points


def _jacobian(function: Map, points: np.ndarray, step: float = 1e-5) -> np.ndarray:  # [n, 2, 2]
    columns = []
    for axis in range(2):
        shift = np.zeros(2)
        shift[axis] = step
        columns.append((function(points + shift) - function(points - shift)) / (2 * step))
    return np.stack(columns, axis=-1)


def _folds(function: Map) -> bool:
    """Whether the map turns over anywhere on a fine grid over the square and a rim around it."""
    lines = np.linspace(-0.15, 1.15, 40)
    grid = np.stack(np.meshgrid(lines, lines), axis=-1).reshape(-1, 2)
    return bool((np.linalg.det(_jacobian(function, grid)) < 0.2).any())
