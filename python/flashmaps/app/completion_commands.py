"""The commands of completion: `flashmaps complete`, and `eval completion`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashmaps.app.arguments import OF_MATCHES, Asked, Out
from flashmaps.app.terminal import print_tables, quiet_libraries, say
from flashmaps.escapes import printable

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
    say(f"{told} Written to {printable(out)}: index.html, samples, masks and numbers.")


def evaluate(asked: Asked) -> None:
    """`flashmaps eval completion`, on the world or a data set of amodal masks."""
    from flashmaps.app.doctor import require
    from flashmaps.app.segment_commands import world_split
    from flashmaps.arguments import whole
    from flashmaps.evaluation.amodal_folders import AmodalFolder
    from flashmaps.evaluation.completion import evaluate_completion, tables
    from flashmaps.evaluation.hidden_objects import EXEMPLARS, SIDE, HiddenObjects, WorldHidden

    drawn = () if asked.data is None else ("image_size",)
    asked.refuse(*drawn, *OF_MATCHES, "features", "labels", "ablation", "no_rivals")
    many = whole("images", EXEMPLARS if asked.images is None else asked.images, 2)
    count = None if asked.pairs is None else whole("pairs", asked.pairs, 1)
    require(*_NEEDED)
    quiet_libraries()
    objects: HiddenObjects
    if asked.data is None:
        side = SIDE if asked.image_size is None else asked.image_size
        count = _SCENES if count is None else count
        objects = WorldHidden(world_split(asked.split), count, asked.seed, side, many)
    else:
        split = None if asked.split == "test" else asked.split
        objects = AmodalFolder(asked.data, split=split, count=count, exemplars=many)
    results = evaluate_completion(
        objects, asked.folder, model=asked.model, resamples=asked.resamples,
        overwrite=asked.overwrite, progress=True,
    )  # fmt: skip
    print_tables(tables(results))
    say(f"Written to {printable(asked.folder)}: results.md, results.json.")
