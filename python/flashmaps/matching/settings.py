"""How a model matches best: match-settings.json beside its weights, found by ``flashmaps study``.

A file is meant for the very weights it was found with, and names them; with others it is left
aside, with a warning. Where there is none, the plain defaults of :class:`MatchSettings` hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch

from flashmaps.arguments import switch, whole
from flashmaps.diffusion.features import DEFAULT_TIMESTEP
from flashmaps.matching.options import MatchOptions

FILE = "match-settings.json"
FORMAT = "flashmaps match settings 1"


@dataclass(frozen=True)
class MatchSettings(MatchOptions):
    """Arguments of :func:`flashmaps.match` that depend on the model: which features, and how read.

    Attributes:
        layers, timestep, seeds, same_noise, size: see :func:`flashmaps.match`.
        calibration: of the confidence, for these very settings; None: there is none.
    """

    layers: tuple[str, ...] | None = None
    timestep: int | tuple[int, ...] = DEFAULT_TIMESTEP
    seeds: tuple[int, ...] = (0,)
    same_noise: bool = True
    size: int | None = None

    def with_given(self, **given: Any) -> Self:
        """As of :class:`MatchOptions`; layers may be one pattern or several."""
        layers = given.get("layers")
        if layers is not None:
            given["layers"] = (layers,) if isinstance(layers, str) else tuple(layers)
        return super().with_given(**given)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """``timestep`` as several, also where it is one."""
        return (self.timestep,) if isinstance(self.timestep, int) else tuple(self.timestep)

    @property
    def options(self) -> MatchOptions:
        """What is not about the features."""
        own = {each.name: getattr(self, each.name) for each in fields(MatchOptions)}
        return MatchOptions(**own)

    @property
    def for_features(self) -> dict[str, Any]:
        """Arguments of :func:`flashmaps.diffusion.features.features`."""
        others = {each.name for each in fields(MatchOptions)}
        return {
            each.name: getattr(self, each.name) for each in fields(self) if each.name not in others
        }

    def to_file(self, weights: str, **more: Any) -> dict[str, Any]:
        """What that file holds, for the weights of this fingerprint."""
        plain = self.to_json()
        confidence = plain.pop("confidence")
        return {
            "format": FORMAT, "weights": weights, "settings": plain, "confidence": confidence,
            **more,
        }  # fmt: skip

    @classmethod
    def from_file(cls, found: Mapping[str, Any]) -> MatchSettings:
        """From what that file holds. Raises ValueError that says what is wrong with it."""
        if not isinstance(found, Mapping):
            raise ValueError(f"it holds {type(found).__name__}; wanted an object")
        if found.get("format") != FORMAT:
            raise ValueError(f"its format is {found.get('format')!r}; wanted {FORMAT!r}")
        made = cls.from_json({**found["settings"], "confidence": found.get("confidence")})
        for name, value in (("timestep", made.timestep), ("seeds", made.seeds)):
            several = value if isinstance(value, tuple) else (value,)
            for each in several:
                whole(name, each, 0)
            if not several:
                raise ValueError(f"its {name} is empty")
        if made.size is not None:
            whole("size", made.size, 1)
        switch("same_noise", made.same_noise)
        if made.layers is not None and not all(isinstance(each, str) for each in made.layers):
            raise ValueError(f"its layers are {made.layers!r}")
        return made


def settings_of(pipe: Any) -> MatchSettings:
    """The settings that lie beside a loaded pipeline's weights, else the plain defaults.

    Raises ValueError for a file that cannot be read as settings.
    """
    folder = folder_of(pipe)
    if folder is None or not (folder / FILE).is_file():
        return MatchSettings()
    file = folder / FILE
    try:
        found = json.loads(file.read_text("utf-8"))
        settings = MatchSettings.from_file(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
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


def check_beside(folder: Path) -> None:
    """Raise ValueError unless settings may be written beside the weights in ``folder``."""
    file = folder / FILE
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"keep: the model's folder {str(folder)!r} is not writable")
    if os.path.lexists(file):
        try:
            ours = json.loads(file.read_text("utf-8"))["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise ValueError(
                f"keep: {str(file)!r} is there, and is none that `flashmaps study` has written; "
                "move it away"
            )


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
