"""The command `flashmaps batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashmaps.app.arguments import (
    OWN,
    Backend,
    Compare,
    Device,
    Layers,
    Model,
    Out,
    Overwrite,
    Seed,
    Size,
    Timestep,
)
from flashmaps.app.terminal import plain, quiet_libraries
from flashmaps.escapes import printable


def batch(
    images: Annotated[
        list[Path] | None, typer.Argument(help="A folder of images, or several image files.")
    ] = None,
    pairs: Annotated[
        str,
        typer.Option(
            help="all, nearest, chain or star; or a .csv or .parquet file with columns source and "
            "target (numbers or names), and x and y for points."
        ),
    ] = "all",
    number: Annotated[
        int | None,
        typer.Option(
            help="Of nearest: for each image; of star: the image in the middle.",
            show_default="5; 0",
        ),
    ] = None,
    both_ways: Annotated[bool, typer.Option("--both-ways", help="(j, i) too.")] = False,
    search: Annotated[
        str,
        typer.Option(help="Of nearest: mean, by mean features; or tokens, an index (faiss)."),
    ] = "mean",
    rows: Annotated[
        str | None,
        typer.Option(
            help="tokens, points, or pairs (summaries alone).",
            show_default="points where the table has some, else tokens",
        ),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="features or pairs: only this one.", show_default="both")
    ] = None,
    model: Model = "builtin",
    layers: Layers = None,
    timestep: Timestep = None,
    seed: Seed = None,
    same_noise: Annotated[
        bool | None,
        typer.Option(
            "--same-noise/--different-noise", help="Noise of all images.", show_default=OWN
        ),
    ] = None,
    size: Size = None,
    compare: Compare = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Features are kept in float16 or bfloat16.", show_default="as the model makes them"
        ),
    ] = None,
    device: Device = None,
    backend: Backend = "auto",
    memory_budget: Annotated[int, typer.Option(help="MB, beyond the model.")] = 512,
    engine: Annotated[
        str, typer.Option(help="local, this process; or ray, workers of a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Of a Ray cluster: auto, or ray://head:10001.", show_default="this machine"
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Of Ray.", show_default="one for each GPU, or for each CPU, at most 16"),
    ] = None,
    out: Out = Path("flashmaps-batch"),
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing: passes, bytes and time.")
    ] = False,
    assume: Annotated[
        tuple[int, int] | None,
        typer.Option(
            help="With --dry-run, in place of images: so many images of the size that the model "
            "sees, and pairs. SPair-71k: 1800 70958.",
            show_default=False,
        ),
    ] = None,
    rates: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="With --dry-run, in place of rates measured here: seconds of a forward pass, and "
            "of a pair, on the device that you think of.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Match many pairs of a collection of images, into Parquet files.

    A run that was interrupted goes on where it was when the same command is given again.
    """
    from rich.console import Console

    from flashmaps.app.doctor import require

    require("diffusers", "transformers", "PIL", "pyarrow")
    quiet_libraries()
    from flashmaps.batches.measure import assumed
    from flashmaps.batches.run import batch as run

    console = Console()
    given: list[Path] | Path | None = images or None
    if images and len(images) == 1 and images[0].is_dir():
        given = images[0]
    how: dict[str, Any] = {
        "model": model, "layers": layers or None, "timestep": timestep or None,
        "seeds": seed or None, "size": size, "same_noise": same_noise, "compare": compare,
        "dtype": dtype, "device": device, "backend": backend, "rates": rates,
    }  # fmt: skip
    if assume is not None:
        if not dry_run or given is not None:
            raise ValueError("--assume stands in for images, and goes with --dry-run")
        console.print(plain(str(assumed(*assume, rows=rows or "tokens", **how))))
        return
    if given is None:
        raise ValueError("give a folder of images, or several image files")
    found = run(
        given, pairs, out, number=number, both_ways=both_ways, search=search, rows=rows,
        stage=stage, memory_budget=memory_budget * 10**6, overwrite=overwrite,
        dry_run=dry_run, progress=True, engine=engine, address=address, workers=workers,
        **how,
    )  # fmt: skip
    if not isinstance(found, dict):
        console.print(plain(str(found)))
        return
    if "pairs" in found:
        what = "pairs.parquet, matches, images.parquet, batch.json."
        told = f"{found['pairs']} pairs of {found['images']} images in {printable(out)}: {what}"
    else:
        told = f"Features of {found['images']} images in {printable(out)}."
    console.print(plain(told))
