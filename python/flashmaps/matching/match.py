"""Match two images through a diffusion model's cross-self-attention (the note's eq. 2.4 to 2.9).

    m = fm.match("left.png", "right.png")
    m.transfer([(120, 80)])            # where that point of the source lies in the target
    m.transfer([(120, 80)], min_confidence=0.7)  # NaN where that is not sure enough
    m.plot_matches().savefig("matches.png")

Both maps, A_st from the source to the target and A_ts back, are averaged over heads, layers,
timesteps and noise seeds. What is compared with what, and how rows become places, is said by
:class:`flashmaps.matching.options.MatchOptions`.

What is best differs from model to model. ``flashmaps study`` finds it, on drawn scenes whose truth
is known, and keeps it in match-settings.json beside the model's weights
(:mod:`flashmaps.matching.settings`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

from flashmaps.arguments import switch
from flashmaps.diffusion.features import BUILTIN, DEFAULT_BATCH, Features, features, load_model
from flashmaps.maps.backends.choice import check_name
from flashmaps.maps.statistics import round_trip
from flashmaps.maps.validation import check_finite
from flashmaps.matching.cross_map import cross_maps
from flashmaps.matching.options import COMPARE, MatchKeywords, MatchOptions
from flashmaps.matching.result import Match
from flashmaps.matching.settings import settings_of


def match(
    source: Any,
    target: Any,
    *,
    model: Any = BUILTIN,
    layers: str | Iterable[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    prompt: str | Sequence[str] = "",
    seeds: int | Sequence[int] | None = None,
    inversion_steps: int | None = None,
    size: int | tuple[int, int] | None = None,
    same_noise: bool | None = None,
    batch_size: int = DEFAULT_BATCH,
    compare: str | None = None,
    temperature: float | None = None,
    normalize: str | None = None,
    readout: str | None = None,
    window: int | None = None,
    between: str | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Match:
    """Match ``source`` to ``target`` and back.

    An argument that is left out is the model's own, where it has a match-settings.json
    (:mod:`flashmaps.matching.settings`; the built-in model may), and else the default named below.
    The confidence is a probability only where all of them are the model's own.

    Args:
        source, target: a path, PIL image, numpy array or torch tensor each.
        model: ``"builtin"``, a Stable Diffusion (1, 2 or XL) folder or hub id, or a loaded
            pipeline.
        layers, timestep, prompt, seeds, inversion_steps, size, same_noise: see
            :func:`flashmaps.diffusion.features.features`. The maps of several layers, timesteps and
            seeds are averaged. A larger size means more tokens; ``prompt`` may be a pair.
        batch_size: 2 shows both images to the model at once, where the model sees them at equal
            size; 1 takes less memory.
        compare: "qk", "kk", "qq" or "features", see :func:`cross_map`; default "kk".
        temperature: of the softmax, see :func:`cross_map`.
        normalize: "block", "rows" or "columns", see :class:`flashmaps.AttentionMap`; default
            "block".
        readout: how a row becomes a place: "hard", "soft", "window", "parabola" or
            "consensus", see
            :func:`flashmaps.matching.readout.read`; default "hard".
        window: tokens to each side that readouts "window" and "consensus" average over; default 1.
        between: how points between token centres are carried, see :meth:`Match.transfer`.
        backend: what computes the maps; see :func:`flashmaps.maps.backends.choice`.
        progress: show bars for what takes long.

    Raises ValueError for arguments out of range, before the model runs.
    """
    given: dict[str, Any] = {
        "compare": compare, "temperature": temperature, "normalize": normalize,
        "readout": readout, "window": window, "between": between,
    }  # fmt: skip
    if same_noise is not None:
        switch("same_noise", same_noise)
    switch("progress", progress)
    MatchOptions().with_given(**given)  # checked before the work, not after it
    check_name(backend)
    pipe = load_model(model)
    if inversion_steps is not None and seeds is None:
        seeds = (0,)  # inversion draws no noise
    settings = settings_of(pipe).with_given(
        **given, layers=layers, timestep=timestep, seeds=seeds, size=size, same_noise=same_noise
    )
    if prompt != "" or inversion_steps is not None:  # not what the confidence was fitted to
        settings = replace(settings, calibration=None)
    found = features(
        pipe,
        [source, target],
        **settings.for_features,
        prompt=prompt,
        inversion_steps=inversion_steps,
        batch_size=batch_size,
        outputs=settings.compare == "features",
        progress=progress,
    )
    return match_features(found[0], found[1], settings.options, backend=backend)


def match_features(
    source: Features,
    target: Features,
    options: MatchOptions | None = None,
    *,
    backend: str = "auto",
    **given: Unpack[MatchKeywords],
) -> Match:
    """Match two images whose features are there already, for instance one image against many.

    Args:
        source, target: from one model with the same layers and seeds.
        options: how the maps are made and read; its fields may be given as keywords.
            ``calibration`` must belong to the others.
        backend: as for :func:`match`.
    """
    options = replace(options or MatchOptions(), **given)
    for name, of in (("source", source), ("target", target)):
        for part in sorted(set(COMPARE[options.compare])):
            if (tensor := getattr(of, part)) is not None:
                check_finite(f"{part} of the {name}'s features", tensor)
    forward_map, backward_map = cross_maps(source, target, options, backend=backend)
    rows = forward_map.reduce("expectation", "max", "entropy")
    return Match(
        source=source,
        target=target,
        options=options,
        forward_map=forward_map,
        backward_map=backward_map,
        round_trip=round_trip(forward_map, backward_map),
        expected_target=rows.expectation[0].float().cpu(),
        expected_source=backward_map.expectation()[0].float().cpu(),
        max_probability=rows.max[0],
        entropy=rows.entropy[0],
    )
