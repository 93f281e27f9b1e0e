"""Fills a Triton cache for a card that is not here, with the kernels that a session launches.

    TRITON_CACHE_DIR=... python warm.py sm_90 quick headline [--share 0/2]

quick: what `session.py check --quick` launches; headline: what is timed, likewise; tune: what
is tried beside today's settings; all: the checks of every problem. The backend runs as on a card,
on tensors of the CPU, and what it would launch is compiled (tests/mocked_launches.py). carried.py
calls this.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import tree

tree.use()

import torch  # noqa: E402


class _Card:
    """What triton asks a driver for when it compiles; nothing is launched."""

    def __init__(self, architecture: str) -> None:
        self.number = int(architecture.removeprefix("sm_"))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, *device: int) -> tuple[int, int]:
        return divmod(self.number, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Filling:
    """Compiles what is launched, its share of it."""

    def __init__(self, share: int, of: int) -> None:
        self.share, self.of = share, of
        self.kernels: Counter[str] = Counter()
        self.seen: set[str] = set()

    def start(self, launch: Any, arguments: dict[str, Any]) -> Any:
        """In the place of `flashmaps.kernels.run.start`."""
        from flashmaps.kernels.ahead import key_of

        key = key_of(launch)
        if key not in self.seen:
            self.seen.add(key)
            if zlib.crc32(key.encode()) % self.of == self.share:
                launch.kernel.warmup(**arguments, grid=(launch.programs,), **launch.tiling.options)
                self.kernels[launch.kernel.__name__] += 1
        return SimpleNamespace(run=lambda *given: None, function=0, packed_metadata=())


def checks(names: tuple[str, ...]) -> None:
    """What the checks of these problems launch; what comes of it is noise, and not looked at."""
    import contract
    import correctness
    import oracle
    from checks import EVERYWHERE, OPERATIONS

    nothing: Callable[..., None] = lambda *given, **named: None  # noqa: E731
    with contextlib.ExitStack() as stack:
        for name in dir(oracle):
            if name.startswith("assert_"):
                stack.enter_context(mock.patch.object(oracle, name, nothing))
        for name in ("check", "check_entries", "check_reduction"):
            stack.enter_context(mock.patch.object(contract.Subject, name, nothing))
        stack.enter_context(mock.patch.object(
            contract.Subject, "check_topk", lambda subject, k: subject.lazy.topk(k)))  # fmt: skip
        stack.enter_context(mock.patch.object(torch, "equal", lambda *given: True))
        correctness.prepare(1)
        torch.use_deterministic_algorithms(False)  # outputs stay what `empty` makes them
        for name in names:
            for operation in (*EVERYWHERE, "again"):
                with contextlib.suppress(Exception):  # noise is no map
                    OPERATIONS[operation](correctness._checked(name, "triton", "cpu"))
            correctness._checked.cache_clear()


def headline() -> None:
    """What the timings launch."""
    import speed

    with torch.no_grad():
        for job in speed.jobs(("triton",), quick=True):
            if job["by"].startswith("flashmaps, triton"):
                operation, shape, dtype = speed.case_of(job)
                inputs = operation.inputs(shape, dtype)
                speed.contestants(operation, ("triton",))[job["by"]](operation, inputs)()


def candidates(architecture: str) -> None:
    """What `session.py tune` launches."""
    import tuning

    with torch.no_grad():
        for job in tuning.jobs():
            with tuning.used(tuning.settings_for(job, architecture, "cpu")):
                tuning.call_of(job, "cpu")()


_empty = torch.empty


def _zeros(*shape: Any, **options: Any) -> torch.Tensor:
    return _empty(*shape, **options).zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture")
    parser.add_argument("parts", nargs="+", choices=("quick", "headline", "tune", "all"))
    parser.add_argument("--share", default="0/1", help="which of how many parts of the kernels")
    options = parser.parse_args()
    share, of = map(int, options.share.split("/"))

    import correctness
    import mocked_launches
    from flashmaps.kernels import run
    from triton.runtime import driver

    driver.set_active(_Card(options.architecture))
    filling = Filling(share, of)
    with (
        mocked_launches.triton(options.architecture),
        mock.patch.object(run, "start", filling.start),
        mock.patch.object(torch, "empty", _zeros),  # indices that there are
    ):
        if "headline" in options.parts:
            headline()
        if "tune" in options.parts:
            candidates(options.architecture)
        if "all" in options.parts:
            checks(tuple(correctness.named_cases()))
        elif "quick" in options.parts:
            checks(correctness.QUICK)
    print(f"share {options.share}: {filling.kernels.total()} of {len(filling.seen)} kernels")


if __name__ == "__main__":
    main()
