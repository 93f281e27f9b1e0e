"""The doctor tells what is here, and what is missing and how to get it."""

from __future__ import annotations

import torch
from flashmaps.app import doctor
from flashmaps.app.commands import make_app
from flashmaps.maps.backends.choice import backends
from typer.testing import CliRunner


def test_every_backend_has_its_reason():
    found = doctor.examine()
    assert set(found["backends"]) == set(backends())
    for state in found["backends"].values():
        assert isinstance(state["available"], bool) and state["reason"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["system"]["torch threads"] == torch.get_num_threads()


def test_missing_packages_come_with_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    missing = doctor.examine()["missing"]
    assert {each["package"] for each in missing} == {package for package, _, _ in doctor.OPTIONAL}
    assert all(each["get"] == f"pip install {each['package']}" for each in missing)
    result = CliRunner().invoke(make_app(), ["doctor"])
    assert result.exit_code == 0 and "pip install matplotlib" in result.output


def test_doctor_prints_it():
    result = CliRunner().invoke(make_app(), ["doctor"])
    assert result.exit_code == 0
    for text in ("flashmaps", "torch threads", "Backends", "reference", "built-in model"):
        assert text in result.output


def test_commands_ask_for_what_they_need_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "jinja2" else name)
    result = CliRunner().invoke(make_app(), ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "pip install jinja2" in result.stderr
