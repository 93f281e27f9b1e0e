"""Arguments that several commands share: their types, and what --help says of them."""

from __future__ import annotations

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
