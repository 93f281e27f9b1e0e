"""The commands of parts: `flashmaps parts`, and `eval parts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashmaps.app.arguments import OF_MATCHES, Asked, Model, Out, Overwrite, Size
from flashmaps.app.segment_commands import Images, image_files
from flashmaps.app.terminal import print_tables, quiet_libraries, say
from flashmaps.escapes import printable

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
    say(
        f"{found.count} parts of {len(files)} images: {', '.join(found.names)}. Written to "
        f"{printable(out)}: index.html, and a textual inversion for each word."
    )


def evaluate(asked: Asked) -> None:
    """`flashmaps eval parts`: words learned from the world's images, scored on others."""
    from flashmaps.app.doctor import require
    from flashmaps.arguments import whole
    from flashmaps.evaluation.part_scenes import IMAGES
    from flashmaps.evaluation.parts import SEEDS, evaluate_parts, tables
    from flashmaps.parts.losses import LOSSES
    from flashmaps.world import CATEGORIES

    asked.refuse(*OF_MATCHES, "data", "features", "labels", "no_rivals")
    require(*_NEEDED, "sklearn", "scipy")
    quiet_libraries()
    names = tuple(CATEGORIES)
    if asked.pairs is not None:
        names = names[: whole("pairs", asked.pairs, 1, len(names))]
    results = evaluate_parts(
        asked.folder, split=asked.split, categories=names, seed=asked.seed, model=asked.model,
        resamples=asked.resamples, overwrite=asked.overwrite,
        images=IMAGES if asked.images is None else asked.images,
        size=128 if asked.image_size is None else asked.image_size,
        losses=LOSSES if asked.ablation else ("both",), seeds=SEEDS if asked.ablation else 1,
        progress=True,
    )  # fmt: skip
    print_tables(tables(results))
    say(f"Written to {printable(asked.folder)}: results.md, results.json.")
