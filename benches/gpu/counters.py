"""What holds a kernel back, by the card's own counters: Nsight Compute (ncu), where there is one.

    python3 benches/gpu/session.py profile        # asks for it, and writes counters.csv
    python3 benches/gpu/counters.py               # what ncu watches: some kernels, once each

Kernels of sd2-64 x 8: the log-sum-exp and the row statistics of backend "triton", and the row
statistics of backend "cuda". Torch has kernels of the same short names, so ours are told by
their mangled ones, and nothing is watched before everything has run once.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# In this order they are launched: as a user sees them, and what their mangled names match. Torch's
# at::native::reduce_kernel is _ZN2at6native13reduce_kernel...
KERNELS = {
    "triton lse": r"^lse_kernel$",
    "triton rows": r"^reduce_kernel$",
    "cuda rows": r"^_Z[A-Z0-9]*flashmaps.*statistics_kernel",
}
SECTIONS = (
    "LaunchStats", "Occupancy", "SpeedOfLight", "SchedulerStats", "WarpStateStats",
    "ComputeWorkloadAnalysis",
)  # fmt: skip
# Beginnings of the lines that decide; all of them are in counters.csv.
DECISIVE = (
    "Duration", "SM Frequency", "Registers Per Thread", "Achieved Occupancy",
    "Theoretical Occupancy", "Issue Slots Busy", "Issued Warp", "Eligible Warps", "No Eligible",
    "Executed Ipc Active", "L2 Cache Throughput", "L1/TEX Hit Rate", "L2 Hit Rate", "Stall", "XU",
    "FMA", "ALU", "Tensor", "Warp Cycles Per Issued", "Waves Per SM", "sm__inst_executed_pipe",
    "smsp__average_warps",
)  # fmt: skip


def find() -> str | None:
    """ncu, if it is installed."""
    places = (*sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True),)
    return shutil.which("ncu") or next(
        (str(file) for file in (Path("/usr/local/cuda/bin/ncu"), *places) if file.exists()), None
    )


# Of pipes and of what warps wait for: some versions show them in a section's tables, others not.
METRICS = (
    *(
        f"sm__inst_executed_pipe_{pipe}.avg.pct_of_peak_sustained_active"
        for pipe in ("alu", "fma", "xu")
    ),
    *(
        f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio"
        for why in (
            "barrier", "long_scoreboard", "short_scoreboard", "math_pipe_throttle", "gmma", "wait",
            "not_selected", "mio_throttle", "dispatch_stall", "membar",
        )
    ),
)  # fmt: skip


def commands(tool: str, python: str, backends: tuple[str, ...]) -> list[list[str]]:
    """How ncu is called: each kernel once, at the clocks and with the caches that there are.

    Its versions differ in what they know, so each call asks for less than the one before it.
    """
    sections = [word for section in SECTIONS for word in ("--section", section)]
    wanted = {name: told for name, told in KERNELS.items() if name.split()[0] in backends}
    details = ["--print-details", "all"]
    return [
        [
            tool, "--clock-control", "none", "--cache-control", "none",
            "--profile-from-start", "off", "--kernel-name-base", "mangled",
            "--print-kernel-base", "mangled", "--kernel-name", "regex:" + "|".join(wanted.values()),
            "--launch-count", str(len(wanted)), "--csv", "--page", "details", *more, *sections,
            python, __file__, *backends,
        ]
        for more in (["--metrics", ",".join(METRICS), *details], details, [])
    ]  # fmt: skip


def rows(text: str) -> list[dict[str, str]]:
    """The lines of ncu's table; what it and the program say before is left out."""
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return list(csv.DictReader(lines[first:]))


def decisive(found: list[dict[str, str]], backends: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Of each kernel the lines that decide, with units."""
    names = [name for name in KERNELS if name.split()[0] in backends]
    told: dict[str, dict[str, str]] = {name: {} for name in names}
    numbers = sorted({int(row["ID"]) for row in found})
    if numbers != [*range(len(names))]:
        raise ValueError(f"ncu watched launches {numbers}, not one of each of {names}")
    for row in found:
        metric, number, kernel = row.get("Metric Name") or "", int(row["ID"]), row["Kernel Name"]
        if not re.search(KERNELS[names[number]], kernel):
            raise ValueError(f"ncu watched {kernel!r} in the place of {names[number]!r}")
        if metric.startswith(DECISIVE):
            value = f"{row.get('Metric Value')} {row.get('Metric Unit') or ''}".strip()
            told[names[number]][metric] = value
    return told


def watched(backends: tuple[str, ...], out: Path, seconds: float) -> dict[str, Any]:
    """Run it: {"counters": ...}, or {"error": ...}. The whole table goes to ``out``."""
    tool = find()
    if tool is None:
        return {"error": "ncu (Nsight Compute) was not found"}
    end = time.monotonic() + seconds
    said = []
    for command in commands(tool, sys.executable, backends):
        left = end - time.monotonic()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(1.0, left), check=False
            )
        except subprocess.TimeoutExpired as error:
            said.append(f"{error.timeout:.0f} s were not enough: {error.stdout!r:.500}")
            break
        out.write_text(done.stdout)
        if found := rows(done.stdout):
            try:
                return {"counters": decisive(found, backends), "said": said}
            except ValueError as error:
                return {"error": str(error), "said": said}
        said.append(f"{done.returncode}: {(done.stdout + done.stderr)[-700:]}")
    return {"error": "ncu: " + " | ".join(said)}


def main(backends: tuple[str, ...]) -> None:
    """Launch the kernels, in the order of KERNELS: once to warm up, once to be watched."""
    sys.path.insert(0, str(Path(__file__).parent))
    import tree

    tree.use()
    import torch
    import tuning

    calls = []
    with torch.no_grad():
        for name in ("lse", "even"):
            job = {"pass": name, "shape": "sd2-64", "batch": 8, "tiling": None}
            if "triton" in backends:
                calls.append(tuning.call_of(job, "cuda"))
        if "cuda" in backends:
            calls.append(tuning.call_of(job, "cuda", backend="cuda"))
        for call in calls:
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for call in calls:
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or ("triton", "cuda"))
