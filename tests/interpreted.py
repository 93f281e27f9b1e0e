"""The Triton kernels under triton's interpreter, on the CPU: a program that test_triton.py runs.

Triton decides when it is imported whether it interprets (TRITON_INTERPRET=1), so this is a process
of its own. It reads one check a line, "problem/operation", and answers each with a line of JSON:
[check, null] or [check, what went wrong].
"""

from __future__ import annotations

import functools
import json
import math
import sys
import traceback
from dataclasses import replace

import torch
from checks import OPERATIONS, Checked
from problems import CASE_NAMES, CASES, Problem

FLOATS = (torch.float32, torch.float16)  # the interpreter has no bfloat16 arithmetic


def cases() -> dict[str, tuple[Problem, torch.dtype]]:
    """The problems of the contract that the interpreter can do, in seconds."""
    found = dict(zip(CASE_NAMES, CASES, strict=True))
    return {
        name: case
        for name, case in found.items()
        if case[1] in FLOATS and math.prod(case[0].shape[:4]) < 100_000
    }


def hurry() -> None:
    """Spare the interpreter two things that take most of its time.

    It patches triton.language again on entering every function; once for each module is enough, and
    for ours the kernel that calls has done it. And it checks whole numbers for overflow.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self: interpreter.InterpretedFunction, *arguments: object, **named: object) -> object:
        module = self.fn.__module__
        if module not in patched and not module.startswith("flashmaps."):
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def main() -> None:
    if "--hurry" in sys.argv:
        hurry()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # every torch.empty begins as NaN
    checked = functools.cache(lambda name: Checked(*cases()[name], "triton", "cpu"))
    for line in sys.stdin:
        check = line.strip()
        name, operation = check.split("/")
        try:
            OPERATIONS[operation](checked(name))
            wrong = None
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps([check, wrong]), flush=True)


if __name__ == "__main__":
    main()
