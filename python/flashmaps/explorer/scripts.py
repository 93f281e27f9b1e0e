"""The Python that makes what a page shows, to be run by whoever has the pictures."""

from __future__ import annotations

from typing import Any

from flashmaps.explorer.generation import Generation
from flashmaps.explorer.pictures import Picture
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
    return "\n".join([*lines, *_FIGURE]) + "\n"


def words(model: str, pair: Pair, prompt: str, word: str) -> str:
    """A program that draws the map of a word over the source."""
    given = ", ".join(f"{name}={value!r}" for name, value in _seeing(pair).items())
    return _program(
        pair.source,
        ["from flashmaps.diffusion.features import features, load_model"],
        [
            f"pipe = load_model({model!r})",
            "with fm.capture(",
            '    pipe.unet, kind="cross", reduce="image_to_text", guidance="conditional"',
            ") as rec:",
            f"    features(pipe, [image], {given}, prompt={prompt!r})",
            f"values = fm.word_maps(rec, {prompt!r}, pipe)[{word!r}]",
        ],
    )


def segments(model: str, pair: Pair, level: int) -> str:
    """A program that draws a level of the segments of the source."""
    given = _seeing(pair)
    given.pop("same_noise")
    if pair.view.layers is None:
        given.pop("layers", None)  # then objects are found by another layer than what looks alike
    told = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return _program(
        pair.source,
        ["import torch"],
        [
            f"found = fm.segment(image, model={model!r}, {told})",
            f"values = torch.from_numpy(found.level({level}).labels)",
        ],
    )


def generation(model: str, made: Generation, layer: int, step: int) -> str:
    """A program that makes the picture again and draws the entropy of a layer at a step."""
    lines = [
        "import flashmaps as fm",
        "import numpy as np",
        "import torch",
        "from flashmaps.diffusion.features import load_model",
        "from matplotlib.figure import Figure",
        "",
        f"pipe = load_model({model!r})",
        'with fm.capture(pipe, kind="self", reduce="entropy", keep="statistics") as rec:',
        "    made = pipe(",
        f"        {made.prompt!r}, num_inference_steps={made.steps},",
        f"        generator=torch.Generator().manual_seed({made.seed}),",
        "    )",
        f"entry = rec.select({made.layers[layer]!r})[{step}].conditional",
        "values = entry.entropy[0].reshape(entry.grid)",
        "image = np.asarray(made.images[0])",
    ]
    return "\n".join([*lines, *_FIGURE]) + "\n"


_FIGURE = (
    "",
    'figure = Figure(figsize=(6, 6), layout="constrained")',
    "ax = figure.subplots()",
    "height, width = image.shape[:2]",
    "ax.imshow(image)",
    "shown = ax.imshow(",
    "    values.detach().cpu().numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5),",
    '    cmap="magma", alpha=0.7,',
    ")",
    "figure.colorbar(shown, ax=ax, shrink=0.8)",
    "ax.set_axis_off()",
    'figure.savefig("explore.png", dpi=150)',
    'print("written: explore.png", tuple(values.shape), float(values.max()))',
)


def _seeing(pair: Pair) -> dict[str, Any]:
    """How the model was shown the pictures, as arguments of `features`."""
    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in pair.settings.for_features.items()
    }
    return {name: value for name, value in given.items() if value is not None}


def _program(source: Picture, imports: list[str], lines: list[str]) -> str:
    bundled = ["from flashmaps.explorer.pictures import BUNDLED"] if source.bundled else []
    file = f"BUNDLED / {source.name!r}" if source.bundled else f"{source.name!r}"
    return (
        "\n".join(
            [
                "import flashmaps as fm",
                *imports,
                "from flashmaps.diffusion.images import load_image",
                *bundled,
                "from matplotlib.figure import Figure",
                "",
                f"image = load_image({file})",
                *lines,
                *_FIGURE,
            ]
        )
        + "\n"
    )


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
