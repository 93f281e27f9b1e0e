"""The Triton kernels without a GPU: interpreted against float64, compiled for several cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flashmaps as fm
import pytest
import torch
from flashmaps.maps.problem import Problem, Request

pytest.importorskip("triton", reason="triton is not installed (pip install triton, on Linux)")

import checks
import interpreted
import triton
import triton.language as tl
from flashmaps.kernels import (
    INTERPRETING,
    ahead,
    composing,
    launch_gradient,
    launches,
    run,
    settings,
    views,
)

pytestmark = pytest.mark.skipif(
    INTERPRETING, reason="TRITON_INTERPRET is set: the interpreter gets a process of its own"
)

# Under the interpreter.

# Each is here for something: one row, one key, all keys in a tile, a square map, head dimensions of
# two parts, lines both ways, and everything at once.
QUICK = (
    "1x1x1x1x8-float32",
    "2x3x1x37x40-float32",
    "2x3x37x1x40-float16",
    "1x2x16x25x72-float16",
    "2x3x25x25x13-float32",
    "1x2x36x49x128-float16",
    "2to3x2x11x45x24-pairs-float32",
    "2x3x21x45x24-bias-float16",
    "1x2x11x45x24-columns-float32",
    "2x2x25x25x24-rows-mask-float32",
    "2to3x4x21x45x24-everything-float32",
)


# Of the way back, which has more kernels, and of plans, which run every operation again: one row,
# two parts of a head, lines, pairs.
QUICK_FEW = (
    "1x1x1x1x8-float32",
    "1x2x16x25x72-float16",
    "2to3x2x11x45x24-pairs-float32",
    "1x2x11x45x24-columns-float32",
)


def _checks() -> list[object]:
    found: list[object] = []
    for name in interpreted.cases():
        for operation in checks.EVERYWHERE:
            quick = QUICK_FEW if operation in ("gradients", "plan") else QUICK
            marks = [] if name in quick else [pytest.mark.slow]
            found.append(pytest.param(f"{name}/{operation}", marks=marks))
    found += [f"1x2x36x49x128-float16/{operation}" for operation in ("again", "compile")]
    found.append(pytest.param("1x2x36x49x128-float16/far_apart", marks=pytest.mark.slow))
    return found


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, str | None]]:
    """What went wrong with each of the checks of this session, from one process that interprets."""
    wanted = [
        item.callspec.params["check"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_interpreted"
    ]
    found: dict[str, str | None] = {}
    program = [sys.executable, str(Path(interpreted.__file__)), "--hurry"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n".join(wanted) + "\n")
        process.stdin.close()
        for line in process.stdout:
            found.update([json.loads(line)])
    yield found


@pytest.mark.parametrize("check", _checks())
def test_interpreted(check: str, outcomes: dict[str, str | None]) -> None:
    assert check in outcomes, "the interpreter's process ended before it came to this"
    assert outcomes[check] is None, outcomes[check]


# Ahead of time.

ARCHITECTURES = tuple(ahead.SHARED)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile afresh, whatever another run has left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", ahead.REPRESENTATIVE, ids=str)
def test_compiles(case: ahead.Case, architecture: str, cache: None) -> None:
    check_compiled(case, architecture)


def check_compiled(case: ahead.Case, architecture: str) -> None:
    """Fits, spills nothing, adds up in order, and multiplies where it should."""
    for _, compiled in ahead.examine_cases([case], architecture):
        assert not compiled.problems(), compiled
        if "combine" in compiled.kernel or compiled.kernel == "add_lse_kernel":
            continue
        if compiled.kernel in ("slope_kernel", "lines_kernel"):  # elementwise
            continue
        assert compiled.exps > 0 or case.composed, compiled
        strict = case.dtype == torch.float32 and case.precision == "highest"
        # Strips are float32, and Blackwell takes no parts of them: Settings.one_product.
        strips = case.composed and compiled.exps == 0 and case.precision != "medium"
        if (strict and architecture.startswith("sm_")) or (strips and architecture == "sm_100"):
            assert compiled.matrix == 0, f"strict float32 is multiplied by threads: {compiled}"
        else:
            assert compiled.matrix > 0, f"no {ahead.MATRIX[architecture]}: {compiled}"


@triton.jit
def counting_kernel(out) -> None:  # type: ignore[no-untyped-def]
    tl.atomic_add(out, 1.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_atomic_would_be_seen(architecture: str, cache: None) -> None:
    tiling = settings.Tiling(16, 16, 4, 1)
    launch = run.Launch(
        counting_kernel, 1, {"out": torch.empty(1, device="meta"), "BLOCK": 16}, tiling
    )
    assert "1 atomic instructions" in ahead.examine(launch, architecture).problems()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles(architecture: str, cache: None) -> None:
    found = ahead.examine_cases(list(ahead.every_case()), architecture, workers=2)
    wrong = [
        (str(case), each)
        for case, each in found
        if each.problems()
        and not (spills_a_little(case, architecture) and each.spills < 32 and not each.atomics)
    ]
    assert len(found) > 100 and not wrong, "\n".join(map(str, wrong))


def spills_a_little(case: ahead.Case, architecture: str) -> bool:
    """What no tile compiles for without spilling some registers (docs/kernels.md)."""
    return architecture == "sm_100" and case.dtype == torch.float32 and case.dim > 64


# What runs, and what it takes.


def meta_problem(heads: int, queries: int, keys: int, dim: int, batch: int = 1) -> Problem:
    def tokens(count: int) -> torch.Tensor:
        return torch.empty(batch, heads, count, dim, dtype=torch.float16, device="meta")

    side = int(keys**0.5)
    return Problem(
        tokens(queries), tokens(keys), None, None, None, None, 0.125, "block", side, keys // side
    )


ROWS = ("entropy", "max", "argmax", "expectation")
COLUMNS = ("column_sum", "column_entropy", "column_max", "column_argmax")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "shape",
    [(5, 4096, 4096, 64), (24, 4608, 4608, 128), (12, 32760, 32760, 128), (1, 65536, 65536, 64),
     (5, 4096, 77, 64), (20, 256, 256, 64, 16)],
    ids=str,
)  # fmt: skip
def test_reductions_take_at_most_4_mb(shape: tuple[int, ...], architecture: str) -> None:
    problem = meta_problem(*shape)
    request = Request((*ROWS, *COLUMNS))
    found, workspace = launches.dry_run(problem, request, settings.settings_of(architecture))
    assert found and workspace <= 4 * 2**20


def test_few_tokens_are_shared_among_many_programs() -> None:
    here = settings.settings_of("sm_90")
    found, _ = launches.dry_run(meta_problem(5, 1024, 1024, 64), Request(ROWS), here)
    programs = {launch.kernel.__name__: launch.programs for launch in found}
    assert set(programs) >= {"lse_kernel", "reduce_kernel", "combine_kernel"}
    assert programs["reduce_kernel"] >= here.programs / 2


def test_text_takes_one_pass() -> None:
    found, workspace = launches.dry_run(
        meta_problem(5, 16384, 77, 64), Request(ROWS), settings.settings_of("sm_90")
    )
    assert [launch.kernel.__name__ for launch in found] == ["reduce_kernel"]
    assert workspace == 0


def test_a_known_log_sum_exp_spares_a_pass() -> None:
    problem = meta_problem(5, 4096, 4096, 64)
    problem = problem._replace(lse=torch.empty(1, 5, 4096, device="meta"))
    found, _ = launches.dry_run(problem, Request(ROWS), settings.settings_of("sm_90"))
    assert "lse_kernel" not in [launch.kernel.__name__ for launch in found]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("tokens", "budget", "strips"),
    [(1024, None, 1), (4096, None, 2), (4096, 16, 11), (9216, None, 9), (65536, 1000, 24)],
)
def test_strips_of_a_composition_fill_the_budget(
    tokens: int, budget: int | None, strips: int, architecture: str
) -> None:
    problem = meta_problem(5, tokens, tokens, 64)
    request = Request(ROWS, memory_budget=None if budget is None else budget * 2**20)
    cut, workspace = composing.strips_for(
        problem, problem, request, settings.settings_of(architecture)
    )
    assert workspace <= (budget or 64) * 2**20
    assert -(-tokens // cut.rows) <= strips
    assert cut.blocks == -(-tokens // cut.columns)


def test_the_smallest_budget_of_a_composition_is_enough_for_it() -> None:
    problem = meta_problem(2, 300, 300, 64)
    here = settings.settings_of("sm_90")
    least = composing.strips_for(problem, problem, Request(ROWS, memory_budget=1), here)[1]
    again = composing.strips_for(problem, problem, Request(ROWS, memory_budget=least), here)[1]
    assert 0 < again == least


def test_compositions_of_row_statistics_have_a_kernel() -> None:
    plain = meta_problem(5, 64, 64, 64)
    assert composing.composes(plain, plain, ROWS)
    assert not composing.composes(plain, plain, (*ROWS, "column_max"))
    assert not composing.composes(plain, plain._replace(normalize="rows"), ROWS)


def test_many_maps_are_taken_in_chunks() -> None:
    problem = meta_problem(10, 4096, 4096, 64, batch=100)
    found, workspace = launches.dry_run(problem, Request(ROWS), settings.settings_of("sm_90"))
    assert len(found) > 2 and workspace <= 4 * 2**20


def way_back(shape: tuple[int, ...], normalize: str) -> tuple[Any, Any]:
    case = ahead.Case(("entropy", "column_entropy", "expectation"))
    problem = meta_problem(*shape)._replace(normalize=normalize)
    lse = torch.empty(problem.batch, problem.heads, problem.num_queries, device="meta")
    problem = problem._replace(lse=lse)
    return problem, case.gradient(problem, Request(case.names))


@pytest.mark.parametrize("shape", [(5, 4096, 4096, 64), (5, 4096, 77, 64), (2, 300, 300, 40, 4)])
@pytest.mark.parametrize("normalize", ["block", "rows"])
def test_the_way_back_takes_36_mb_unless_told_otherwise(
    shape: tuple[int, ...], normalize: str
) -> None:
    found, workspace = launch_gradient.dry_run(
        *way_back(shape, normalize), settings.settings_of("sm_90")
    )
    assert 0 < workspace <= 36 * 2**20
    assert {"query_kernel", "key_kernel"} <= {launch.kernel.__name__ for launch in found}


@pytest.mark.parametrize("shape", [(5, 512, 512, 64), (5, 1024, 77, 64), (2, 100, 100, 40, 4)])
@pytest.mark.parametrize("normalize", ["block", "rows"])
def test_the_way_back_keeps_its_budget(shape: tuple[int, ...], normalize: str) -> None:
    """What the smallest is said to be is enough."""
    problem, gradient = way_back(shape, normalize)
    here = settings.settings_of("sm_90")
    workspace = launch_gradient.dry_run(problem, gradient, here)[1]
    least = launch_gradient.dry_run(problem, replace(gradient, memory_budget=1), here)[1]
    assert least < workspace
    for budget in (least, (least + workspace) // 2):
        within = replace(gradient, memory_budget=budget)
        assert launch_gradient.dry_run(problem, within, here)[1] <= budget


@pytest.mark.parametrize(
    ("dim", "parts"),
    [(8, (16, 0)), (13, (16, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)),
     (96, (64, 32)), (128, (128, 0)), (160, (128, 32)), (256, (256, 0))],
)  # fmt: skip
def test_head_dimensions_are_padded_as_little_as_their_tiles_allow(
    dim: int, parts: tuple[int, int]
) -> None:
    assert views.head_parts(dim) == parts


def test_the_table_is_whole() -> None:
    classes = {f"{bits}/{width}" for bits in (16, 32) for width in (64, 128, 256)}
    for architecture in (*ARCHITECTURES, "interpreter"):
        here = settings.settings_of(architecture)
        assert set(here.table) == set(settings.KINDS)
        for kind, entries in here.table.items():
            assert set(entries) == classes, (architecture, kind)
            for rows, columns, warps, stages, *_ in entries.values():
                assert rows.bit_count() == columns.bit_count() == warps.bit_count() == 1
                assert rows >= 16 and columns >= 16 and stages >= 1


def test_precision_follows_torch() -> None:
    assert settings.settings_of("sm_90").precision(torch.float32) == "ieee"
    assert settings.settings_of("sm_90", "high").precision(torch.float32) == "bf16x6"
    assert settings.settings_of("sm_90", "high").precision(torch.float16) == "ieee"


# Refusals.


def need_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")


def test_without_a_gpu_the_reason_is_that_there_is_none() -> None:
    need_no_gpu()
    query = torch.randn(1, 2, 6, 8)
    with pytest.raises(
        RuntimeError, match=r"'triton' cannot run this: torch sees no GPU here; use"
    ):
        fm.AttentionMap(query, query, backend="triton")
    assert not fm.backends()["triton"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (torch.empty(1, 2, 6, 8), "needs tensors on a GPU, these are on cpu"),
        (torch.empty(1, 2, 6, 8, device="meta"), "these are on meta"),
    ],
    ids=["cpu", "meta"],
)
def test_tensors_elsewhere_are_refused(
    query: torch.Tensor, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=words):
        fm.AttentionMap(query, query, backend="triton")


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((1, 2, 6, 8), torch.float64, "takes no float64: convert Q and K with .float()"),
        ((1, 2, 6, 300), torch.float32, "takes head dimensions up to 256, this one is 300"),
        ((1, 2, 6, 8), torch.bfloat16, "interpreter .* has no bfloat16 arithmetic"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(
    shape: tuple[int, ...], dtype: torch.dtype, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashmaps.kernels.INTERPRETING", True)
    monkeypatch.setattr("flashmaps.kernels.backend.INTERPRETING", True)
    query = torch.empty(shape, dtype=dtype)
    with pytest.raises(RuntimeError, match=words):
        fm.AttentionMap(query, query, backend="triton")
