"""Row and column statistics with the kept tokens of all heads on chip, where they fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from flashmaps.maps.problem import Problem, Request

pytest.importorskip("triton", reason="triton is not installed (pip install triton, on Linux)")

from flashmaps.kernels import INTERPRETING, ahead, launches, settings

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter gets a process of its own")

ROWS = ("entropy", "max", "argmax", "expectation")
COLUMNS = ("column_sum", "column_entropy", "column_max", "column_argmax")


def heads_on_chip(architecture: str, heads: int, dim: int, **more: object) -> int:
    def tokens(count: int) -> torch.Tensor:
        return torch.empty(1, heads, count, dim, dtype=torch.float16, device="meta")

    lse = torch.empty(1, heads, 4096, device="meta")
    problem = Problem(
        tokens(4096), tokens(4096), None, None, None, lse, 0.125, "block", 64, 64
    )._replace(**more)  # type: ignore[arg-type]
    found, _ = launches.dry_run(problem, Request(ROWS), settings.settings_of(architecture))
    (launch,) = (each for each in found if each.kernel.__name__ == "reduce_kernel")
    return int(launch.arguments["HEADS"])


def test_they_stay_where_they_fit() -> None:
    assert heads_on_chip("sm_90", 5, 64) == 5
    assert heads_on_chip("sm_90", 10, 64) == 0  # too many
    assert heads_on_chip("sm_90", 5, 80) == 0  # heads of two parts
    bias = torch.empty(1, 4096, device="meta")
    assert heads_on_chip("sm_90", 5, 64, bias=bias) == 0
    assert heads_on_chip("sm_100", 1, 64) == 0


PROGRAM = """
import json, torch, flashmaps as fm
from flashmaps.kernels import launch_reduce
real, seen = launch_reduce.resident_heads, []
launch_reduce.resident_heads = lambda *given: seen.append(real(*given)) or seen[-1]
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
query, key = (torch.randn(2, 3, n, 16, generator=generator).half() for n in (64, 320))
for weights in (None, torch.tensor([0.2, 0.3, 0.5])):
    common = {"head_weights": weights, "key_grid": (16, 20)}
    names = ("entropy", "max", "argmax", "expectation", "column_sum", "column_entropy")
    got = fm.AttentionMap(query, key, backend="triton", **common).reduce(*names)
    want = fm.AttentionMap(query.double(), key.double(), backend="reference", **common)
    for name, value in want.reduce(*names)._asdict().items():
        # Sums of 320 probabilities, each rounded a few times in float32.
        torch.testing.assert_close(
            getattr(got, name).double(), value.double(), rtol=320 * 2**-23, atol=320 * 2**-23
        )
print(json.dumps(sorted(set(seen))))
"""


def test_numbers_are_those_of_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [3]


BAD_PAIRS = """
import torch
from flashmaps.kernels import backend
from flashmaps.maps.problem import Problem, Request
torch.set_num_threads(1)
query, key = torch.randn(2, 1, 5, 16), torch.randn(3, 1, 20, 16)

def found(pairs):
    problem = Problem(query, key, None, None, torch.tensor(pairs), None, 0.25, "block", 4, 5)
    request = Request(("dense", "lse", "column_sum"))
    return backend.reduce(problem, request)

bad, good = found([[-7, 99], [2**40, -1]]), found([[0, 2], [1, 0]])
assert all(torch.equal(bad[name], good[name]) for name in good)
"""


def test_pairs_that_nobody_has_checked_are_held_inside_the_batch() -> None:
    """As under torch.compile: out of bounds they would read what is not theirs."""
    done = subprocess.run(
        [sys.executable, "-c", BAD_PAIRS], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("names", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_each_tile_copies_one_side_alone(names: tuple[str, ...]) -> None:
    """A tile of 64 streamed tokens of 5 heads is 40 KB: by 256 threads, 16 bytes each, 10 copies.

    Two more tiles of them are fetched before the loop. Both sides would be 30 a tile.
    """
    found = ahead.examine_cases([ahead.Case(names)], "sm_90")
    (kernel,) = (each for _, each in found if each.kernel == "reduce_kernel")
    assert not kernel.problems()
    assert kernel.copies == 3 * 10
    assert kernel.exps == 5 * 32  # of each thread
    # Both were 64 more with a product by 1 / H and a floor under the logarithm for each element.
    assert kernel.instructions <= {ROWS: 1760, COLUMNS: 1792}[names]
