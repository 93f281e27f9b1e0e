"""Processes that were forked after torch had used threads: what docs/cpu.md says of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import os, sys, torch, flashmaps as fm
torch.set_num_threads(2)
Q = torch.randn(1, 2, 512, 64)
fm.AttentionMap(Q, Q, backend=sys.argv[1]).entropy()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    fm.AttentionMap(Q, Q, backend=sys.argv[1]).entropy()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_forked_child_with_one_thread_works(name):
    command = [sys.executable, "-c", CODE, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "cannot run" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout.strip() == "7", done.stderr
