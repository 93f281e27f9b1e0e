"""The Python that makes what a page shows, to be run by whoever has the pictures."""

from __future__ import annotations

from typing import Any

from flashmaps.explorer.view import Pair

_MAPS = {
    "entropy": "m.entropy", "max": "m.max_probability", "confidence": "m.confidence",
    "cycle": "m.round_trip.hard_distance[0]", "return": "m.round_trip.return_probability[0]",
    "spread": "m.round_trip.spread[0]", "ime": "m.round_trip.inverse_entropy[0]",
    "density": "m.round_trip.density[0]", "nims": "m.round_trip.nims[0]",
    "nims_log1p": "m.round_trip.nims_log1p[0]",
}  # fmt: skip
_TARGETS = ("ime", "density", "nims", "nims_log1p")


def script(model: str, pair: Pair, side: str, token: int | None, statistic: str | None) -> str:
    """A program that writes explore.png: the statistic's map, else the row of the token."""
    settings = pair.settings
    lines = ["import flashmaps as fm", "from matplotlib.figure import Figure"]
    names = [each.name for each in (pair.source, pair.target)]
    if any(each.bundled for each in (pair.source, pair.target)):
        lines.append("from flashmaps.explorer.pictures import BUNDLED")
    given: dict[str, Any] = {
        "model": model, "layers": list(settings.layers) if settings.layers else None,
        "timestep": list(settings.timesteps), "seeds": list(settings.seeds), "size": settings.size,
        "same_noise": settings.same_noise, "compare": settings.compare,
        "temperature": settings.temperature, "normalize": settings.normalize,
        "readout": settings.readout, "window": settings.window, "between": settings.between,
    }  # fmt: skip
    lines += ["", "m = fm.match("]
    for each, name in zip((pair.source, pair.target), names, strict=True):
        bundled = each.bundled
        lines.append(f"    BUNDLED / {name!r}," if bundled else f"    {name!r},  # your file")
    lines += [f"    {key}={value!r}," for key, value in given.items() if value is not None]
    lines.append(")")
    head = pair.head
    if head is not None:
        lines += _of_head(settings.compare, head)
    if statistic is not None:
        where = "target" if statistic in _TARGETS else "source"
        lines += [
            f"values = {_MAPS[statistic]}.float().reshape(m.{where}.grid)",
            f"image = m.{where}.image",
        ]
    else:
        here, there = ("source", "target") if side == "source" else ("target", "source")
        which = "forward" if side == "source" else "backward"
        lines += [
            f"values = m.{which}_map.rows([{token or 0}])[0, 0].reshape(m.{there}.grid)"
            f"  # where token {token or 0} of the {here} looks",
            f"image = m.{there}.image",
        ]
    lines += [
        "",
        'figure = Figure(figsize=(6, 6), layout="constrained")',
        "ax = figure.subplots()",
        "height, width = image.shape[:2]",
        "ax.imshow(image)",
        "shown = ax.imshow(",
        "    values.detach().cpu().numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5),",
        '    cmap="magma", alpha=0.7, interpolation="bilinear",',
        ")",
        "figure.colorbar(shown, ax=ax, shrink=0.8)",
        "ax.set_axis_off()",
        'figure.savefig("explore.png", dpi=150)',
        'print("written: explore.png", tuple(values.shape), float(values.max()))',
    ]
    return "\n".join(lines) + "\n"


def _of_head(compare: str, head: int) -> list[str]:
    lines = [
        "from dataclasses import replace",
        "from flashmaps.matching.match import match_features",
        "import torch",
        "",
        f"k = {head}  # one head alone",
    ]
    part = (
        "replace(f, output=f.output[:, k : k + 1])"
        if compare == "features"
        else "replace(f, query=f.query[:, k : k + 1], key=f.key[:, k : k + 1], "
        "head_weights=torch.ones(1))"
    )
    return [
        *lines,
        f"one = [{part} for f in (m.source, m.target)]",
        "m = match_features(*one, m.options, calibration=None)",
    ]
