"""Time by turns, so that noise hits all alike; memory by torch's own record of allocations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import flashmaps.maps.backends.cpu
import flashmaps.maps.backends.cpu_backward
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rivals import COMPILED, KEOPS, OURS, SDPA, Contestant
from torch.profiler import ProfilerActivity, profile


def peak_workspace(run: Callable[[], Any]) -> tuple[int, Any]:
    """(bytes, result): the most that one call holds beyond its inputs and outputs.

    What torch allocated at once, by its profiler, plus the largest workspace that a C++ call of
    flashmaps reported, less the storage of the result. Buffers that other libraries allocate past
    torch (MKL's packing, for one) do not count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, _cpp() as most:
        result = run()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _flat(result)}
    return max(0, peak - sum(storages.values())) + most[0], result


@contextmanager
def _cpp() -> Iterator[list[int]]:
    most = [0]
    modules = (flashmaps.maps.backends.cpu, flashmaps.maps.backends.cpu_backward)
    originals = (modules[0].reduce, modules[1].backward)

    def watching(run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            result = run(*args)
            most[0] = max(most[0], flashmaps.maps.backends.cpu.last_workspace_bytes())
            return result

        return watched

    modules[0].reduce, modules[1].backward = map(watching, originals)
    try:
        yield most
    finally:
        modules[0].reduce, modules[1].backward = originals


def _flat(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    else:
        for each in result:
            yield from _flat(each)


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds_for(name: str, seconds: float, budget: float, least: int) -> int:
    """Rounds of about ``budget`` seconds in all, but enough of them for a median."""
    least = max(least, 5 if name in (OURS, SDPA) else 2)
    if seconds > 2.0:
        least = min(least, 2)
    if seconds > 10.0:
        least = 1
    return max(least, min(21, round(budget / seconds)))


def by_turns(
    benchmark: BenchmarkFixture,
    runs: dict[str, Callable[[], Any]],
    first: dict[str, float],
    *,
    budget: float,
    least: int,
    rounds: int | None,
) -> dict[str, tuple[float, int]]:
    """(median seconds, rounds) of each contestant, all in turns; pytest-benchmark times ours.

    ``first``: about how long each takes. Slow rivals sit out some of the turns, evenly spread.
    """
    wanted = {name: rounds or rounds_for(name, first[name], budget, least) for name in runs}
    turns = wanted[OURS]
    times: dict[str, list[float]] = {name: [] for name in runs}
    turn = 0

    def rivals_turn() -> None:
        nonlocal turn
        turn += 1
        for name, run in runs.items():
            if name != OURS and turn * min(wanted[name], turns) // turns > len(times[name]):
                times[name].append(seconds_of(run))

    def ours() -> None:
        times[OURS].append(seconds_of(runs[OURS]))

    benchmark.pedantic(ours, setup=rivals_turn, rounds=turns)
    return {name: (median(found), len(found)) for name, found in times.items()}


def agree(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    """AssertionError unless a rival's numbers are ours, to a few roundings (indices may tie)."""
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 2e-2)
    for a, b in zip(_flat(ours), _flat(theirs), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(
                b.to(a.dtype), a, rtol=tolerance, atol=tolerance * float(a.abs().max())
            )


@dataclass
class Runner:
    """A contestant that has run once: it can, and its numbers are right."""

    run: Callable[[], Any]
    first: float  # seconds, about
    workspace: int  # bytes


def checked(
    found: list[Contestant], dtype: torch.dtype
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Everyone's first call: who runs, and why the others do not."""
    runners, refusals = {}, {}
    expected = None
    for contestant in found:
        name, run = contestant.name, contestant.run
        if run is None:
            refusals[name] = contestant.refusal
            continue
        try:
            if name in (OURS, COMPILED, KEOPS):  # what a first call loads, compiles and keeps
                run()
        except Exception as error:
            if name == OURS:
                raise
            refusals[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        start = time.perf_counter()
        workspace, result = peak_workspace(run)
        runners[name] = Runner(run, time.perf_counter() - start, workspace)
        if expected is None:
            expected = result
        elif contestant.same:
            agree(expected, result, dtype)
    return runners, refusals
