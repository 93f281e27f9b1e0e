"""A card's minutes, none of them lost: smoke, check, time, tune, profile.

    source benches/gpu/env.sh
    python3 benches/gpu/session.py                  # all of it, in this order, within 8 minutes
    python3 benches/gpu/session.py --quick          # within 4
    python3 benches/gpu/session.py check --budget 75 --backend cuda
    python3 benches/gpu/session.py check --device cpu    # without a card: Triton interpreted, CUDA
                                                         # C++ emulated, the smallest problems

smoke     versions, backends, one operation of each, the card's measured rates
check     every operation, backend and dtype against float64; most telling first
time      our statistics beside eager torch, SDPA and others, on the same numbers
tune      the settings of the headline passes beside others, in the same process (tuning.py)
profile   where the microseconds of a call go; the counters of some kernels, where ncu is

Each job runs in a process that may crash or hang without costing the others, and each result is on
disk at once (OUT/*.jsonl). A failed check stops nothing. OUT/<card>.json and .md are written anew
after every part, and copied to benches/results/ by --keep. The exit status is 1 where a number is
wrong or a worker was lost, 2 where there is no card. Needs this checkout and torch; nothing is
installed (see env.sh).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tree

tree.use()

import hands  # noqa: E402

PARTS = ("smoke", "check", "time", "tune", "profile")
# Shares of the budget; what a part leaves goes to those behind it.
SHARES = {"smoke": 0.12, "check": 0.38, "time": 0.3, "tune": 0.15, "profile": 0.05}
EACH = {"smoke": 60.0, "check": 45.0, "time": 30.0, "tune": 40.0, "profile": 30.0}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="session.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default all")
    add("--quick", action="store_true", help="fewer problems and shapes")
    add("--budget", type=float, metavar="SECONDS", help="of the whole; default 480, quick 240")
    add("--each", type=float, metavar="SECONDS", help="the most that one job may take")
    add("--workers", type=int, help="processes that check; default one less than the cores")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--backend", action="append", choices=("triton", "cuda"), help="default: those that run")
    add("--only", metavar="OPERATION", help="what this is part of the name of")
    add("--seed", type=int, help="of the random numbers; default a fresh one")
    add("--out", type=Path, default=Path("gpu-session"), metavar="FOLDER")
    add("--keep", action="store_true", help="copy the tables to benches/results")
    add("--plant", action="append", default=[], help=argparse.SUPPRESS)  # by the tests
    options = parser.parse_args(given)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    options.parts = options.parts or list(PARTS)
    return options


class Session:
    """One call of this program."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device: str = options.device
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.budget = options.budget or (240.0 if options.quick else 480.0)
        self.begin = time.monotonic()
        self.seed = random.randrange(2**31) if options.seed is None else options.seed
        self.backends: tuple[str, ...] = tuple(options.backend or ())
        self.bad = 0
        self.command = [
            sys.executable, str(Path(__file__).with_name("work.py")),
            "--device", self.device, "--seed", str(self.seed),
        ]  # fmt: skip

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.begin)

    def run(self) -> int:
        """All parts; the exit status."""
        print(f"seed {self.seed}, {self.budget:.0f} s, results in {self.out}", flush=True)
        if not self.backends:
            self.backends = self._find_backends()
        if not self.backends:
            return 2
        parts = self.options.parts
        for number, part in enumerate(parts):
            share = SHARES[part] / sum(SHARES[each] for each in parts[number:])
            makers: dict[str, Callable[[], list[hands.Job]]] = {
                "smoke": self._smoke, "check": self._check, "time": self._time, "tune": self._tune,
                "profile": self._profile,
            }  # fmt: skip
            jobs: list[hands.Job] = [
                {"kind": "planted", "what": what, **({"limit": 3.0} if what == "hang" else {})}
                for what in self.options.plant
            ]
            self._do(part, jobs + makers[part](), share * self.left())
            self.options.plant = []
            self._report()
        print(f"{self.budget - self.left():.0f} s in all", flush=True)
        return 1 if self.bad else 0

    def _do(self, part: str, jobs: list[hands.Job], seconds: float) -> None:
        cores = os.cpu_count() or 1
        many = self.options.workers or max(1, min(15, cores - 1))
        begin = time.monotonic()
        not_run = hands.run(
            jobs,
            self.command,
            self.out / f"{part}.jsonl",
            workers=many if part in ("smoke", "check") else 1,
            seconds=seconds,
            each=self.options.each or EACH[part],
            tell=self._tell,
        )
        took = time.monotonic() - begin
        rest = f", {not_run} not run for want of time" if not_run else ""
        print(f"{part}: {len(jobs) - not_run} jobs in {took:.0f} of {seconds:.0f} s{rest}\n")

    def _tell(self, line: hands.Job) -> None:
        words = ("backend", "problem", "operation", "shape", "batch", "by", "tiling", "what")
        variants = ("anchored", "ahead", "resident", "splits")  # of a candidate
        name = " ".join(str(line[key]) for key in words if key in line)
        name += "".join(f" {key}={line[key]}" for key in variants if key in line)
        wrong = line.get("lost") or line.get("error")
        counts = line["kind"] in ("check", "around", "large", "planted", "card", "rates")
        counts |= "ncu watched" in str(wrong)
        counts &= line.get("lost") != hands.OVER
        if wrong:
            self.bad += counts
            word = "LOST" if "lost" in line else "WRONG" if counts else "no"
            print(f"{word} {line['kind']} {name}: {str(wrong).strip().splitlines()[-1][:200]}")
        elif "ms" in line:
            host = f", host {line['host_ms']:.3f}" if "host_ms" in line else ""
            off = f", off {line['off']:.1e}" if line.get("off") else ""
            print(f"{name}: {line['ms']:.4f} ms{host}{off}")
        elif line["kind"] in ("rates", "profile"):
            print(f"{line['kind']} {name}: {line.get('rates') or line.get('us')}")
        elif "counters" in line:
            for kernel, values in line["counters"].items():
                print(f"{kernel}: " + "; ".join(f"{key} {value}" for key, value in values.items()))
        sys.stdout.flush()

    # The jobs of each part, the most telling first.

    def _find_backends(self) -> tuple[str, ...]:
        """Asked of a worker: the process that hands out jobs stays clear of the card."""
        hand = hands.Hand(self.command, self.out / "workers.log")
        found = hand.ask({"kind": "card"}, 120.0)
        hand.stop()
        if "backends" not in found:
            print(f"The first worker failed: {found.get('lost') or found.get('error')}")
            return ()
        if self.device == "cuda" and "no card" in found["card"]["name"]:
            print("There is no GPU here that torch can see, so there is nothing to check or time.")
            print(f"torch {found['card']['torch']}. Without a GPU: `make test`, or --device cpu.")
            return ()
        names = tuple(name for name in ("triton", "cuda") if found["backends"][name][0])
        for name in ("triton", "cuda"):
            if name not in names:
                print(f"backend {name} does not run: {found['backends'][name][1]}")
        return names

    def _smoke(self) -> list[hands.Job]:
        if self.device == "cpu":
            return [{"kind": "card"}]
        one = "2x5x33x47x64-float16"
        jobs: list[hands.Job] = [{"kind": "card"}, {"kind": "rates"}]
        for backend in self.backends:
            for operation in ("lse", "reductions", "product", "dense"):
                jobs.append(_checking(one, operation, backend))
        return jobs

    def _check(self) -> list[hands.Job]:
        import correctness as of
        from checks import EVERYWHERE

        quick = self.options.quick
        cpu = self.device == "cpu"
        names = of.QUICK
        if not quick:
            names += tuple(name for name in of.named_cases() if name not in of.QUICK)
        first = ("lse", "reductions", "dense", "product")
        operations = (*first, *(each for each in EVERYWHERE if each not in first))
        if cpu:
            return self._only(
                [
                    _checking(of.SMALLEST[backend], operation, backend)
                    for operation in operations
                    for backend in self.backends
                ]
            )
        jobs = [
            _checking(name, operation, backend)
            for name in names
            for operation in (*operations, "again")
            for backend in self.backends
        ]
        near = len(of.QUICK) * (len(operations) + 1) * len(self.backends)
        jobs[near:near] = [
            {"kind": "around", "operation": name, "backend": backend}
            for name in of.around()
            for backend in self.backends
            if name != "compute-sanitizer"
        ] + [
            {"kind": "large", "tokens": n, "heads": h, "dtype": dtype, "backend": backend}
            for n, h, dtype in (
                (4096, 5, "float16"), (16384, 2, "bfloat16"), (65536, 1, "float16")
            )
            for backend in self.backends
        ]  # fmt: skip
        if "compute-sanitizer" in of.around() and not quick:
            jobs += [
                {"kind": "around", "operation": "compute-sanitizer", "backend": backend}
                for backend in self.backends
            ]
        return self._only(jobs)

    def _time(self) -> list[hands.Job]:
        import speed

        return self._only(speed.jobs(self.backends, quick=self.options.quick, device=self.device))

    def _tune(self) -> list[hands.Job]:
        if "triton" not in self.backends or self.device == "cpu":
            return []
        import tuning

        return self._only(tuning.jobs())

    def _profile(self) -> list[hands.Job]:
        import counters

        shape = "tiny" if self.device == "cpu" else "sd2-64"
        watched: list[hands.Job] = []
        if self.device == "cuda" and counters.find() is not None:
            watched.append(
                {
                    "kind": "counters", "operation": "counters", "backends": list(self.backends),
                    "file": str((self.out / "counters.csv").resolve()), "limit": 36.0,
                }
            )  # fmt: skip
        return self._only(
            watched
            + [
                {
                    "kind": "profile", "operation": name, "shape": shape, "dtype": "float16",
                    "backend": backend,
                }
                for name in ("entropy+max+argmax+expectation", "all columns", "round_trip")
                for backend in self.backends
            ]
        )  # fmt: skip

    def _only(self, jobs: list[hands.Job]) -> list[hands.Job]:
        word = self.options.only
        return [job for job in jobs if word is None or word in job.get("operation", "large")]

    def _report(self) -> None:
        import tables

        files = tables.write(self.out, self.seed)
        if self.options.keep:
            for file in files:
                shutil.copy(file, tree.ROOT / "benches/results")


def _checking(problem: str, operation: str, backend: str) -> hands.Job:
    return {"kind": "check", "problem": problem, "operation": operation, "backend": backend}


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # of the workers
    return Session(options).run()


if __name__ == "__main__":
    sys.exit(main())
