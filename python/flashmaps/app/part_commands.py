"""The commands of parts: `flashmaps parts`, and `eval parts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashmaps.app.arguments import Model, Out, Overwrite, Size
from flashmaps.app.segment_commands import Images, image_files
from flashmaps.app.terminal import print_tables, quiet_libraries
from flashmaps.escapes import printable

PART_BENCHMARKS = ("parts",)
_NEEDED = ("diffusers", "transformers", "PIL", "matplotlib", "skimage")


def parts(
    images: Images,
    model: Model = "builtin",
    loss: Annotated[
        str, typer.Option(help="What words learn from: noise, attention or both.")
    ] = "both",
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 120,
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 4,
    tokens: Annotated[int, typer.Option(help="Embeddings of each word.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the start, the order and the noise.")] = 0,
    size: Size = None,
    out: Out = Path("flashmaps-parts"),
    overwrite: Overwrite = False,
) -> None:
    """Learn words for the parts of a collection: textual inversions, a picture, a page.

    An interrupted run goes on where it was when the same command is given again.
    """
    from rich.console import Console

    from flashmaps.app.doctor import require
    from flashmaps.files import check_folder
    from flashmaps.parts.learn import learn_parts
    from flashmaps.parts.result import KIND

    require(*_NEEDED)
    check_folder(out, KIND, grows=True)
    files = image_files(images)
    quiet_libraries()
    found = learn_parts(
        files, model=model, loss=loss, steps=steps, batch=batch, tokens=tokens, seed=seed,
        size=size, folder=out, overwrite=overwrite,
    )  # fmt: skip
    told = f"{found.count} parts of {len(files)} images: {', '.join(found.names)}. Written to {out}"
    Console().print(
        printable(f"{told}: index.html, and a textual inversion for each word."),
        markup=False,
        highlight=False,
    )


def evaluate(
    out: Path | None,
    *,
    count: int | None,
    seed: int,
    split: str,
    image_size: int | None,
    model: Any,
    resamples: int,
    overwrite: bool,
    images: int | None,
    ablation: bool,
    others: dict[str, Any],
) -> None:
    """`flashmaps eval parts`: words learned from the world's images, scored on others.

    ``others``: options that were given and mean nothing here.
    """
    from rich.console import Console

    from flashmaps.app.doctor import require
    from flashmaps.arguments import whole
    from flashmaps.evaluation.part_scenes import IMAGES
    from flashmaps.evaluation.parts import SEEDS, evaluate_parts, tables
    from flashmaps.parts.losses import LOSSES
    from flashmaps.world import CATEGORIES

    if others:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"{told}: not an option of eval parts")
    require(*_NEEDED, "sklearn", "scipy")
    quiet_libraries()
    names = tuple(CATEGORIES)
    if count is not None:
        names = names[: whole("pairs", count, 1, len(names))]
    folder = Path("flashmaps-eval-parts") if out is None else out
    results = evaluate_parts(
        folder, split=split, categories=names, seed=seed, model=model, resamples=resamples,
        overwrite=overwrite, images=IMAGES if images is None else images,
        size=128 if image_size is None else image_size, losses=LOSSES if ablation else ("both",),
        seeds=SEEDS if ablation else 1, progress=True,
    )  # fmt: skip
    print_tables(tables(results))
    Console().print(printable(f"Written to {folder}: results.md, results.json."), markup=False)
