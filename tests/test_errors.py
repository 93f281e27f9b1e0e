"""Bad input: each error names the argument, what it got, and what to do about it."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import flashmaps as fm
import pytest
import torch
from torch import Tensor


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K = tensor(2, 3, 10, 8), tensor(2, 3, 12, 8, seed=1)  # neither 10 nor 12 is a square
SQUARE = tensor(2, 3, 16, 8)


def make(query: Tensor = Q, key: Tensor = K, **options) -> fm.AttentionMap:
    return fm.AttentionMap(query, key, **options)


def hidden() -> Tensor:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    return mask


class Bad(NamedTuple):
    name: str
    call: Callable[[], object]
    error: type[Exception]
    says: tuple[str, ...]  # the argument, what it got, what to do


BAD_MAPS = [
    Bad("query-is-numpy", lambda: make(query=Q.numpy()), TypeError,
        ("query must be a torch.Tensor", "ndarray")),
    Bad("query-of-rank-3", lambda: make(query=Q[0]), ValueError,
        ("query must have 4 dimensions [B, H, N, d]", "got 3: [3, 10, 8]", "query[None]")),
    Bad("key-of-rank-5", lambda: make(key=K[None]), ValueError,
        ("key must have 4 dimensions [B', H, M, d]", "got 5: [1, 2, 3, 12, 8]")),
    Bad("integers", lambda: make(query=Q.long()), TypeError,
        ("query has dtype torch.int64", "wanted float64, float32, float16 or bfloat16",
         "query.float()")),
    Bad("complex", lambda: make(key=K.to(torch.complex64)), TypeError,
        ("key has dtype torch.complex64", "key.float()")),
    Bad("sparse", lambda: make(query=Q.to_sparse()), TypeError,
        ("query has layout torch.sparse_coo", "query.to_dense()")),
    Bad("dtypes-differ", lambda: make(key=K.half()), TypeError,
        ("query is torch.float32", "key is torch.float16", "convert one of them")),
    Bad("devices-differ", lambda: make(key=K.to("meta")), ValueError,
        ("query is on cpu", "key is on meta", "move one of them")),
    Bad("heads-differ", lambda: make(key=K[:, :2]), ValueError,
        ("query has H = 3 heads", "key has 2", "transpose(1, 2)")),
    Bad("widths-differ", lambda: make(key=K[..., :4]), ValueError,
        ("query has head dimension d = 8", "key has 4", "layers of one width")),
    Bad("no-queries", lambda: make(query=Q[:, :, :0]), ValueError,
        ("query is empty", "[2, 3, 0, 8]", "no tokens (axis 2)")),
    Bad("no-keys", lambda: make(key=K[:, :, :0]), ValueError,
        ("key is empty", "[2, 3, 0, 8]", "no tokens (axis 2)")),
    Bad("no-batch", lambda: make(query=Q[:0]), ValueError, ("query is empty", "no batch (axis 0)")),
    Bad("no-heads", lambda: make(query=Q[:, :0], key=K[:, :0]), ValueError,
        ("query is empty", "no heads (axis 1)")),
    Bad("no-width", lambda: make(query=Q[..., :0], key=K[..., :0]), ValueError,
        ("query is empty", "no head dimension (axis 3)")),
    Bad("batches-differ", lambda: make(key=tensor(3, 3, 12, 8)), ValueError,
        ("query has batch 2", "key has batch 3", "pairs=[[query index, key index], ...]")),
    Bad("scale-nan", lambda: make(scale=math.nan), ValueError,
        ("scale must be a finite number", "nan")),
    Bad("scale-text", lambda: make(scale="8"), ValueError,
        ("scale must be a finite number", "'8'")),
    Bad("mask-hides-a-batch", lambda: make(key_mask=hidden()), ValueError,
        ("key_mask hides every key of batch 1", "pass ~mask if yours marks padding")),
    Bad("bias-hides-all", lambda: make(key_mask=torch.full((12,), -math.inf)), ValueError,
        ("key_mask hides every key of batch 0",)),
    Bad("bias-nan", lambda: make(key_mask=torch.full((12,), math.nan)), ValueError,
        ("key_mask has NaN or +inf", "-inf to hide a key")),
    Bad("mask-of-queries", lambda: make(key_mask=torch.ones(2, 10, dtype=torch.bool)), ValueError,
        ("key_mask has shape [2, 10]", "wanted [B', M] = [2, 12] or [M] = [12]")),
    Bad("mask-of-integers", lambda: make(key_mask=torch.ones(12, dtype=torch.int64)), TypeError,
        ("key_mask has dtype torch.int64", "key_mask.bool()")),
    Bad("mask-is-a-list", lambda: make(key_mask=[True] * 12), TypeError,
        ("key_mask must be a torch.Tensor", "list")),
    Bad("mask-elsewhere", lambda: make(key_mask=torch.ones(12, device="meta")), ValueError,
        ("key_mask is on meta", "key is on cpu")),
    Bad("weights-shape", lambda: make(head_weights=[0.5, 0.5]), ValueError,
        ("head_weights has shape [2]", "wanted [H] = [3]")),
    Bad("weights-negative", lambda: make(head_weights=[-0.5, 1.0, 0.5]), ValueError,
        ("head_weights must be >= 0", "-0.5")),
    Bad("weights-sum", lambda: make(head_weights=[1.0, 1.0, 1.0]), ValueError,
        ("head_weights sum to 3", "divide them by their sum")),
    Bad("weights-text", lambda: make(head_weights="equal"), TypeError,
        ("head_weights must be [H] = [3] numbers", "'equal'")),
    Bad("weights-nan", lambda: make(head_weights=[math.nan, 0.5, 0.5]), ValueError,
        ("head_weights must be >= 0", "nan")),
    Bad("pairs-beyond", lambda: make(pairs=[[0, 1], [0, 2]]), IndexError,
        ("pairs[:, 1] picks key 2", "the key batch is 2", "indices go from 0 to 1")),
    Bad("pairs-negative", lambda: make(pairs=[[-1, 0]]), IndexError,
        ("pairs[:, 0] picks query -1", "indices go from 0 to 1")),
    Bad("pairs-flat", lambda: make(pairs=[0, 1]), ValueError,
        ("pairs must be [P, 2] (query index, key index)", "got [2]")),
    Bad("pairs-ragged", lambda: make(pairs=[[0, 1], [1]]), TypeError,
        ("pairs must be [P, 2] integers (query index, key index)", "[[0, 1], [1]]")),
    Bad("pairs-empty", lambda: make(pairs=torch.zeros(0, 2, dtype=torch.int64)), ValueError,
        ("pairs is empty", "give at least one")),
    Bad("pairs-floats", lambda: make(pairs=torch.zeros(1, 2)), TypeError,
        ("pairs must hold integers", "torch.float32")),
    Bad("normalize-unknown", lambda: make(normalize="softmax"), ValueError,
        ("normalize = 'softmax' is unknown", "'block'", "'columns'", "'rows'")),
    Bad("normalize-without-grid", lambda: make(normalize="rows"), ValueError,
        ("normalize='rows' needs key_grid", "12 tokens are not a square",
         "key_grid=(height, width)")),
    Bad("query-grid", lambda: make(query_grid=(3, 3)), ValueError,
        ("query_grid = (3, 3) holds 9 tokens", "there are 10", "height * width must be 10")),
    Bad("key-grid", lambda: make(key_grid=(4, 4)), ValueError,
        ("key_grid = (4, 4) holds 16 tokens", "height * width must be 12")),
    Bad("key-grid-negative", lambda: make(key_grid=(-3, -4)), ValueError,
        ("key_grid = (-3, -4)", "height * width must be 12")),
    Bad("grid-is-a-number", lambda: make(key_grid=12), TypeError,
        ("key_grid must be (height, width)", "12")),
    Bad("grid-is-infinite", lambda: make(key_grid=(math.inf, 1)), TypeError,
        ("key_grid must be (height, width)", "inf")),
    Bad("lse-shape", lambda: make(lse=torch.zeros(2, 10, 3)), ValueError,
        ("lse must be [batch, H, N] = [2, 3, 10]", "natural log", "got [2, 10, 3]")),
    Bad("lse-is-a-number", lambda: make(lse=1.0), ValueError, ("lse must be", "got float")),
]  # fmt: skip

BAD_CALLS = [
    Bad("reduction-unknown", lambda: make().reduce("entropy", "mean"), ValueError,
        ("reduction 'mean' is unknown", "choose from entropy, max, argmax")),
    Bad("reduction-topk", lambda: make().reduce("topk"), ValueError,
        ("reduction 'topk' is unknown", "A.topk(k)")),
    Bad("no-reduction", lambda: make().reduce(), ValueError,
        ("reduce() needs at least one of entropy",)),
    Bad("not-asked-for", lambda: make().reduce("entropy").argmax, AttributeError,
        ("'argmax' was not asked for", "reduce() was given ['entropy']")),
    Bad("expectation-without-grid", lambda: make().expectation(), ValueError,
        ("expectation needs key_grid", "12 tokens are not a square grid",
         "height * width = 12")),
    Bad("diagonal-not-square", lambda: make().diagonal(), ValueError,
        ("diagonal needs a square map", "10 x 12")),
    Bad("k-too-large", lambda: make().topk(13), ValueError,
        ("k = 13 is more than the 12 keys", "k must be <= 12")),
    Bad("k-zero", lambda: make().topk(0), ValueError, ("k must be a whole number >= 1", "got 0")),
    Bad("k-float", lambda: make().topk(2.0), ValueError, ("k must be a whole number", "2.0")),
    Bad("row-out-of-range", lambda: make().rows([3, 10]), IndexError,
        ("row 10 is out of range", "the map has 10 rows")),
    Bad("row-below", lambda: make().rows(-11), IndexError, ("row -11 is out of range",)),
    Bad("row-float", lambda: make().rows(1.5), TypeError,
        ("rows(index) wants whole numbers", "1.5")),
    Bad("row-mask", lambda: make().rows(torch.ones(10, dtype=torch.bool)), TypeError,
        ("rows(index) wants whole numbers",)),
    Bad("product-shape", lambda: make() @ tensor(2, 10, 4), ValueError,
        ("x has shape [2, 10, 4]", "wanted [batch, tokens, C] = [2, 12, C]", "or [12, C]")),
    Bad("product-vector", lambda: make() @ tensor(12), ValueError,
        ("x has shape [12]", "[2, 12, C]")),
    Bad("product-integers", lambda: make() @ torch.ones(12, 1, dtype=torch.int64), TypeError,
        ("x has dtype torch.int64", "x.float()")),
    Bad("product-empty", lambda: make() @ tensor(12, 0), ValueError, ("x has no columns",)),
    Bad("product-number", lambda: make() @ 2.0, TypeError, ("x must be a torch.Tensor", "float")),
    Bad("product-elsewhere", lambda: make() @ tensor(12, 1).to("meta"), ValueError,
        ("x is on meta", "the map is on cpu")),
    Bad("transposed-shape", lambda: make().mT @ tensor(2, 12, 4), ValueError,
        ("y has shape [2, 12, 4]", "[2, 10, C]")),
    Bad("pool-without-grid", lambda: make().pool(key_to=(2, 2)), ValueError,
        ("pool needs key_grid", "12 tokens are not a square")),
    Bad("pool-finer", lambda: make(SQUARE, SQUARE).pool(query_to=(5, 2)), ValueError,
        ("query_to = (5, 2)", "between (1, 1) and the query grid (4, 4)")),
    Bad("pool-number", lambda: make(SQUARE, SQUARE).pool(key_to=2), TypeError,
        ("key_to must be (height, width)", "2")),
    Bad("average-of-nothing", lambda: fm.AttentionMap.average([]), ValueError,
        ("needs at least one map",)),
    Bad("average-of-one", lambda: fm.AttentionMap.average(make()), TypeError,
        ("takes a sequence of AttentionMaps", "put it in a list")),
    Bad("average-of-tensors", lambda: fm.AttentionMap.average([Q]), TypeError,
        ("maps[0] must be an AttentionMap", "Tensor")),
    Bad("average-weights", lambda: fm.AttentionMap.average([make()], [0.5, 0.5]), ValueError,
        ("weights has 2 entries for 1 maps",)),
    Bad("average-sum", lambda: fm.AttentionMap.average([make(), make()], [1.0, 1.0]), ValueError,
        ("weights must be >= 0 and sum to 1", "[1.0, 1.0]")),
    Bad("average-shapes", lambda: fm.AttentionMap.average([make(), make(SQUARE)]), ValueError,
        ("maps[1] is AttentionMap(shape=(2, 16, 12)", "only maps of one shape")),
    Bad("average-masks", lambda: fm.AttentionMap.average([make(), make(key_mask=torch.ones(12))]),
        ValueError, ("maps[1] has another key_mask than maps[0]",)),
    Bad("average-grids",
        lambda: fm.AttentionMap.average(
            [make(normalize="rows", key_grid=grid) for grid in ((3, 4), (4, 3))]),
        ValueError, ("maps[1] has key_grid (4, 3)", "maps[0] has (3, 4)")),
]  # fmt: skip

A, BACK = make(), make(K, Q)

BAD_TRIPS = [
    Bad("compose-a-tensor", lambda: fm.compose(A, K), TypeError,
        ("compose() takes two AttentionMaps", "AttentionMap and Tensor")),
    Bad("compose-shapes", lambda: A @ A, ValueError,
        ("(2, 10, 12) and (2, 10, 12) do not chain", "the first one's keys must be the second")),
    Bad("compose-batches", lambda: fm.compose(A, make(K[:1], Q[:1])), ValueError,
        ("(2, 10, 12) and (1, 12, 10) do not chain", "equal batches")),
    Bad("compose-dtypes", lambda: A @ make(K.double(), Q.double()), ValueError,
        ("the first map is torch.float32", "the second is torch.float64", "make them alike")),
    Bad("budget-too-small", lambda: fm.compose(A, BACK, memory_budget=100), ValueError,
        ("memory_budget = 100 bytes is too small", "the smallest that works is")),
    Bad("budget-is-text", lambda: fm.compose(A, BACK, memory_budget="64MB"), TypeError,
        ("memory_budget must be a whole number of bytes", "64 * 2**20", "'64MB'")),
    Bad("composition-times-a-number", lambda: (A @ BACK) @ 3, TypeError,
        ("Composition @ wants a tensor", "int")),
    Bad("composition-times-a-shape", lambda: (A @ BACK) @ tensor(2, 12, 1), ValueError,
        ("x has shape [2, 12, 1]", "[2, 10, C]")),
    Bad("composition-reduction", lambda: (A @ BACK).reduce("median"), ValueError,
        ("reduction 'median' is unknown",)),
    Bad("composition-expectation", lambda: (A @ BACK).reduce("expectation"), ValueError,
        ("expectation needs key_grid", "10 tokens")),
    Bad("composition-diagonal", lambda: (make(Q, K) @ make(K, SQUARE)).diagonal(), ValueError,
        ("diagonal needs a square map", "10 x 16")),
    Bad("composition-k", lambda: (A @ BACK).topk(11), ValueError, ("k = 11 is more than the 10",)),
    Bad("composition-row", lambda: (A @ BACK).rows(10), IndexError, ("row 10 is out of range",)),
    Bad("trip-shapes", lambda: fm.round_trip(A, A), ValueError,
        ("A_ts has shape (2, 10, 12)", "the way back from A_st (2, 10, 12) is (2, 12, 10)",
         "A_ts = map(Q_t, K_s)")),
    Bad("trip-tensor", lambda: fm.round_trip(A, K), TypeError,
        ("A_ts must be an AttentionMap", "Tensor")),
    Bad("trip-dtypes", lambda: fm.round_trip(A, make(K.double(), Q.double())), ValueError,
        ("A_st is torch.float32", "A_ts is torch.float64", "make them alike")),
    Bad("trip-without-grid", lambda: fm.round_trip(A, BACK), ValueError,
        ("a distance needs query_grid (of A_st)", "10 tokens are not a square grid")),
    Bad("trip-grids-differ",
        lambda: fm.round_trip(make(query_grid=(2, 5)), make(K, Q, key_grid=(5, 2))),
        ValueError, ("(2, 5) as A_st.query_grid", "(5, 2) as A_ts.key_grid", "pass the same")),
    Bad("ims-kind", lambda: fm.inverse_mapping_score(
        make(query_grid=(2, 5)), BACK, kind="mean"), ValueError,
        ("kind = 'mean' is unknown", "'hard' or 'soft'")),
    Bad("ime-kind", lambda: fm.inverse_mapping_entropy(A, kind="columns"), ValueError,
        ("kind = 'columns' is unknown", "'rows'", "'bayes'")),
    Bad("ime-tensor", lambda: fm.inverse_mapping_entropy(Q), TypeError,
        ("A must be an AttentionMap", "Tensor")),
    Bad("density-tensor", lambda: fm.mapping_density(Q), TypeError,
        ("A_st must be an AttentionMap", "Tensor")),
    Bad("density-kind", lambda: fm.mapping_density(A, kind="mean"), ValueError,
        ("kind = 'mean' is unknown", "'hard' or 'soft'")),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_MAPS + BAD_CALLS + BAD_TRIPS, ids=lambda bad: bad.name)
def test_the_error_says_what_is_wrong(bad: Bad) -> None:
    with pytest.raises(bad.error) as error:
        bad.call()
    for part in bad.says:
        assert part in str(error.value)


# NaN and infinity in Q or K.


def poisoned(value: float, side: str = "query") -> dict[str, Tensor]:
    inputs = {"query": tensor(1, 2, 40, 8), "key": tensor(1, 2, 37, 8, seed=1)}
    inputs[side][0, 1, 3, 5] = value
    return inputs


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_checks_name_the_first_bad_value(value: float, side: str, backend: str) -> None:
    with fm.checks(True), pytest.raises(ValueError) as error:
        fm.AttentionMap(**poisoned(value, side), backend=backend)
    for part in (
        f"{side} has 1 values that are NaN or inf",
        "[0, 1, 3, 5]",
        str(value),
        "bfloat16",
    ):
        assert part in str(error.value)
    fm.AttentionMap(**poisoned(value, side), backend=backend)  # off again outside


def test_checks_nest_and_switch() -> None:
    bad = poisoned(math.nan)
    with fm.checks(True):
        with fm.checks(False):
            fm.AttentionMap(**bad)
        with pytest.raises(ValueError, match="query has 1 values"):
            fm.AttentionMap(**bad)
    fm.AttentionMap(**bad)
    fm.checks(True)
    try:
        with pytest.raises(ValueError, match="query has 1 values"):
            fm.AttentionMap(**bad)
    finally:
        fm.checks(False)
    fm.AttentionMap(**bad)


@pytest.mark.parametrize("side", ["query", "key"])
def test_the_reference_always_names_them(side: str) -> None:
    A = fm.AttentionMap(**poisoned(math.nan, side), backend="reference")
    with pytest.raises(ValueError, match=f"{side} has 1 values that are NaN or inf"):
        A.entropy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_kernels_neither_hang_nor_leave_their_bounds(
    value: float, side: str, dtype: torch.dtype, backend: str, poison: None
) -> None:
    """Every operation comes back, with indices that are indices; other rows are not touched."""
    if backend == "reference":
        pytest.skip("the reference refuses NaN and infinity instead")
    inputs = {name: t.to(dtype) for name, t in poisoned(value, side).items()}
    A = fm.AttentionMap(**inputs, key_grid=(1, 37), backend=backend)
    clean = fm.AttentionMap(
        **{name: t.nan_to_num(0, 0, 0) for name, t in inputs.items()}, backend=backend
    )
    fields = A.reduce("entropy", "max", "argmax", "expectation", "column_sum", "column_entropy",
                      "column_max", "column_argmax")  # fmt: skip
    _, indices = A.topk(5)
    for index, size in ((fields.argmax, 37), (fields.column_argmax, 40), (indices, 37)):
        assert ((index >= 0) & (index < size)).all()
    A.to_dense(), A @ torch.ones(37, 3), A.mT @ torch.ones(40, 3), A.pool(key_to=(1, 5)), A.lse
    normalized = fm.AttentionMap(**inputs, normalize="rows", key_grid=(1, 37), backend=backend)
    normalized.reduce("entropy", "argmax")
    back = fm.AttentionMap(inputs["key"], inputs["query"], backend=backend)
    R = fm.round_trip(
        fm.AttentionMap(**inputs, query_grid=(5, 8), backend=backend),
        fm.AttentionMap(inputs["key"], inputs["query"], key_grid=(5, 8), backend=backend),
    )
    assert ((R.forward >= 0) & (R.forward < 37)).all()
    (A @ back).reduce("entropy", "argmax", "diagonal")
    if side == "query":
        others = torch.arange(40) != 3
        assert torch.equal(fields.entropy[:, others], clean.entropy()[:, others])
        assert torch.equal(indices[:, others], clean.topk(5)[1][:, others])


def test_checks_of_threads_and_tasks_are_their_own() -> None:
    """As contexts in several at once: none leaves the switch on, and none hears of another's."""
    bad = Q.clone()
    bad[0, 0, 0, 0] = math.nan
    wrong: list[object] = []
    barrier = threading.Barrier(4)

    def work(wanted: bool) -> None:
        try:
            for _ in range(50):
                barrier.wait()
                with fm.checks(wanted):
                    barrier.wait()
                    try:
                        make(query=bad)
                        assert not wanted
                    except ValueError:
                        assert wanted
                make(query=bad)
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

    async def task(wanted: bool) -> None:
        for _ in range(5):
            with fm.checks(wanted):
                await asyncio.sleep(0)
                if wanted:
                    with pytest.raises(ValueError, match="query has 1 values that are NaN"):
                        make(query=bad)
                else:
                    make(query=bad)
            await asyncio.sleep(0)

    async def tasks() -> None:
        await asyncio.gather(*(task(index % 2 == 0) for index in range(6)))

    asyncio.run(tasks())
    make(query=bad)
