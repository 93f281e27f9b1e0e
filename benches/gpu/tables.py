"""What gpu-check found, for the terminal and for benches/results."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from correctness import Result
from flashmaps.files import write_text
from speed import Case


@dataclass
class Whole:
    """Everything of one run."""

    card: dict[str, Any]
    seed: int
    seconds: float
    results: list[Result]
    wanted: int  # how many checks there are
    rates: dict[str, float]
    cases: list[Case]
    left_out: list[str]  # timings for which there was no time


def summary(results: list[Result], wanted: int) -> str:
    """One line about correctness."""
    wrong = sum(result.error is not None for result in results)
    refused = sum(result.refused for result in results)
    line = f"{len(results) - wrong - refused} checks passed, {wrong} failed"
    line += f", {refused} refused with a reason" if refused else ""
    missing = wanted - len(results)
    return line + (f", {missing} not run (no time, or not for --quick)" if missing > 0 else "")


def one_line(case: Case) -> str:
    """Progress."""
    ours = next((row for row in case.rows if row.by.startswith("flashmaps")), None)
    if ours is None or ours.ms is None:
        return f"{case.title}: {ours.refusal if ours else 'nobody ran'}"
    return f"{case.title}: {ours.ms:.3f} ms, {ours.of_limit or 0:.0%} of the limit"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def markdown(whole: Whole) -> str:
    """The tables."""
    of = whole.card
    facts = ", ".join(f"{name} {value}" for name, value in of.items() if name != "name")
    lines = [
        f"# {of['name']}",
        "",
        f"{facts}. {whole.seconds:.0f} s, seed {whole.seed}.",
        "",
        f"{summary(whole.results, whole.wanted)}.",
        "",
    ]
    counts: dict[str, Counter[tuple[str, str]]] = {
        name: Counter() for name in ("passed", "failed", "refused")
    }
    for r in whole.results:
        outcome = "failed" if r.error else "refused" if r.refused else "passed"
        counts[outcome][r.backend, r.check.split("/")[-1]] += 1
    lines += ["| backend | operation | " + " | ".join(counts) + " |"]
    lines += ["| --- | --- | ---: | ---: | ---: |"]
    lines += [
        f"| {of[0]} | {of[1]} | " + " | ".join(str(count[of]) for count in counts.values()) + " |"
        for of in sorted(set().union(*counts.values()))
    ]
    if whole.cases:
        rates = whole.rates
        lines += [
            "",
            f"Measured ceilings: {rates['exp'] / 1e12:.2f} T exp2/s, "
            f"{rates['matrix'] / 1e12:.0f} TFLOP/s (float16 torch.mm), "
            f"{rates['memory'] / 1e12:.2f} TB/s. The limit is the largest of the three; call is "
            "what a call from Python takes, ms what a CUDA graph of it does, MB the most memory "
            "beyond inputs and outputs. SDPA is a yardstick: only with V = x does it do the job.",
            "",
            "| case | limit ms (exp / matrix / memory) | by | ms | call ms | MB | of limit |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for case in whole.cases:
            limits = " / ".join(f"{limit:.3f}" for limit in case.limits_ms.values())
            for n, row in enumerate(case.rows):
                first = [case.title, limits] if n == 0 else ["", ""]
                cells = [
                    *first, row.by, _number(row.ms, "{:.3f}") or row.refusal,
                    _number(row.call_ms, "{:.3f}"), _number(row.mb, "{:,.1f}"),
                    _number(row.of_limit, "{:.0%}"),
                ]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    if whole.left_out:
        lines += ["", "No time was left for: " + "; ".join(whole.left_out) + "."]
    return "\n".join([*lines, ""])


def text(whole: Whole) -> str:
    """A short table: ours beside the best of the others."""
    lines = ["", f"{'case':<64}{'ours ms':>10}{'of limit':>10}{'eager':>10}{'best SDPA':>11}"]
    for case in whole.cases:
        ours = [r.ms for r in case.rows if r.by.startswith("flashmaps") and r.ms is not None]
        eager = next((r.ms for r in case.rows if r.by == "eager" and r.ms is not None), None)
        sdpa = [r.ms for r in case.rows if r.by.startswith("SDPA,") and r.ms is not None]
        if not ours:
            lines.append(f"{case.title:<64}{'failed':>10}")
            continue
        limit = max(case.limits_ms.values())
        lines.append(
            f"{case.title:<64}{ours[0]:>10.3f}{limit / ours[0]:>10.0%}"
            f"{_number(eager, '{:.3f}'):>10}{_number(min(sdpa, default=None), '{:.3f}'):>11}"
        )
    lines += ["", summary(whole.results, whole.wanted) + f"; {whole.seconds:.0f} s."]
    return "\n".join(lines)


def write(whole: Whole, folder: Path) -> list[Path]:
    """<card>.json and .md, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", whole.card["name"].lower()).strip("-")
    everything = asdict(whole)
    everything["results"] = [
        each for each in everything["results"] if each["error"] is not None
    ]  # those that passed are counted
    everything["passed"] = sum(r.error is None and not r.refused for r in whole.results)
    everything["refused"] = sum(r.refused for r in whole.results)
    files = [folder / f"{name}.json", folder / f"{name}.md"]
    write_text(files[0], json.dumps(everything, indent=1) + "\n")
    write_text(files[1], markdown(whole))
    return files
