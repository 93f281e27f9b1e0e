"""A loss and its gradients as CUDA graphs.

A step of the miniature is thousands of small kernels, and the host takes longer to ask for them
than a large GPU to run them. Captured once, they are asked for with one call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Numbers = dict[str, Tensor]
_WARM = 3  # calls before a capture: they choose algorithms and allocate what lasts


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    value: Tensor
    numbers: Numbers
    gradients: list[Tensor | None]


class Replayed:
    """``function(key, *inputs) -> (loss, numbers)``, run forwards and backwards by replay.

    A call gives the loss without its history and leaves the gradients with the parameters. What
    differs but in numbers has another key, and is captured on its own: other shapes, or another
    way through the function. The function may not wait for the GPU nor draw random numbers, and
    autocasts within itself, without autocast's cache.

    ``descend``, if given, is the step that an optimizer takes with the gradients, and is replayed
    too: what changes in it is in tensors, and all that it keeps is made before the first call.
    ``rehearse`` does the same and moves nothing: what is run before a capture.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, Numbers]],
        parameters: Sequence[torch.nn.Parameter],
        descend: Callable[[], None] | None = None,
        rehearse: Callable[[], None] | None = None,
    ) -> None:
        self._function, self._parameters = function, parameters
        self._descend, self._rehearse = descend, rehearse
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # what one graph needs only within, all share

    def __call__(self, key: Hashable, *inputs: Tensor) -> tuple[Tensor, Numbers]:
        """The loss and the numbers, which the next call with this key overwrites."""
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._captured(key, inputs)
        for place, new in zip(found.inputs, inputs, strict=True):
            place.copy_(new)
        found.graph.replay()
        for parameter, gradient in zip(self._parameters, found.gradients, strict=True):
            parameter.grad = gradient
        return found.value, found.numbers

    def _captured(self, key: Hashable, inputs: Sequence[Tensor]) -> _Graph:
        static = [x.detach().clone() for x in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM):
                self._forget()
                self._function(key, *static)[0].backward()
                if self._rehearse is not None:
                    self._rehearse()
        torch.cuda.current_stream().wait_stream(aside)
        self._forget()  # so that the graph writes gradients instead of adding to them
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            value, numbers = self._function(key, *static)
            value.backward()
            gradients = [parameter.grad for parameter in self._parameters]
            if self._descend is not None:
                self._descend()
        return _Graph(graph, static, value.detach(), numbers, gradients)

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
