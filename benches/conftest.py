"""Options of the benchmarks, the fixture that runs one case, and the table at the end.

make bench                              everything at sd2-64, the fused statistics at all shapes
make bench ARGS=--full                  also the large shapes, more shapes and every rival
make bench ARGS="--rounds 1 -k fused"   a quick look; its numbers are not written
make bench ARGS=--benchmark-disable     once each, for correctness only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flashmaps.maps.backends.cpu
import measure
import pytest
import report
import torch
from operations import Operation, compute_dtype
from pytest_benchmark.fixture import BenchmarkFixture
from rivals import contestants
from roofline import Roofline, machine
from shapes import Shape

_HEADLINE_ROUNDS = 5
_SECONDS = 0.7  # of rounds for each contestant of a case, about


def extension() -> tuple[str, float] | None:
    """The compiled module and when it was built: numbers of two builds do not make one table."""
    module = flashmaps.maps.backends.cpu._C
    return None if module is None else (module.__file__, Path(module.__file__).stat().st_mtime)


class Session:
    """What one run of the benchmarks has found."""

    def __init__(self) -> None:
        self.cases: list[report.Case] = []
        self.host: list[report.Host] = []
        self.roofline = Roofline()
        self.extension = extension()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flashmaps benchmarks")
    group.addoption("--full", action="store_true", help="every shape and every rival; takes long")
    group.addoption(
        "--rounds", type=int, help="rounds of everyone (default: as many as a median needs)"
    )
    group.addoption("--no-save", action="store_true", help="print the table only")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SESSION] = Session()
    config.option.benchmark_quiet = True  # one table, ours
    config.option.benchmark_disable_gc = True


_SESSION = pytest.StashKey[Session]()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether everything was asked for."""
    return request.config.getoption("--full")


@pytest.fixture
def case(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[..., None]:
    """case(operation, shape, dtype): measure it beside its rivals."""
    session = request.config.stash[_SESSION]

    def run(
        operation: Operation,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        *,
        compiled: bool = True,
        headline: bool = False,
    ) -> None:
        inputs = operation.inputs(shape, dtype)
        found = contestants(operation, inputs, compiled=compiled)
        runners, refusals = measure.checked(found, dtype)
        session.roofline.sample(compute_dtype(dtype))
        times = measure.by_turns(
            benchmark,
            {name: runner.run for name, runner in runners.items()},
            {name: runner.first for name, runner in runners.items()},
            budget=_SECONDS,
            least=_HEADLINE_ROUNDS if headline else 0,
            rounds=request.config.getoption("--rounds"),
        )
        if benchmark.disabled:
            return
        measured = {name: (*times[name], runners[name].workspace) for name in runners}
        made = report.make_case(operation, shape, dtype, measured, refusals)
        session.cases.append(made)
        benchmark.extra_info["rivals"] = {row.by: row.median for row in made.rows}

    return run


@pytest.fixture
def host(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Callable[..., None]:
    """Times what the host does in a call: the median of many."""
    session = request.config.stash[_SESSION]

    def run(backend: str, call: str, function: Callable[[], Any]) -> None:
        benchmark.pedantic(function, rounds=500, warmup_rounds=20)
        if not benchmark.disabled:
            median = benchmark.stats.stats.median
            session.host.append(report.Host(backend, call, median * 1e6))

    return run


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    if session.host:
        terminalreporter.write_line(report.host_text(session.host))
    if not session.cases:
        return
    report.add_limits(session.cases, session.roofline)
    here = machine()
    terminalreporter.write_line(report.text(session.cases, report.about(here, session.roofline)))
    options = config.option
    partly = exitstatus != 0 or options.keyword or options.rounds or options.no_save
    if partly or not all(Path(argument).is_dir() for argument in config.args):
        terminalreporter.write_line("\nNot written to results/: this was not a whole, clean run.")
        return
    if session.extension != extension():
        terminalreporter.write_line("\nNot written to results/: flashmaps was rebuilt meanwhile.")
        return
    files = report.write(session.cases, session.host, here, session.roofline)
    terminalreporter.write_line("\nWritten to " + " and ".join(map(str, files)))
