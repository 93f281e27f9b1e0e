"""The commands of the command line; those of segments are in segment_commands.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from flashmaps.app.arguments import (
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
from flashmaps.app.batch_command import batch
from flashmaps.app.completion_commands import complete
from flashmaps.app.eval_command import NEEDED, evaluate
from flashmaps.app.explore_command import explore
from flashmaps.app.part_commands import parts
from flashmaps.app.segment_commands import cosegment, segment
from flashmaps.app.terminal import friendly, plain, print_tables, quiet_libraries, say
from flashmaps.arguments import whole
from flashmaps.escapes import printable


def make_app() -> typer.Typer:
    """The commands as one typer application; see :func:`flashmaps.app.cli.main`."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Numbers from attention maps that are never built.",
    )
    for command in (
        match, explore, batch, segment, cosegment, parts, complete, demo, world, doctor, bench,
    ):  # fmt: skip
        app.command()(friendly(command))
    app.command("eval")(friendly(evaluate))
    app.command("study")(friendly(study))
    return app


def match(
    source: Annotated[Path, typer.Argument(help="Image file.")],
    target: Annotated[Path, typer.Argument(help="Image file to find the source's points in.")],
    model: Model = "builtin",
    layers: Layers = None,
    timestep: Timestep = None,
    seed: Seed = None,
    prompt: Annotated[str, typer.Option(help="Text the model sees.")] = "",
    size: Size = None,
    out: Out = Path("flashmaps-match"),
    compare: Compare = None,
    backend: Backend = "auto",
) -> None:
    """Match two images: writes correspondences, statistics and pictures to a folder."""
    from rich.console import Console
    from rich.table import Table

    from flashmaps.app.doctor import require
    from flashmaps.diffusion.images import load_image
    from flashmaps.files import whole_folder

    require("diffusers", "transformers", "PIL", "matplotlib")
    console = Console()
    with whole_folder(out, "match") as new:
        first, second = load_image(source, "SOURCE"), load_image(target, "TARGET")
        with console.status("loading the model"):
            quiet_libraries()
            from flashmaps.diffusion.features import load_model
            from flashmaps.matching.match import match as match_images

            pipe = load_model(model)
        found = match_images(
            first, second, model=pipe, layers=layers or None, timestep=timestep or None,
            seeds=seed or None, prompt=prompt, size=size, compare=compare, backend=backend,
            progress=True,
        )  # fmt: skip
        with console.status("drawing"):
            found.write(new)
    title = plain(f"{printable(source)} to {printable(target)}")
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in found.summary().items():
        if isinstance(value, list):
            shown = (" x " if name.endswith(("size", "grid")) else "\n").join(map(str, value))
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), plain(shown))
    console.print(table)
    say(f"Written to {printable(out)}: match.json, correspondences.safetensors and pictures.")


def demo(
    out: Out = Path("demo-output"),
    model: Model = "builtin",
    layers: Layers = None,
    timestep: Timestep = None,
    seed: Seed = None,
    size: Annotated[int, typer.Option(help="Longer side in pixels that the model sees.")] = 288,
    compare: Compare = None,
    backend: Backend = "auto",
) -> None:
    """Match a real stereo pair and drawn scenes, score them against the truth, write a report."""
    from rich.console import Console

    quiet_libraries()
    from flashmaps.app import demo as job
    from flashmaps.app import report
    from flashmaps.app.doctor import require

    require("diffusers", "transformers", "skimage", "sklearn", "matplotlib", "jinja2")
    results = job.run(
        out, model=model, layers=layers or None, timestep=timestep or None, seeds=seed or None,
        size=size, compare=compare, backend=backend, progress=True,
    )  # fmt: skip
    console = Console()
    for table in report.tables(results):
        console.print(table)
        console.print()
    page = Path(out, "report.html").absolute().as_uri()  # which escapes all that is not plain
    console.print(plain(f"Report: {page}"), soft_wrap=True)


def study(
    model: Model = "builtin",
    pairs: Annotated[int, typer.Option(help="Pairs of the validation split to choose on.")] = 96,
    points: Annotated[int, typer.Option(help="Points of each pair.")] = 20,
    test_pairs: Annotated[
        int, typer.Option(help="Pairs of the test split, looked at once, at the end.")
    ] = 204,
    seed: Annotated[int, typer.Option(help="Draws the pairs and the points.")] = 0,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="What to try to compare; may be repeated.", show_default="all"),
    ] = None,
    timestep: Annotated[
        list[int] | None,
        typer.Option(help="To try; may be repeated.", show_default="1 51 101 201 301 401"),
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            help="Longer side that the model sees, to try; may be repeated.",
            show_default="what the model was trained on",
        ),
    ] = None,
    noises: Annotated[
        list[int] | None,
        typer.Option(
            help="How many noises to average, to try; may be repeated.", show_default="1 2 4"
        ),
    ] = None,
    device: Device = None,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Write match-settings.json beside the model's weights too."),
    ] = False,
    out: Out = Path("flashmaps-study"),
    overwrite: Overwrite = False,
) -> None:
    """Find how a model matches best, and calibrate its confidence, on scenes of the world.

    Chooses on the validation split and scores the choice once on the test split. An interrupted
    study goes on where it was when the same command is given again.
    """

    from flashmaps.app.doctor import require
    from flashmaps.evaluation.search import NOISES, TIMESTEPS
    from flashmaps.evaluation.study import study as run
    from flashmaps.matching.options import COMPARE

    require(*NEEDED)
    quiet_libraries()
    results = run(
        out, model=model, pairs=pairs, points=points, test_pairs=test_pairs, seed=seed,
        compare=compare or tuple(COMPARE), timesteps=timestep or TIMESTEPS, sizes=size or (None,),
        noises=noises or NOISES, device=device, keep=keep, overwrite=overwrite, progress=True,
    )  # fmt: skip
    from flashmaps.evaluation.study_report import tables

    print_tables(tables(results))
    say(f"Written to {printable(out)}: match-settings.json, results.md, results.json, plots.")
    if keep:
        say("match-settings.json lies beside the model's weights too.")


def world(
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("world.png"),
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    size: Annotated[int, typer.Option(help="Pixels a side of each scene.")] = 128,
    count: Annotated[int, typer.Option(help="How many scenes.")] = 24,
    pairs: Annotated[int, typer.Option(help="How many pairs, with true matches.")] = 12,
    category: Annotated[
        list[str] | None,
        typer.Option(help="Only this category; may be repeated.", show_default="all"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other scenes.")] = 0,
    alone: Annotated[bool, typer.Option(help="One object a scene, and nothing else.")] = False,
) -> None:
    """Draw a contact sheet of the world: scenes with their truth, and pairs with true matches."""
    from rich.console import Console

    from flashmaps.app.doctor import require
    from flashmaps.world import CATEGORIES, Options, Split
    from flashmaps.world import pairs as pairs_of
    from flashmaps.world.sheet import write_sheet

    require("PIL")

    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {str(out)!r} must end in .png")
    whole("--pairs", pairs, 0)
    options = Options(categories=tuple(category or CATEGORIES))
    if alone:
        options = replace(options, objects=(1, 1), occluders=(0, 0), clutter=(0, 0))
    scenes = Split(split, size=size, count=count, seed=seed, options=options)
    pairs_or_none = pairs_of(split, pairs, seed=seed, size=size, options=options) if pairs else None
    console = Console()
    with console.status("drawing"):
        write_sheet(out, scenes, count, pairs_or_none)
    console.print(plain(f"Written: {printable(out)}"), soft_wrap=True)


def doctor() -> None:
    """Show versions, backends, threads and GPU, and what is missing and how to get it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from flashmaps.app.doctor import examine

    found = examine()
    console = Console()
    table = Table(show_header=False, box=None)
    for section in ("versions", "system"):
        for name, value in found[section].items():
            table.add_row(name, escape(str(value)))
    table.add_row("gpu", escape("; ".join(found["gpu"]) or "none that torch can use"))
    table.add_row("cpu kernel", escape(found["cpu kernel"]))
    table.add_row("built-in model", escape(found["builtin model"]))
    console.print(table)
    console.print("\n[bold]Backends[/bold]")
    table = Table(show_header=False, box=None)
    for name, state in found["backends"].items():
        mark = "[green]yes[/green]" if state["available"] else "[yellow]no[/yellow]"
        table.add_row(f"  {name}", mark, escape(state["reason"]))
    console.print(table)
    if not found["missing"]:
        console.print("\nAll optional packages are installed.")
        return
    console.print("\n[bold]Not installed[/bold] (only what you use needs to be)")
    table = Table(show_header=False, box=None)
    for each in found["missing"]:
        table.add_row(f"  {each['package']}", f"for {each['for']}", escape(each["get"]))
    console.print(table)


def bench(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Passed on to pytest, after --.")
    ] = None,
) -> None:
    """Run the benchmarks of a checkout, each case beside its rivals."""
    folder = _benches()
    if folder is None:
        raise ValueError(
            "the benchmarks are not part of the installed package; get the source code, and run "
            "`flashmaps bench` (or `make bench`) inside it"
        )
    if find_spec("pytest_benchmark") is None:
        raise ImportError(
            "the benchmarks need pytest-benchmark; install it with: pip install pytest-benchmark"
        )
    print(f"Benchmarks of {folder}: some minutes on every core. Ctrl-C stops them.", flush=True)
    command = [sys.executable, "-m", "pytest", str(folder), *(arguments or [])]
    raise typer.Exit(subprocess.run(command, cwd=folder.parent).returncode)


def _benches() -> Path | None:
    """benches/ of the checkout we are in, or the one this package runs from."""
    here = Path.cwd()
    for root in (here, *here.parents, Path(__file__).resolve().parents[3]):
        if (root / "benches").is_dir() and (root / "python" / "flashmaps").is_dir():
            return root / "benches"
    return None
