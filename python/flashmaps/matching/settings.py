"""How a model matches best: the file match.json beside its weights, found by ``flashmaps study``.

A file is meant for the very weights it was found with, and names them; with others it is left
aside, with a warning. Where there is none, the plain defaults of :class:`MatchSettings` hold.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from flashmaps.diffusion.features import DEFAULT_TIMESTEP
from flashmaps.matching.confidence import Calibration

FILE = "match.json"
FORMAT = "flashmaps match settings 1"


@dataclass(frozen=True)
class MatchSettings:
    """Arguments of :func:`flashmaps.match` that depend on the model, and the confidence.

    Attributes:
        compare, layers, timestep, seeds, same_noise, size, temperature, normalize, readout, window,
            between: see :func:`flashmaps.match`.
        calibration: of the confidence, for these very settings; None: there is none.
    """

    compare: str = "kk"
    layers: tuple[str, ...] | None = None
    timestep: int | tuple[int, ...] = DEFAULT_TIMESTEP
    seeds: tuple[int, ...] = (0,)
    same_noise: bool = True
    size: int | None = None
    temperature: float | None = None
    normalize: str = "block"
    readout: str = "hard"
    window: int = 1
    between: str | None = None
    calibration: Calibration | None = None

    def with_given(self, **given: Any) -> MatchSettings:
        """With the arguments that are not None in place of these.

        A temperature belongs to what is compared: another comparison drops it. Whatever changes the
        map or where its rows point drops the calibration.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        if chosen.get("compare", self.compare) != self.compare:
            chosen.setdefault("temperature", None)
        changed = [name for name, value in chosen.items() if _plain(value) != self._plain(name)]
        if not changed:
            return self
        return replace(self, **chosen, calibration=None)

    def _plain(self, name: str) -> Any:
        return _plain(getattr(self, name))

    def to_json(self, weights: str, **more: Any) -> dict[str, Any]:
        """What match.json holds, for the weights of this fingerprint."""
        plain = {
            each.name: _plain(getattr(self, each.name))
            for each in fields(self)
            if each.name != "calibration"
        }
        calibration = None if self.calibration is None else self.calibration.to_json()
        return {
            "format": FORMAT, "weights": weights, "settings": plain, "confidence": calibration,
            **more,
        }  # fmt: skip

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> MatchSettings:
        """From what match.json holds. Raises ValueError that says what is wrong with it."""
        if found.get("format") != FORMAT:
            raise ValueError(f"its format is {found.get('format')!r}; wanted {FORMAT!r}")
        given = dict(found["settings"])
        for name in ("layers", "timestep", "seeds"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        known = {each.name for each in fields(cls)} - {"calibration"}
        if set(given) - known:
            raise ValueError(f"its settings hold {sorted(set(given) - known)}, which are not known")
        confidence = found.get("confidence")
        calibration = None if confidence is None else Calibration.from_json(confidence)
        return cls(**given, calibration=calibration)


def _plain(value: Any) -> Any:
    """As JSON will have it, one whole number for several that are one."""
    if isinstance(value, (list, tuple)):
        return [int(each) if not isinstance(each, str) else each for each in value]
    return value


def settings_of(pipe: Any) -> MatchSettings:
    """The settings that lie beside a loaded pipeline's weights, else the plain defaults.

    Raises ValueError for a match.json that cannot be read.
    """
    folder = folder_of(pipe)
    if folder is None or not (folder / FILE).is_file():
        return MatchSettings()
    file = folder / FILE
    try:
        found = json.loads(file.read_text("utf-8"))
        settings = MatchSettings.from_json(found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is not readable as match settings: {error}") from None
    here = fingerprint(pipe)
    if found.get("weights") != here:
        warnings.warn(
            f"{str(file)!r} belongs to other weights ({found.get('weights')}; these are {here}) "
            "and is left aside; `flashmaps study` finds settings for these",
            stacklevel=3,
        )
        return MatchSettings()
    return settings


def folder_of(pipe: Any) -> Path | None:
    """The folder that a pipeline was loaded from; None if it was not, or from the hub."""
    name = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    if not isinstance(name, (str, Path)) or not str(name):
        return None
    path = Path(name)
    return path if path.is_dir() else None


def fingerprint(pipe: Any) -> str:
    """A few values of every weight of the UNet, hashed: tells one model from another."""
    digest = hashlib.sha256()
    for name, weight in pipe.unet.state_dict().items():
        digest.update(name.encode())
        if weight.is_meta:  # offloaded: what it holds is elsewhere
            continue
        some = weight.detach().flatten()[:16].to("cpu", torch.float32)
        digest.update(some.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
