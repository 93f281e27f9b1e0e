"""Draws the rooms of the package and who imports whom, for ARCHITECTURE.md.

    python tests/rooms.py        # prints the Mermaid block that stands there

Arrows that follow from others are left out: app reaches maps through matching. So is
arguments.py, which all rooms may import.
"""

from __future__ import annotations

from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]


def imports() -> dict[str, set[str]]:
    """Which room imports which, by name; `kernels` is the top-level folder."""
    graph = grimp.build_graph("flashmaps", exclude_type_checking_imports=True, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in sorted(graph.modules - {"flashmaps"}):  # its public names come from everywhere
        room = module.split(".")[1]
        for imported in graph.find_modules_directly_imported_by(module) - {"flashmaps"}:
            if (to := imported.split(".")[1]) not in (room, "arguments"):
                found.setdefault(room, set()).add(to)
    # kernels/ lies outside python/, where grimp does not see it.
    found.setdefault("maps", set()).add("kernels")
    return found


def mermaid(found: dict[str, set[str]]) -> str:
    """The block, with a line for each arrow that does not follow from others."""

    def reached(room: str) -> set[str]:
        return {end for to in found.get(room, ()) for end in (to, *reached(to))}

    lines = [
        f"    {room} --> {to}"
        for room in sorted(found)
        for to in sorted(found[room])
        if not any(to in reached(other) for other in found[room] - {to})
    ]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


if __name__ == "__main__":
    print(mermaid(imports()))
