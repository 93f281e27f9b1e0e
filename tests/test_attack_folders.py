"""A little of the attacks on folders and on the command line; `make attack` has much."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from flashmaps.files import folders as implementation
from flashmaps.files import marker

sys.path.append(str(Path(__file__).parent / "attack"))
import commands
import folders


@pytest.mark.parametrize("seed", range(4))
def test_steps_into_folders_hold(seed):
    assert folders.steps(seed, 20) == 20


@pytest.mark.parametrize(
    "planted",
    [
        # Removes what was not listed; exchanges in two steps; lists nothing before it moves.
        lambda patch: patch.setattr(marker, "clear", lambda folder, names: shutil.rmtree(folder)),
        lambda patch: patch.setattr(implementation, "_retire", lambda old, target: 1 / 0),
        lambda patch: patch.setattr(marker, "strangers", lambda *_: []),
    ],
    ids=["removes too much", "breaks", "sees no strangers"],
)
def test_a_planted_fault_is_found(monkeypatch, planted):
    planted(monkeypatch)
    with pytest.raises(AssertionError, match=r"steps\(\d+, 25\)"):
        for seed in range(40):
            folders.steps(seed)


def test_command_lines_hold():
    ended = commands.lines(8, seed=3)
    assert sum(ended.values()) == 8


def test_killed_commands_lose_nothing():
    assert "killed" in folders.kills(1, seed=1, names=("world",))[-1]


@pytest.mark.slow
def test_forty_kills_lose_nothing():
    said = folders.kills(40, seed=0)
    assert sum(line.count("killed") for line in said) >= 40
