"""The tables of a session, made of what lies in its folder: <card>.json and <card>.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from flashmaps.files import write_text
from hands import OVER
from tuning import VARIANTS

Line = dict[str, Any]

# Of the counters, what a reader needs: the units' shares of their peak, and what warps wait for.
SHOWN = (
    "Duration", "SM Frequency", "XU", "Tensor (All)", "FMA", "ALU", "Issue Slots Busy",
    "L2 Cache Throughput", "Registers Per Thread", "Theoretical Occupancy", "Achieved Occupancy",
    "Eligible Warps Per Scheduler", "Stall Wait", "Stall MIO Throttle", "Stall Barrier",
    "Stall Short Scoreboard", "Stall Math Pipe Throttle", "Stall Not Selected",
)  # fmt: skip


def read(folder: Path) -> dict[str, list[Line]]:
    """What each part has found, by the name of the part."""
    return {
        file.stem: [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for file in sorted(folder.glob("*.jsonl"))
    }


def outcome(line: Line) -> str:
    """Of a check: passed, refused, failed, lost with its worker, or cut off by the clock."""
    if "lost" in line:
        return "not finished" if line["lost"] == OVER else "lost"
    return "failed" if line.get("error") else "refused" if line.get("refused") else "passed"


def summary(found: dict[str, list[Line]]) -> Line:
    """Everything that is worth keeping, and of checks that passed only how many there are."""
    every = [line for lines in found.values() for line in lines]
    checks = [each for each in every if each["kind"] in ("check", "around", "large")]
    cards = [each["card"] for each in every if "card" in each]
    rates = [each["rates"] for each in every if "rates" in each]
    return {
        "card": cards[-1] if cards else {"name": "unknown"},
        "rates": rates[-1] if rates else {},
        "checks": {
            backend: dict(Counter(outcome(each) for each in checks if each["backend"] == backend))
            for backend in sorted({each["backend"] for each in checks})
        },
        "wrong": [each for each in checks if outcome(each) in ("failed", "lost")],
        "times": [each for each in every if each["kind"] == "time"],
        "tuned": [each for each in every if each["kind"] == "tune"],
        "profiles": [each for each in every if each["kind"] == "profile"],
        "counters": [each for each in every if each["kind"] == "counters"],
    }


def limit(line: Line, rates: dict[str, float]) -> float | None:
    """ms that the largest of exponentials, products and memory takes at the measured rates."""
    if not rates or "counts" not in line:
        return None
    return max(line["counts"][name] / rates[name] for name in line["counts"]) * 1e3


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def markdown(of: Line, seed: int) -> str:
    """The tables."""
    facts = ", ".join(f"{name} {value}" for name, value in of["card"].items() if name != "name")
    lines = [f"# {of['card']['name']}", "", f"{facts}. Seed {seed}.", ""]
    kinds = ("passed", "failed", "lost", "refused", "not finished")
    lines += ["| backend | " + " | ".join(kinds) + " |", "| --- |" + " ---: |" * len(kinds)]
    for backend, counts in of["checks"].items():
        lines.append(f"| {backend} | " + " | ".join(str(counts.get(k, 0)) for k in kinds) + " |")
    if of["rates"]:
        rates = of["rates"]
        lines += [
            "",
            f"Measured ceilings: {rates['exp'] / 1e12:.2f} T exp2/s, "
            f"{rates['matrix'] / 1e12:.0f} TFLOP/s (float16 torch.mm), "
            f"{rates['memory'] / 1e12:.2f} TB/s from memory, "
            f"{rates['l2'] / 1e12:.2f} TB/s within L2.",
        ]
    if of["times"]:
        lines += [
            "",
            "ms: replays of a CUDA graph of the call, many between two events (* where it could "
            "not be captured: calls). host: what a call costs the host. MB: the most memory beyond "
            "inputs and outputs. SDPA is a yardstick: only with V = x does it do the job.",
            "",
            "| case | limit ms | by | ms | host ms | MB | of limit |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        before = ""
        for line in of["times"]:
            case = f"{line['operation']}, {line['shape']} x {line['batch']}, {line['dtype']}"
            bound, ms = limit(line, of["rates"]), line.get("ms")
            why = str(line.get("lost") or line.get("error") or "").strip().splitlines()[-1:]
            said = f"{ms:.4f}{'' if line['graphed'] else '*'}" if ms else "".join(why)[:80]
            share = bound / ms if bound and ms else None
            cells = [
                case if case != before else "", _number(bound, "{:.4f}"), line["by"], said,
                _number(line.get("host_ms"), "{:.3f}"), _number(line.get("mb"), "{:,.1f}"),
                _number(share, "{:.0%}"),
            ]  # fmt: skip
            before = case
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    # Today's settings alone, where time allowed no other, are beside nothing.
    if any(each["tiling"] or any(name in each for name in VARIANTS) for each in of["tuned"]):
        lines += [
            "",
            "Settings beside today's: tiles (rows, columns, warps, stages, most registers) and "
            "variants. off: the largest difference of a number from today's.",
            "",
            "| pass | tiles | variants | ms | off |",
            "| --- | --- | --- | ---: | ---: |",
        ]
        for each in of["tuned"]:
            variants = [f"{name} {each[name]}" for name in VARIANTS if name in each]
            why = str(each.get("lost") or each.get("error") or "").strip().splitlines()[-1:]
            cells = [
                f"{each['pass']}, {each['shape']} x {each['batch']}",
                str(each["tiling"] or "today's"), ", ".join(variants),
                _number(each.get("ms"), "{:.4f}") or "".join(why)[:80].replace("|", "/"),
                _number(each.get("off"), "{:.1e}"),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    for each in of["profiles"]:
        if "us" in each:
            lines += [
                "",
                f"{each['operation']}, {each['shape']}, {each['backend']}, us a call:",
                "",
            ]
            lines += [f"- {us:.1f} `{name[:90]}`" for name, us in each["us"].items()]
    for each in of["counters"]:
        lines += _counters(each.get("counters", {}))
    if of["wrong"]:
        lines += ["", "Wrong or lost:", ""]
        for each in of["wrong"]:
            said = str(each.get("lost") or each["error"]).strip().splitlines()[-1][:160]
            what = each.get("problem") or each.get("tokens") or ""
            lines.append(f"- {each['backend']} {each.get('operation', 'large')} {what}: {said}")
    return "\n".join([*lines, ""])


def _counters(kernels: dict[str, dict[str, str]]) -> list[str]:
    """A column for each kernel; the rest of the counters is in the .json."""
    told = dict.fromkeys(name for values in kernels.values() for name in values)
    metrics = [name for name in told if name in SHOWN]
    if not metrics:
        return []
    return [
        "",
        "Nsight Compute, sd2-64 x 8: the log-sum-exp, and row statistics with it given:",
        "",
        "| | " + " | ".join(kernels) + " |",
        "| --- |" + " ---: |" * len(kernels),
        *(
            f"| {name} | " + " | ".join(values.get(name, "") for values in kernels.values()) + " |"
            for name in metrics
        ),
    ]


def write(folder: Path, seed: int) -> list[Path]:
    """<card>.json and .md in the folder, each whole or not at all."""
    of = summary(read(folder))
    name = re.sub(r"[^a-z0-9]+", "-", of["card"]["name"].lower()).strip("-")
    files = [folder / f"{name}.json", folder / f"{name}.md"]
    write_text(files[0], json.dumps({"seed": seed, **of}, indent=1) + "\n")
    write_text(files[1], markdown(of, seed))
    return files
