"""Plans of batches at the rates of this machine, measured now."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from flashmaps.arguments import number, whole
from flashmaps.batches.features import only_of
from flashmaps.batches.parts import tile_side
from flashmaps.batches.plan import BatchPlan, Rates, plan, simulated_reads
from flashmaps.diffusion.features import BUILTIN, Features, default_size, features, load_model
from flashmaps.matching.pairs import match_pairs
from flashmaps.matching.settings import MatchSettings, settings_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TRIED = 4  # pairs that are timed
_RATES = ("seconds of a forward pass", "seconds of a pair")


def assumed(
    images: int, pairs: int, *, rows: str = "tokens", model: Any = BUILTIN,
    dtype: str | None = None, device: str | None = None, backend: str = "auto",
    rates: tuple[float, float] | None = None, **given: Any,
) -> BatchPlan:  # fmt: skip
    """The plan of a collection that is not here: square images of the size that the model sees.

    Args:
        rows, model, dtype, device, backend, given: as of :func:`flashmaps.batches.run.batch`.
        rates: seconds of a forward pass and of a pair; default: measured here.
    """
    pipe = load_model(model, device=device)
    seeds = given.pop("seeds", None)
    settings = settings_of(pipe).with_given(
        **given, seeds=None if seeds is None else tuple(seeds)
    )  # fmt: skip
    side = default_size(pipe) if settings.size is None else settings.size
    noise = np.random.default_rng(0).random((side, side, 3), np.float32)
    return measured_plan(
        whole("images", images, 1), whole("pairs", pairs, 1), noise, pipe, settings, rows=rows,
        dtype=None if dtype is None else DTYPES[dtype], backend=backend, rates=rates, simulate=True,
    )  # fmt: skip


def measured_plan(
    images: int,
    pairs: int,
    like: Any,
    pipe: Any,
    settings: MatchSettings,
    *,
    rows: str = "tokens",
    points: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    rates: tuple[float, float] | None = None,
    simulate: bool = False,
) -> BatchPlan:
    """The plan of so many images like one, and pairs, at the rates of this machine now.

    The rates, unless they are given: of the second of two forward passes, and of pairs of that
    image with itself. ``simulate``: which images are read, for pairs that are drawn at random.
    """
    options = {**settings.for_features, "outputs": settings.compare == "features"}
    passes = len(settings.seeds) * len(settings.timesteps)

    def once() -> tuple[float, Features]:
        start = time.perf_counter()
        (found,) = features(pipe, [like], **options)
        return time.perf_counter() - start, found

    seconds, one = once()
    if rates is None:
        seconds, one = once()
        spent = 0.0
        for _ in range(2):  # the first time loads what is loaded once
            start = time.perf_counter()
            for _ in match_pairs([one], [(0, 0)] * _TRIED, settings.options, backend=backend):
                pass
            spent = time.perf_counter() - start
        found = Rates(seconds / passes, spent / _TRIED)
    else:
        one_pass, one_pair = (number(n, r, above=0) for n, r in zip(_RATES, rates, strict=True))
        found = Rates(one_pass, one_pair, measured=False)
    kept = [getattr(one, name) for name in only_of(settings)]
    itemsize = (lambda x: x.element_size()) if dtype is None else (lambda x: dtype.itemsize)
    size = sum(x.numel() * itemsize(x) for x in kept if x is not None)
    side = tile_side(images, pairs, size)
    return plan(
        images, pairs, left=(images, pairs), tokens=one.grid[0] * one.grid[1], points=points,
        rows=rows, feature_bytes=size, passes=passes, side=side, rates=found,
        simulated=simulated_reads(images, pairs, side) if simulate else None,
    )  # fmt: skip
