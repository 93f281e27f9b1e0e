"""The arguments of the operators: problems and a request, flat, in one order said once.

Lists of names travel as one comma-separated string: operator schemas have no list of strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashmaps.maps.problem import Problem, Request

PROBLEM = len(Problem._fields)  # how many arguments of an operator make up one problem

# In the language of torch's schemas.
_TYPES = {
    "query": "Tensor",
    "key": "Tensor",
    "bias": "Tensor?",
    "head_weights": "Tensor?",
    "pairs": "Tensor?",
    "lse": "Tensor?",
    "scale": "float",
    "normalize": "str",
    "grid_height": "SymInt",
    "grid_width": "SymInt",
    # Of a request.
    "names": "str",
    "right": "Tensor?",
    "left": "Tensor?",
    "k": "SymInt",
    "cells": "Tensor?",
    "num_cells": "SymInt",
}


def problem_schema(prefix: str = "") -> list[str]:
    """The arguments that make up one problem."""
    return [f"{_TYPES[name]} {prefix}{name}" for name in Problem._fields]


@dataclass(frozen=True)
class Signature:
    """Of an operator: problems, what it takes of a request, backends, the memory budget."""

    prefixes: tuple[str, ...]  # of the fields of each problem
    fields: tuple[str, ...]  # of the request, the names first
    backends: tuple[str, ...] = ("backend",)

    @property
    def schema(self) -> str:
        """For `torch.library`. No defaults: torch leaves them out of what its autograd counts."""
        arguments = [each for prefix in self.prefixes for each in problem_schema(prefix)]
        arguments += [f"{_TYPES[name]} {name}" for name in self.fields]
        arguments += [f"str {name}" for name in self.backends]
        return f"({', '.join(arguments)}, SymInt? memory_budget) -> Tensor[]"

    def pack(
        self, problems: Sequence[Problem], request: Request, backends: Sequence[str]
    ) -> tuple[Any, ...]:
        """The arguments of a call."""
        of_request = (getattr(request, name) for name in self.fields[1:])
        names, budget = ",".join(request.names), request.memory_budget
        return (*(x for one in problems for x in one), names, *of_request, *backends, budget)

    def unpack(self, args: Sequence[Any]) -> tuple[list[Problem], Request, tuple[str, ...]]:
        """`pack` undone."""
        starts = range(0, PROBLEM * len(self.prefixes), PROBLEM)
        problems = [Problem(*args[start : start + PROBLEM]) for start in starts]
        rest = args[PROBLEM * len(self.prefixes) :]
        count = len(self.fields)
        of_request = dict(zip(self.fields, rest[:count], strict=True))
        request = Request(tuple(of_request.pop("names").split(",")), **of_request)
        backends = (*rest[count : count + len(self.backends)],)
        return problems, replace(request, memory_budget=rest[-1]), backends


REDUCE = Signature(("",), ("names", "right", "left", "k", "cells", "num_cells"))
ROUND_TRIP = Signature(("", "back_"), ("names", "right"))
COMPOSE = Signature(("", "then_"), ("names", "k"), ("backend", "then_backend"))
