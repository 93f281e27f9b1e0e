"""The commands of segments: segment, cosegment, and `eval segments` and `eval cosegments`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmaps.app.arguments import Backend, Layers, Model, Out, Seed, Size, Timestep
from flashmaps.app.terminal import print_tables, quiet_libraries
from flashmaps.escapes import printable

BENCHMARKS = ("segments", "cosegments")
_NEEDED = ("diffusers", "transformers", "PIL", "matplotlib")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Images = Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")]
Count = Annotated[
    int | None, typer.Option(help="How many, for who knows.", show_default="as many as there are")
]
Plain = Annotated[
    bool, typer.Option("--tokens", help="Borders of tokens, not those found in the image.")
]


def image_files(given: Sequence[Path]) -> list[Path]:
    """Files as they are, and those of folders by name. ValueError for a folder without any."""
    found: list[Path] = []
    for each in given:
        if each.is_dir():
            inside = sorted(p for p in each.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not inside:
                raise ValueError(
                    f"{str(each)!r} holds no images (looked for {', '.join(_SUFFIXES)})"
                )
            found += inside
        else:
            found.append(each)
    return found


def segment(
    images: Images,
    model: Model = "builtin",
    layers: Layers = None,
    timestep: Timestep = None,
    seed: Seed = None,
    size: Size = None,
    count: Count = None,
    tokens: Plain = False,
    backend: Backend = "auto",
    out: Out = Path("flashmaps-segments"),
) -> None:
    """Segment images into objects and their parts: labels, pictures, numbers and a page."""
    from rich.console import Console
    from tqdm.auto import tqdm

    from flashmaps.app.doctor import require
    from flashmaps.diffusion.images import load_image
    from flashmaps.files import check_folder, whole_folder

    require(*_NEEDED, "skimage")
    check_folder(out, "segments")
    files = image_files(images)
    for each in files:  # refused before the work
        load_image(each, f"image {str(each)!r}")
    quiet_libraries()
    from flashmaps.diffusion.features import load_model
    from flashmaps.segmentation.segment import segment as segment_image

    pipe = load_model(model)
    shown = []
    with whole_folder(out, "segments") as new:
        for number, each in enumerate(tqdm(files, desc="images")):
            found = segment_image(
                each, model=pipe, layers=layers or None, timestep=timestep or None,
                seeds=seed or None, size=size, count=count, boundaries=not tokens, backend=backend,
            )  # fmt: skip
            place = new if len(files) == 1 else new / f"{number:04d}"
            place.mkdir(exist_ok=True)
            found.write(place)
            told = ", ".join(f"{level.count} {level.name}" for level in found.tree)
            shown.append((f"{number:04d}", each.name, told))
        if len(files) > 1:
            _write_index(new / "index.html", shown)
    for _, name, told in shown:
        Console().print(printable(f"{name}: {told}"), markup=False, highlight=False)
    Console().print(
        printable(f"Written to {out}: index.html, labels, pictures and numbers."), markup=False
    )


def _write_index(path: Path, shown: list[tuple[str, str, str]]) -> None:
    rows = "\n".join(
        f'<h2><a href="{folder}/index.html">{html.escape(printable(name))}</a></h2>'
        f'<p>{html.escape(told)}</p><p><img src="{folder}/segments.png" alt=""></p>'
        for folder, name, told in shown
    )
    path.write_text(
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Segments</title>\n'
        "<style>body{font-family:sans-serif;max-width:75rem;margin:2rem auto}"
        f"img{{max-width:100%}}</style>\n<h1>Segments</h1>\n{rows}\n</html>\n",
        encoding="utf-8",
    )


def cosegment(
    images: Images,
    model: Model = "builtin",
    layers: Layers = None,
    timestep: Timestep = None,
    seed: Seed = None,
    size: Size = None,
    count: Count = None,
    tokens: Plain = False,
    backend: Backend = "auto",
    out: Out = Path("flashmaps-cosegments"),
) -> None:
    """Segment a collection: the same label in two images is the same part."""
    from rich.console import Console

    from flashmaps.app.doctor import require
    from flashmaps.files import check_folder

    require(*_NEEDED, "skimage")
    check_folder(out, "cosegments")
    files = image_files(images)
    quiet_libraries()
    from flashmaps.segmentation.cosegment import cosegment as cosegment_images

    found = cosegment_images(
        files, model=model, layers=layers or None, timestep=timestep or None, seeds=seed or None,
        size=size, count=count, boundaries=not tokens, backend=backend, progress=True,
    )  # fmt: skip
    found.save(out)
    common = sum(part.common and not part.background for part in found.parts)
    Console().print(
        printable(
            f"{found.count} labels in {len(files)} images, {common} of them parts in common. "
            f"Written to {out}: index.html, labels, pictures and numbers."
        ),
        markup=False,
    )


def evaluate(
    benchmark: str,
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
    others: dict[str, Any],
) -> None:
    """`flashmaps eval segments` and `flashmaps eval cosegments`, on the world.

    ``others``: options that were given and mean nothing here.
    """
    from rich.console import Console

    from flashmaps.app.doctor import require
    from flashmaps.evaluation.cosegments import evaluate_cosegments
    from flashmaps.evaluation.segment_scenes import SIDE, WorldCollections, WorldScenes
    from flashmaps.evaluation.segments import evaluate_segments, tables

    if data is not None:
        others = {"data": data, **others}
    if others:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"{told}: not an option of eval {benchmark}")
    if split not in ("test", "validation"):
        raise ValueError(f"split={split!r}; world is scored on its splits 'test' and 'validation'")
    require(*_NEEDED, "skimage", "sklearn", "scipy")
    quiet_libraries()
    folder = Path(f"flashmaps-eval-{benchmark}") if out is None else out
    side = SIDE if image_size is None else image_size
    given: dict[str, Any] = {
        "model": model, "resamples": resamples, "overwrite": overwrite, "progress": True,
    }  # fmt: skip
    if benchmark == "segments":
        scenes = WorldScenes(split, 200 if count is None else count, seed, side)
        results = evaluate_segments(scenes, folder, **given)
    else:
        results = evaluate_cosegments(
            WorldCollections(split, seeds=4, side=side, count=count), folder, **given
        )
    print_tables(tables(results))
    Console().print(printable(f"Written to {folder}: results.md, results.json."), markup=False)
