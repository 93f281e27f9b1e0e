"""What `session.py tune` tries: tiles and variants of the passes that matter most, beside today's.

A candidate is timed as the call that a user makes, on a headline shape, and its numbers are
compared with those of the settings that are the default, which come first. carried.py compiles all
of them beforehand, so that no second on a card goes into compiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from shapes import SHAPES, qk
from torch import Tensor

Job = dict[str, Any]
Tile = tuple[int, ...]  # of `Tiling`
Candidates = tuple[tuple[Tile, dict[str, Any]], ...]

# Of each pass and shape, the most promising first: tiles, and what of `Settings` is not as usual.
# Two programs of 8 warps fit a multiprocessor of an H100 with at most 128 registers a thread, three
# with 80, and with 113 or 75 KB of shared memory each.
_AHEAD = {"ahead": True}
_ANCHORED = {"anchored": True}
_BOTH = {"anchored": True, "ahead": True}
_STREAMED = {"resident": False}
LSE_64: Candidates = (
    ((128, 64, 8, 3), _BOTH),
    ((128, 128, 8, 3, 128), _ANCHORED),
    ((128, 64, 8, 3, 80), _ANCHORED),
    ((128, 128, 8, 3), _BOTH),
    ((128, 64, 8, 3), {}),
    ((64, 128, 4, 3), {}),
    ((128, 128, 8, 2, 128), _ANCHORED),
    ((64, 64, 4, 3), _BOTH),
    ((128, 64, 8, 4), _BOTH),
    ((256, 64, 8, 3, 128), _ANCHORED),
)
# One map alone leaves a card's last programs by themselves.
LSE_64_SPLIT = tuple(
    (tiling, {**changes, "splits": splits})
    for tiling, changes in LSE_64[:3]
    for splits in (3, 5, 6, 8)
)
LSE_128: Candidates = (
    ((128, 64, 8, 3, 128), _BOTH),
    ((128, 128, 8, 3), _BOTH),
    ((128, 64, 8, 3), _ANCHORED),
    ((128, 128, 8, 2, 128), _ANCHORED),
    ((128, 128, 8, 2), {}),
    ((128, 64, 8, 3), {}),
)
RESIDENT: Candidates = (
    ((128, 64, 8, 3), _AHEAD),
    ((128, 64, 8, 2), _AHEAD),
    ((64, 32, 4, 3), _AHEAD),
    ((64, 32, 4, 2), _AHEAD),
    ((128, 64, 8, 2), {**_AHEAD, **_STREAMED}),
    ((128, 64, 8, 3, 128), _STREAMED),
    ((64, 32, 4, 3), {}),
    ((64, 64, 4, 3, 128), _STREAMED),
    ((128, 32, 8, 3), _AHEAD),
    ((256, 32, 16, 1), _AHEAD),
    ((128, 64, 4, 3), _STREAMED),
)
STREAMED_64: Candidates = (
    ((128, 64, 8, 3), _AHEAD),
    ((128, 64, 8, 2), {}),
    ((128, 128, 8, 2), {}),
    ((64, 64, 4, 3), {}),
    ((128, 128, 8, 3), {}),
    ((64, 32, 8, 2), _AHEAD),  # whose kept tokens fit
    ((64, 32, 4, 3), _AHEAD),
    ((128, 32, 8, 1), _AHEAD),
    ((128, 64, 4, 3), {}),
)
STREAMED_128: Candidates = (
    ((128, 64, 8, 3), _AHEAD),
    ((128, 128, 8, 2), {}),
    ((128, 64, 8, 2, 128), {}),
    ((128, 128, 8, 3), {}),
    ((128, 64, 8, 2), _AHEAD),
    ((128, 64, 4, 2), {}),
)
# What no card has timed yet comes first.
PLAN = (
    ("lse", "sd2-64", 1, (
        ((128, 128, 8, 3), {}),
        ((128, 64, 8, 3, 80), _ANCHORED),
        ((128, 128, 8, 3, 128, 1), {"splits": 3}),
        ((128, 128, 8, 3, 128, 1), {"splits": 6}),
    )),
    ("lse", "flux", 1, (*LSE_128[:2], ((128, 128, 8, 3), _ANCHORED))),
    ("even", "flux", 1, STREAMED_128[:1]),
    ("lse", "sdxl-64", 1, (((128, 128, 8, 3), {}),)),
    ("even", "sdxl-64", 1, STREAMED_64[:1]),
    ("even", "sd2-64", 8, RESIDENT),
    ("lse", "sd2-64", 8, LSE_64),
    ("even", "sd2-64", 1, RESIDENT),
    ("lse", "sd2-64", 1, (*LSE_64, *LSE_64_SPLIT)),
    ("even", "sdxl-64", 1, STREAMED_64),
    ("lse", "flux", 1, LSE_128),
    ("even", "flux", 1, STREAMED_128),
)  # fmt: skip
VARIANTS = ("anchored", "ahead", "resident", "splits")  # of `Settings`


def jobs() -> list[Job]:
    """One for each candidate; the default of a pass and shape comes first, without a tiling."""
    found: list[Job] = []
    for kind, shape, batch, candidates in PLAN:
        for tiling, changes in ((None, {}), *candidates):
            job: Job = {"kind": "tune", "pass": kind, "operation": kind, "shape": shape}
            job |= {"batch": batch, "tiling": tiling, **changes}
            if job not in found:
                found.append(job)
    return found


def settings_for(job: Job, architecture: str, device: str) -> Any:
    """The settings of a candidate."""
    from flashmaps.kernels.autotune import with_tiling
    from flashmaps.kernels.settings import settings_of

    settings = settings_of(architecture)
    if device == "cuda":
        here = torch.cuda.get_device_properties(0).multi_processor_count
        settings = replace(settings, multiprocessors=here)
    if job["tiling"] is not None:
        width = 64 if SHAPES[job["shape"]].dim <= 64 else 128
        settings = with_tiling(settings, job["pass"], f"16/{width}", tuple(job["tiling"]))
    return replace(settings, **{name: job[name] for name in VARIANTS if name in job})


def call_of(job: Job, device: str, backend: str = "triton") -> Callable[[], tuple[Tensor, ...]]:
    """What is timed, in whatever settings are `used`."""
    import flashmaps as fm

    shape = SHAPES[job["shape"]]
    query, key = (x.repeat(job["batch"], 1, 1, 1).to(device) for x in qk(shape, torch.float16))
    grids: dict[str, Any] = {"query_grid": shape.grid, "key_grid": shape.key_grid}
    if job["pass"] == "lse":
        return lambda: (fm.AttentionMap(query, key, backend=backend, **grids).lse,)
    lse = torch.zeros(query.shape[:3], device=device)
    if device == "cuda":
        for one in range(query.shape[0]):  # by torch, whatever the settings
            scores = query[one].float() @ key[one].float().mT * shape.dim**-0.5
            lse[one] = scores.logsumexp(-1)
    known = fm.AttentionMap(query, key, lse=lse, backend=backend, **grids)
    names = ("entropy", "max", "argmax", "expectation")
    return lambda: tuple(known.reduce(*names)._asdict().values())


@contextlib.contextmanager
def used(settings: Any) -> Iterator[None]:
    """Backend "triton" in other settings."""
    from flashmaps.kernels import backend

    with mock.patch.object(backend, "_settings_here", lambda device: settings):
        yield


def furthest(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest difference of two results, argmax apart, which may differ where two are equal."""
    return max(
        float((a.double() - b.double()).abs().max())
        for a, b in zip(found, wanted, strict=True)
        if a.is_floating_point()
    )
