"""Why a capture recorded nothing: what its layers were, and what left each of them out."""

from __future__ import annotations

from dataclasses import dataclass

from flashmaps.diffusion.guidance import UNTOLD
from flashmaps.diffusion.layouts import Layout
from flashmaps.maps.grids import Grid


@dataclass(frozen=True)
class LeftOut:
    """What a layer was, and which argument left it out: "kind", "resolution", ..."""

    kind: str
    grid: Grid | None
    guidance: str | None
    by: str
    why: str

    @classmethod
    def of(cls, found: Layout, guidance: str | None, by: str) -> LeftOut:
        """Of an attention that was not recorded."""
        return cls(found.kind, found.grid, guidance, by, found.why)


def why_nothing(left: dict[str, LeftOut], asked: dict[str, object]) -> str:
    """The layers that ran by what they had in common, each with what left it out.

    Args:
        left: by name of the layer.
        asked: arguments of the capture by name.
    """
    groups: dict[LeftOut, list[str]] = {}
    for layer, each in left.items():
        groups.setdefault(each, []).append(layer)
    lines = [_line(each, layers, asked) for each, layers in groups.items()]
    if any(each.guidance == "unknown" and each.by == "guidance" for each in groups):
        lines.append(f"  {UNTOLD}")
    return "the layers ran, and were left out:\n" + "\n".join(lines)


def _line(each: LeftOut, layers: list[str], asked: dict[str, object]) -> str:
    grid = f"grid {each.grid[0]} x {each.grid[1]}" if each.grid is not None else "no grid"
    guidance = f"guidance {each.guidance!r}" if each.guidance is not None else "no guidance"
    name = layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} like it"
    by = _BY.get(each.by, f"{each.by}={asked.get(each.by)!r} leaves them out")
    why = f". Their parts are not known: {each.why}" if each.why else ""
    return f"  {name}: kind {each.kind!r}, {grid}, {guidance}: {by}{why}"


_BY = {
    "text": "in them no image token attends to text, which reduce='image_to_text' is of",
}
