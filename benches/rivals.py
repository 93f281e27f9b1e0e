"""Who else can do it: the contestants of one operation on one set of inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from operations import Inputs, Operation, Outputs, compute_dtype, eager_map, eager_scores
from operations import head_by_head_map as one_map
from torch import Tensor

OURS, EAGER, COMPILED = "flashmaps", "eager torch", "torch.compile"
SDPA, KEOPS = "SDPA", "KeOps"
MATERIALISED, KEPT = "map, then reduce", "reduce of a kept map"


@dataclass
class Contestant:
    """Something to time. ``refusal`` says why it cannot run here."""

    name: str
    run: Callable[[], Any] | None
    refusal: str = ""
    same: bool = True  # whether it computes the same outputs, rather than being a yardstick


def contestants(operation: Operation, inputs: Inputs, *, compiled: bool) -> list[Contestant]:
    """Ours first, then each rival, those that cannot run with the reason."""
    shape = inputs.shape
    found = [Contestant(OURS, lambda: operation.lazy(inputs, *inputs.maps()))]
    sdpa, same = _sdpa(operation, inputs)
    found.append(Contestant(SDPA, sdpa, same=same))
    itemsize = 8 if inputs.pairs[0][0].dtype == torch.float64 else 4
    one = shape.queries * shape.keys * itemsize
    # Scores and probabilities of every head beside the mean maps there are; three of these for one
    # head at a time; and for "entropy+argmax of A_st A_ts" the product and its logarithm.
    # Going back, gradients of the scores and of the probabilities beside them.
    eager_bytes = (2 * shape.heads + 2 * operation.maps) * one * (2 if operation.gradient else 1)
    found.append(_if_fits(EAGER, lambda: _eager(operation, inputs), eager_bytes))
    if compiled and not operation.gradient:
        torch._dynamo.reset()  # or it would give up after a few shapes of the same function
        run = torch.compile(lambda *tensors: _eager(operation, inputs, tensors), dynamic=False)
        flat = [tensor for pair in inputs.pairs for tensor in pair]
        found.append(_if_fits(COMPILED, lambda: run(*flat), eager_bytes))
    if operation.dense is not None:
        dense = operation.dense
        head = (2 + 3 * operation.maps) * one

        def materialise() -> list[Tensor]:
            return [one_map(*pair) for pair in inputs.pairs]

        found.append(_if_fits(MATERIALISED, lambda: dense(inputs, *materialise()), head))
        kept_once = operation.name == "to_dense" or operation.gradient
        if found[-1].run is not None and not kept_once:
            kept = materialise()
            found.append(Contestant(KEPT, lambda: dense(inputs, *kept)))
    keops = _keops(operation, inputs)
    if keops is not None:
        found.append(keops)
    if operation.gradient:
        for contestant in found:
            if contestant.run is not None and contestant.name in (EAGER, MATERIALISED):
                contestant.run = torch.enable_grad()(contestant.run)
    return found


def _if_fits(name: str, run: Callable[[], Any], needed: int) -> Contestant:
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        return Contestant(name, None, f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")
    return Contestant(name, run)


def _eager(
    operation: Operation, inputs: Inputs, tensors: tuple[Tensor, ...] | None = None
) -> Outputs:
    flat = tensors or tuple(tensor for pair in inputs.pairs for tensor in pair)
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    if operation.dense is None:  # lse
        return (eager_scores(*pairs[0]).logsumexp(-1),)
    return operation.dense(inputs, *(eager_map(*pair) for pair in pairs))


def _sdpa(operation: Operation, inputs: Inputs) -> tuple[Callable[[], Outputs], bool]:
    """Attention with the same Q and K, once for each map. With V = x it is A_h @ x."""
    attention = torch.nn.functional.scaled_dot_product_attention
    query, key = inputs.pairs[0]
    if operation.operand == "right" and inputs.right is not None:
        # Every head sees the same x. Its fast path wants V as wide as K.
        value = torch.zeros(*key.shape[:3], key.shape[3], dtype=key.dtype)
        value[..., : operation.columns] = inputs.right[:, None]

        def product() -> Outputs:
            return (attention(query, key, value)[..., : operation.columns].mean(1),)

        return product, operation.columns <= key.shape[3]
    return lambda: tuple(attention(q, k, k) for q, k in inputs.pairs), False


def _keops(operation: Operation, inputs: Inputs) -> Contestant | None:
    """KeOps' log-sum-exp, and its product for few columns; None for what it has no formula for."""
    if operation.name not in ("lse", "A @ x, C=3"):
        return None
    if find_spec("pykeops") is None:
        return Contestant(KEOPS, None, "not installed (pip install pykeops)")
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    query, key = inputs.pairs[0]
    dtype = compute_dtype(query.dtype)
    scaled = (query.to(dtype) * query.shape[3] ** -0.5)[0, :, :, None, :].contiguous()
    keys = key.to(dtype)[0, :, None, :, :].contiguous()

    def scores() -> LazyTensor:
        return (LazyTensor(scaled) * LazyTensor(keys)).sum(-1)

    if operation.name == "lse":
        return Contestant(KEOPS, lambda: (scores().logsumexp(dim=2)[None, ..., 0],))
    assert inputs.right is not None
    x = inputs.right[0].expand(query.shape[1], 1, -1, -1).contiguous()

    def product() -> Outputs:
        return (scores().sumsoftmaxweight(LazyTensor(x), dim=2).mean(0)[None],)

    return Contestant(KEOPS, product)
