"""The table of docs/models.md, of the cases that tests/test_families.py proves.

python tests/family_table.py    writes it
"""

from __future__ import annotations

from pathlib import Path

from flashmaps.diffusion.families import FAMILIES
from tiny_families import CASES, Case

MODELS = Path(__file__).parents[1] / "docs/models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"


def _grid(case: Case) -> str:
    if case.rows > 1:
        return "height x width; frames are rows of the batch"
    return "frames x height x width" if case.frames > 1 else "height x width"


def table() -> str:
    """Family, classes of the model, layers with the order of their tokens, grid."""
    lines = ["| family | model | layers | grid of image tokens |", "| --- | --- | --- | --- |"]
    for family in sorted(FAMILIES, key=lambda family: family.name.lower()):
        proven = [case for case in CASES if case.family == family.name]
        layers = {
            f"`{pattern}` {order.replace('->', 'to') or 'not known'}": None
            for case in proven
            for pattern, order in case.layers.items()
        }
        models = [f"`{name}`" for name in family.models]
        cells = [family.name, ", ".join(models), "; ".join(layers), _grid(proven[0])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """A document with this table between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    MODELS.write_text(with_table(MODELS.read_text("utf-8")), "utf-8")
