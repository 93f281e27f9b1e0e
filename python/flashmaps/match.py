"""Match two images through a diffusion model's cross-self-attention (the note's eq. 2.4 to 2.9).

    m = fm.match("left.png", "right.png")
    m.transfer([(120, 80)])            # where that point of the source lies in the target
    m.plot_matches().savefig("matches.png")

``compare="qk"`` is the note's way: A_st = softmax(scale Q_s K_t^T) says where each source token
looks in the target, A_ts = softmax(scale Q_t K_s^T) the way back, both averaged over heads, layers
and noise seeds. Queries and keys live in different spaces, so that what a token looks at need not
be what it looks like. The default, ``"kk"``, compares keys with keys (``"qq"``: queries with
queries) by cosine, through the same lazy maps: on known warps of photographs the built-in model
found far more that way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.attention_map import AttentionMap
from flashmaps.backends import check_name
from flashmaps.grids import centres
from flashmaps.pipelines import BUILTIN, DEFAULT_BATCH, DEFAULT_TIMESTEP, Features, features
from flashmaps.statistics import RoundTrip, round_trip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("hard", "soft")

# What is multiplied with what: (of the one image, of the other).
COMPARE = {"qk": ("query", "key"), "kk": ("key", "key"), "qq": ("query", "query")}
READING = {"qk": "queries on keys", "kk": "keys on keys", "qq": "queries on queries"}
TEMPERATURE = 0.005  # of the softmax over cosines; chosen on known warps of other photographs


@dataclass(frozen=True, eq=False)
class Match:
    """Correspondences between two images, both ways, and how far to trust them.

    Tokens are numbered row by row on the token grid. Points are (x, y) in pixels of the images as
    given, (0, 0) being the centre of the top left pixel.

    Attributes:
        source, target: Q, K, token grid, image and settings of each image.
        compare: "qk", "kk" or "qq", see :func:`cross_map`.
        forward_map: A_st, lazy [1, N_s, N_t]; backward_map: A_ts, lazy [1, N_t, N_s].
        round_trip: every statistic of the note; per source token: ``forward`` (f, the best target
            token), ``hard_distance`` and ``soft_distance`` (cycle errors, in the unit square),
            ``spread``, ``return_probability``; per target token: ``backward`` (g),
            ``inverse_entropy`` (nats), ``density``, ``nims``, ``nims_valid``, ``nims_log1p``; and
            ``hard_ims``, ``soft_ims``. All have a leading batch of 1.
        expected_target: [N_s, 2], mean of each row of A_st, (x, y) in the target's unit square.
        expected_source: [N_t, 2], mean of each row of A_ts, (x, y) in the source's unit square.
    """

    source: Features
    target: Features
    compare: str
    forward_map: AttentionMap
    backward_map: AttentionMap
    round_trip: RoundTrip
    expected_target: Tensor  # [N_s, 2]
    expected_source: Tensor  # [N_t, 2]

    # -- per token ---------------------------------------------------------------------------------

    @property
    def forward(self) -> Tensor:  # [N_s] int64
        """f(i): the target token that source token i attends to most."""
        return self.round_trip.forward[0]

    @property
    def backward(self) -> Tensor:  # [N_t] int64
        """g(j): the source token that target token j attends to most."""
        return self.round_trip.backward[0]

    @property
    def mutual(self) -> Tensor:  # [N_s] bool
        """Whether g(f(i)) = i: the token and its match choose each other."""
        here = torch.arange(len(self.forward), device=self.forward.device)
        return self.backward[self.forward] == here

    @property
    def confidence(self) -> Tensor:  # [N_s], 0 to 1
        """R_ii of R = A_st A_ts: how likely a random round trip ends on the token it began at."""
        return self.round_trip.return_probability[0]

    # -- per pixel ---------------------------------------------------------------------------------

    @property
    def source_to_target(self) -> np.ndarray:  # [h_s, w_s, 2]
        """For each source pixel the (x, y) pixel of the target: hard matches, nearest token."""
        return self.field("source", "hard")

    @property
    def source_to_target_soft(self) -> np.ndarray:  # [h_s, w_s, 2]
        """For each source pixel the (x, y) pixel of the target: expectations, bilinear."""
        return self.field("source", "soft")

    @property
    def target_to_source(self) -> np.ndarray:  # [h_t, w_t, 2]
        """For each target pixel the (x, y) pixel of the source: hard matches, nearest token."""
        return self.field("target", "hard")

    @property
    def target_to_source_soft(self) -> np.ndarray:  # [h_t, w_t, 2]
        """For each target pixel the (x, y) pixel of the source: expectations, bilinear."""
        return self.field("target", "soft")

    def field(self, origin: str = "source", kind: str = "hard") -> np.ndarray:
        """(x, y) in the other image for every pixel of ``origin`` ("source" or "target").

        ``kind="hard"``: every pixel moves as the token it lies in moves to its best match.
        ``kind="soft"``: the tokens' mean movements, interpolated bilinearly between token centres.
        """
        if origin not in ("source", "target"):
            raise ValueError(f"origin={origin!r}; wanted 'source' or 'target'")
        here, there = (self.source, self.target)[:: 1 if origin == "source" else -1]
        return pixel_field(
            self._matched(origin, kind),
            here.grid,
            here.image.shape[:2],
            there.image.shape[:2],
            smooth=kind == "soft",
        )

    def transfer(self, points: Any, kind: str = "hard") -> np.ndarray:
        """Where source points lie in the target.

        Args:
            points: [n, 2] of (x, y) in source pixels.
            kind: "hard" or "soft", as in :meth:`field`.

        Returns [n, 2] of (x, y) in target pixels. Raises ValueError for points outside the source.
        """
        points = np.asarray(points, dtype=np.float64)
        if points.ndim == 1 and points.shape[0] == 2:
            points = points[None]
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"points has shape {points.shape}; wanted [n, 2] of (x, y) pixels")
        height, width = self.source.image.shape[:2]
        inside = ((points >= -0.5) & (points < (width - 0.5, height - 0.5))).all(axis=1)
        if not inside.all():
            x, y = points[~inside][0]
            raise ValueError(
                f"point ({x:g}, {y:g}) lies outside the source image of {width} x {height} pixels"
            )
        columns, rows = np.rint(points).astype(int).T
        columns, rows = columns.clip(0, width - 1), rows.clip(0, height - 1)
        return self.field("source", kind)[rows, columns] + (points - np.stack((columns, rows), 1))

    def token_at(self, point: Sequence[float], image: str = "source") -> int:
        """Index of the token that holds pixel (x, y) of the source or the target."""
        here = self.source if image == "source" else self.target
        return token_at(point, here.grid, here.image.shape[:2])

    def _matched(self, origin: str, kind: str) -> Tensor:  # [N, 2] in the other's unit square
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}; wanted 'hard' or 'soft'")
        if kind == "soft":
            return self.expected_target if origin == "source" else self.expected_source
        if origin == "source":
            return centres(self.target.grid)[self.forward.cpu()]
        return centres(self.source.grid)[self.backward.cpu()]

    # -- numbers, pictures, files ------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """The numbers of this match that fit on one page, with plain Python values."""
        rt = self.round_trip
        density = rt.density[0]
        return {
            "source_size": list(self.source.image.shape[:2]),
            "target_size": list(self.target.image.shape[:2]),
            "model_input_size": list(self.source.input_size),
            "source_grid": list(self.source.grid),
            "target_grid": list(self.target.grid),
            "layers": list(self.source.layers),
            "timestep": self.source.timestep,
            "seeds": list(self.source.seeds),
            "inversion_steps": self.source.inversion_steps,
            "prompt": self.source.prompt,
            "target_prompt": self.target.prompt,
            "compare": self.compare,
            "backend": self.forward_map.backend,
            "hard_ims": float(rt.hard_ims[0]),
            "soft_ims": float(rt.soft_ims[0]),
            "mutual_share": float(self.mutual.float().mean()),
            "mean_return_probability": float(self.confidence.mean()),
            "mean_ime_nats": float(rt.inverse_entropy[0].mean()),
            "max_ime_nats": float(np.log(len(self.forward))),
            "density_min": int(density.min()),
            "density_max": int(density.max()),
            "targets_hit_share": float((density > 0).float().mean()),
        }

    def save(self, folder: str | Path) -> Path:
        """Write match.json, correspondences.safetensors and the pictures, whole or not at all.

        An earlier match in ``folder`` is replaced; a folder with anything else in it is refused.
        """
        from safetensors.torch import save_file

        from flashmaps.files import whole_folder, write_json

        with whole_folder(folder, "match.json") as new:
            save_file(self._tensors(), new / "correspondences.safetensors")
            for name, figure in self.pictures():
                figure.savefig(new / f"{name}.png", dpi=120)
            write_json(new / "match.json", self.summary())
        return Path(folder)

    def _tensors(self) -> dict[str, Tensor]:
        rt = self.round_trip
        tensors = {
            "forward": rt.forward,
            "backward": rt.backward,
            "hard_distance": rt.hard_distance,
            "soft_distance": rt.soft_distance,
            "spread": rt.spread,
            "return_probability": rt.return_probability,
            "inverse_entropy": rt.inverse_entropy,
            "density": rt.density,
            "nims": rt.nims,
            "nims_log1p": rt.nims_log1p,
            "expected_target": self.expected_target,
            "expected_source": self.expected_source,
        }
        for origin, other in (("source", "target"), ("target", "source")):
            for kind in KINDS:
                tensors[f"{origin}_to_{other}_{kind}"] = torch.from_numpy(self.field(origin, kind))
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def pictures(self) -> Iterable[tuple[str, Figure]]:
        """(name, figure) of every picture, drawn as they are asked for."""
        height, width = self.source.image.shape[:2]
        yield "matches", self.plot_matches()
        yield "heatmap", self.plot_heatmap((width / 2, height / 2))
        yield "entropy", self.plot_entropy()
        yield "density", self.plot_density()
        yield "cycle_error", self.plot_cycle_error()

    def plot_matches(self, **options: Any) -> Figure:
        """Both images with lines between matched points; see :func:`flashmaps.plots.matches`."""
        from flashmaps import plots

        return plots.matches(self, **options)

    def plot_heatmap(self, point: Sequence[float], **options: Any) -> Figure:
        """Where one source pixel looks in the target; see :func:`flashmaps.plots.heatmap`."""
        from flashmaps import plots

        return plots.heatmap(self, point, **options)

    def plot_entropy(self) -> Figure:
        """How undecided each target token is about its source (IME)."""
        from flashmaps import plots

        return plots.entropy(self)

    def plot_density(self) -> Figure:
        """How many source tokens chose each target token (MD)."""
        from flashmaps import plots

        return plots.density(self)

    def plot_cycle_error(self) -> Figure:
        """How far from home each source token lands after the round trip."""
        from flashmaps import plots

        return plots.cycle_error(self)

    def __repr__(self) -> str:
        (hs, ws), (ht, wt) = self.source.grid, self.target.grid
        rt = self.round_trip
        return (
            f"Match({hs}x{ws} to {ht}x{wt} tokens, hard IMS {float(rt.hard_ims[0]):.4f}, "
            f"soft IMS {float(rt.soft_ims[0]):.4f}, {float(self.mutual.float().mean()):.0%} "
            f"mutual, backend {self.forward_map.backend})"
        )


def match(
    source: Any,
    target: Any,
    *,
    model: Any = BUILTIN,
    layers: str | Iterable[str] | None = None,
    timestep: int | Sequence[int] = DEFAULT_TIMESTEP,
    prompt: str | Sequence[str] = "",
    seeds: int | Sequence[int] = (0,),
    inversion_steps: int | None = None,
    size: int | tuple[int, int] | None = None,
    same_noise: bool = True,
    batch_size: int = DEFAULT_BATCH,
    compare: str = "kk",
    backend: str = "auto",
    progress: bool = False,
) -> Match:
    """Match ``source`` to ``target`` and back.

    Args:
        source, target: a path, PIL image, numpy array or torch tensor each.
        model: ``"builtin"``, a Stable Diffusion (1, 2 or XL) folder or hub id, or a loaded
            pipeline.
        layers, timestep, prompt, seeds, inversion_steps, size, same_noise: see
            :func:`flashmaps.pipelines.features`. A larger size means more tokens; ``prompt`` may be
            a pair.
        batch_size: 2 shows both images to the model at once, where the model sees them at equal
            size; 1 takes less memory.
        compare: "qk", "kk" or "qq", see :func:`cross_map`.
        backend: what computes the maps; see :func:`flashmaps.backends`.
        progress: show bars for what takes long.
    """
    _check_compare(compare)  # before the work, not after it
    check_name(backend)
    found = features(
        model,
        [source, target],
        layers=layers,
        timestep=timestep,
        prompt=prompt,
        seeds=seeds,
        inversion_steps=inversion_steps,
        size=size,
        same_noise=same_noise,
        batch_size=batch_size,
        progress=progress,
    )
    return match_features(found[0], found[1], compare=compare, backend=backend)


def match_features(
    source: Features, target: Features, *, compare: str = "kk", backend: str = "auto"
) -> Match:
    """Match two images whose features are there already, for instance one image against many."""
    forward_map = cross_map(source, target, compare=compare, backend=backend)
    backward_map = cross_map(target, source, compare=compare, backend=backend)
    return Match(
        source=source,
        target=target,
        compare=compare,
        forward_map=forward_map,
        backward_map=backward_map,
        round_trip=round_trip(forward_map, backward_map),
        expected_target=forward_map.expectation()[0].float().cpu(),
        expected_source=backward_map.expectation()[0].float().cpu(),
    )


def cross_map(
    of: Features,
    to: Features,
    *,
    compare: str = "kk",
    pairs: Tensor | None = None,
    backend: str = "auto",
) -> AttentionMap:
    """The map from one image's tokens to the other's, lazy [1, N, M].

    compare="qk": cross-self-attention, softmax(scale Q K^T), the note's eq. 2.4.
    compare="kk", "qq": softmax(cosine / TEMPERATURE) of keys with keys, or queries with queries;
        vectors of each head are scaled to length 1, since a long one would otherwise win
        everywhere.
    pairs: [P, 2], where both hold the queries and keys of several images (see pairs.py).
    """
    _check_compare(compare)
    ours, theirs = (getattr(f, name) for f, name in zip((of, to), COMPARE[compare], strict=True))
    scale = of.scale
    if compare != "qk":
        # bfloat16 rounds a cosine by 0.002, which is much beside the temperature.
        ours, theirs = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (ours, theirs))
        ours, theirs = (torch.nn.functional.normalize(x, dim=-1) for x in (ours, theirs))
        scale = 1 / TEMPERATURE
    return AttentionMap(
        ours,
        theirs,
        scale=scale,
        head_weights=of.head_weights,
        pairs=pairs,
        query_grid=of.grid,
        key_grid=to.grid,
        backend=backend,
    )


def _check_compare(compare: str) -> None:
    if compare not in COMPARE:
        raise ValueError(
            f"compare={compare!r} is not known; choose 'qk' (attention), 'kk' (keys with keys) or "
            "'qq' (queries with queries)"
        )


def pixel_field(
    matched: Tensor,  # [N, 2] (x, y) in the other image's unit square
    grid: tuple[int, int],
    size: tuple[int, int],
    other_size: tuple[int, int],
    *,
    smooth: bool,
) -> np.ndarray:
    """[h, w, 2]: for every pixel of an image of ``size`` its (x, y) pixel in the other image.

    What is carried from tokens to pixels is the movement in the unit square, not the position, so
    that pixels of one token stay apart and tokens that stay put give exactly the identity.
    ``smooth``: bilinear between token centres; otherwise that of the token the pixel lies in.
    Results are clipped to the other image.
    """
    height, width = size
    moved = (matched - centres(grid, dtype=matched.dtype)).reshape(1, *grid, 2)
    planes = moved.permute(0, 3, 1, 2)
    if smooth:
        planes = torch.nn.functional.interpolate(planes, size, mode="bilinear")
    else:
        planes = torch.nn.functional.interpolate(planes, size, mode="nearest-exact")
    here = centres((height, width), dtype=matched.dtype).reshape(height, width, 2)
    there = (here + planes[0].permute(1, 2, 0)).clamp(0, 1).numpy()
    other_height, other_width = other_size
    pixels = there * np.array((other_width, other_height), dtype=there.dtype) - 0.5
    return pixels.clip(0, (other_width - 1, other_height - 1)).astype(np.float32)


def token_at(point: Sequence[float], grid: tuple[int, int], size: tuple[int, int]) -> int:
    """Row-major index of the token that holds the pixel (x, y) of an image of size (h, w)."""
    x, y = point
    height, width = size
    if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5):
        raise ValueError(
            f"point ({x:g}, {y:g}) lies outside the image of {width} x {height} pixels"
        )
    rows, columns = grid
    return int((y + 0.5) / height * rows) * columns + int((x + 0.5) / width * columns)
