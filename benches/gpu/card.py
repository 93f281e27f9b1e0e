"""What a reader needs to know about where numbers come from."""

from __future__ import annotations

import datetime
import platform
import subprocess
from typing import Any

import torch


def card() -> dict[str, Any]:
    """Name of the card, driver and versions; on the CPU, that it is one."""
    import flashmaps

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flashmaps": flashmaps.__version__,
        "date": datetime.date.today().isoformat(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    if not torch.cuda.is_available():
        return {"name": "no card: interpreted and emulated on the CPU", **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9),
        "clock_mhz": _asked("clocks.max.sm"),
        "driver": _asked("driver_version"),
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        **found,
    }


def _asked(what: str) -> str:
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
