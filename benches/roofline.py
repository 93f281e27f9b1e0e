"""What this machine could do at best, measured in the same run, and its name.

    limit = flops / (multiply-add rate) + exps / (exp rate)

``flops`` and ``exps`` count what the definition needs, each element once: recomputation counts
against us. Both rates are the best ever seen in this run with all of torch's threads: torch.mm of
two square matrices, and torch.exp of a tensor that stays in the cache. Multiplications and exps
share the same arithmetic units, so their times add. Memory traffic is not part of the limit. Half
precision is held to float32's limit, in which it is accumulated.
"""

from __future__ import annotations

import datetime
import platform
import re

import flashmaps as fm
import flashmaps.maps.backends.cpu
import torch
from flashmaps.app.doctor import _processor


class Roofline:
    """Rates of each compute dtype. They only rise: a busy moment does not lower the limit."""

    def __init__(self) -> None:
        self.flops: dict[torch.dtype, float] = {}
        self.exps: dict[torch.dtype, float] = {}

    def sample(self, dtype: torch.dtype) -> None:
        """Measure once more."""
        found = fm.Ceilings.measure("cpu", dtype)
        self.flops[dtype] = max(found.flops, self.flops.get(dtype, 0.0))
        self.exps[dtype] = max(found.exps, self.exps.get(dtype, 0.0))

    def limit(self, flops: float, exps: float, dtype: torch.dtype) -> float:
        """Seconds."""
        return flops / self.flops[dtype] + exps / self.exps[dtype]


def machine() -> dict[str, str | int]:
    """What a reader needs to know about where the numbers come from; nothing that names a host."""
    return {
        "cpu": re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|@.*", "", _processor()).strip(),
        "instruction_set": flashmaps.maps.backends.cpu.instruction_set()
        or "none (reference backend)",
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flashmaps": fm.__version__,
        "date": datetime.date.today().isoformat(),
    }


def slug(of: dict[str, str | int]) -> str:
    """A file name: processor, instruction set and threads."""
    words = f"{of['cpu']} {of['instruction_set']} {of['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
