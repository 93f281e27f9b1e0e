"""The table of README.md, from the newest whole run of the benchmarks.

    python benches/readme.py            # print it
    python benches/readme.py --write    # and put it into README.md, with its date and its link

What the table shows and in which order is said here; the numbers are those of benches/results/.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from flashmaps.files import write_text
from report import FOLDER
from rivals import COMPILED, EAGER, OURS, SDPA

README = Path(__file__).parents[1] / "README.md"
FUSED = "entropy+max+argmax+expectation"
FUSED_OF = (
    ("sd2-64", "float32"), ("sd2-96", "float32"), ("sdxl-64", "float32"), ("flux", "float32"),
    ("sd2-64", "bfloat16"), ("sd2-64", "float16"),
)  # fmt: skip
HEAD = (
    "| operation | shape | flashmaps ms | SDPA ms | eager ms | compiled ms | flashmaps MB "
    "| eager MB | of limit |\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
)


def newest() -> Path:
    """The results of the last run, by the date that it wrote."""
    files = sorted(FOLDER.glob("*-threads.json"))
    if not files:
        raise SystemExit("benches/results has no run of the benchmarks: make bench")
    return max(files, key=lambda file: json.loads(file.read_text("utf-8"))["machine"]["date"])


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown; a cell is empty where somebody did not run."""
    fused = [
        case
        for shape, dtype in FUSED_OF
        for case in cases
        if (case["operation"], case["dtype"]) == (FUSED, dtype)
        and case["shape"].split()[0] == shape
    ]
    rest = [case for case in cases if case["operation"] != FUSED]
    return HEAD + "".join(map(_line, fused + rest))


def _line(case: dict[str, Any]) -> str:
    rows = {row["by"]: row for row in case["rows"]}

    def cell(by: str, field: str, factor: float, form: str) -> str:
        found = rows.get(by, {}).get(field)
        return "" if found is None else format(found * factor, form)

    name = "entropy, max, argmax, mean position" if case["operation"] == FUSED else None
    cells = [
        name or case["operation"],
        f"{case['shape']}, {case['dtype']}",
        *(cell(by, "median", 1e3, ",.0f") for by in (OURS, SDPA, EAGER, COMPILED)),
        *(cell(by, "workspace", 1e-6, ",.1f") for by in (OURS, EAGER)),
        cell(OURS, "of_limit", 1, ".0%"),
    ]
    return "| " + " | ".join(cells) + " |\n"


def replaced(text: str, file: Path) -> str:
    """README with the table of these results, their date and their address."""
    found = json.loads(file.read_text("utf-8"))
    made, count = re.subn(
        r"\| operation \| shape \|[^\n]*\n(\|[^\n]*\n)+", lambda _: table(found["cases"]), text
    )
    assert count == 1
    there = f"(benches/results/{file.with_suffix('.md').name})"
    made, links = re.subn(r"\(benches/results/[^)]*-threads\.md\)", there, made)
    date = re.compile(r"(torch )\S+(, )\d{4}-\d\d-\d\d")
    machine = found["machine"]
    made, dates = date.subn(rf"\g<1>{machine['torch']}\g<2>{machine['date']}", made)
    assert links == dates == 1
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    options = parser.parse_args()
    file = newest()
    print(file.name)
    print(table(json.loads(file.read_text("utf-8"))["cases"]))
    if options.write:
        write_text(README, replaced(README.read_text("utf-8"), file))


if __name__ == "__main__":
    main()
