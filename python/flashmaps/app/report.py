"""The demo's results as one self-contained web page, and as tables for the terminal."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmaps.evaluation import PCK_THRESHOLDS
from flashmaps.files import write_text
from flashmaps.matching.options import READING

if TYPE_CHECKING:
    from rich.table import Table

# What each picture shows, for somebody who has not read the paper.
CAPTIONS = {
    "scenes": (
        "Drawn scenes, with the truth",
        "Left of each: points of one object. Right: where they are found on another object of its "
        "kind, and where they truly lie, which is known since the scenes are drawn. These are the "
        "first pairs of a split that the model has never seen.",
    ),
    "segments": (
        "Segments of a photograph",
        "The left photograph, its objects and their parts. How many there are was not told.",
    ),
    "cosegments": (
        "Co-segments",
        "Drawn scenes with one thing of the same kind in each, and their labels: one colour is one "
        "part in all of them, or one kind of surroundings.",
    ),
    "matches": (
        "Matches",
        "Some points of the left photograph and where they are found in the right one.",
    ),
    "shifts": (
        "Shift of every pixel",
        "How far each pixel of the left photograph moves to the left in the right one. Near things "
        "move further, so the truth is a depth map. Good matches look like it.",
    ),
    "heatmap": (
        "One point's attention",
        "One row of the attention map A_st: how one point of the left photograph spreads its "
        "attention over the right one.",
    ),
    "cycle_error": (
        "Cycle error",
        "Each token goes to its best match in the right photograph and from there back to the best "
        "match in the left one. Distances are in the unit square, where both sides are 1.",
    ),
    "entropy": (
        "Inverse mapping entropy (IME)",
        "Entropy of each row of the map back, A_ts. Zero: it knows exactly where it came from.",
    ),
    "density": (
        "Mapping density (MD)",
        "Where many source tokens choose the same target token, matching has collapsed.",
    ),
    "completion": (
        "A hidden animal, imagined whole",
        "A drawn scene with one animal behind other things; the same without them; the whole as a "
        "collection of its kind has it, filled by inpainting; the convex hull of what is seen; and "
        "what inpainting gives with an empty prompt.",
    ),
    "methods": ("Compared with simpler ways", "All methods choose among the same tokens."),
}

_METHOD_COLUMNS = [
    *((f"pck@{t:g}", f"PCK@{t:g}") for t in sorted(PCK_THRESHOLDS, reverse=True)),
    ("median_error_px", "median px"),
    ("mean_error_px", "mean px"),
]


def method_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of methods."""
    header = ["method", *(title for _, title in _METHOD_COLUMNS)]
    rows = []
    for name, score in results["methods"].items():
        cells = [
            f"{score[key]:.1%}" if key.startswith("pck") else f"{score[key]:.1f}"
            for key, _ in _METHOD_COLUMNS
        ]
        rows.append([name, *cells])
    return header, rows


def scene_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of drawn scenes."""
    header = ["method", "PCK@0.1", "PCK@0.05", "median error / box"]
    rows = [
        [
            name,
            f"{score['pck@0.1']:.1%}",
            f"{score['pck@0.05']:.1%}",
            f"{score['median_error_of_box']:.2f}",
        ]
        for name, score in results["scenes"]["methods"].items()
    ]
    return header, rows


def map_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of the maps' own statistics, which need no truth."""
    header = ["maps of", "hard IMS", "soft IMS", "mean IME", "MD", "mutual"]
    rows = [
        [
            name,
            f"{s['hard_ims']:.4f}",
            f"{s['soft_ims']:.4f}",
            f"{s['mean_ime_nats']:.2f} of {s['max_ime_nats']:.2f}",
            f"{s['density_min']} to {s['density_max']}",
            f"{s['mutual_share']:.1%}",
        ]
        for name, s in results["maps"].items()
    ]
    return header, rows


def cost_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of time and memory."""
    header = ["round trip by", "time", "peak memory", "hard IMS", "mean IME"]
    names = {"flashmaps": f"flashmaps ({results['settings']['backend']})", "eager": "eager torch"}
    rows = [
        [
            names.get(name, name),
            f"{cost['seconds']:.3f} s",
            f"{cost['peak_mb']:.1f} MB",
            f"{cost['hard_ims']:.4f}",
            f"{cost['mean_ime']:.3f}",
        ]
        for name, cost in results["cost"].items()
    ]
    return header, rows


def predictor_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of how well each score finds wrong matches."""
    header = ["score", "AUROC", "reading", "defined for"]
    rows = []
    for name, value in results["predictors_of_wrong_matches"].items():
        if name == "_task":
            continue
        area = value["auroc_wrong_if_high"]
        if area is None:
            shown, reading = "-", "not defined here"
        else:
            shown = f"{area:.3f}"
            reading = "no information" if abs(area - 0.5) < 0.02 else (
                "high means wrong" if area > 0.5 else "high means right"
            )  # fmt: skip
        rows.append([name, shown, reading, f"{value['defined_share']:.0%}"])
    return header, rows


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """The same tables for the terminal."""
    from rich.table import Table

    from flashmaps.app.terminal import plain

    truth = results["truth"]
    task = results["predictors_of_wrong_matches"]["_task"]
    settings, scenes = results["settings"], results["scenes"]
    rows, columns = settings["source_grid"]
    titles = [
        (
            scene_rows,
            f"Drawn scenes, {scenes['points']} points of {scenes['pairs']} pairs (PCK@a: within "
            "a x the object's box)",
        ),
        (
            method_rows,
            "The stereo pair against the true disparity (PCK@a: within a x "
            f"{truth['pck_base_px']} px, the longer side)",
        ),
        (map_rows, f"The maps' own statistics ({rows} x {columns} tokens; IMS: 1 = image side)"),
        (
            cost_rows,
            "All statistics of queries on keys and back "
            f"({results['cost']['flashmaps']['threads']} threads, own process each)",
        ),
        (
            predictor_rows,
            f"Which score finds wrong matches ({task['wrong_share']:.0%} are off by more than "
            f"{task['wrong_if_off_by_px']:.0f} px)",
        ),
    ]
    for make, title in titles:
        header, body = make(results)
        if make is method_rows:  # the last column does not fit into 80 characters
            header, body = header[:-1], [row[:-1] for row in body]
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=None,
            padding=(0, 2, 0, 0),
        )
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        for row in body:
            table.add_row(*map(plain, row))
        yield table


def write(path: str | Path, results: dict[str, Any], pictures: str | Path) -> None:
    """Write the page to ``path``, with the PNG files of the folder ``pictures`` inside it."""
    from jinja2 import Environment

    template = files("flashmaps.app").joinpath("templates/report.html.j2").read_text("utf-8")
    shown = []
    for name, (title, caption) in CAPTIONS.items():
        data = base64.b64encode((Path(pictures) / f"{name}.png").read_bytes()).decode()
        shown.append({"name": name, "title": title, "caption": caption, "data": data})
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    text = page.render(
        results=results,
        reading=READING[results["settings"]["compare"]],
        pictures={picture["name"]: picture for picture in shown},
        tables={
            "scenes": scene_rows(results),
            "methods": method_rows(results),
            "maps": map_rows(results),
            "cost": cost_rows(results),
            "predictors": predictor_rows(results),
        },
        best=_best_line(results),
    )
    write_text(path, text)


def _best_line(results: dict[str, Any]) -> str:
    """One honest sentence: where FlashMaps' matches stand among the methods."""
    methods, settings = results["methods"], results["settings"]
    ranked = sorted(methods, key=lambda name: methods[name]["median_error_px"])
    name = f"{READING[settings['compare']]}, {settings['readout']}"
    place = ranked.index(name) + 1
    score = methods[name]
    first, beside = methods[ranked[0]], results["beside"]
    off = f"{methods[beside]['median_error_px']:.1f} pixels off"
    return (
        f"Matches ({name}) are {score['median_error_px']:.1f} pixels "
        f"off in the median and within 5 % of the image for {score['pck@0.05']:.1%} of the pixels: "
        f"place {place} of {len(ranked)} methods by median error (first: {ranked[0]}, "
        f"{first['median_error_px']:.1f} pixels). Beside it, {beside} are {off}."
    )
