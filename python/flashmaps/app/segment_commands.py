"""The commands of segments: segment, cosegment, and `eval segments` and `eval cosegments`."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmaps.app.arguments import (
    OF_MATCHES,
    Asked,
    Backend,
    Layers,
    Model,
    Out,
    Seed,
    Size,
    Timestep,
)
from flashmaps.app.terminal import print_tables, quiet_libraries, say
from flashmaps.escapes import printable

BENCHMARKS = ("segments", "cosegments", "segments-warps", "segments-stereo")
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


def _command(
    name: str, out_folder: str, work: Callable[[list[Path], dict[str, Any], Path], str], about: str
) -> Callable[..., None]:
    """A command with the options that both have: ``work(files, arguments, out)`` tells the end."""

    def command(
        images: Images,
        model: Model = "builtin",
        layers: Layers = None,
        timestep: Timestep = None,
        seed: Seed = None,
        size: Size = None,
        count: Count = None,
        tokens: Plain = False,
        backend: Backend = "auto",
        out: Out = Path(out_folder),
    ) -> None:
        from flashmaps.app.doctor import require
        from flashmaps.files import check_folder

        require(*_NEEDED, "skimage")
        check_folder(out, f"{name}s")
        files = image_files(images)
        quiet_libraries()
        arguments = {
            "model": model, "layers": layers or None, "timestep": timestep or None,
            "seeds": seed or None, "size": size, "count": count, "boundaries": not tokens,
            "backend": backend,
        }  # fmt: skip
        told = work(files, arguments, out)
        say(f"{told}Written to {printable(out)}: index.html, labels, pictures and numbers.")

    command.__name__, command.__doc__ = name, about
    return command


def _segment_each(files: list[Path], arguments: dict[str, Any], out: Path) -> str:
    from tqdm.auto import tqdm

    from flashmaps.diffusion.features import load_model
    from flashmaps.diffusion.images import load_image
    from flashmaps.files import whole_folder
    from flashmaps.segmentation.segment import segment as segment_image

    for each in files:  # refused before the work
        load_image(each, f"image {str(each)!r}")
    arguments["model"] = load_model(arguments["model"])
    shown = []
    with whole_folder(out, "segments") as new:
        for number, each in enumerate(tqdm(files, desc="images")):
            found = segment_image(each, **arguments)
            place = new if len(files) == 1 else new / f"{number:04d}"
            place.mkdir(exist_ok=True)
            found.write(place)
            told = ", ".join(f"{level.count} {level.name}" for level in found.tree)
            shown.append((f"{number:04d}", each.name, told))
        if len(files) > 1:
            _write_index(new / "index.html", shown)
    return "".join(f"{printable(name)}: {told}\n" for _, name, told in shown)


def _cosegment_all(files: list[Path], arguments: dict[str, Any], out: Path) -> str:
    from flashmaps.segmentation.cosegment import cosegment as cosegment_images

    found = cosegment_images(files, **arguments, progress=True)
    found.save(out)
    common = sum(part.common and not part.background for part in found.parts)
    return f"{found.count} labels in {len(files)} images, {common} of them parts in common. "


segment = _command(
    "segment", "flashmaps-segments", _segment_each,
    "Segment images into objects and their parts: labels, pictures, numbers and a page.",
)  # fmt: skip
cosegment = _command(
    "cosegment", "flashmaps-cosegments", _cosegment_all,
    "Segment a collection: the same label in two images is the same part.",
)  # fmt: skip


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


def evaluate(asked: Asked) -> None:
    """`flashmaps eval` of segments and cosegments, on the world or a data set, and of two views."""
    from flashmaps.app.doctor import require
    from flashmaps.evaluation import segment_consistency as views
    from flashmaps.evaluation.cosegments import evaluate_cosegments
    from flashmaps.evaluation.segments import evaluate_segments, tables

    benchmark = asked.benchmark
    of_views = benchmark in ("segments-warps", "segments-stereo")
    unmeant = {
        "data": of_views,
        "features": of_views,
        "labels": benchmark != "segments",
        "images": benchmark != "cosegments",
        "ablation": benchmark != "cosegments",
        "no_rivals": of_views,
        "seed": benchmark == "cosegments",  # its collections are those of 0 to 3
        "image_size": of_views or asked.data is not None,
    }
    asked.refuse(*(name for name, refused in unmeant.items() if refused), *OF_MATCHES)
    require(*_NEEDED, "skimage", "sklearn", "scipy")
    quiet_libraries()
    given: dict[str, Any] = {
        "model": asked.model, "resamples": asked.resamples, "overwrite": asked.overwrite,
        "progress": True,
    }  # fmt: skip
    show = tables
    if of_views:
        show = views.tables
        results = views.evaluate_consistency(_views(asked), asked.folder, **given)
    else:
        given |= {"features": asked.features, "rivals": not asked.no_rivals}
        if benchmark == "segments":
            given["labels"] = asked.labels
            results = evaluate_segments(_scenes(asked), asked.folder, **given)
        else:
            given["ablation"] = asked.ablation
            results = evaluate_cosegments(_collections(asked), asked.folder, **given)
    print_tables(show(results))
    say(f"Written to {printable(asked.folder)}: results.md, results.json.")


def _views(asked: Asked) -> Any:
    from flashmaps.evaluation.segment_consistency import ALL
    from flashmaps.evaluation.stereo import Stereo
    from flashmaps.evaluation.warps import Warps

    if asked.benchmark == "segments-warps":  # each photograph under each kind
        return Warps(56 if asked.pairs is None else asked.pairs, points=ALL, seed=asked.seed)
    if asked.pairs not in (None, 1):
        raise ValueError(f"pairs={asked.pairs}: stereo is a single pair")
    return Stereo(points=ALL, seed=asked.seed)


def world_split(split: str) -> str:
    """A split of the world that may be scored on; ValueError for another."""
    if split not in ("test", "validation"):
        raise ValueError(f"split={split!r}; world is scored on its splits 'test' and 'validation'")
    return split


def _scenes(asked: Asked) -> Any:
    from flashmaps.evaluation.label_folders import LabelFolder
    from flashmaps.evaluation.segment_scenes import SIDE, WorldScenes

    if asked.data is not None:  # their test splits have no labels: the one meant is the usual one
        split = None if asked.split == "test" else asked.split
        return LabelFolder(asked.data, split=split, count=asked.pairs)
    side = SIDE if asked.image_size is None else asked.image_size
    count = 200 if asked.pairs is None else asked.pairs
    return WorldScenes(world_split(asked.split), count, asked.seed, side)


def _collections(asked: Asked) -> Any:
    from flashmaps.evaluation.cub_parts import CubCollections
    from flashmaps.evaluation.segment_scenes import COLLECTION, SIDE, WorldCollections

    many = COLLECTION if asked.images is None else asked.images
    if asked.data is not None:
        return CubCollections(asked.data, split=asked.split, images=many, count=asked.pairs)
    side = SIDE if asked.image_size is None else asked.image_size
    return WorldCollections(world_split(asked.split), many, seeds=4, side=side, count=asked.pairs)
