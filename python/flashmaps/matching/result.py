"""What matching two images gives: correspondences both ways, how sure they are, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.arguments import number
from flashmaps.diffusion.features import Features
from flashmaps.files import whole_folder, write_json
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import Grid, centres
from flashmaps.maps.statistics import RoundTrip
from flashmaps.matching import plots
from flashmaps.matching.confidence import judged
from flashmaps.matching.cross_map import place_points
from flashmaps.matching.options import MatchOptions
from flashmaps.matching.points import corners, pixel_field, token_at
from flashmaps.matching.readout import check_readout, read_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Match:
    """Correspondences between two images, both ways, and how far to trust them.

    Tokens are numbered row by row on the token grid. Points are (x, y) in pixels of the images as
    given, (0, 0) being the centre of the top left pixel.

    Attributes:
        source, target: Q, K, token grid, image and settings of each image.
        options: how the maps were made, and how places are found unless told otherwise; its fields
            (compare, temperature, normalize, readout, window, between, calibration) are attributes
            of the match too.
        forward_map: A_st, lazy [1, N_s, N_t]; backward_map: A_ts, lazy [1, N_t, N_s].
        round_trip: every statistic of the note; per source token: ``forward`` (f, the best target
            token), ``hard_distance`` and ``soft_distance`` (cycle errors, in the unit square),
            ``spread``, ``return_probability``; per target token: ``backward`` (g),
            ``inverse_entropy`` (nats), ``density``, ``nims``, ``nims_valid``, ``nims_log1p``; and
            ``hard_ims``, ``soft_ims``. All have a leading batch of 1.
        expected_target: [N_s, 2], mean of each row of A_st, (x, y) in the target's unit square.
        expected_source: [N_t, 2], mean of each row of A_ts, (x, y) in the source's unit square.
        max_probability, entropy: [N_s], of the rows of A_st; entropy in nats.
    """

    source: Features
    target: Features
    options: MatchOptions
    forward_map: AttentionMap
    backward_map: AttentionMap
    round_trip: RoundTrip
    expected_target: Tensor  # [N_s, 2]
    expected_source: Tensor  # [N_t, 2]
    max_probability: Tensor  # [N_s]
    entropy: Tensor  # [N_s]
    _places: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    compare = property(attrgetter("options.compare"))
    temperature = property(attrgetter("options.temperature"))
    normalize = property(attrgetter("options.normalize"))
    readout = property(attrgetter("options.readout"))
    window = property(attrgetter("options.window"))
    between = property(attrgetter("options.between"))
    calibration = property(attrgetter("options.calibration"))

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
        """How far to trust the hard match f(i) of each source token.

        With a calibration (``calibrated``): the probability that the match is right, which is off
        by at most ``calibration.tolerance`` times ``calibration.of``, given that the target shows
        the place at all. It was fitted on drawn scenes (``calibration.fitted_on``) and holds as far
        as images are like them.

        Without one: R_ii of R = A_st A_ts, how likely a random round trip ends on the token it
        began at. That ranks matches, but is no probability of being right.
        """
        if self.calibration is None:
            return self.round_trip.return_probability[0]
        return judged(self.calibration, *self._judges)[0]

    @property
    def _judges(self) -> tuple[RoundTrip, Tensor, Tensor, tuple[Grid, Grid]]:
        grids = self.source.grid, self.target.grid
        return self.round_trip, self.max_probability[None], self.entropy[None], grids

    @property
    def calibrated(self) -> bool:
        """Whether ``confidence`` is a probability."""
        return self.calibration is not None

    def confidence_at(self, points: Any) -> np.ndarray:
        """Confidence of where `transfer` puts source points [n, 2] of (x, y) pixels: [n].

        What is asked of a point is asked of the token that holds it.
        """
        points = self._checked(points)
        if self.calibration is None:  # of the token, wherever it goes
            return self._trusted(points, points)
        return self._trusted(points, self._carried(points, self.options))

    def _trusted(self, points: np.ndarray, placed: np.ndarray) -> np.ndarray:  # [n]
        """Confidence of points that are put at these pixels of the target."""
        tokens = torch.tensor([self.token_at(point) for point in points], dtype=torch.int64)
        if self.calibration is None or not len(tokens):
            return self.confidence.float().cpu()[tokens].numpy()
        there = torch.tensor([self.token_at(point, "target") for point in placed])
        here = (x[None].to(self.forward.device) for x in (tokens, there))
        return judged(self.calibration, *self._judges, *here)[0].float().cpu().numpy()

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
                default the match's own ``readout``. With "hard" every pixel moves as the token it
                lies in moves to its best match. With the others the tokens' movements are
                interpolated bilinearly between token centres.
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
            kind: "hard", "soft", "window", "parabola" or "consensus", see
                :func:`flashmaps.matching.readout.read`; default the match's own ``readout``.
            between: how a point between token centres is carried. "token": it moves as the token it
                lies in. "bilinear": as the tokens around it, interpolated. "query": the image's
                features are interpolated at the point, and the map has a row for it. Default: the
                match's own ``between``; else "token" for "hard", "query" for "consensus" and
                "bilinear" for the others.
            min_confidence: abstain below it, 0 to 1: points whose confidence, at the places found,
                is lower come back as (NaN, NaN).

        Returns [n, 2] of (x, y) in target pixels. Raises ValueError for points outside the source.
        """
        points = self._checked(points)
        if between is None and kind in (None, self.readout):
            between = self.between
        options = replace(self.options, readout=self._kind(kind), between=between)
        if min_confidence is not None:
            number("min_confidence", min_confidence, least=0, most=1)
        found = self._carried(points, options)
        if min_confidence is not None and len(points):
            found[self._trusted(points, found) < min_confidence] = np.nan
        return found

    def _carried(self, points: np.ndarray, options: MatchOptions) -> np.ndarray:  # [n, 2]
        height, width = self.source.image.shape[:2]
        unit = torch.from_numpy((points + 0.5) / (width, height))
        between = options.carried_by
        if between == "query":
            backend = self.forward_map.backend
            there = place_points(self.source, self.target, unit[None], options, backend=backend)[0]
        else:
            index, weight = corners(unit, self.source.grid, smooth=between == "bilinear")
            movement = self._matched("source", options.readout) - centres(self.source.grid)
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

    def place_of(self, token: int, origin: str = "source") -> Tensor:  # [2]
        """(x, y) in the other image's unit square, by the match's own readout, of one token.

        By consensus it reads the rows of the token's neighbours alone, not the whole map.
        """
        if self.readout != "consensus":
            return self._matched(origin, self.readout)[token]
        here, there = (self.source, self.target)[:: 1 if origin == "source" else -1]
        at = centres(here.grid)[None, token : token + 1]
        options = replace(self.options, between="query")
        return place_points(here, there, at, options, backend=self.forward_map.backend)[0, 0]

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
            "between": self.options.carried_by,
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
        with whole_folder(folder, "match") as new:
            self.write(new)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """The same into an empty folder that somebody else takes care of."""
        from safetensors.torch import save_file

        save_file(self._tensors(), folder / "correspondences.safetensors")
        for name, figure in self.pictures():
            figure.savefig(folder / f"{name}.png", dpi=120)
        write_json(folder / "match.json", self.summary())

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
        return plots.matches(self, **options)

    def plot_heatmap(self, point: Sequence[float], **options: Any) -> Figure:
        """Where one source pixel looks in the target; see
        :func:`flashmaps.matching.plots.heatmap`."""
        return plots.heatmap(self, point, **options)

    def plot_entropy(self) -> Figure:
        """How undecided each target token is about its source (IME)."""
        return plots.entropy(self)

    def plot_density(self) -> Figure:
        """How many source tokens chose each target token (MD)."""
        return plots.density(self)

    def plot_cycle_error(self) -> Figure:
        """How far from home each source token lands after the round trip."""
        return plots.cycle_error(self)

    def __repr__(self) -> str:
        (hs, ws), (ht, wt) = self.source.grid, self.target.grid
        rt = self.round_trip
        return (
            f"Match({hs}x{ws} to {ht}x{wt} tokens, hard IMS {float(rt.hard_ims[0]):.4f}, "
            f"soft IMS {float(rt.soft_ims[0]):.4f}, {float(self.mutual.float().mean()):.0%} "
            f"mutual, backend {self.forward_map.backend})"
        )
