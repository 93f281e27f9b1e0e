"""The C++ kernel is compiled several times; the contract holds for each build that runs here."""

from __future__ import annotations

import flashmaps as fm
import pytest
import test_operations as contract_tests
import torch
from contract import subject_of
from every_operation import outputs
from flashmaps.maps.backends import cpu
from problems import CASE_NAMES, CASES, Problem

BUILDS = cpu._C.instruction_sets() if fm.backends()["cpu"] else []

pytestmark = pytest.mark.usefixtures("poison", "one_thread")


class OneBuild:
    """The extension, with every call sent to one of its builds."""

    def __init__(self, name: str) -> None:
        self.name, self.of = name, cpu._C

    def __getattr__(self, attribute: str) -> object:
        return getattr(self.of, attribute)

    def reduce(self, *arguments: object) -> int:
        return self.of.reduce(*arguments, instruction_set=self.name)


@pytest.fixture(params=BUILDS[1:])  # the first is what runs everywhere else
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "_C", OneBuild(request.param))
    return request.param


def test_there_are_builds() -> None:
    if not BUILDS:
        pytest.skip(f"backend 'cpu': {fm.backends()['cpu'].reason}")
    assert BUILDS[-1] == "baseline"
    assert BUILDS[0] in fm.backends()["cpu"].reason


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_contract(case: tuple[Problem, torch.dtype], build: str) -> None:
    subject = subject_of(case, "cpu")
    contract_tests.test_lse(subject, case)
    contract_tests.test_to_dense(subject)
    contract_tests.test_reductions_fused(subject)
    contract_tests.test_topk(subject)
    contract_tests.test_products(subject)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_builds_agree_on_everything_else(dtype: torch.dtype, build: str) -> None:
    """Round trips, compositions, pooling: as the reference has them, indices and all."""
    want = outputs("reference", dtype)
    # Roundings of these maps as in oracle.band: 60 eps for an entry, twice that for a composition,
    # times |log| of up to 8 in entropies of columns.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name, got in outputs("cpu", dtype).items():
        if "spread" in name:
            got, want[name] = got.square(), want[name].square()
        if got.dtype.is_floating_point:
            close = {"rtol": 2**10 * eps, "atol": 2**5 * eps}
            torch.testing.assert_close(got, want[name], equal_nan=True, **close, msg=name)
        else:
            same = (got == want[name]).double().mean()
            assert same > 0.99, f"{name}: {same:.3f} of the indices agree"
