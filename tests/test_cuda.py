"""The CUDA kernels on the CPU, emulated: every operation against float64; plans; refusals."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import checks
import cuda_emulated
import flashmaps as fm
import native
import pytest
import torch
from checks import Checked
from cuda_emulated import Watched, shapes
from cuda_problems import CASE_NAMES, CASES, OPERATIONS
from flashmaps.maps import gpu
from flashmaps.maps.backends import cuda
from flashmaps.maps.backends.cuda_launches import Run
from flashmaps.maps.problem import Problem as Described
from flashmaps.maps.problem import Request
from flashmaps.maps.tape import Recorder, without_memory
from problems import Problem

module, emulated = cuda_emulated.module, cuda_emulated.emulated  # fixtures
pytestmark = pytest.mark.usefixtures("poison", "one_thread")


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_every_operation(case: tuple[Problem, torch.dtype], emulated: Watched) -> None:
    checked = Checked(*case, "cuda", "cpu")
    for check in OPERATIONS.values():
        check(checked)


def test_what_is_for_few_problems(emulated: Watched) -> None:
    checked = Checked(Problem((1, 2, 37, 81, 40)), torch.float16, "cuda", "cpu")
    for name in checks.SPECIAL:
        checks.OPERATIONS[name](checked)


def test_whole_rows_of_a_composition(emulated: Watched) -> None:
    """Strips of dense pieces, of both maps."""
    there, back = (
        Checked(Problem((1, 2, *tokens, 64)), torch.bfloat16, "cuda", "cpu")
        for tokens in ((25, 33), (33, 25))
    )
    fields = fm.compose(there.lazy, back.lazy).reduce("entropy", "argmax")
    maps = [(c.subject.truth, c.subject.plain) for c in (there, back)]
    truth, plain = (a @ b for a, b in zip(*maps, strict=True))
    both = dataclasses.replace(there.subject, truth=truth, plain=plain)
    both.check_reduction("entropy", fields.entropy)
    both.check_reduction("argmax", fields.argmax)


def test_a_round_trip_with_every_statistic(emulated: Watched) -> None:
    query_s, query_t, key_s, key_t = torch.randn(4, 1, 2, 36, 40).half().unbind(0)
    got, want = (
        vars(
            fm.round_trip(
                fm.AttentionMap(query_s.to(dtype), key_t.to(dtype), backend=backend),
                fm.AttentionMap(query_t.to(dtype), key_s.to(dtype), backend=backend),
            )
        )
        for backend, dtype in (("cuda", torch.float16), ("reference", torch.float64))
    )
    for name, value in want.items():
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=1e-5, atol=1e-5, equal_nan=True
        )


# How the work is divided.

BLOCKS = [
    (rows, columns, resident)
    for rows, columns in ((4, 1), (2, 2), (1, 4), (4, 2))
    for resident in (True, False)
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(
    "case",
    [((1, 2, 130, 270, 40), torch.float16), ((1, 2, 70, 135, 160), torch.bfloat16)],
    ids=["40", "160"],
)
def test_blocks_of_every_shape(
    case: tuple[tuple[int, ...], torch.dtype], block: tuple[int, int, bool], emulated: Watched
) -> None:
    emulated.shapes = shapes(block)
    checked = Checked(Problem(case[0]), case[1], "cuda", "cpu")
    for name in ("lse", "reductions", "product", "transposed_product", "return_probability"):
        OPERATIONS[name](checked)


@pytest.mark.parametrize("multiprocessors", [1, 3, 64])
def test_splits_of_any_number(multiprocessors: int, emulated: Watched) -> None:
    """On a card with many multiprocessors few tokens are shared among many blocks."""
    emulated.native.set_limits(emulated.native.Limits(multiprocessors, 99 * 1024, 89))
    checked = Checked(Problem((1, 2, 40, 330, 64)), torch.float16, "cuda", "cpu")
    for name in ("lse", "reductions", "product", "transposed_product", "return_probability"):
        OPERATIONS[name](checked)
    splits = "combine" in emulated.launches
    assert splits or multiprocessors < 64


def test_splits_fill_the_card_and_leave_no_wave_nearly_empty() -> None:
    assert gpu.best_splits(blocks=32, tiles=64, most=64, multiprocessors=132) == 4
    assert gpu.best_splits(blocks=1, tiles=3, most=3, multiprocessors=132) == 3
    assert gpu.best_splits(blocks=1000, tiles=64, most=64, multiprocessors=132) == 1
    assert gpu.best_splits(blocks=133, tiles=64, most=64, multiprocessors=132) > 1
    for blocks, tiles in itertools.product((1, 7, 40, 500), (1, 5, 64)):
        assert gpu.best_splits(blocks, tiles, most=min(tiles, 8), multiprocessors=264) <= min(
            tiles, 8
        )


def test_ldmatrix_never_waits_for_a_bank(emulated: Watched) -> None:
    emulated.native.take_sites()
    for dim in (40, 64, 80):
        for block in ((4, 1, True), (4, 2, False)):
            emulated.shapes = shapes(block)
            query, key = torch.randn(2, 1, 2, 130, dim).half()
            fm.AttentionMap(query, key, backend="cuda").reduce("entropy", "column_sum")
    sites = [site for site in emulated.native.take_sites() if site[0].startswith("ldmatrix")]
    assert sites and all(conflicts == 0 for *_, conflicts in sites), sites


def test_numbers_that_are_none_give_no_index_beyond_the_map(emulated: Watched) -> None:
    query, key = torch.randn(2, 1, 2, 37, 40).half()
    query[0, 0, 3] = torch.nan
    key[0, 1, 5] = torch.inf
    for tokens in ((query, key), (query, torch.full_like(key, torch.nan))):
        fields = fm.AttentionMap(*tokens, backend="cuda").reduce(
            "argmax", "column_argmax", "entropy"
        )
        assert ((fields.argmax >= 0) & (fields.argmax < 37)).all()
        assert ((fields.column_argmax >= 0) & (fields.column_argmax < 37)).all()


@pytest.mark.slow  # compiles the kernels again
def test_exponentials_may_be_multiplied_instead(tmp_path: Path, emulated: Watched) -> None:
    made = native.build("_emulated", "-DFLASHMAPS_POLYNOMIAL=4", tree=tmp_path)
    emulated.native = cuda_emulated.load(made)
    checked = Checked(Problem((1, 2, 70, 135, 64)), torch.float16, "cuda", "cpu")
    for name in ("lse", "reductions", "product", "return_probability"):
        OPERATIONS[name](checked)


# What runs, and what it takes.


def described(*shape: int, lse: bool = False, batch: int = 1, device: str = "meta") -> Described:
    heads, queries, keys, dim = shape
    query, key = (
        torch.empty(batch, heads, count, dim, dtype=torch.float16, device=device)
        for count in (queries, keys)
    )
    known = torch.empty(batch, heads, queries, device=device) if lse else None
    side = int(keys**0.5)
    return Described(query, key, None, None, None, known, 0.125, "block", side, keys // side)


ROWS = ("entropy", "max", "argmax", "expectation")
COLUMNS = ("column_sum", "column_entropy", "column_max", "column_argmax")
CARDS = {
    "A100": (108, 163, 80),
    "L40": (142, 99, 89),
    "H100": (132, 227, 90),
    "B200": (148, 227, 100),
}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    "shape",
    [(5, 4096, 4096, 64), (8, 4096, 4096, 40), (24, 4608, 4608, 128), (12, 32760, 32760, 128),
     (1, 65536, 65536, 64), (5, 4096, 77, 64), (20, 256, 256, 160)],
    ids=str,
)  # fmt: skip
def test_reductions_take_at_most_4_mb_on_any_card(
    shape: tuple[int, ...], card: str, emulated: Watched
) -> None:
    multiprocessors, kilobytes, architecture = CARDS[card]
    limits = emulated.native.Limits(multiprocessors, 1024 * kilobytes, architecture)
    emulated.native.set_limits(limits)
    plan = emulated.plan(described(*shape), Request((*ROWS, *COLUMNS)))
    assert plan.workspace <= max(4 * 2**20, 4 * shape[0] * shape[1])
    assert plan.passes == 3  # log-sum-exp, rows, columns


def test_a_known_log_sum_exp_spares_a_pass(emulated: Watched) -> None:
    plan = emulated.plan(described(5, 4096, 4096, 64, lse=True), Request(ROWS))
    assert plan.passes == 1


def test_a_return_counts_the_map_back(emulated: Watched) -> None:
    there, back = described(2, 256, 144, 64), described(3, 144, 256, 40, lse=True)
    plan = emulated.plan(there, Request(("return_probability",), partner=back))
    assert plan.passes == 3  # log-sum-exp, then both maps


def test_many_maps_are_taken_in_chunks(emulated: Watched) -> None:
    plan = emulated.plan(described(10, 4096, 4096, 64, batch=100), Request(ROWS))
    assert plan.workspace <= 4 * 2**20


def arranging(emulated: Watched, problem: Described) -> tuple[Run, Described]:
    """A call at its beginning, and the problem that it sees."""
    recorder = Recorder()
    there, request, _ = without_memory(problem, Request(ROWS), recorder)
    return Run(emulated, problem.query.device, request.memory_budget, recorder), there


@pytest.mark.parametrize(
    ("block", "bytes_wanted"),
    [
        # The place, kept tokens of 5 heads, two stages of 64 others, their terms.
        ((4, 1, True), 16 + 5 * 128 * 64 * 2 + 2 * 64 * 64 * 2 + 2 * (64 + 128) * 4),
        # Two stages of both.
        ((4, 2, False), 16 + 2 * (128 + 128) * 64 * 2 + 2 * (128 + 128) * 4),
    ],
)  # fmt: skip
def test_shared_memory_is_what_the_design_says(
    block: tuple[int, int, bool], bytes_wanted: int, emulated: Watched
) -> None:
    run, problem = arranging(emulated, described(5, 4096, 4096, 64))
    arguments = emulated.native.Statistics()
    arguments.map = run.map(problem, None)
    arguments.tiling = emulated.native.Tiling(*block)
    assert emulated.native.shared_bytes(arguments) == bytes_wanted


@pytest.mark.parametrize(
    ("card", "shape", "block"),
    [
        ("H100", (5, 4096, 4096, 64), (4, 1, True)),  # 97 KB, twice on an SM
        ("A100", (5, 4096, 4096, 64), (4, 2, True)),
        ("L40", (5, 4096, 4096, 64), (4, 2, False)),
        ("L40", (24, 4608, 4608, 128), (4, 2, False)),
        ("L40", (16, 4096, 4096, 160), (4, 2, False)),  # half a head at a time
        ("H100", (24, 4608, 4608, 128), (4, 2, False)),
        ("H100", (20, 20, 20, 64), (1, 1, False)),
    ],
)  # fmt: skip
def test_kept_tokens_stay_where_they_fit(
    card: str, shape: tuple[int, ...], block: tuple[int, int, bool], emulated: Watched
) -> None:
    multiprocessors, kilobytes, architecture = CARDS[card]
    limits = emulated.native.Limits(multiprocessors, 1024 * kilobytes, architecture)
    emulated.native.set_limits(limits)
    run, problem = arranging(emulated, described(*shape))
    arguments = emulated.native.Statistics()
    arguments.map = run.map(problem, None)
    run.arrange("statistics", arguments, 1)
    tiling = arguments.tiling
    assert (tiling.warp_rows, tiling.warp_columns, tiling.resident) == block


# Refusals.


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ({"dtype": torch.float32}, "takes float16 and bfloat16, these are float32: convert Q"),
        ({"dim": 72}, "head dimensions 40, 64, 80, 128, 160, this one is 72: use backend="),
        ({"device": "meta"}, "needs tensors on a GPU, these are on meta"),
        ({"normalize": "rows"}, "does not normalise rows of the key grid: use"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_with_the_reason(
    problem: dict[str, object], words: str, emulated: Watched
) -> None:
    of = {"dtype": torch.float16, "dim": 40, "device": "cpu", **problem}
    normalize = of.pop("normalize", None)
    query = torch.empty(1, 2, 9, of.pop("dim"), **of)
    with pytest.raises(RuntimeError, match=f"'cuda' cannot run this: .*{words}"):
        fm.AttentionMap(query, query, backend="cuda", normalize=normalize)


def test_the_largest_k_are_refused_with_the_reason(emulated: Watched) -> None:
    query = torch.randn(1, 2, 9, 40).half()
    lazy = fm.AttentionMap(query, query, backend="cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot run this: it has no top-k: use backend"):
        lazy.topk(3)


def test_cards_before_ampere_are_refused(emulated: Watched) -> None:
    emulated.native.set_limits(emulated.native.Limits(40, 64 * 1024, 75))
    query = torch.randn(1, 2, 9, 40).half()
    with pytest.raises(
        RuntimeError, match=r"need compute capability 8.0 \(Ampere\) or later, this"
    ):
        fm.AttentionMap(query, query, backend="cuda").entropy()


def test_auto_never_takes_it_until_a_measurement_says_so(emulated: Watched) -> None:
    assert frozenset() == cuda.AUTOMATIC
    query = torch.randn(1, 2, 9, 40).half()
    assert fm.AttentionMap(query, query).backend != "cuda"
    assert fm.AttentionMap(query, query, backend="cuda").backend == "cuda"


def test_why_it_is_not_available_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    available, reason = fm.backends()["cuda"]
    assert not available
    assert "are not built: " in reason or "are built, but torch sees no GPU here" in reason
    with pytest.raises(RuntimeError, match="'cuda' cannot run this: the CUDA kernels are"):
        fm.AttentionMap(torch.randn(1, 2, 9, 40), torch.randn(1, 2, 9, 40), backend="cuda")
