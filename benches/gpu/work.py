"""What a worker of session.py does: one function for each kind of job.

    python benches/gpu/work.py --device cuda --seed 1

reads a job a line (JSON) and answers each with a line. Whatever else is printed goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which reproducible products want
sys.path.insert(0, str(Path(__file__).parent))

import tree

tree.use()

import torch  # noqa: E402

# After these a process can do nothing more on its card, or not be trusted to.
SPOILS = (
    "CUDA error", "illegal memory access", "misaligned address", "device-side assert",
    "Offset increment outside graph", "HIP error",
)  # fmt: skip


class Worker:
    """The functions, by the kind of job."""

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.seed = device, seed
        self.prepared = False
        self.tuned: Any = None  # a case, its call, and what that gives in today's settings
        if device == "cuda" and torch.cuda.is_available():
            torch.zeros(1, device=device)  # the context

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """What a job came to. Errors are answers: {"error": ...}."""
        start = time.perf_counter()
        try:
            found = getattr(self, job["kind"])(job)
        except Exception:
            found = {"error": traceback.format_exc()[-3000:]}
        found["seconds"] = round(time.perf_counter() - start, 2)
        said = found.get("error") or ""
        if any(words in said for words in SPOILS):
            found["spoiled"] = True
        return found

    # Right numbers.

    def _correctness(self) -> Any:
        import correctness

        if not self.prepared:
            correctness.prepare(self.seed)
            self.prepared = True
        return correctness

    def check(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"problem", "operation", "backend"}: one operation on one problem, against float64."""
        if job["operation"] == "gradients" and self.device == "cpu":  # triton's, for both
            reason = interpreter_reason()
            if reason is not None:
                return {"error": None, "refused": True, "why": reason}
        return _told(
            self._correctness().check(job["problem"], job["operation"], job["backend"], self.device)
        )

    def around(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"operation", "backend"}: graphs, torch.compile, memory, compute-sanitizer."""
        of = self._correctness()
        run = of.around()[job["operation"]]
        return _told(of.check_around(job["operation"], run, job["backend"], self.device))

    def large(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"tokens", "heads", "dtype", "backend"}: rows and columns of a map that fits nowhere."""
        dtype = getattr(torch, job["dtype"])
        of = self._correctness()
        return _told(
            of.check_large(job["tokens"], job["heads"], dtype, job["backend"], self.device)
        )

    # What is here.

    def card(self, job: dict[str, Any]) -> dict[str, Any]:
        """Versions, and which backends run."""
        import flashmaps as fm
        from card import card

        backends = {name: [bool(each), each.reason] for name, each in fm.backends().items()}
        if self.device == "cpu" and backends["triton"][0]:
            reason = interpreter_reason()
            if reason is not None:
                backends["triton"] = [False, reason]
        return {"card": card(), "backends": backends}

    def rates(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the card can do: exponentials, products, bytes."""
        from speed import Clock, ceilings

        torch.use_deterministic_algorithms(False)
        return {"rates": ceilings(Clock(self.device))}

    # How fast.

    def time(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"operation", "shape", "batch", "dtype", "by", "graph"}: one contestant of one case.

        A graph that cannot be captured leaves torch's streams in disorder: the answer then asks for
        the same job in a fresh process, without a graph.
        """
        from speed import Clock, NoGraph, measure

        torch.use_deterministic_algorithms(False)
        try:
            with torch.no_grad():
                return measure(job, Clock(self.device))
        except NoGraph as error:
            return {"again": {**job, "graph": False, "no_graph": str(error)[:300]}, "spoiled": True}

    def tune(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"pass", "shape", "batch", "tiling", ...}: a candidate of tuning.py.

        ms as replays of a graph; "off": how far its numbers are from those of today's settings.
        """
        import tuning
        from flashmaps.kernels.settings import architecture_of
        from speed import Clock

        torch.use_deterministic_algorithms(False)
        architecture = architecture_of(torch.device(self.device))
        clock = Clock(self.device)
        with torch.no_grad():
            case = (job["pass"], job["shape"], job["batch"])
            if self.tuned is None or self.tuned[0] != case:
                call = tuning.call_of(job, self.device)
                usual = {**dict(zip(("pass", "shape", "batch"), case, strict=True)), "tiling": None}
                with tuning.used(tuning.settings_for(usual, architecture, self.device)):
                    self.tuned = (case, call, call())
            _, call, wanted = self.tuned
            with tuning.used(tuning.settings_for(job, architecture, self.device)):
                off = tuning.furthest(call(), wanted)
                call()
                run = clock.graph(call)
                return {"ms": clock.replays(run) * 1e3, "off": off}

    def profile(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"operation", "shape", "dtype", "backend"}: microseconds in each kernel of a call."""
        from speed import case_of, lazy_maps, on_device
        from torch.profiler import ProfilerActivity, profile

        operation, shape, dtype = case_of(job)
        inputs = on_device(operation.inputs(shape, dtype), self.device)
        maps = lazy_maps(inputs, job["backend"])
        operation.lazy(inputs, *maps)
        kind = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
        with profile(activities=[kind]) as seen:
            for _ in range(10):
                operation.lazy(inputs, *maps)
            if self.device == "cuda":
                torch.cuda.synchronize()
        field = "device_time_total" if self.device == "cuda" else "cpu_time_total"
        spent = {each.key: getattr(each, field) / 10 for each in seen.key_averages()}
        most = sorted(spent.items(), key=lambda item: -item[1])[:12]
        return {"us": {name: round(us, 2) for name, us in most}}

    def counters(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"backends", "file", "limit"}: Nsight Compute's numbers of some kernels."""
        import counters

        backends = tuple(job["backends"])
        return counters.watched(backends, Path(job["file"]), job["limit"] - 8.0)

    # For the tests of all this.

    def planted(self, job: dict[str, Any]) -> dict[str, Any]:
        """{"what"}: a crash, a hang, a wrong number, an error that spoils the process."""
        match job["what"]:
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hang":
                time.sleep(3600)
            case "wrong":
                return {"error": "AssertionError: off by one"}
            case "spoil":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"pid": os.getpid()}


def _told(result: Any) -> dict[str, Any]:
    error = None if result.error is None else result.error[-1500:]
    return {"error": error, "refused": result.refused}


def interpreter_reason() -> str | None:
    """Why triton's interpreter does not work here, or None: some do not with some numpy."""
    import flashmaps as fm
    import numpy
    import triton

    tokens = torch.zeros(1, 1, 4, 8)
    try:
        fm.AttentionMap(tokens, tokens, backend="triton").entropy()
    except Exception as error:
        said = str(error).strip().splitlines()[-1:]
        return (
            f"the interpreter of triton {triton.__version__} does not work with numpy "
            f"{numpy.__version__}: {type(error).__name__}: {''.join(said)[:200]}"
        )
    return None


def emulate() -> None:
    """Backend "cuda" without a card: its sources compiled for the CPU (tests/cuda_watched.py)."""
    import cuda_watched
    from flashmaps.maps.backends import choice

    carried = tree.carried("_emulated")
    emulated = cuda_watched.Watched(cuda_watched.load(carried))
    choice._BACKENDS["cuda"] = emulated  # type: ignore[assignment]
    from flashmaps.maps.backends import cuda

    cuda.unavailable_reason = lambda: None  # type: ignore[assignment]
    cuda.what_runs = lambda: "CUDA C++ kernels, emulated on the CPU"  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    if options.device == "cpu":
        with contextlib.suppress(Exception):
            emulate()
    worker = Worker(options.device, options.seed)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
