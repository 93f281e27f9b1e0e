"""make gpu-check: is backend "triton" right on this card, and how fast.

    python benches/gpu/check.py                 within 8 minutes
    python benches/gpu/check.py --quick         within 2
    python benches/gpu/check.py --only topk     one operation: of the checks and of the timings

Needs a GPU, torch 2.11 to 2.13 with its triton (3.6 to 3.9), and this checkout. Ends with a table,
and writes benches/results/<card>.json and .md. The exit status is 1 where a number is wrong, 2
where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which reproducible products want

ROOT = Path(__file__).parents[2]
for folder in (ROOT / "python", ROOT / "benches", ROOT / "benches/gpu"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer problems and shapes")
    parser.add_argument("--only", metavar="OPERATION", help="what this is part of the name of")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="default 460, quick 105")
    parser.add_argument("--seed", type=int, help="of the random numbers; default a fresh one")
    parser.add_argument("--workers", type=int, help="processes that check; default up to 8")
    parser.add_argument("--out", type=Path, default=ROOT / "benches/results", metavar="FOLDER")
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="check this script: the smallest problems under triton's interpreter, on the CPU",
    )
    return parser.parse_args(given)


def card() -> dict[str, Any]:
    """What a reader needs to know about where the numbers come from."""
    import flashmaps
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flashmaps": flashmaps.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if not torch.cuda.is_available():
        return {"name": "triton interpreter on the CPU", **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9),
        "driver": _driver(),
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        **found,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    interpreted = options.self_test
    if interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        print("--self-test wants TRITON_INTERPRET=1 in the environment.")
        return 2
    if not interpreted and not torch.cuda.is_available():
        print("There is no GPU here that torch can see, so there is nothing to check or to time.")
        print(f"torch {torch.__version__}, built for {torch.version.cuda or 'the CPU only'}.")
        print(
            "Without a GPU, `make test` compiles the kernels for several cards and interprets them."
        )
        return 2

    import flashmaps as fm
    import tables
    from correctness import (
        EVERYWHERE,
        QUICK,
        SMALLEST,
        around,
        check_all,
        check_around,
        check_large,
        named_cases,
    )
    from speed import Clock, ceilings, measure, plan

    begin = time.monotonic()
    budget = options.budget or (105.0 if options.quick else 460.0)
    deadline = begin + budget
    seed = random.randrange(2**31) if options.seed is None else options.seed
    device = "cpu" if interpreted else "cuda"
    here = card()
    backends = tuple(name for name in ("triton", "cuda") if fm.backends()[name])
    print(f"{here['name']}, torch {here['torch']}, triton {here['triton']}; seed {seed}")
    print(f"backends: {', '.join(backends)}", flush=True)

    names = SMALLEST if interpreted else QUICK if options.quick else tuple(named_cases())
    operations = EVERYWHERE if interpreted else (*EVERYWHERE, "again")
    if options.only:
        operations = tuple(name for name in operations if options.only in name)
    results = []
    share = begin + 0.6 * budget  # of the time, for what must be right
    if operations:
        workers = 1 if interpreted else options.workers or min(8, os.cpu_count() or 1)
        checked = check_all(
            names, operations, backends, device, seed=seed, deadline=share, workers=workers
        )
        for result in checked:
            results.append(result)
            if result.error is not None:
                print(f"WRONG {result.backend} {result.check}\n  {result.error}", flush=True)
    wanted = len(names) * len(operations) * len(backends)
    if not interpreted and not options.only:
        for backend in backends:
            for tokens, heads, dtype in (
                (4096, 5, torch.float16), (16384, 2, torch.bfloat16), (65536, 1, torch.float16),
            ):  # fmt: skip
                if time.monotonic() < share and not (options.quick and tokens > 16384):
                    results.append(check_large(tokens, heads, dtype, backend, device))
                wanted += 1
            for name, run in around().items():
                if time.monotonic() < share and not (options.quick and name.startswith("compute")):
                    results.append(check_around(name, run, backend, device))
                wanted += 1
    wrong = [result for result in results if result.error is not None]
    print(tables.summary(results, wanted), flush=True)

    cases: list[Any] = []
    left_out: list[str] = []
    rates: dict[str, float] = {}
    if wrong:
        print("No speed is measured while numbers are wrong.")
    else:
        torch.use_deterministic_algorithms(False)
        clock = Clock(device)
        with torch.no_grad():
            rates = ceilings(clock, options.quick)
            for operation, shape, dtype in plan(options.quick, options.only):
                if interpreted:
                    from speed import Shape

                    shape = Shape("tiny", 1, (4, 4), 16)
                    if len(cases) == 2:
                        break
                if time.monotonic() > deadline:
                    left_out.append(f"{operation.name}, {shape}")
                    continue
                every = not (options.quick or interpreted)
                cases.append(measure(operation, shape, dtype, backends, rates, clock, every=every))
                print(tables.one_line(cases[-1]), flush=True)
    seconds = time.monotonic() - begin
    whole = tables.Whole(here, seed, seconds, results, wanted, rates, cases, left_out)
    print(tables.text(whole))
    if options.only:
        print("\nNot written: this was not a whole run.")
    else:
        print(
            "\nWritten to " + " and ".join(str(file) for file in tables.write(whole, options.out))
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
