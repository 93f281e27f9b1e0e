"""Which backends there are, how one is chosen, and that an explicit choice never falls back."""

from __future__ import annotations

import flashmaps as fm
import pytest
import torch

QUERY = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
KEY = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", fm.backends())
def test_is_here(name: str) -> None:
    """Skipped, with the reason, where it is not: the whole suite then runs without it."""
    available = fm.backends()[name]
    if not available:
        pytest.skip(f"backend {name!r}: {available.reason}")
    A = fm.AttentionMap(QUERY, KEY, backend=name)
    assert A.backend == name
    assert A.max().shape == (1, 6)


def test_names_and_reasons() -> None:
    found = fm.backends()
    assert {"reference", "cpu", "triton", "cuda"} <= set(found)
    assert found["reference"].available
    for name, availability in found.items():
        assert availability.reason, f"{name} says nothing about itself"


def test_auto_takes_the_fastest_that_can_run() -> None:
    A = fm.AttentionMap(QUERY, KEY)
    assert A.backend == ("cpu" if fm.backends()["cpu"] else "reference")
    assert f"backend={A.backend!r}" in repr(A)


@pytest.mark.parametrize("name", [name for name, a in fm.backends().items() if not a])
def test_an_explicit_backend_that_cannot_run_raises_with_the_reason(name: str) -> None:
    with pytest.raises(RuntimeError) as error:
        fm.AttentionMap(QUERY, KEY, backend=name)
    assert str(error.value).startswith(f"backend {name!r} cannot run this: ")
    assert fm.backends()[name].reason in str(error.value)


def test_cpu_without_its_extension_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "flashmaps.maps.backends.cpu._missing", "the C++ extension is not built: no compiler"
    )
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run this: .* not built: no compiler"):
        fm.AttentionMap(QUERY, KEY, backend="cpu")
    assert fm.AttentionMap(QUERY, KEY).backend == "reference"
    assert fm.backends()["cpu"] == (False, "the C++ extension is not built: no compiler")


def test_cpu_refuses_tensors_of_another_device() -> None:
    query, key = QUERY.to("meta"), KEY.to("meta")
    if not fm.backends()["cpu"]:
        pytest.skip(f"backend 'cpu': {fm.backends()['cpu'].reason}")
    with pytest.raises(RuntimeError, match="needs tensors on the CPU, these are on meta"):
        fm.AttentionMap(query, key, backend="cpu")


def test_an_unknown_backend_is_named_beside_those_there_are() -> None:
    with pytest.raises(ValueError, match="'metal' is unknown; choose 'auto' or one of cpu, ref"):
        fm.AttentionMap(QUERY, KEY, backend="metal")


@pytest.mark.parametrize("name", ["metal", *(n for n, a in fm.backends().items() if not a)])
def test_match_refuses_a_backend_before_it_looks_at_anything(name: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"backend '{name}'"):
        fm.match("nowhere.png", "nowhere.png", model="./nowhere", backend=name)
