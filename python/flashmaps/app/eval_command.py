"""The command `flashmaps eval`: one set of options, of which each benchmark takes its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from flashmaps.app import completion_commands, part_commands, segment_commands
from flashmaps.app.arguments import (
    OWN,
    Asked,
    Backend,
    Device,
    Layers,
    Model,
    Overwrite,
    Seed,
    Size,
    Timestep,
)
from flashmaps.app.terminal import print_tables, quiet_libraries, say
from flashmaps.escapes import printable

# Packages that evaluating a way of matching takes.
NEEDED = (
    "diffusers", "transformers", "skimage", "sklearn", "scipy", "matplotlib", "pyarrow",
)  # fmt: skip
_OTHERS: dict[str, Callable[[Asked], None]] = {
    **dict.fromkeys(segment_commands.BENCHMARKS, segment_commands.evaluate),
    "parts": part_commands.evaluate,
    "completion": completion_commands.evaluate,
}


def evaluate(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="world, stereo, warps, spair, pf-pascal, pf-willow, cub; or segments, cosegments, "
            "segments-warps, segments-stereo; or parts, completion."
        ),
    ],
    pairs: Annotated[
        int | None,
        typer.Option(
            help="How many pairs; or scenes of segments and completion, collections of cosegments, "
            "categories of parts.",
            show_default="50; 1000 of cub; 200 of segments; 96 of completion; all of the others",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the pairs, the warps and the points.")] = 0,
    points: Annotated[
        int | None,
        typer.Option(
            help="Points of a pair, where the truth is dense.", show_default="256; 4096 of stereo"
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of a public benchmark, as it is published.")
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Split: test, val or trn of a public benchmark; test or validation of world."
        ),
    ] = "test",
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Pixels a side of the images that world draws.",
            show_default="256; 128 of segments",
        ),
    ] = None,
    model: Model = "builtin",
    layers: Layers = None,
    timestep: Timestep = None,
    noise_seed: Seed = None,
    different_noise: Annotated[
        bool, typer.Option("--different-noise", help="Noise of its own for every image.")
    ] = False,
    prompt: Annotated[
        str, typer.Option(help="Text the model sees; {category} stands for the pair's.")
    ] = "",
    size: Size = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="kk, qq, qk or features, as in match; may be repeated.",
            show_default=f"{OWN}, or kk",
        ),
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="as it is")
    ] = None,
    backend: Backend = "auto",
    resamples: Annotated[int, typer.Option(help="Resamples of the bootstrap.")] = 1000,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="flashmaps-eval-BENCHMARK")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Of segments: folder that keeps features for the next run.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Of segments: label PNGs of another method, to score too.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            help="Of cosegments, parts and completion: images in a collection.",
            show_default="8; 16 of parts and completion",
        ),
    ] = None,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablation",
            help="Of cosegments: links weighed otherwise, too. Of parts: all losses, three seeds.",
        ),
    ] = False,
    no_rivals: Annotated[
        bool,
        typer.Option("--no-rivals", help="Of segments: our own ways alone."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Score matches, and what predicts wrong ones, on a benchmark, beside baselines.

    An interrupted run goes on where it was when the same command is given again.
    """
    asked = Asked(**locals())
    _OTHERS.get(benchmark, _matches)(asked)


def _matches(asked: Asked) -> None:
    from flashmaps.app.doctor import require
    from flashmaps.evaluation.markdown import tables
    from flashmaps.evaluation.run import evaluate as run

    asked.refuse("features", "labels", "images", "ablation", "no_rivals")
    require(*NEEDED)
    quiet_libraries()
    results = run(
        asked.benchmark, asked.folder, pairs=asked.pairs, points=asked.points, seed=asked.seed,
        data=asked.data, split=asked.split, image_size=asked.image_size, model=asked.model,
        compare=asked.compare or None, layers=asked.layers or None,
        timestep=asked.timestep or None, prompt=asked.prompt, seeds=asked.noise_seed or None,
        size=asked.size, same_noise=False if asked.different_noise else None, device=asked.device,
        dtype=asked.dtype, backend=asked.backend, resamples=asked.resamples,
        overwrite=asked.overwrite, progress=True,
    )  # fmt: skip
    print_tables(tables(results))
    say(f"Written to {printable(asked.folder)}: results.md, results.json, points.parquet, plots.")
