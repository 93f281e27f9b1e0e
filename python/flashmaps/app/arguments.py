"""Arguments that several commands share: their types, and what --help says of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

OWN = "the model's own"
Model = Annotated[
    str, typer.Option(help="'builtin', a Stable Diffusion folder, or a hub id such as owner/name.")
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        help="Pattern of self-attention layers; may be repeated.",
        show_default=f"{OWN}, or of the decoder",
    ),
]
Timestep = Annotated[
    list[int] | None,
    typer.Option(
        help="Noise level shown to the model: 0 is none, 999 nearly all; may be repeated.",
        show_default=f"{OWN}, or 1",
    ),
]
Seed = Annotated[
    list[int] | None,
    typer.Option(
        help="Noise seed; repeat it to average over several.", show_default=f"{OWN}, or 0"
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(
        help="kk, qq, features: keys, queries or block outputs by cosine. qk: attention.",
        show_default=f"{OWN}, or kk",
    ),
]
Backend = Annotated[str, typer.Option(help="What computes the maps; flashmaps doctor lists them.")]
Size = Annotated[
    int | None,
    typer.Option(
        help="Longer side in pixels that the model sees; more pixels, more tokens.",
        show_default="what the model was trained on",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Where the model runs, such as cuda.", show_default="cpu")
]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Throw away a run of other settings in the folder.")
]


@dataclass(frozen=True)
class Asked:
    """What `flashmaps eval` was asked; each benchmark takes some of it and refuses the others."""

    benchmark: str
    pairs: int | None = None
    seed: int = 0
    points: int | None = None
    data: Path | None = None
    split: str = "test"
    image_size: int | None = None
    model: str = "builtin"
    layers: list[str] | None = None
    timestep: list[int] | None = None
    noise_seed: list[int] | None = None
    different_noise: bool = False
    prompt: str = ""
    size: int | None = None
    compare: list[str] | None = None
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    resamples: int = 1000
    out: Path | None = None
    features: Path | None = None
    labels: Path | None = None
    images: int | None = None
    ablation: bool = False
    no_rivals: bool = False
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(f"flashmaps-eval-{self.benchmark}") if self.out is None else self.out

    def refuse(self, *names: str) -> None:
        """ValueError where one of these was given: it means nothing to this benchmark."""
        given = [
            f"--{name.replace('_', '-')}"
            for name in names
            if getattr(self, name) not in (getattr(Asked, name, None), [])
        ]
        if given:
            raise ValueError(f"{', '.join(given)}: not an option of eval {self.benchmark}")


# What says how a match is made, and means nothing to what makes none.
OF_MATCHES = (
    "points", "layers", "timestep", "noise_seed", "different_noise", "prompt", "size", "compare",
    "device", "dtype", "backend",
)  # fmt: skip
