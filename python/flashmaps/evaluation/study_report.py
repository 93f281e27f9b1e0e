"""What a study found, as Markdown and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashmaps.escapes import markdown as literal
from flashmaps.evaluation import markdown
from flashmaps.evaluation.markdown import number, percent, table
from flashmaps.evaluation.search import PRICE
from flashmaps.matching.options import READING

_SHOWN = 12  # rows of a table at most

# Axis: (what it is called, the value of a variant as text).
_AXES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "compare": ("compared", lambda row: READING[row["compare"]]),
    "layers": ("layers", lambda row: ", ".join(short(each) for each in row["layers"])),
    "timestep": ("timesteps", lambda row: ", ".join(map(str, row["timestep"]))),
    "noises": ("noises averaged", lambda row: str(row["noises"])),
    "same_noise": ("noise", lambda row: "the same" if row["same_noise"] else "different"),
    "size": ("size", lambda row: str(row["size"] or "the model's own")),
    "temperature": ("temperature", lambda row: f"{row['temperature'] or 'default'}"),
    "normalize": ("normalisation", lambda row: row["normalize"]),
    "readout": (
        "readout",
        lambda row: (
            f"{row['readout']} of {2 * row['window'] + 1} x {2 * row['window'] + 1}"
            if row["window"]
            else row["readout"]
        ),
    ),
    "between": ("between tokens", lambda row: row["between"]),
}


def short(layer: str) -> str:
    """A layer's name without what all have: "up 2.1" of up_blocks.2.attentions.1."""
    level, _, rest = layer.partition(".attentions.")
    return f"{level.replace('_blocks', '').replace('_block', '').replace('.', ' ')}.{rest[:1]}"


def page(results: dict[str, Any], *, plots: bool = True) -> str:
    """results.md of a study."""
    asked, test = results["settings"], results["test"]
    trials = results["trials"]
    lines = [
        "# How this model matches best",
        "",
        f"{len(trials)} variants were scored on {asked['pairs']} pairs of the world's validation "
        f"split, {asked['points']} points each, and the best by PCK@0.1 was kept (minus "
        f"{100 * PRICE:g} percentage points for each doubling of the forward passes it takes). "
        "Brackets: 95 % bootstrap intervals over pairs. The best of many is a little lucky on the "
        "pairs it was chosen on; the test split below was looked at once.",
        "",
        *table(
            ["setting", ""], [["model", literal(f"{asked['model']} (weights {asked['weights']})")]]
        ),
        "",
        "## Chosen",
        "",
        *table(
            ["setting", "value"],
            [[title, literal(shown(results["chosen"]))] for title, shown in _AXES.values()],
        ),
        "",
        "## The best variant with each value",
        "",
        "What else the variant has is free, so that each row shows what a value can reach among "
        f"the variants that were tried. At most {_SHOWN} rows an axis.",
    ]
    for axis in _AXES:
        title, rows = best_of(trials, axis)
        if len(rows) > 1:
            told = [[literal(value), *cells] for value, *cells in rows]
            lines += ["", *table([title, "PCK@0.05", "PCK@0.1", "mean error / base"], told)]
    lines += ["", *_confidence(results["confidence"]["candidates"])]
    lines += [
        "",
        "## On the test split",
        "",
        f"{test['pairs']} pairs, {test['points'] // len(test['noises'])} points that both scenes "
        f"show, each with {len(test['noises'])} noises; intervals are over pairs, all noises of a "
        f"pair together. PCK@{test['headline']['pck']} of {test['headline']['method']} by noise: "
        + ", ".join(f"{100 * each:.1f}" for each in test["noises"])
        + "."
        + _told(confidence_auroc(test)),
        "",
        # The same page as `flashmaps eval` writes, a level lower.
        *(f"#{line}" if line.startswith("#") else line for line in _test_lines(test, plots)),
    ]
    return "\n".join([*lines, ""])


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) for the terminal."""
    header = ["", "PCK@0.05", "PCK@0.1", "error"]
    found = []
    for axis in _AXES:
        title, rows = best_of(results["trials"], axis)
        if len(rows) > 1:
            found.append((f"Best variant by {title} (validation)", header, rows))
    chosen = [[title, shown(results["chosen"])] for title, shown in _AXES.values()]
    found.append(("Chosen", ["", ""], chosen))
    return [*found, *markdown.tables(results["test"])]


def best_of(trials: list[dict[str, Any]], axis: str) -> tuple[str, list[list[str]]]:
    """The title of an axis, and a row for the best trial with each of its values, best first."""
    title, shown = _AXES[axis]
    best: dict[str, dict[str, Any]] = {}
    for each in trials:
        value = shown(each)
        if value not in best or _order(each) > _order(best[value]):
            best[value] = each
    ranked = sorted(best.items(), key=lambda item: _order(item[1]), reverse=True)
    rows = [
        [
            value,
            *(
                percent(each["pck"][t]["value"], each["pck"][t]["interval"])
                for t in ("0.05", "0.1")
            ),
            f"{each['mean_error']:.3f}",
        ]
        for value, each in ranked[:_SHOWN]
    ]
    return title, rows


def confidence_auroc(test: dict[str, Any]) -> tuple[float, list[float] | None] | None:
    """How often a wrong match has less confidence than a right one, and its interval."""
    scores = next(iter(test["scores"].values()))["scores"]
    found = scores.get("confidence", {}).get("wrong", {}).get(test["headline"]["pck"], {})
    if found.get("auroc") is None:
        return None
    # The report has it the other way round: how often the wrong one has the higher score.
    interval = found["auroc_interval"]
    turned = None if interval is None else [1 - value for value in reversed(interval)]
    return 1 - found["auroc"], turned


def _told(confidence: tuple[float, list[float] | None] | None) -> str:
    if confidence is None:
        return ""
    return f" The confidence ranks wrong matches with AUROC {number(*confidence, 3)}."


def _order(trial: dict[str, Any]) -> tuple[float, float, float]:
    return trial["value"], trial["pck"]["0.05"]["value"], -trial["mean_error"]


def _confidence(candidates: dict[str, Any]) -> list[str]:
    if not candidates:
        return [
            "## Confidence",
            "",
            "There were too few pairs, or none right or none wrong: no calibration.",
        ]
    rows = [
        [
            f"**{name}**" if each["kept"] else name,
            f"{each['log_loss']:.4f}",
            f"{each['brier']:.4f}",
            number(each["auroc"], None, 3),
            f"{each['aurc']:.3f}",
            f"{each['calibration_error']:.3f}",
        ]
        for name, each in sorted(candidates.items(), key=lambda item: item[1]["log_loss"])
    ]
    return [
        "## Confidence",
        "",
        "A logistic function of one score, or of all, fitted to four fifths of the validation "
        "pairs and judged on the others, five times. The one with the least log loss (bold) was "
        "fitted to all of them and kept. AUROC: how often a wrong match gets the lower confidence.",
        "",
        *table(["of", "log loss", "Brier", "AUROC", "AURC", "calibration error"], rows),
    ]


def _test_lines(test: dict[str, Any], plots: bool) -> list[str]:
    lines = markdown.page(test, plots=plots).splitlines()
    return lines[2:]  # its title is ours
