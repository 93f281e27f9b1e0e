"""benches/gpu/session.py where there is no GPU: that nothing of a card's minutes can be lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benches/gpu/session.py"


def run(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_without_a_gpu_it_says_that_there_is_none(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(tmp_path, "--quick")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "There is no GPU here that torch can see" in done.stdout
    assert "make test" in done.stdout  # what can be done instead


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "tests")
    assert done.returncode == 2 and "choose from smoke, check, time" in done.stderr


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One session in which a job crashes, one hangs, one is wrong, and one spoils its process."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("session")
    plants = [word for what in ("crash", "hang", "wrong", "spoil") for word in ("--plant", what)]
    begin = time.monotonic()
    done = run(
        out, "check", "time", "--device", "cpu", "--backend", "triton", "--only", "lse",
        "--workers", "1", "--budget", "600", "--each", "90", *plants, TRITON_INTERPRET="1",
    )  # fmt: skip
    return done, out, time.monotonic() - begin


@pytest.mark.slow  # eight processes, each of which loads torch and triton
def test_what_crashes_hangs_or_is_wrong_is_recorded(planted: Any) -> None:
    done, out, _ = planted
    assert done.returncode == 1, done.stdout + done.stderr
    found = {line["what"]: line for line in lines(out / "check.jsonl") if "what" in line}
    assert "ended with status -11" in found["crash"]["lost"]
    assert "it hung for" in found["hang"]["lost"]
    assert found["wrong"]["error"].endswith("off by one")
    assert "illegal memory access" in found["spoil"]["error"] and found["spoil"]["spoiled"]


@pytest.mark.slow  # eight processes, each of which loads torch and triton
def test_it_costs_the_others_nothing(planted: Any) -> None:
    _, out, seconds = planted
    checks = [line for line in lines(out / "check.jsonl") if line["kind"] == "check"]
    assert [line["operation"] for line in checks] == ["lse"]
    assert checks[0]["error"] is None and not checks[0]["refused"]
    timed = [line for line in lines(out / "time.jsonl") if line["by"] == "flashmaps, triton"]
    assert timed and timed[0]["ms"] > 0 and timed[0]["host_ms"] > 0
    assert seconds < 720  # the budget, and what the processes need to start


@pytest.mark.slow  # eight processes, each of which loads torch and triton
def test_the_tables_say_so(planted: Any) -> None:
    _, out, _ = planted
    (file,) = out.glob("*.json")
    found = json.loads(file.read_text("utf-8"))
    assert found["checks"] == {"triton": {"passed": 1}} and found["wrong"] == []
    assert {line["by"] for line in found["times"]} >= {"flashmaps, triton", "SDPA, flash"}
    assert "| lse, tiny x 1, float16 |" in file.with_suffix(".md").read_text("utf-8")


def test_a_job_that_waits_for_none_is_not_begun_after_the_end(tmp_path: Path) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import hands
    finally:
        sys.path.remove(str(SCRIPT.parent))
    program = "import sys, time; print('{}', flush=True)\nfor _ in sys.stdin: time.sleep(60)"
    told: list[dict[str, Any]] = []
    begin = time.monotonic()
    left = hands.run(
        [{"job": 1}, {"job": 2}, {"job": 3}], [sys.executable, "-c", program], tmp_path / "x.jsonl",
        workers=1, seconds=3.0, each=60.0, tell=told.append,
    )  # fmt: skip
    assert left == 2 and [line["job"] for line in told] == [1]
    assert told[0]["lost"] == "the seconds of this part were over"
    assert time.monotonic() - begin < 55  # less than what the job would have taken


def test_it_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    """Nothing installed, another folder: `import flashmaps.kernels` by tree.py alone."""
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r}); import tree; tree.use()\n"
        "import flashmaps.kernels, flashmaps; print(flashmaps.kernels.__file__, flashmaps.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    root = SCRIPT.parents[2]
    assert done.stdout.split() == [
        str(root / "kernels/__init__.py"),
        str(root / "python/flashmaps/__init__.py"),
    ]


@pytest.fixture
def of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' own modules can be imported."""
    for folder in (SCRIPT.parent, SCRIPT.parents[1]):
        monkeypatch.syspath_prepend(str(folder))


def test_memory_is_what_was_asked_for(of_the_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cached block the allocator may leave 1 MB unsplit, and counts it as allocated."""
    import memory

    asked = {"current": 1000, "peak": 1000}

    def run() -> object:
        asked["current"] += 400  # the result
        asked["peak"] = asked["current"] + 70_000  # and what it took meanwhile
        return object()

    def stats() -> dict[str, int]:
        requested = {f"requested_bytes.all.{name}": size for name, size in asked.items()}
        return requested | {"allocated_bytes.all.peak": 2**20, "allocated_bytes.all.current": 0}

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    assert memory.most_requested(run) == 70_000


def test_candidates_are_timed_beside_todays(
    of_the_card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With launches that do nothing: each candidate's kernels are those of its tiles."""
    pytest.importorskip("triton")
    import mocked_launches
    import tuning
    import work
    from flashmaps.kernels import run, settings

    monkeypatch.setattr(settings, "architecture_of", lambda device: "sm_90")
    seen = []
    with mocked_launches.triton("sm_90", note=False):
        start = run.start
        monkeypatch.setattr(
            run, "start", lambda launch, given: seen.append(launch) or start(launch, given)
        )
        worker = work.Worker("cpu", 1)
        for kind, kernel in (("lse", "lse_kernel"), ("even", "reduce_kernel")):
            job = {"kind": "tune", "pass": kind, "shape": "sd2-32", "batch": 1, "tiling": None}
            assert worker.answer(job)["ms"] > 0
            job |= {"tiling": [64, 32, 4, 2], "anchored": True, "ahead": True, "resident": False}
            answer = worker.answer(job)
            assert answer["ms"] > 0 and "off" in answer, answer
            launch = next(each for each in seen if each.tiling[:4] == (64, 32, 4, 2))
            assert launch.kernel.__name__ == kernel and launch.arguments["AHEAD"]
            assert kind == "even" or launch.arguments["ANCHORED"]
            seen.clear()
    every = tuning.jobs()
    assert {job["pass"] for job in every} == {"lse", "even"}
    assert len({json.dumps(job) for job in every}) == len(every)


def test_counters_are_read_from_what_ncu_prints(
    of_the_card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not know the metrics that are asked for first."""
    import counters

    tool = tmp_path / "ncu"

    def prints(*kernels: str) -> None:
        lines = [
            f'"{n}","{kernel}","Occupancy","{metric}","%","{n}4.1"'
            for n, kernel in enumerate(kernels)
            for metric in ("Achieved Occupancy", "Block Limit Warps")
        ]
        heading = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
        table = "\n".join(["==PROF== Profiling", heading, *lines])
        tool.write_text(
            "#!/bin/sh\n"
            'case "$*" in *--metrics*) echo "==ERROR== Failed to find metric"; exit 1;; esac\n'
            f"cat <<'END'\n{table}\nEND\n",
            encoding="utf-8",
        )
        tool.chmod(0o755)

    statistics = "_ZN9flashmaps4cuda17statistics_kernelINS0_4HalfELi4EEEvNS0_19StatisticsArgumentsE"
    monkeypatch.setattr(counters, "find", lambda: str(tool))
    file, both = tmp_path / "counters.csv", ("triton", "cuda")
    prints("lse_kernel", "reduce_kernel", statistics)
    found = counters.watched(both, file, 20.0)
    assert found["counters"] == {
        "triton lse": {"Achieved Occupancy": "04.1 %"},
        "triton rows": {"Achieved Occupancy": "14.1 %"},
        "cuda rows": {"Achieved Occupancy": "24.1 %"},
    }
    assert "Failed to find metric" in found["said"][0] and len(found["said"]) == 1
    assert "Block Limit Warps" in file.read_text("utf-8")
    # A kernel of torch by the same short name, one that is missing, another order.
    torchs = "_ZN2at6native13reduce_kernelILi512ELi1ENS0_8ReduceOpIfEEEEvT1_"
    for wrong in (
        ("lse_kernel", torchs, statistics), ("lse_kernel", "reduce_kernel"),
        ("reduce_kernel", "lse_kernel", statistics), ("lse_kernel", "reduce_kernel", torchs),
    ):  # fmt: skip
        prints(*wrong)
        answer = counters.watched(both, file, 20.0)
        assert "counters" not in answer and "ncu watched" in answer["error"], wrong
    for given in counters.commands("ncu", "python", ("triton",)):
        assert given[given.index("--launch-count") + 1] == "2"
        assert given[given.index("--profile-from-start") + 1] == "off"  # inputs are made by torch
        asked = given[given.index("--kernel-name") + 1].removeprefix("regex:")
        assert given[given.index("--kernel-name-base") + 1] == "mangled"
        assert re.search(asked, "reduce_kernel") and not re.search(asked, torchs)
    monkeypatch.setattr(counters, "find", lambda: None)
    assert "not found" in counters.watched(("triton",), tmp_path / "counters.csv", 20.0)["error"]


def test_a_carried_cache_names_the_files_where_they_are_unpacked(tmp_path: Path) -> None:
    """Triton's groups have whole paths; one of another folder would be compiled anew."""
    kernel = tmp_path / "filled" / "ABC234" / "lse_kernel.cubin"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("compiled")
    group = kernel.with_name("__grp__lse_kernel.json")
    group.write_text(json.dumps({"child_paths": {kernel.name: str(kernel)}}))
    carried, env = tmp_path / "build/carried", tmp_path / "benches/gpu/env.sh"
    carried.mkdir(parents=True)
    env.parent.mkdir(parents=True)
    env.write_text(SCRIPT.with_name("env.sh").read_text("utf-8"))
    packed = str(carried / "triton-cache.tar.xz")
    subprocess.run(["tar", "-cJf", packed, "-C", str(tmp_path / "filled"), "."], check=True)
    kernel.unlink()
    here = tmp_path / "elsewhere"
    subprocess.run(
        ["bash", "-c", f"source {env}"], check=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(here)},
    )  # fmt: skip
    found = json.loads((here / "ABC234" / group.name).read_text())
    assert found == {"child_paths": {kernel.name: str(here / "ABC234" / kernel.name)}}
    assert (here / "ABC234" / kernel.name).read_text() == "compiled"
