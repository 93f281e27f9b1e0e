"""Bad input ends here, in words meant for the person who made it, before any kernel runs.

Checks that look only at shapes and dtypes always run. Checks that look at values (a mask that
hides every key, pairs out of range, weights that do not sum to one) run when a map is made
eagerly; under ``torch.compile`` they cannot, and the kernels are safe without them: they clamp
nothing, write nothing out of bounds, and give zeros for a row that has no key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashmaps import arguments
from flashmaps.maps.grids import Grid, square_grid
from flashmaps.maps.problem import Problem, compute_dtype

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NORMALIZE = (None, "block", "columns", "rows")

_check_values: ContextVar[bool] = ContextVar("flashmaps_checks", default=False)


class checks:
    """Look for NaN and inf in Q and K whenever a map is made: ``fm.checks(True)``.

    A switch when called, and a context manager that puts the old setting back. Off by default:
    it reads all of Q and K, and on a GPU it waits for them. Each thread and each asyncio task has
    its own setting, as with `flashmaps.memory_budget`; a new thread begins with it off.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._before = _check_values.get()
        _check_values.set(arguments.switch("enabled", enabled))

    def __enter__(self) -> checks:
        return self

    def __exit__(self, *exc: object) -> None:
        _check_values.set(self._before)


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in tensor.shape) + "]"


def _check_tokens(name: str, tensor: object, layout: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {tensor.layout}; wanted a dense tensor, {name}.to_dense()"
        )
    if tensor.dim() != 4:
        hint = (
            f"; add the missing dimensions with {name}[None] or {name}.unflatten(-1, (heads, d))"
            if tensor.dim() < 4
            else ""
        )
        raise ValueError(
            f"{name} must have 4 dimensions {layout}, got {tensor.dim()}: {_shape(tensor)}{hint}"
        )
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; wanted float64, float32, float16 or bfloat16, "
            f"convert it with {name}.float()"
        )
    for axis, what in enumerate(("batch", "heads", "tokens", "head dimension")):
        if tensor.shape[axis] == 0:
            raise ValueError(f"{name} is empty: {_shape(tensor)} has no {what} (axis {axis})")
    return tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """ValueError that names the first NaN or inf of ``tensor``."""
    # Extremes show NaN and inf, without a temporary of the tensor's size.
    if not math.isfinite(tensor.amin()) or not math.isfinite(tensor.amax()):
        bad = ~torch.isfinite(tensor)
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name} has {int(bad.sum())} values that are NaN or inf, the first at "
            f"{list(where)} ({float(tensor[where])}); half precision overflows above 65504: "
            f"compute {name} in float32 or bfloat16 (upcast_attention in diffusers)"
        )


def check_grid(name: str, grid: object, tokens: int) -> Grid:
    """``grid`` as (height, width), or an error that says what would fit."""
    found = arguments.sides(grid)
    if found is None:
        raise TypeError(f"{name} must be (height, width) in whole numbers, got {grid!r}")
    height, width = found
    if height < 1 or width < 1:
        raise ValueError(
            f"{name} = ({height}, {width}) has a side below 1: both must be at least 1, and "
            f"height * width must be {tokens}"
        )
    if height * width != tokens:
        raise ValueError(
            f"{name} = ({height}, {width}) holds {height * width} tokens, but there are {tokens}: "
            f"height * width must be {tokens}"
        )
    return height, width


def need_grid(name: str, grid: Grid | None, tokens: int, what: str) -> Grid:
    """``grid``, or the error for a count of tokens that is no square."""
    if grid is None:
        raise ValueError(
            f"{what} needs {name}: {tokens} tokens are not a square grid, so pass "
            f"{name}=(height, width) with height * width = {tokens}"
        )
    return grid


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _pairs(pairs: object, query: Tensor, key: Tensor) -> Tensor | None:
    batch, key_batch = query.shape[0], key.shape[0]
    if pairs is None:
        if batch == key_batch:
            return None
        if batch == 1 or key_batch == 1:  # one image against many, as broadcasting would
            many = torch.arange(max(batch, key_batch), device=query.device)
            one = torch.zeros_like(many)
            return torch.stack((one, many) if batch == 1 else (many, one), dim=1)
        raise ValueError(
            f"query has batch {batch} and key has batch {key_batch}: make them equal, or say "
            f"which go together with pairs=[[query index, key index], ...]"
        )
    given = pairs
    mixed = False
    try:
        made = torch.as_tensor(pairs, device=query.device)
        # Of [[True, 1]] torch would make [[1, 1]], and the same of tensors of 1.9.
        if not isinstance(pairs, (Tensor, np.ndarray)):
            mixed = any(
                arguments.as_whole(each) is None
                for pair in pairs  # type: ignore[attr-defined]
                if isinstance(pair, Sequence)
                for each in pair
            )
    except (TypeError, ValueError, OverflowError, RuntimeError):
        mixed = True
    if mixed:
        raise TypeError(f"pairs must be [P, 2] integers (query index, key index), got {given!r}")
    pairs = made
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be [P, 2] (query index, key index), got {_shape(pairs)}")
    if pairs.shape[0] == 0:
        raise ValueError("pairs is empty: give at least one (query index, key index)")
    if pairs.dtype.is_floating_point or pairs.dtype.is_complex or pairs.dtype == torch.bool:
        raise TypeError(f"pairs must hold integers, got {pairs.dtype}")
    if pairs.dtype == torch.uint64:
        raise TypeError("pairs must hold signed integers, got torch.uint64: use pairs.long()")
    # A copy: what has been checked must not change afterwards.
    pairs = pairs.to(torch.int64, copy=True).contiguous()
    if not _compiling():
        for column, (name, size) in enumerate((("query", batch), ("key", key_batch))):
            low, high = int(pairs[:, column].min()), int(pairs[:, column].max())
            if low < 0 or high >= size:
                raise IndexError(
                    f"pairs[:, {column}] picks {name} {low if low < 0 else high}, but the {name} "
                    f"batch is {size}: indices go from 0 to {size - 1}"
                )
    return pairs


class _Mask(NamedTuple):
    """A mask over keys, as the kernels take it.

    A row of scores may be shifted by any constant, so the largest bias of each batch is made 0:
    that of a key that counts is then small, and so are its roundings, whatever the mask's
    magnitude; and no bias overflows where it is multiplied by log2 e. A log-sum-exp is shifted with
    it.
    """

    bias: Tensor  # [B', M], compute dtype, the largest of each batch 0
    offset: Tensor | None  # [B'], what was subtracted; None for nothing


def _query_mask(mask: Tensor, key: Tensor, queries: int) -> _Mask:
    """A boolean mask that differs between queries: [B', N, M]. Held as it is, as one byte each."""
    batch, keys = key.shape[0], key.shape[2]
    if mask.shape not in ((batch, queries, keys), (1, queries, keys)):
        raise ValueError(
            f"key_mask has shape {_shape(mask)}; wanted [B', M] = [{batch}, {keys}], or, where it "
            f"differs between queries, [B', N, M] = [{batch}, {queries}, {keys}]"
        )
    if mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask of [B', N, M] must be bool (True = may be attended), got {mask.dtype}; a "
            "bias that is added to the scores is the same for all queries: [B', M]"
        )
    if mask.device != key.device:
        raise ValueError(f"key_mask is on {mask.device} but key is on {key.device}")
    return _Mask(mask.expand(batch, -1, -1).clone(), None)


def _mask(key_mask: Tensor | None, key: Tensor, dtype: torch.dtype, queries: int) -> _Mask | None:
    """A boolean mask (True attends) or an additive bias. A copy: later changes have no effect."""
    if key_mask is None:
        return None
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a torch.Tensor, got {type(key_mask).__name__}")
    batch, keys = key.shape[0], key.shape[2]
    if key_mask.dim() == 3:
        return _query_mask(key_mask, key, queries)
    if key_mask.shape not in ((keys,), (batch, keys), (1, keys)):
        raise ValueError(
            f"key_mask has shape {_shape(key_mask)}; wanted [B', M] = [{batch}, {keys}] or "
            f"[M] = [{keys}], one entry a key"
        )
    if key_mask.device != key.device:
        raise ValueError(f"key_mask is on {key_mask.device} but key is on {key.device}")
    offset = None
    if key_mask.dtype == torch.bool:
        bias = torch.zeros(key_mask.shape, dtype=dtype, device=key.device)
        bias = bias.masked_fill(~key_mask, -math.inf)
    elif key_mask.dtype in FLOATS:
        bias = key_mask.to(dtype)
    else:
        raise TypeError(
            f"key_mask has dtype {key_mask.dtype}; wanted bool (True = may be attended) or a "
            f"float that is added to the scores: use key_mask.bool()"
        )
    bias = bias.expand(batch, keys)
    if not _compiling():
        hidden = (bias == -math.inf).all(dim=1)
        if bool(hidden.any()):
            row = int(hidden.nonzero()[0])
            raise ValueError(
                f"key_mask hides every key of batch {row}: a softmax over nothing is undefined; "
                f"True means 'may be attended' (pass ~mask if yours marks padding)"
            )
        if bool(torch.isnan(bias).any()) or bool((bias == math.inf).any()):
            raise ValueError("key_mask has NaN or +inf; a bias is finite, or -inf to hide a key")
    if key_mask.dtype != torch.bool:
        offset = bias.detach().amax(dim=1)
        offset = torch.where(torch.isfinite(offset), offset, torch.zeros_like(offset))
        # Half of the lowest number: times log2 e, and with a score added, it is still finite.
        shifted = (bias - offset[:, None]).clamp_min(torch.finfo(dtype).min / 2)
        bias = torch.where(bias == -math.inf, bias, shifted)
    return _Mask(bias.contiguous(), offset)


def _lse_offset(mask: _Mask | None, pairs: Tensor | None) -> Tensor | None:
    """By how much the log-sum-exps of each map are shifted: [P, 1, 1], or None for nothing."""
    if mask is None or mask.offset is None:
        return None
    offset = mask.offset if pairs is None else mask.offset[pairs[:, 1]]
    return offset[:, None, None]


def _head_weights(
    head_weights: object, heads: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """A copy: later changes have no effect."""
    if head_weights is None:
        return None
    mixed = False
    try:
        # Of [True, 0.5] torch would make [1.0, 0.5].
        if isinstance(head_weights, Sequence):
            mixed = any(arguments.is_boolean(each) for each in head_weights)
        weights = torch.as_tensor(head_weights, device=device)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        mixed = True
    if mixed:
        raise TypeError(f"head_weights must be [H] = [{heads}] numbers, got {head_weights!r}")
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"head_weights must be [H] = [{heads}] numbers, got {weights.dtype}")
    weights = weights.to(dtype, copy=True)
    if weights.shape != (heads,):
        raise ValueError(f"head_weights has shape {_shape(weights)}; wanted [H] = [{heads}]")
    if not _compiling():
        total = float(weights.detach().sum())
        if not bool((weights >= 0).all()):
            raise ValueError(f"head_weights must be >= 0, got {weights.tolist()}")
        if not math.isclose(total, 1.0, rel_tol=1e-4):
            raise ValueError(
                f"head_weights sum to {total:.6g}; they must sum to 1: divide them by their sum"
            )
    return weights.contiguous()


def _key_lines(normalize: str | None, grid: Grid | None, keys: int) -> Grid:
    if normalize not in NORMALIZE:
        raise ValueError(
            f"normalize = {normalize!r} is unknown; choose None or 'block' (the whole map sums to "
            f"1), 'columns' (each column does) or 'rows' (each row does)"
        )
    if normalize in ("rows", "columns"):
        grid = need_grid("key_grid", grid, keys, f"normalize={normalize!r}")
    return grid or (0, 0)


def largest_scale(dtype: torch.dtype) -> float:
    """Beyond it, scores of products up to 2^64 overflow the compute dtype."""
    return torch.finfo(dtype).max / 2.0**64


class Made(NamedTuple):
    """A problem, and what its map knows beside it."""

    problem: Problem
    query_grid: Grid | None  # None where no grid is known
    key_grid: Grid | None
    lse_offset: Tensor | None  # [P, 1, 1]: a log-sum-exp of the caller is larger by this


def make_problem(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    head_weights: Tensor | Sequence[float] | None = None,
    pairs: Tensor | Sequence[Sequence[int]] | None = None,
    normalize: str | None = None,
    query_grid: Grid | None = None,
    key_grid: Grid | None = None,
    lse: Tensor | None = None,
) -> Made:
    """The validated `Problem`, and what a map knows beside it."""
    query = _check_tokens("query", query, "[B, H, N, d]")
    key = _check_tokens("key", key, "[B', H, M, d]")
    if query.device != key.device:
        raise ValueError(f"query is on {query.device} but key is on {key.device}: move one of them")
    if query.dtype != key.dtype:
        raise TypeError(f"query is {query.dtype} but key is {key.dtype}: convert one of them")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query has H = {query.shape[1]} heads but key has {key.shape[1]}: wanted as many, or "
            f"fewer that divide H (grouped queries); the layout is [B, H, tokens, d]; "
            f"transpose(1, 2) if yours is [B, tokens, H, d]"
        )
    if key.shape[1] == 1:
        key = key.expand(-1, query.shape[1], -1, -1)  # one for all: a stride of 0, no copy
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query has head dimension d = {query.shape[3]} but key has {key.shape[3]}: both must "
            f"come from layers of one width"
        )
    queries, keys = query.shape[2], key.shape[2]
    query_grid = (
        square_grid(queries)
        if query_grid is None
        else check_grid("query_grid", query_grid, queries)
    )
    key_grid = square_grid(keys) if key_grid is None else check_grid("key_grid", key_grid, keys)
    grid_height, grid_width = _key_lines(normalize, key_grid, keys)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[3])
    else:
        scale = arguments.number("scale", scale)
    dtype = compute_dtype(query.dtype)
    if abs(scale) > largest_scale(dtype):
        raise ValueError(
            f"scale = {scale:g} is too large for {dtype}: scores would overflow; wanted at most "
            f"{largest_scale(dtype):.3g}, at which a row is one key already"
        )
    mask, indices = _mask(key_mask, key, dtype, queries), _pairs(pairs, query, key)
    if mask is not None and mask.bias.dim() == 3:
        grows = any(isinstance(x, Tensor) and x.requires_grad for x in (query, key, head_weights))
        if grows and torch.is_grad_enabled():
            raise ValueError(
                "key_mask differs between queries, for which there are no gradients; use "
                "torch.no_grad(), query.detach() and key.detach(), or a mask over keys, [B', M]"
            )
    problem = Problem(
        query=query,
        key=key,
        bias=None if mask is None else mask.bias,
        head_weights=_head_weights(head_weights, query.shape[1], dtype, query.device),
        pairs=indices,
        lse=None,
        scale=float(scale),
        normalize=normalize or "block",
        grid_height=grid_height,
        grid_width=grid_width,
    )
    offset = _lse_offset(mask, indices)
    if lse is not None:
        wanted = (problem.batch, problem.heads, queries)
        if not isinstance(lse, Tensor) or lse.shape != wanted or lse.device != query.device:
            got = (
                f"{_shape(lse)} on {lse.device}" if isinstance(lse, Tensor) else type(lse).__name__
            )
            raise ValueError(
                f"lse must be [batch, H, N] = {list(wanted)} on {query.device} (natural log, as "
                f"attention kernels return it), got {got}"
            )
        problem = problem._replace(lse=_given_lse(lse, offset, dtype))
    if not _compiling() and _check_values.get():
        check_finite("query", query)
        check_finite("key", key)
    return Made(problem, query_grid, key_grid, offset)


# A log-sum-exp that is off by this makes all probabilities of its row off by a share of this.
_LSE_OFF = 1 / 16


def _given_lse(lse: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In the compute dtype, of scores whose largest bias is 0."""
    if lse.dtype not in FLOATS:
        raise TypeError(f"lse has dtype {lse.dtype}; wanted a float, the log-sum-exp of each row")
    # On a GPU that would wait for it: there, only if asked for.
    looks = not _compiling() and (lse.device.type == "cpu" or _check_values.get())
    if looks and not torch.isfinite(torch.stack(lse.detach().aminmax())).all():
        raise ValueError(
            "lse has NaN or inf: rows that see no key, or scores that overflowed; leave lse out, "
            "and it is computed"
        )
    if offset is not None and not _compiling():
        largest = float(offset.abs().max())
        off = largest * torch.finfo(lse.dtype).eps / 2
        if off > _LSE_OFF:
            raise ValueError(
                f"lse has no digits left beside a key_mask of {largest:.3g}: in {lse.dtype} it is "
                f"rounded by up to {off:.3g}; give a key_mask whose largest bias is near 0"
            )
    found = lse.to(dtype)
    return (found if offset is None else found - offset).contiguous()


def check_operand(name: str, operand: object, batch: int, tokens: int, like: Tensor) -> Tensor:
    """``operand`` as [batch, tokens, C] in the compute dtype of ``like``."""
    if not isinstance(operand, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(operand).__name__}")
    if operand.dim() == 2:
        operand = operand.expand(batch, *operand.shape)
    if operand.dim() != 3 or operand.shape[0] != batch or operand.shape[1] != tokens:
        raise ValueError(
            f"{name} has shape {_shape(operand)}; wanted [batch, tokens, C] = "
            f"[{batch}, {tokens}, C] (or [{tokens}, C] for all maps alike)"
        )
    if operand.shape[2] == 0:
        raise ValueError(f"{name} has no columns: {_shape(operand)}")
    if operand.device != like.device:
        raise ValueError(f"{name} is on {operand.device} but the map is on {like.device}")
    if operand.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {operand.dtype}; wanted a float, use {name}.float()")
    return operand.to(compute_dtype(like.dtype))


def check_count(name: str, count: int) -> int:
    """A whole number from 1 on; ValueError names the argument."""
    return arguments.whole(name, count, 1)


def check_k(k: int, keys: int) -> int:
    """A whole number from 1 to the number of keys."""
    k = check_count("k", k)
    if k > keys:
        raise ValueError(f"k = {k} is more than the {keys} keys of the map: k must be <= {keys}")
    return k
