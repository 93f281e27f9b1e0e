"""The commands of completion: `flashmaps complete`, and `eval completion`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashmaps.app.arguments import Out
from flashmaps.app.terminal import print_tables, quiet_libraries
from flashmaps.escapes import printable

BENCHMARK = "completion"
_NEEDED = ("diffusers", "transformers", "PIL", "matplotlib", "skimage", "scipy")
_SCENES = 96


def complete(
    image: Annotated[Path, typer.Argument(help="Image file with an object that is partly hidden.")],
    parts: Annotated[Path, typer.Argument(help="Folder that `flashmaps parts` has written.")],
    visible: Annotated[
        Path | None,
        typer.Option(help="Picture of what is seen of it: all but black.", show_default="found"),
    ] = None,
    occluder: Annotated[
        Path | None,
        typer.Option(help="Picture of what is in front: all but black.", show_default="found"),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many pictures are imagined.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the noise of the first; then one more each.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of inpainting.")] = 20,
    model: Annotated[
        str | None,
        typer.Option(help="Where the parts' model is now.", show_default="as it was learned"),
    ] = None,
    out: Out = Path("flashmaps-completion"),
) -> None:
    """Imagine the whole of an object that is partly hidden, by the parts of a collection."""
    from rich.console import Console

    from flashmaps.app.doctor import require
    from flashmaps.files import check_folder
    from flashmaps.parts.completion import complete as complete_image
    from flashmaps.parts.imagined import KIND
    from flashmaps.parts.result import Parts

    require(*_NEEDED)
    check_folder(out, KIND)
    quiet_libraries()
    found = complete_image(
        image, Parts.load(parts), visible=visible, occluder=occluder, samples=samples, seed=seed,
        steps=steps, model=model, progress=True,
    )  # fmt: skip
    found.save(out)
    imagined = int(found.hidden.sum())
    told = (
        f"{len(found.scores)} samples of {imagined} hidden pixels, the best is {found.best}; parts "
        f"missing: {', '.join(found.missing) or 'none'}."
        if imagined
        else "Nothing of the object is hidden, as far as the collection tells."
    )
    Console().print(
        printable(f"{told} Written to {out}: index.html, samples, masks and numbers."),
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
    data: Path | None,
    images: int | None,
    others: dict[str, Any],
) -> None:
    """`flashmaps eval completion`, on the world or a data set of amodal masks.

    ``others``: options that were given and mean nothing here.
    """
    from rich.console import Console

    from flashmaps.app.doctor import require
    from flashmaps.app.segment_commands import world_split
    from flashmaps.arguments import whole
    from flashmaps.evaluation.amodal_folders import AmodalFolder
    from flashmaps.evaluation.completion import evaluate_completion, tables
    from flashmaps.evaluation.hidden_objects import EXEMPLARS, SIDE, HiddenObjects, WorldHidden

    if data is not None and image_size is not None:
        others = {"image_size": image_size, **others}
    if others:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"{told}: not an option of eval completion")
    many = whole("images", EXEMPLARS if images is None else images, 2)
    count = None if count is None else whole("pairs", count, 1)
    require(*_NEEDED)
    quiet_libraries()
    objects: HiddenObjects
    if data is None:
        objects = WorldHidden(
            world_split(split), _SCENES if count is None else count, seed,
            SIDE if image_size is None else image_size, many,
        )  # fmt: skip
    else:
        given = None if split == "test" else split
        objects = AmodalFolder(data, split=given, count=count, exemplars=many)
    folder = Path("flashmaps-eval-completion") if out is None else out
    results = evaluate_completion(
        objects, folder, model=model, resamples=resamples, overwrite=overwrite, progress=True
    )
    print_tables(tables(results))
    Console().print(printable(f"Written to {folder}: results.md, results.json."), markup=False)
