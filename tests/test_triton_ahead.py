"""The log-sum-exp against its first tile's maxima, and products ahead of exponentials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton, on Linux)")

# Tiles of the interpreter are 16 x 32: 96 keys are three of them.
PROGRAM = """
import dataclasses, itertools, math, torch, flashmaps as fm
from flashmaps.kernels import backend, settings
torch.set_num_threads(1)
plain = settings.settings_here(torch.device("cpu"))
generator = torch.Generator().manual_seed(0)
query, key = (torch.randn(1, 2, n, 16, generator=generator).half() for n in (16, 96))
late = key.clone()
late[:, :, 90] = query[:, :1, 5] * 40  # scores of hundreds, in the last tile
low = key.clone()
low[:, :, :32] = query[:, :1, 5:6] * 40  # and in the first one
first_hidden = torch.zeros(1, 96)
first_hidden[:, :40] = -math.inf
cases = {
    "plain": (key, None), "odd": (key[:, :, :93], None), "late": (late, None),
    "low": (low, None), "first tile hidden": (key, first_hidden),
    "late, hidden": (late, first_hidden), "one key": (key[:, :, :1], None),
    "larger": (8 * key, None), "far below": (key, first_hidden - 300.0),
}
# Scores that are no numbers, in the first tile, later or in a row of Q, have a pass of their own.
odd = {}
for n, value in enumerate((math.nan, math.inf, -math.inf)):
    for at in (3, 70):
        odd[f"{value} at key {at}"] = (query, key.clone(), None)
        odd[f"{value} at key {at}"][1][:, n % 2, at, 2] = value
        bias = torch.zeros(1, 96)
        bias[:, at] = value
        odd[f"bias {value} at {at}"] = (query, key, bias)
    odd[f"{value} in a query"] = (query.clone(), key, None)
    odd[f"{value} in a query"][0][:, 1, 7, 0] = value
odd["every key hidden"] = (query, key, torch.full((1, 96), -math.inf))
for n, (what, (queries, keys, bias)) in enumerate(odd.items()):
    found = []
    for anchored, ahead in ((False, False), (True, n % 2 == 0)):
        here = dataclasses.replace(plain, anchored=anchored, ahead=ahead)
        backend._settings_here = lambda device: here
        # The kernel itself: an AttentionMap refuses some of these.
        problem = fm.maps.problem.Problem(
            queries, keys, bias, None, None, None, 0.25, "block", 8, 12
        )
        found.append(backend.reduce(problem, fm.maps.problem.Request(("lse",)))["lse"])
    # Finite sums may differ in their last bits, and nothing else may.
    torch.testing.assert_close(
        found[1], found[0], rtol=2**-20, atol=2**-20, equal_nan=True, msg=lambda m: what + m
    )
names = ("entropy", "max", "argmax", "column_sum", "column_entropy")
for (what, (keys, bias)), (ahead, resident) in itertools.product(
    cases.items(), ((False, True), (True, True), (True, False))
):
    here = dataclasses.replace(plain, anchored=True, ahead=ahead, resident=resident)
    backend._settings_here = lambda device: here
    common = {} if bias is None else {"key_mask": bias[:, : keys.shape[2]]}
    ours = fm.AttentionMap(query, keys, backend="triton", **common)
    exact = fm.AttentionMap(query.double(), keys.double(), backend="reference", **common)
    # Scores are rounded in float32, and so is what is added up.
    most = float((query.double() @ keys.double().mT).abs().max()) / 4 + 300 * (bias is not None)
    error = 8 * 2**-24 * (most + 96)
    torch.testing.assert_close(
        ours.lse.double(), exact.lse.double(), rtol=2**-22, atol=error, msg=lambda m: what + m
    )
    if what in ("plain", "odd", "late", "first tile hidden") :
        got, want = ours.reduce(*names), exact.reduce(*names)
        for name in names:
            if name != "argmax":
                torch.testing.assert_close(
                    getattr(got, name).double(), getattr(want, name).double(), rtol=error,
                    atol=error, msg=lambda m: what + name + m,
                )
"""


def test_numbers_are_those_of_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def _arguments(heads: int, dim: int, batch: int, keys: int = 4096, **more: object) -> list[object]:
    """(ANCHORED, registers) of the log-sum-exp and AHEAD of the rows, on an H100."""
    import torch
    from flashmaps.kernels import launches, settings
    from flashmaps.maps.problem import Problem, Request

    query, key = (
        torch.empty(batch, heads, n, dim, dtype=torch.float16, device="meta") for n in (4096, keys)
    )
    problem = Problem(query, key, None, None, None, None, 0.125, "block", 64, 64)
    problem = problem._replace(**more)  # type: ignore[arg-type]
    names = ("entropy", "max", "argmax", "expectation")
    found, _ = launches.dry_run(problem, Request(names), settings.settings_of("sm_90"))
    (lse,) = (each for each in found if each.kernel.__name__ == "lse_kernel")
    (rows,) = (each for each in found if each.kernel.__name__ == "reduce_kernel")
    return [lse.arguments["ANCHORED"], lse.tiling.registers, rows.arguments["AHEAD"]]


def test_they_are_used_where_a_card_found_them_faster() -> None:
    import torch

    assert _arguments(5, 64, 8) == [True, 128, True]
    assert _arguments(5, 64, 1) == [True, 128, False]  # 32 programs
    assert _arguments(10, 64, 8) == [True, 128, False]  # heads that do not stay on chip
    assert _arguments(5, 64, 8, keys=4095) == [False, 0, False]
    assert _arguments(5, 40, 8)[:2] == [False, 0]
    assert _arguments(5, 128, 8) == [False, 0, False]
    bias = torch.empty(8, 4096, device="meta")
    assert _arguments(5, 64, 8, bias=bias) == [False, 0, False]


@pytest.mark.slow
@pytest.mark.parametrize("names", [("lse",), ("entropy", "max", "argmax", "expectation")], ids=str)
def test_the_default_kernels_of_sm_90_spill_nothing(names: tuple[str, ...]) -> None:
    from dataclasses import replace

    from flashmaps.kernels import ahead
    from flashmaps.kernels.settings import settings_of

    here = replace(settings_of("sm_90"), multiprocessors=1)  # as if programs were enough
    for launch in ahead.Case(names).launches_with(here):
        if "R" in launch.arguments:
            assert launch.arguments["ANCHORED" if names == ("lse",) else "AHEAD"]
            assert not ahead.examine(launch, "sm_90").problems()


@pytest.mark.slow
@pytest.mark.parametrize("names", [("lse",), ("entropy", "max", "argmax", "expectation")], ids=str)
def test_products_run_beneath_the_exponentials_on_sm_90(names: tuple[str, ...]) -> None:
    """Two programs of 8 warps fit a multiprocessor, or resident heads one; nothing spills."""
    from dataclasses import replace

    from flashmaps.kernels import ahead
    from flashmaps.kernels.autotune import with_tiling
    from flashmaps.kernels.settings import settings_of

    kind = "lse" if names == ("lse",) else "even"
    here = with_tiling(settings_of("sm_90"), kind, "16/64", (128, 64, 8, 3))
    here = replace(here, anchored=True, ahead=True)
    (launch,) = (
        each for each in ahead.Case(names).launches_with(here) if "R" in each.arguments
    )  # and one that combines splits
    found = ahead.examine(launch, "sm_90")
    assert not found.problems()
    assert found.registers <= (128 if kind == "lse" else 168)
    text = ahead.compile_launch(launch, "sm_90").asm["ptx"]
    # A product is still under way, its registers apart from those of the exponentials.
    assert text.count("wgmma.commit_group") >= (3 if kind == "lse" else 5)


def test_autotune_keeps_what_a_card_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rewriting the table, here or ahead, tries the anchored and the ahead entry, and first."""
    from flashmaps.kernels import autotune, settings

    before = json.loads(settings.TABLE.read_text("utf-8"))
    table = before["sm_90"]["tiles"]
    flagged = [
        (kind, *map(int, key.split("/")), tuple(entry))
        for kind, entries in table.items()
        for key, entry in entries.items()
        if any(entry[5:])
    ]
    assert [(kind, bits, width) for kind, bits, width, _ in flagged] == [
        ("lse", 16, 64), ("even", 16, 64)
    ]  # fmt: skip
    monkeypatch.setattr(autotune, "fits", lambda *of: True)
    monkeypatch.setattr(autotune, "_milliseconds", lambda run: 1.0)
    monkeypatch.setattr(autotune.Case, "runner", lambda *of: lambda: None)
    for kind, bits, width, entry in flagged:
        assert autotune.first_that_fits("sm_90", kind, bits, width) == entry
        assert autotune.fastest("sm_90", kind, bits, width) == entry
        # What does not fit, or is slower, is not kept.
        assert autotune.candidates("sm_90", kind, bits, width)[1] == (128, 128, 8, 3)
        assert autotune.candidates("sm_80", kind, bits, width)[0] == (128, 128, 8, 3)
    copy = tmp_path / "settings.json"
    copy.write_bytes(settings.TABLE.read_bytes())
    monkeypatch.setattr(autotune, "TABLE", copy)
    autotune.write("sm_90", table)
    assert copy.read_bytes() == settings.TABLE.read_bytes()


def test_every_kind_of_pass_has_problems_and_tiles_to_tune() -> None:
    from flashmaps.kernels import autotune
    from flashmaps.kernels.settings import KINDS

    for kind in KINDS:
        for bits in (16, 32):
            case = next(autotune.cases(kind, bits, 64))
            assert kind in {each.kind for each in case.launches("sm_90")}
            assert autotune.candidates("sm_90", kind, bits, 64)
