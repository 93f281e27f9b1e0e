"""Match two images through a diffusion model's cross-self-attention (the note's eq. 2.4 to 2.9).

    m = fm.match("left.png", "right.png")
    m.transfer([(120, 80)])            # where that point of the source lies in the target
    m.transfer([(120, 80)], min_confidence=0.7)  # NaN where that is not sure enough
    m.plot_matches().savefig("matches.png")

``compare="qk"`` is the note's way: A_st = softmax(scale Q_s K_t^T) says where each source token
looks in the target, A_ts = softmax(scale Q_t K_s^T) the way back, both averaged over heads, layers,
timesteps and noise seeds. Queries and keys live in different spaces, so that what a token looks at
need not be what it looks like. ``"kk"`` compares keys with keys, ``"qq"`` queries with queries, and
``"features"`` what the layers' transformer blocks put out, by cosine, through the same lazy maps.

What is best differs from model to model. ``flashmaps study`` finds it, on drawn scenes whose truth
is known, and keeps it in match.json beside the model's weights
(:mod:`flashmaps.matching.settings`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.diffusion.features import BUILTIN, DEFAULT_BATCH, Features, features, load_model
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.backends.choice import check_name
from flashmaps.maps.grids import centres
from flashmaps.maps.statistics import RoundTrip, round_trip
from flashmaps.matching.confidence import Calibration, score
from flashmaps.matching.readout import READOUTS, check_readout, check_window, read_map
from flashmaps.matching.settings import settings_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = READOUTS
NORMALIZE = ("block", "rows", "columns")

# How a point that is not a token's centre is carried, and how if nothing is said.
BETWEEN = ("token", "bilinear", "query")
_BETWEEN = {"hard": "token", "soft": "bilinear", "window": "bilinear", "parabola": "bilinear"}

# What is multiplied with what: (of the one image, of the other).
COMPARE = {
    "qk": ("query", "key"),
    "kk": ("key", "key"),
    "qq": ("query", "query"),
    "features": ("output", "output"),
}
READING = {
    "qk": "queries on keys",
    "kk": "keys on keys",
    "qq": "queries on queries",
    "features": "features on features",
}
TEMPERATURE = 0.005  # of the softmax over cosines; chosen on known warps of other photographs
_QUERIES = 2**15  # points that are asked for at a time


@dataclass(frozen=True, eq=False)
class Match:
    """Correspondences between two images, both ways, and how far to trust them.

    Tokens are numbered row by row on the token grid. Points are (x, y) in pixels of the images as
    given, (0, 0) being the centre of the top left pixel.

    Attributes:
        source, target: Q, K, token grid, image and settings of each image.
        compare: "qk", "kk", "qq" or "features", see :func:`cross_map`.
        forward_map: A_st, lazy [1, N_s, N_t]; backward_map: A_ts, lazy [1, N_t, N_s].
        round_trip: every statistic of the note; per source token: ``forward`` (f, the best target
            token), ``hard_distance`` and ``soft_distance`` (cycle errors, in the unit square),
            ``spread``, ``return_probability``; per target token: ``backward`` (g),
            ``inverse_entropy`` (nats), ``density``, ``nims``, ``nims_valid``, ``nims_log1p``; and
            ``hard_ims``, ``soft_ims``. All have a leading batch of 1.
        expected_target: [N_s, 2], mean of each row of A_st, (x, y) in the target's unit square.
        expected_source: [N_t, 2], mean of each row of A_ts, (x, y) in the source's unit square.
        max_probability, entropy: [N_s], of the rows of A_st; entropy in nats.
        temperature, normalize: of the maps, see :func:`cross_map`.
        readout, window, between: how :meth:`transfer` and :meth:`field` find places unless told
            otherwise; see :func:`match`.
        calibration: makes a probability of the scores; None: ``confidence`` is a raw score.
    """

    source: Features
    target: Features
    compare: str
    forward_map: AttentionMap
    backward_map: AttentionMap
    round_trip: RoundTrip
    expected_target: Tensor  # [N_s, 2]
    expected_source: Tensor  # [N_t, 2]
    max_probability: Tensor  # [N_s]
    entropy: Tensor  # [N_s]
    temperature: float | None = None
    normalize: str = "block"
    readout: str = "hard"
    window: int = 1
    between: str | None = None
    calibration: Calibration | None = None
    _places: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

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
        """How far to trust the match of each source token.

        With a calibration (``calibrated``): the probability that the match is right, which is off
        by at most ``calibration.tolerance`` times ``calibration.of``, given that the target shows
        the place at all. It was fitted on drawn scenes (``calibration.fitted_on``) and holds as far
        as images are like them.

        Without one: R_ii of R = A_st A_ts, how likely a random round trip ends on the token it
        began at. That ranks matches, but is no probability of being right.
        """
        if self.calibration is None:
            return self.round_trip.return_probability[0]
        of = self.round_trip, self.max_probability[None], self.entropy[None]
        scores = {name: score(name, *of)[0] for name in self.calibration.scores}
        return self.calibration.probability(scores)

    @property
    def calibrated(self) -> bool:
        """Whether ``confidence`` is a probability."""
        return self.calibration is not None

    def confidence_at(self, points: Any) -> np.ndarray:
        """Confidence of source points [n, 2] of (x, y) pixels, that of their tokens: [n]."""
        points = self._checked(points)
        tokens = [self.token_at(point) for point in points]
        return self.confidence.float().cpu().numpy()[tokens]

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

    def field(self, origin: str = "source", kind: str | None = None) -> np.ndarray:
        """(x, y) in the other image for every pixel of ``origin`` ("source" or "target").

        Args:
            origin: "source" or "target".
            kind: how a row of the map becomes a place, see :func:`flashmaps.matching.readout.read`;
            default
                the match's own ``readout``. With "hard" every pixel moves as the token it lies in
                moves to its best match. With the others the tokens' movements are interpolated
                bilinearly between token centres.
        """
        if origin not in ("source", "target"):
            raise ValueError(f"origin={origin!r}; wanted 'source' or 'target'")
        kind = self._kind(kind)
        here, there = (self.source, self.target)[:: 1 if origin == "source" else -1]
        return pixel_field(
            self._matched(origin, kind),
            here.grid,
            here.image.shape[:2],
            there.image.shape[:2],
            smooth=kind != "hard",
        )

    def transfer(
        self,
        points: Any,
        kind: str | None = None,
        *,
        between: str | None = None,
        min_confidence: float | None = None,
    ) -> np.ndarray:
        """Where source points lie in the target.

        Args:
            points: [n, 2] of (x, y) in source pixels.
            kind: "hard", "soft", "window" or "parabola", see
            :func:`flashmaps.matching.readout.read`;
                default the match's own ``readout``.
            between: how a point between token centres is carried. "token": it moves as the token it
                lies in. "bilinear": as the tokens around it, interpolated. "query": the image's
                features are interpolated at the point, and the map has a row for it. Default: the
                match's own ``between``; else "token" for "hard" and "bilinear" for the others.
            min_confidence: abstain below it, 0 to 1: points whose ``confidence_at`` is lower come
                back as (NaN, NaN).

        Returns [n, 2] of (x, y) in target pixels. Raises ValueError for points outside the source.
        """
        points = self._checked(points)
        if between is None and kind in (None, self.readout):
            between = self.between
        kind = self._kind(kind)
        between = between_of(kind, between)
        _check_between(between)
        if min_confidence is not None and not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence={min_confidence!r}; wanted a number from 0 to 1")
        found = self._carried(points, kind, between)
        if min_confidence is not None and len(points):
            found[self.confidence_at(points) < min_confidence] = np.nan
        return found

    def _carried(self, points: np.ndarray, kind: str, between: str) -> np.ndarray:  # [n, 2]
        height, width = self.source.image.shape[:2]
        unit = torch.from_numpy((points + 0.5) / (width, height))
        if between == "query":
            there = place_points(
                self.source,
                self.target,
                unit[None],
                compare=self.compare,
                temperature=self.temperature,
                normalize=self.normalize,
                readout=kind,
                window=self.window,
                between=between,
                backend=self.forward_map.backend,
            )[0]
        else:
            index, weight = corners(unit, self.source.grid, smooth=between == "bilinear")
            movement = self._matched("source", kind) - centres(self.source.grid)
            there = unit + (weight[..., None] * movement[index]).sum(-2)
        other_height, other_width = self.target.image.shape[:2]
        size = np.array((other_width, other_height))
        return (there.double().clamp(0, 1).numpy() * size - 0.5).clip(0, size - 1)

    def _checked(self, points: Any) -> np.ndarray:  # [n, 2]
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
        return points

    def token_at(self, point: Sequence[float], image: str = "source") -> int:
        """Index of the token that holds pixel (x, y) of the source or the target."""
        here = self.source if image == "source" else self.target
        return token_at(point, here.grid, here.image.shape[:2])

    def _kind(self, kind: str | None) -> str:
        if kind is None:
            return self.readout
        check_readout("kind", kind)
        return kind

    def _matched(self, origin: str, kind: str) -> Tensor:  # [N, 2] in the other's unit square
        if kind == "soft":
            return self.expected_target if origin == "source" else self.expected_source
        if kind == "hard":
            if origin == "source":
                return centres(self.target.grid)[self.forward.cpu()]
            return centres(self.source.grid)[self.backward.cpu()]
        if (origin, kind) not in self._places:
            A = self.forward_map if origin == "source" else self.backward_map
            self._places[origin, kind] = read_map(A, kind, self.window)[0].float().cpu()
        return self._places[origin, kind]

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
            "temperature": self.temperature,
            "normalize": self.normalize,
            "readout": self.readout,
            "window": self.window,
            "between": between_of(self.readout, self.between),
            "calibrated": self.calibrated,
            "backend": self.forward_map.backend,
            "hard_ims": float(rt.hard_ims[0]),
            "soft_ims": float(rt.soft_ims[0]),
            "mutual_share": float(self.mutual.float().mean()),
            "mean_return_probability": float(rt.return_probability[0].mean()),
            "mean_confidence": float(self.confidence.mean()),
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
            "confidence": self.confidence[None].clone(),  # no second view of another
            "expected_target": self.expected_target,
            "expected_source": self.expected_source,
        }
        for origin, other in (("source", "target"), ("target", "source")):
            for kind in dict.fromkeys(("hard", "soft", self.readout)):
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
        """Both images with lines between matched points; see
        :func:`flashmaps.matching.plots.matches`."""
        from flashmaps.matching import plots

        return plots.matches(self, **options)

    def plot_heatmap(self, point: Sequence[float], **options: Any) -> Figure:
        """Where one source pixel looks in the target; see
        :func:`flashmaps.matching.plots.heatmap`."""
        from flashmaps.matching import plots

        return plots.heatmap(self, point, **options)

    def plot_entropy(self) -> Figure:
        """How undecided each target token is about its source (IME)."""
        from flashmaps.matching import plots

        return plots.entropy(self)

    def plot_density(self) -> Figure:
        """How many source tokens chose each target token (MD)."""
        from flashmaps.matching import plots

        return plots.density(self)

    def plot_cycle_error(self) -> Figure:
        """How far from home each source token lands after the round trip."""
        from flashmaps.matching import plots

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
    timestep: int | Sequence[int] | None = None,
    prompt: str | Sequence[str] = "",
    seeds: int | Sequence[int] | None = None,
    inversion_steps: int | None = None,
    size: int | tuple[int, int] | None = None,
    same_noise: bool | None = None,
    batch_size: int = DEFAULT_BATCH,
    compare: str | None = None,
    temperature: float | None = None,
    normalize: str | None = None,
    readout: str | None = None,
    window: int | None = None,
    between: str | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Match:
    """Match ``source`` to ``target`` and back.

    An argument that is left out is the model's own, where it has a match.json
    (:mod:`flashmaps.matching.settings`; the built-in model may), and else the default named below.
    The confidence is a probability only where all of them are the model's own.

    Args:
        source, target: a path, PIL image, numpy array or torch tensor each.
        model: ``"builtin"``, a Stable Diffusion (1, 2 or XL) folder or hub id, or a loaded
            pipeline.
        layers, timestep, prompt, seeds, inversion_steps, size, same_noise: see
            :func:`flashmaps.diffusion.features.features`. The maps of several layers, timesteps and
            seeds are averaged. A larger size means more tokens; ``prompt`` may be a pair.
        batch_size: 2 shows both images to the model at once, where the model sees them at equal
            size; 1 takes less memory.
        compare: "qk", "kk", "qq" or "features", see :func:`cross_map`; default "kk".
        temperature: of the softmax, see :func:`cross_map`.
        normalize: "block", "rows" or "columns", see :class:`flashmaps.AttentionMap`; default
            "block".
        readout: how a row becomes a place: "hard", "soft", "window" or "parabola", see
            :func:`flashmaps.matching.readout.read`; default "hard".
        window: tokens to each side that readout "window" averages over; default 1.
        between: how points between token centres are carried, see :meth:`Match.transfer`.
        backend: what computes the maps; see :func:`flashmaps.maps.backends.choice`.
        progress: show bars for what takes long.

    Raises ValueError for arguments out of range, before the model runs.
    """
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        layers = tuple(layers)
    given: dict[str, Any] = {
        "compare": compare, "temperature": temperature, "normalize": normalize,
        "readout": readout, "window": window, "between": between,
    }  # fmt: skip
    check_options(**given)  # before the work, not after it
    check_name(backend)
    pipe = load_model(model)
    if inversion_steps is not None and seeds is None:
        seeds = (0,)  # inversion draws no noise
    settings = settings_of(pipe).with_given(
        **given, layers=layers, timestep=timestep, seeds=seeds, size=size, same_noise=same_noise
    )
    if prompt != "" or inversion_steps is not None:  # not what the confidence was fitted to
        settings = replace(settings, calibration=None)
    found = features(
        pipe,
        [source, target],
        layers=settings.layers,
        timestep=settings.timestep,
        prompt=prompt,
        seeds=settings.seeds,
        inversion_steps=inversion_steps,
        size=settings.size,
        same_noise=settings.same_noise,
        batch_size=batch_size,
        outputs=settings.compare == "features",
        progress=progress,
    )
    return match_features(
        found[0],
        found[1],
        compare=settings.compare,
        temperature=settings.temperature,
        normalize=settings.normalize,
        readout=settings.readout,
        window=settings.window,
        between=settings.between,
        calibration=settings.calibration,
        backend=backend,
    )


def match_features(
    source: Features,
    target: Features,
    *,
    compare: str = "kk",
    temperature: float | None = None,
    normalize: str = "block",
    readout: str = "hard",
    window: int = 1,
    between: str | None = None,
    calibration: Calibration | None = None,
    backend: str = "auto",
) -> Match:
    """Match two images whose features are there already, for instance one image against many.

    For the arguments see :func:`match`; ``calibration`` must belong to the others.
    """
    check_options(compare, temperature, normalize, readout, window, between)
    options: dict[str, Any] = {
        "compare": compare, "temperature": temperature, "normalize": normalize, "backend": backend,
    }  # fmt: skip
    forward_map = cross_map(source, target, **options)
    backward_map = cross_map(target, source, **options)
    rows = forward_map.reduce("expectation", "max", "entropy")
    return Match(
        source=source,
        target=target,
        compare=compare,
        forward_map=forward_map,
        backward_map=backward_map,
        round_trip=round_trip(forward_map, backward_map),
        expected_target=rows.expectation[0].float().cpu(),
        expected_source=backward_map.expectation()[0].float().cpu(),
        max_probability=rows.max[0],
        entropy=rows.entropy[0],
        temperature=temperature,
        normalize=normalize,
        readout=readout,
        window=window,
        between=between,
        calibration=calibration,
    )


def cross_map(
    of: Features,
    to: Features,
    *,
    compare: str = "kk",
    temperature: float | None = None,
    normalize: str = "block",
    pairs: Tensor | None = None,
    backend: str = "auto",
) -> AttentionMap:
    """The map from one image's tokens to the other's, lazy [1, N, M].

    compare="qk": cross-self-attention, softmax(scale Q K^T / temperature), the note's eq. 2.4;
        ``temperature`` is 1 unless given.
    compare="kk", "qq", "features": softmax(cosine / temperature) of keys with keys, queries with
        queries, or the outputs of the layers' blocks, as one head each (``outputs=True`` of
        :func:`flashmaps.diffusion.features.features`); ``temperature`` is 0.005 unless given.
        Vectors of each head are scaled to length 1, since a long one would otherwise win
        everywhere.
    normalize: "block", "rows" or "columns", see :class:`flashmaps.AttentionMap`.
    pairs: [P, 2], where both hold the queries and keys of several images (see pairs.py).
    """
    check_options(compare=compare, temperature=temperature, normalize=normalize)
    ours, theirs = (getattr(f, name) for f, name in zip((of, to), COMPARE[compare], strict=True))
    if ours is None or theirs is None:
        raise ValueError(
            "compare='features' needs the outputs of the layers' blocks; take the features with "
            "outputs=True"
        )
    weights: Tensor | None = of.head_weights
    if compare == "qk":
        scale = of.scale / (1.0 if temperature is None else temperature)
    else:
        # bfloat16 rounds a cosine by 0.002, which is much beside the temperature.
        ours, theirs = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (ours, theirs))
        ours, theirs = (torch.nn.functional.normalize(x, dim=-1) for x in (ours, theirs))
        scale = 1 / (TEMPERATURE if temperature is None else temperature)
    if compare == "features":
        weights = None  # blocks count alike, however many heads their layers have
    whole = ours.shape[2] == of.grid[0] * of.grid[1]  # else: points between tokens
    return AttentionMap(
        ours,
        theirs,
        scale=scale,
        head_weights=weights,
        pairs=pairs,
        normalize=normalize,
        query_grid=of.grid if whole else None,
        key_grid=to.grid,
        backend=backend,
    )


def place_points(
    of: Features,
    to: Features,
    points: Tensor,
    *,
    readout: str = "hard",
    window: int = 1,
    between: str = "token",
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Where points of one image lie in the other, in unit squares, from the rows they need alone.

    Args:
        of, to: features of B images each; usually B is 1.
        points: [B, n, 2], (x, y).
        readout, window, between: see :func:`match`.
        options: compare, temperature and normalize, as in :func:`cross_map`.

    Returns [B, n, 2] float32.
    """
    if between == "query":
        parts = [
            read_map(
                cross_map(at_points(of, part), to, backend=backend, **options), readout, window
            )
            for part in points.split(_QUERIES, dim=1)
        ]
        return torch.cat(parts, dim=1).float().cpu()
    index, weight = corners(points, of.grid, smooth=between == "bilinear")
    A = cross_map(at_tokens(of, index.flatten(1)), to, backend=backend, **options)
    there = read_map(A, readout, window).float().cpu().reshape(*index.shape, 2)
    return points + (weight[..., None] * (there - centres(of.grid)[index])).sum(-2)


def corners(
    points: Tensor, grid: tuple[int, int], *, smooth: bool
) -> tuple[Tensor, Tensor]:  # [..., 4] int64 and float, or [..., 1]
    """The tokens that carry each point [..., 2] of the unit square, and their weights.

    ``smooth``: the four around it, bilinear between their centres and without change beyond the
    outermost; otherwise the token that it lies in.
    """
    size = torch.tensor([grid[1], grid[0]])
    if not smooth:
        cell = (points * size).floor().long().clamp_min(0).minimum(size - 1)
        return (cell[..., 1] * grid[1] + cell[..., 0])[..., None], torch.ones_like(points[..., :1])
    place = (points * size - 0.5).clamp_min(0).minimum(size - 1.0)
    low = place.floor().long()
    high = (low + 1).minimum(size - 1)
    share = place - low
    index, weight = [], []
    for y, wy in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
        for x, wx in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
            index.append(y * grid[1] + x)
            weight.append(wy * wx)
    return torch.stack(index, -1), torch.stack(weight, -1)


def at_tokens(of: Features, index: Tensor) -> Features:
    """The features of some tokens, [B, n] row-major, in place of all."""

    def picked(x: Tensor) -> Tensor:  # [B, H, N, d] to [B, H, n, d]
        if not x.shape[2]:  # left out, since it is not compared
            return x
        where = index.to(x.device)[:, None, :, None]
        return x.gather(2, where.expand(-1, x.shape[1], -1, x.shape[3]))

    output = None if of.output is None else picked(of.output)
    return replace(of, query=picked(of.query), key=picked(of.key), output=output)


def at_points(of: Features, points: Tensor) -> Features:
    """The features at points of the image, [B, n, 2] in the unit square, in place of its tokens.

    Vectors are interpolated bilinearly between token centres, and are those of the nearest token
    beyond the outermost centres.
    """
    index, weight = corners(points, of.grid, smooth=True)
    around = at_tokens(of, index.flatten(1))

    def mixed(x: Tensor) -> Tensor:  # [B, H, 4 n, d] to [B, H, n, d]
        if not x.shape[2]:
            return x
        shares = weight.to(x)[:, None, :, :, None]
        return (x.unflatten(2, index.shape[1:]) * shares).sum(3)

    output = None if around.output is None else mixed(around.output)
    return replace(of, query=mixed(around.query), key=mixed(around.key), output=output)


def check_options(
    compare: str | None = None,
    temperature: float | None = None,
    normalize: str | None = None,
    readout: str | None = None,
    window: int | None = None,
    between: str | None = None,
) -> None:
    """ValueError, naming the argument, for one that is given and cannot be used."""
    if compare is not None and compare not in COMPARE:
        raise ValueError(
            f"compare={compare!r} is not known; choose 'qk' (attention), 'kk' (keys with keys), "
            "'qq' (queries with queries) or 'features' (what the blocks put out)"
        )
    if temperature is not None and not (
        isinstance(temperature, (int, float)) and 0 < temperature < float("inf")
    ):
        raise ValueError(f"temperature={temperature!r}; wanted a number above 0")
    if normalize is not None and normalize not in NORMALIZE:
        raise ValueError(f"normalize={normalize!r}; wanted {', '.join(map(repr, NORMALIZE))}")
    if readout is not None:
        check_readout("readout", readout)
    if window is not None:
        check_window(window)
    if between is not None:
        _check_between(between)


def between_of(readout: str, between: str | None) -> str:
    """How points are carried: ``between`` where it is given, else what suits the readout."""
    return _BETWEEN[readout] if between is None else between


def _check_between(between: object) -> None:
    if between not in BETWEEN:
        raise ValueError(f"between={between!r}; wanted 'token', 'bilinear' or 'query'")


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
