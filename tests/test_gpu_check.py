"""make gpu-check where there is no GPU: it says so; and its logic, on triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benches/gpu/check.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_says_that_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--quick")
    assert done.returncode == 2, done.stderr
    assert "There is no GPU here that torch can see" in done.stdout
    assert "make test" in done.stdout  # what can be done instead


def test_it_checks_times_and_writes(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run("--self-test", "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text("utf-8"))
    assert found["passed"] == found["wanted"] > 5 and found["results"] == []
    assert found["cases"][0]["operation"] == "entropy+max+argmax+expectation"
    ours = [row for case in found["cases"] for row in case["rows"] if "triton" in row["by"]]
    assert ours and all(row["ms"] > 0 for row in ours)
    assert "| case | limit ms" in file.with_suffix(".md").read_text("utf-8")


def test_a_wrong_number_fails_it_and_no_speed_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import check, correctness\n"
        "def wrong(of): assert False, 'off by one'\n"
        "correctness.OPERATIONS['lse'] = wrong\n"
        "sys.exit(check.main(['--self-test', '--only', 'lse', '--out', sys.argv[2]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(SCRIPT.parent), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG triton 1x2x16x25x72-float16/lse\n  off by one" in done.stdout
    assert "No speed is measured while numbers are wrong." in done.stdout
    assert not list(tmp_path.iterdir())
