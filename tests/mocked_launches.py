"""Both GPU backends on tensors of the CPU with launches that do nothing: what the host pays.

Everything else is what runs on a GPU: how a call is arranged, its tape, its allocations. Results
are whatever was in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from flashmaps.kernels import backend as triton_backend
from flashmaps.maps.backends import choice, cuda
from flashmaps.maps.tape import Tapes

Seen = list[tuple[str, dict[str, Any]]]  # kernels and their arguments, addresses as numbers


def _nothing(*given: Any) -> None:
    pass


@contextlib.contextmanager
def triton(architecture: str = "sm_90", *, note: bool = True) -> Iterator[Seen]:
    """Backend "triton". Launches are noted where addresses are filled in, which is not at first."""
    from flashmaps.kernels import run, settings

    seen: Seen = []
    here = settings.settings_of(architecture)

    def start(launch: run.Launch, arguments: dict[str, Any]) -> Any:
        names = [parameter.name for parameter in launch.kernel.params]
        name = launch.kernel.__name__

        def go(*given: Any) -> None:
            seen.append((name, dict(zip(names, given[9:], strict=True))))

        return SimpleNamespace(run=go if note else _nothing, function=0, packed_metadata=())

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(triton_backend, "supports", lambda problem: None))
        enter(mock.patch.object(triton_backend, "unavailable_reason", lambda: None))
        enter(mock.patch.object(triton_backend, "_settings_here", lambda device: here))
        enter(mock.patch.object(triton_backend, "_tapes", Tapes()))
        enter(mock.patch.object(run, "start", start))
        yield seen


class _Silent:
    """The compiled module, launching nothing."""

    def __init__(self, native: Any, seen: list[str]) -> None:
        self._native = native
        for name in ("lse", "statistics", "product", "round_trip", "prepare", "combine"):
            setattr(self, name, self._launch(name, seen))
        self.combine_lse = self._launch("combine_lse", seen)
        self._card = native.Limits(
            multiprocessors=132, shared_bytes=227 * 1024, architecture=90
        )  # an H100's

    @staticmethod
    def _launch(name: str, seen: list[str]) -> Callable[..., None]:
        def launch(arguments: Any, *more: Any) -> None:
            seen.append(name)

        launch.__name__ = name
        return launch

    def limits(self, device: int) -> Any:
        return self._card

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


@contextlib.contextmanager
def cuda_cpp(native: Any) -> Iterator[list[str]]:
    """Backend "cuda" with the structs of a compiled module: `flashmaps._cuda` or its emulation."""
    seen: list[str] = []
    backend = cuda.Backend(_Silent(native, seen), "cpu")
    with (
        mock.patch.dict(choice._BACKENDS, {"cuda": backend}),
        mock.patch.object(cuda, "unavailable_reason", lambda: None),
    ):
        yield seen
