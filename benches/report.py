"""One table of everything that was measured, and its files."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from flashmaps.files import write_text
from operations import Operation, compute_dtype
from rivals import EAGER, KEPT, OURS, SDPA
from roofline import Roofline, slug
from shapes import Shape

FOLDER = Path(__file__).parent / "results"

HEADERS = (
    "median", "rounds", "of SDPA", "of eager", "workspace", "of limit", "GFLOP/s", "ps/element",
)  # fmt: skip

_LEGEND = """\
median: of one call, in milliseconds; everyone takes turns. of SDPA, of eager: its time divided by \
theirs. SDPA is torch's attention with the same Q and K, a yardstick: only in the products does it \
do the job.
workspace: the most held at once beyond inputs and outputs, in MB (10^6 bytes).
of limit: the machine's limit divided by the median. limit = flops / (multiply-add rate) + exps / \
(exp rate), with what the definition needs, each element once, and the best rates of torch.mm and \
torch.exp in this run.
ps/element: picoseconds for each of the H N M elements of the heads' maps (of both maps, where \
there are two).
torch.compile: compiled eager. map, then reduce: the mean map built head by head by torch, then \
reduced. reduce of a kept map: the same without building it."""
LEGEND = "\n".join(textwrap.fill(line, 100) for line in _LEGEND.splitlines())


@dataclass
class Row:
    """One contestant of one case."""

    by: str
    median: float | None = None  # seconds
    rounds: int = 0
    of_sdpa: float | None = None
    of_eager: float | None = None
    workspace: int | None = None  # bytes
    of_limit: float | None = None
    gflops: float | None = None
    ps_per_element: float | None = None
    refusal: str = ""

    def cells(self) -> list[str]:
        """What the table shows under HEADERS."""
        if self.median is None:
            return [self.refusal]
        return [
            f"{self.median * 1e3:,.2f}",
            str(self.rounds),
            _number(self.of_sdpa, "{:.2f}"),
            _number(self.of_eager, "{:.3f}"),
            _number(None if self.workspace is None else self.workspace / 1e6, "{:,.1f}"),
            _number(self.of_limit, "{:.0%}"),
            _number(self.gflops, "{:.0f}"),
            _number(self.ps_per_element, "{:,.0f}"),
        ]


@dataclass
class Case:
    """One operation on one shape, and everyone who did it."""

    operation: str
    shape: str
    dtype: str
    flops: float
    exps: float
    elements: int
    rows: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.operation}, {self.shape}, {self.dtype}"


@dataclass
class Host:
    """What the host pays for a call."""

    backend: str
    call: str
    microseconds: float


def host_text(rows: list[Host]) -> str:
    """Microseconds by backend and call."""
    lines = ["", "Microseconds of the host for one call, its kernels left out (median of 500):"]
    return "\n".join(
        [*lines, *(f"  {r.backend:<8}{r.call:<20}{r.microseconds:8.1f}" for r in rows), ""]
    )


def make_case(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    measured: dict[str, tuple[float, int, int]],  # seconds, rounds, bytes
    refusals: dict[str, str],
) -> Case:
    """A case without its limit: the rates may still rise."""
    case = Case(
        operation.name,
        str(shape),
        str(dtype).removeprefix("torch."),
        operation.flops(shape),
        operation.exps(shape),
        operation.maps * shape.scores,
    )
    for name, (seconds, rounds, workspace) in measured.items():
        sdpa, eager = (measured[k][0] if k in measured else None for k in (SDPA, EAGER))
        row = Row(name, seconds, rounds, workspace=workspace)
        row.of_sdpa = None if sdpa is None else seconds / sdpa
        row.of_eager = None if eager is None else seconds / eager
        if name != SDPA:  # which counts differently: it has a second product, and no reduction
            if name != KEPT:  # which has spared itself the work that is counted
                row.gflops = case.flops / seconds / 1e9
            row.ps_per_element = seconds / case.elements * 1e12
        case.rows.append(row)
    case.rows += [Row(name, refusal=why) for name, why in refusals.items()]
    return case


def add_limits(cases: list[Case], roofline: Roofline) -> None:
    """Fill in ``of_limit`` once all rates are known."""
    for case in cases:
        limit = roofline.limit(case.flops, case.exps, compute_dtype(getattr(torch, case.dtype)))
        for row in case.rows:
            if row.gflops is not None and row.median is not None:
                row.of_limit = limit / row.median


def rates(roofline: Roofline) -> str:
    """The rates behind the limits, in words."""
    return "; ".join(
        f"{str(dtype).removeprefix('torch.')}: multiply-add {flops / 1e9:.0f} GFLOP/s (torch.mm), "
        f"{roofline.exps[dtype] / 1e9:.1f} G exp/s (torch.exp)"
        for dtype, flops in roofline.flops.items()
    )


def text(cases: list[Case], about: str) -> str:
    """The table for a terminal."""
    width = max(len(row.by) for case in cases for row in case.rows) + 4
    columns = [
        max(len(h), *(len(c) for case in cases for r in case.rows for c in _full(r)[i : i + 1]))
        for i, h in enumerate(HEADERS)
    ]
    lines = ["", about, "", " " * width + _aligned(HEADERS, columns)]
    for case in cases:
        lines.append(case.title)
        for row in case.rows:
            cells = _full(row)
            shown = _aligned(cells, columns) if cells else "  " + row.refusal
            lines.append(f"  {row.by:<{width - 2}}{shown}")
    return "\n".join([*lines, "", LEGEND])


def markdown(cases: list[Case], host: list[Host], about: str) -> str:
    """The same table for a README."""
    lines = [about, "", "| case | by | " + " | ".join(HEADERS) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(HEADERS))
    for case in cases:
        for n, row in enumerate(case.rows):
            cells = _full(row) or [row.refusal, *[""] * (len(HEADERS) - 1)]
            by = f"**{row.by}**" if row.by == OURS else row.by
            lines.append(f"| {'' if n else case.title} | {by} | " + " | ".join(cells) + " |")
    lines += ["", _LEGEND.replace("\n", "\n\n"), ""]
    if host:
        lines += [
            "Microseconds of the host for one call, its kernels left out (median of 500):",
            "",
            "| backend | call | us |",
            "| --- | --- | ---: |",
            *(f"| {row.backend} | {row.call} | {row.microseconds:.1f} |" for row in host),
            "",
        ]
    return "\n".join(lines)


def about(machine: dict[str, str | int], roofline: Roofline) -> str:
    """One line about where the numbers come from."""
    return (
        f"{machine['cpu']}, {machine['instruction_set']}, {machine['threads']} threads, "
        f"{machine['system']}; flashmaps {machine['flashmaps']}, torch {machine['torch']}, "
        f"Python {machine['python']}; {machine['date']}. {rates(roofline)}."
    )


def write(
    cases: list[Case], host: list[Host], machine: dict[str, str | int], roofline: Roofline
) -> list[Path]:
    """results/<machine>.json and .md, each whole or not at all."""
    FOLDER.mkdir(exist_ok=True)
    stem = FOLDER / slug(machine)
    everything = {
        "machine": machine,
        "multiply_add_per_second": {str(d): v for d, v in roofline.flops.items()},
        "exp_per_second": {str(d): v for d, v in roofline.exps.items()},
        "cases": [asdict(case) for case in cases],
        "host": [asdict(row) for row in host],
    }
    files = [stem.with_name(stem.name + suffix) for suffix in (".json", ".md")]
    write_text(files[0], json.dumps(everything, indent=1, allow_nan=False) + "\n")
    write_text(files[1], markdown(cases, host, about(machine, roofline)))
    return files


def _full(row: Row) -> list[str]:
    return [] if row.median is None else row.cells()


def _aligned(cells: tuple[str, ...] | list[str], columns: list[int]) -> str:
    return "".join(f"{cell:>{width + 2}}" for cell, width in zip(cells, columns, strict=True))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
