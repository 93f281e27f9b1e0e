"""What holds a kernel back, by the card's own counters: Nsight Compute (ncu), where there is one.

    python3 benches/gpu/session.py profile        # asks for it, and writes counters.csv
    python3 benches/gpu/counters.py               # what ncu watches: some kernels, once each

Kernels of sd2-64 x 8: the log-sum-exp and the row statistics of backend "triton", both again with
products ahead of exponentials, and the row statistics of backend "cuda".
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# In this order they are launched; names as a user sees them.
KERNELS = (
    "triton lse", "triton rows", "triton lse, ahead", "triton rows, ahead", "cuda rows",
)  # fmt: skip
SECTIONS = (
    "LaunchStats", "Occupancy", "SpeedOfLight", "SchedulerStats", "WarpStateStats",
    "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis",
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
    count = sum(name.split()[0] in backends for name in KERNELS)
    details = ["--print-details", "all"]
    return [
        [
            tool, "--clock-control", "none", "--cache-control", "none",
            "--kernel-name", "regex:^(lse_kernel|reduce_kernel|statistics_kernel)$",
            "--launch-count", str(count), "--csv", "--page", "details", *more, *sections,
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
    for row in found:
        metric, number = row.get("Metric Name") or "", int(row["ID"])
        if number < len(names) and metric.startswith(DECISIVE):
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
            return {"counters": decisive(found, backends), "said": said}
        said.append(f"{done.returncode}: {(done.stdout + done.stderr)[-700:]}")
    return {"error": "ncu: " + " | ".join(said)}


def main(backends: tuple[str, ...]) -> None:
    """Launch the kernels, in the order of KERNELS."""
    sys.path.insert(0, str(Path(__file__).parent))
    import tree

    tree.use()
    import torch
    import tuning

    lse, even = ({"pass": name, "shape": "sd2-64", "batch": 8} for name in ("lse", "even"))
    with torch.no_grad():
        if "triton" in backends:
            call_lse, call_even = (tuning.call_of(job, "cuda") for job in (lse, even))
            ahead = {"tiling": [128, 64, 8, 3], "anchored": True, "ahead": True}
            for changes in ({"tiling": None}, ahead):
                for job, call in ((lse, call_lse), (even, call_even)):
                    with tuning.used(tuning.settings_for({**job, **changes}, "sm_90", "cuda")):
                        call()
        if "cuda" in backends:
            tuning.call_of(even, "cuda", backend="cuda")()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or ("triton", "cuda"))
