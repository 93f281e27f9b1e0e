"""A call that is arranged once and played again on other tensors."""

from __future__ import annotations

import flashmaps as fm
import mocked_launches
import pytest
import torch
from flashmaps.maps.problem import Problem, Request
from flashmaps.maps.tape import Play, Recorder, Tapes, call_key, without_memory
from torch import Tensor


def problem(query: Tensor, key: Tensor) -> Problem:
    return Problem(query, key, None, None, None, None, 0.125, "block", 4, 4)


def tokens(count: int = 16) -> Tensor:
    return torch.randn(1, 2, count, 8)


def test_what_is_computed_on_the_way_is_computed_again() -> None:
    recorder = Recorder()
    there, _, inputs = without_memory(problem(tokens(), tokens()), Request(("max",)), recorder)
    assert there.query.device.type == "meta"
    doubled = recorder.compute(lambda x: 2 * x, there.query)
    out = recorder.make(torch.empty(8, 16, device="meta"))
    recorder.compute(lambda x, out: out.copy_(x), doubled[0, 1].mT, out)
    tape = recorder.tape(inputs, {"out": out}, workspace=0)
    for _ in range(2):
        query = tokens()
        given = (query, tokens(), *(None,) * 13)
        found = tape.play(given, query.device)
        assert torch.equal(found["out"], 2 * query[0, 1].mT)


def test_workspace_is_let_go_after_its_last_use() -> None:
    recorder = Recorder()
    there, _, inputs = without_memory(problem(tokens(), tokens()), Request(("max",)), recorder)
    held: list[int] = []
    first = recorder.make(torch.empty(4, device="meta"))
    recorder.compute(lambda first: first.zero_(), first)
    second = recorder.make(torch.empty(4, device="meta"))
    recorder.compute(lambda second: second.zero_(), second)

    def look(call: Play) -> None:
        held.append(sum(each is not None for each in call.tensors))

    recorder.launch(look, None)
    tape = recorder.tape(inputs, {"out": there.query}, workspace=0)
    tape.play((tokens(), tokens(), *(None,) * 13), torch.device("cpu"))
    assert held == [2]  # the inputs


def test_calls_are_alike_where_shapes_strides_dtypes_and_alignment_are() -> None:
    query, key, request = tokens(), tokens(), Request(("max",))
    same = call_key(problem(query, key), request)
    assert call_key(problem(query.clone(), query), request) == same
    odd = torch.empty(query.numel() + 1)[1:].view(query.shape)
    others = (
        call_key(problem(tokens(17), key), request),
        call_key(problem(query.transpose(1, 2).contiguous().transpose(1, 2), key), request),
        call_key(problem(query.half(), key.half()), request),
        call_key(problem(odd, key), request),
        call_key(problem(query, key)._replace(scale=1.0), request),
        call_key(problem(query, key), Request(("max",), memory_budget=100)),
        call_key(problem(query, key), Request(("max", "argmax"))),
        call_key(problem(query, key), request, "a setting"),
    )
    assert len({same, *others}) == 1 + len(others)


def test_a_stand_in_begins_where_its_tensor_does() -> None:
    odd = torch.empty(99)[3:].view(1, 2, 6, 8)
    stand_in = Recorder().given(odd)
    assert stand_in.storage_offset() * 4 % 16 == odd.data_ptr() % 16
    assert (stand_in.shape, stand_in.stride()) == (odd.shape, odd.stride())


def test_few_tapes_are_kept() -> None:
    tapes = Tapes()
    for number in range(1000):
        tapes.get(number, object)  # type: ignore[arg-type]
    assert len([*tapes]) == 256
    last = tapes.get(999, object)  # type: ignore[arg-type]
    assert tapes.get(999, object) is last  # type: ignore[arg-type]
    assert tapes.get(0, object) is not last  # type: ignore[arg-type]


ROWS = ("entropy", "max", "argmax", "expectation")


def test_triton_gets_the_addresses_of_each_call() -> None:
    """Also where the first call had one tensor for both queries and keys."""
    pytest.importorskip("triton")
    query, key = (torch.randn(1, 5, 400, 64).half() for _ in range(2))
    with mocked_launches.triton() as seen:
        fm.AttentionMap(query, query, backend="triton").reduce(*ROWS)
        assert seen == []  # triton compiles
        for one, other in ((query, query), (query, key), (key, query)):
            found = fm.AttentionMap(one, other, backend="triton").reduce(*ROWS)
            launches = dict(seen)
            assert launches["lse_kernel"]["query"] == one.data_ptr()
            assert launches["lse_kernel"]["key"] == other.data_ptr()
            assert launches["reduce_kernel"]["kept"] == one.data_ptr()
            assert launches["reduce_kernel"]["streamed"] == other.data_ptr()
            last = launches.get("combine_kernel", launches["reduce_kernel"])
            assert found.expectation.data_ptr() in last.values()
            seen.clear()


def test_the_way_back_gets_the_addresses_of_each_call() -> None:
    """The tape of a way back is recorded once, and its gradients are new tensors."""
    pytest.importorskip("triton")
    from flashmaps.kernels import backend

    given = [torch.randn(1, 2, 80, 16).half().requires_grad_() for _ in range(3)]
    with mocked_launches.triton() as seen:
        found = []
        for query, key in ((given[0], given[1]), (given[1], given[2]), (given[2], given[0])):
            seen.clear()
            entropy = fm.AttentionMap(query, key, backend="triton").reduce("entropy").entropy
            made = backend._tapes
            found.append(torch.autograd.grad(entropy.sum(), (query, key)))
            launches = dict(seen)
        assert len([*made]) == 2  # the way there, the way back
        for kernel in ("inner_kernel", "query_kernel", "key_kernel"):
            assert launches[kernel]["query"] == given[2].data_ptr()
            assert launches[kernel]["key"] == given[0].data_ptr()
        assert len({grad.data_ptr() for pair in found for grad in pair}) == 6


def test_triton_kernels_are_given_what_they_take() -> None:
    """Arguments go to the driver by place, and every parameter has one."""
    pytest.importorskip("triton")
    query, key = (torch.randn(2, 5, 300, 40).half() for _ in range(2))
    pairs = torch.tensor([[0, 1], [1, 0], [1, 1]])
    with mocked_launches.triton() as seen:
        for _ in range(2):
            lazy = fm.AttentionMap(query, key, pairs=pairs, backend="triton")
            lazy.reduce("column_sum", "column_entropy")
            lazy @ torch.ones(300, 3)
            lazy.topk(4)
        for name, arguments in seen:
            for argument, value in arguments.items():
                assert value is None or isinstance(value, int | float | str), (name, argument)
                if argument == "num_queries":
                    assert value == 300
                if argument == "pairs" and value is not None:
                    assert value > 2**20  # an address
