"""The numbers of an evaluation as a page of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from flashmaps.escapes import markdown as literal
from flashmaps.evaluation.results import THRESHOLDS, TITLES
from flashmaps.matching.options import READING
from flashmaps.matching.readout import WINDOWED

_MEANING = {
    "wrong": "high means wrong",
    "right": "high means right",
    "nothing": "says nothing",
    "unknown": "not known",
    None: "not defined here",
}


def page(results: dict[str, Any], *, plots: bool = True) -> str:
    """results.md: what results.json holds, as tables to read, and the plots if there are any."""
    about = results["benchmark"]
    lines = [
        f"# Evaluation: {literal(about['name'])}",
        "",
        literal(_sentence(about["what"])),
        "",
        *_settings(results),
        "",
        "## Percentage of correct keypoints",
        "",
        f"PCK@a: the share of points found within a times {literal(about['pck_base'])}. Brackets: "
        f"95 % bootstrap intervals over {literal(about['interval_unit'])}, {results['resamples']} "
        "resamples. "
        '"best token there is" is the one that holds the truth: more than it no choice among these '
        "tokens can reach.",
        "",
        "Every point counts once:",
        "",
        *_pck_table(results, "per_point"),
        "",
        "Every pair counts once (the mean of each pair's share):",
        "",
        *_pck_table(results, "per_image"),
        "",
        "Distance from the truth:",
        "",
        *_error_table(results),
        "",
        f"## How far {next(iter(results['methods']))} is ahead",
        "",
        "Difference of PCK per point, in percentage points, on the same points and resamples.",
        "",
        *_difference_table(results),
    ]
    for compare, found in results["scores"].items():
        lines += ["", *_score_section(compare, found, about["headline"])]
    if results["mirrored"] is not None:
        lines += ["", *_mirrored_section(results)]
    if len(results["categories"]) > 1:
        lines += ["", *_category_section(results)]
    if plots:
        lines += ["", *_pictures()]
    return "\n".join([*lines, ""])


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of the main tables, for the terminal: 80 characters wide."""
    headline = results["benchmark"]["headline"]
    key = f"{headline:g}"
    rows = []
    for name, found in results["methods"].items():
        each = [f"{100 * found['pck'][f'{t:g}']['per_point']:.1f}" for t in THRESHOLDS]
        interval = found["pck"][key]["per_point_interval"]
        shown = "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
        rows.append([name, *each, shown])
    header = ["method", *(f"PCK@{t:g}" for t in THRESHOLDS), f"95 % of PCK@{key}"]
    found = [(f"PCK per point, %, of {results['benchmark']['pck_base']}", header, rows)]
    for compare, each in results["scores"].items():
        title = f"Which score tells wrong matches: {READING[compare]}, off by over {key}"
        header, rows = _score_rows(each, headline)
        found.append((title, header[:3], [row[:3] for row in rows]))
    return found


def _settings(results: dict[str, Any]) -> list[str]:
    settings = results["settings"]
    tokens = " / ".join(", ".join(results["tokens"][side]) for side in ("source", "target"))
    rows = [
        ["pairs", str(results["pairs"])],
        ["points", f"{results['points']} with a match, {results['hidden_points']} hidden"],
        ["model", f"{settings['model']} (weights {settings['weights']})"],
        ["layers", str(settings["layers"] or "default")],
        ["timestep", str(settings["timestep"])],
        ["noise seeds", ", ".join(map(str, settings["seeds"]))],
        ["noise", "the same for all images" if settings["same_noise"] else "different"],
        ["prompt", repr(settings["prompt"])],
        ["size", str(settings["size"] or "what the model was trained on")],
        *([name, str(value)] for name, value in _match_settings(settings).items()),
        ["tokens, source / target", tokens],
        ["seed of the benchmark", str(settings["seed"])],
    ]
    return table(["setting", ""], [[name, literal(value)] for name, value in rows])


def _match_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Of fm.match, those that are not plain defaults."""
    given = settings.get("match", {})
    plain = {"temperature": None, "normalize": "block", "readout": "hard", "between": None}
    found = {name: str(given[name]) for name in plain if given.get(name) != plain[name]}
    if given.get("readout") in WINDOWED:
        found["readout"] += f" of {2 * given['window'] + 1} x {2 * given['window'] + 1} tokens"
    return {f"fm.match: {name}": value for name, value in found.items()}


def _pck_rows(results: dict[str, Any], kind: str) -> tuple[list[str], list[list[str]]]:
    header = ["method", *(f"PCK@{t:g}" for t in THRESHOLDS)]
    rows = []
    for name, found in results["methods"].items():
        each = [found["pck"][f"{t:g}"] for t in THRESHOLDS]
        rows.append([name, *(percent(one[kind], one[f"{kind}_interval"]) for one in each)])
    return header, rows


def _pck_table(results: dict[str, Any], kind: str) -> list[str]:
    return table(*_pck_rows(results, kind))


def _error_table(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in results["methods"].items():
        error = found["error"]
        rows.append(
            [
                name,
                number(error["median_px"], error["median_px_interval"], 1),
                number(error["mean_px"], error["mean_px_interval"], 1),
                f"{error['median_of_base']:.3f}",
                f"{error['mean_of_base']:.3f}",
            ]
        )
    return table(["method", "median px", "mean px", "median / base", "mean / base"], rows)


def _difference_table(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in results["against"].items():
        each = [found[f"{t:g}"] for t in THRESHOLDS]
        cells = [percent(one["per_point"], one["per_point_interval"], sign="+") for one in each]
        rows.append([name, *cells])
    return table(["against", *(f"PCK@{t:g}" for t in THRESHOLDS)], rows)


def _score_section(compare: str, found: dict[str, Any], headline: float) -> list[str]:
    shares = ", ".join(f"{share:.0%} at {t}" for t, share in found["wrong_share"].items())
    key = f"{headline:g}"
    header, rows = _score_rows(found, headline)
    return [
        f"## Which score tells wrong matches: {READING[compare]}",
        "",
        f'A match (of "{found["method"]}") is wrong when it is off by more than a times the base; '
        f"here: {shares}. AUROC: how often a wrong match has the higher score than a right one, at "
        f"a = {key}; 0.5 is chance, and below it a high score means right. The direction is called "
        "by the "
        'interval: "says nothing" where it holds 0.5. AURC: mean share of wrong matches among the '
        "kept, over all coverages, keeping low scores first and keeping high scores first; the "
        "better is in bold. A score that knows nothing gets the share of wrong matches where it "
        f"is defined, which is beside it; a perfect one gets {found['perfect_aurc'][key]:.3f} (of "
        "all points). Hidden: AUROC of telling points that have no match in the target, high "
        "meaning hidden.",
        "",
        *table(header, rows),
    ]


def _score_rows(found: dict[str, Any], headline: float) -> tuple[list[str], list[list[str]]]:
    header = [
        "score", "AUROC", "direction", "AURC, low first", "AURC, high first", "wrong", "defined",
        "hidden",
    ]  # fmt: skip
    rows = []
    for name, one in found["scores"].items():
        wrong, hidden = one["wrong"].get(f"{headline:g}"), one["hidden"]
        if wrong is None:
            rows.append([TITLES[name], "", _MEANING[None], "", "", "", "0%", ""])
            continue
        risks = one["risk_coverage"]
        areas = []
        for first in ("low", "high"):
            area = number(risks[f"aurc_keep_{first}"], risks[f"aurc_keep_{first}_interval"], 3)
            areas.append(f"**{area}**" if first == risks["keep_first"] else area)
        rows.append(
            [
                TITLES[name],
                number(wrong["auroc"], wrong["auroc_interval"], 3),
                _MEANING[wrong["high_means"]],
                *areas,
                f"{wrong['share']:.3f}",
                f"{one['defined_share']:.0%}",
                number(hidden["auroc"], hidden["auroc_interval"], 3),
            ]
        )
    return header, rows


def _mirrored_section(results: dict[str, Any]) -> list[str]:
    found = results["mirrored"]
    rows = []
    for name, shares in found["pck"].items():
        cells = []
        for t in THRESHOLDS:
            one = shares[f"{t:g}"]
            cells.append(f"{100 * one['own_side']:.1f} / {100 * one['either_side']:.1f}")
        rows.append([name, *cells])
    return [
        "## Left and right",
        "",
        f"PCK per point, %, on the {found['pairs']} pairs of symmetric objects "
        f"({found['points']} points): as above / with a match to the same point of the other side "
        "counted as right too.",
        "",
        *table(["method", *(f"PCK@{t:g}" for t in THRESHOLDS)], rows),
    ]


def _category_section(results: dict[str, Any]) -> list[str]:
    key = f"{results['benchmark']['headline']:g}"
    names = list(results["methods"])
    rows = []
    for category, found in results["categories"].items():
        shares = [f"{100 * found['pck'][name][key]['per_point']:.1f}" for name in names]
        rows.append([literal(category), str(found["pairs"]), str(found["points"]), *shares])
    return [
        f"## PCK@{key} by category, per point, %",
        "",
        *table(["category", "pairs", "points", *names], rows),
    ]


def _pictures() -> list[str]:
    captions = {
        "pck": "PCK at every threshold",
        "scores": "AUROC of every score",
        "risk": "Risk and coverage",
        "reliability": "Reliability",
        "examples": "Some pairs",
    }
    return ["## Pictures", "", *(f"![{text}]({name}.png)" for name, text in captions.items())]


def percent(value: float, interval: Sequence[float] | None, sign: str = "") -> str:
    """A share as a percentage, with its interval."""
    return number(100 * value, None if interval is None else [100 * v for v in interval], 1, sign)


def number(
    value: float | None, interval: Sequence[float] | None, digits: int, sign: str = ""
) -> str:
    """A number, with its interval where there is one."""
    if value is None:
        return ""
    shown = f"{value:{sign}.{digits}f}"
    if interval is None:
        return shown
    low, high = (f"{v:{sign}.{digits}f}" for v in interval)
    return f"{shown} [{low}, {high}]"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table of Markdown, numbers to the right."""
    align = ["---", *("---:" for _ in header[1:])]
    every = [header, align, *rows]
    return ["| " + " | ".join(map(_cell, cells)) + " |" for cells in every]


def _cell(text: str) -> str:
    """A bar would begin another cell, and a line end another row."""
    return re.sub(r"(?<!\\)\|", r"\\|", text).replace("\n", " ")
