"""Bad input ends here, in words meant for the person who made it, before any kernel runs.

Checks that look only at shapes and dtypes always run. Checks that look at values (a mask that
hides every key, pairs out of range, weights that do not sum to one) run when a map is made
eagerly; under ``torch.compile`` they cannot, and the kernels are safe without them: they clamp
nothing, write nothing out of bounds, and give zeros for a row that has no key.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from flashmaps.maps.grids import Grid, square_grid
from flashmaps.maps.problem import Problem, compute_dtype

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NORMALIZE = (None, "block", "columns", "rows")

_check_values = False


class checks:
    """Look for NaN and inf in Q and K whenever a map is made: ``fm.checks(True)``.

    A switch when called, and a context manager that puts the old setting back. Off by default:
    it reads all of Q and K, and on a GPU it waits for them.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _check_values
        self._before = _check_values
        _check_values = bool(enabled)

    def __enter__(self) -> checks:
        return self

    def __exit__(self, *exc: object) -> None:
        global _check_values
        _check_values = self._before


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
    try:
        height, width = (operator.index(n) for n in grid)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be (height, width), got {grid!r}") from None
    if height < 1 or width < 1 or height * width != tokens:
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
    try:
        pairs = torch.as_tensor(pairs, device=query.device)
    except (TypeError, ValueError):
        raise TypeError(
            f"pairs must be [P, 2] integers (query index, key index), got {pairs!r}"
        ) from None
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be [P, 2] (query index, key index), got {_shape(pairs)}")
    if pairs.shape[0] == 0:
        raise ValueError("pairs is empty: give at least one (query index, key index)")
    if pairs.dtype.is_floating_point or pairs.dtype.is_complex or pairs.dtype == torch.bool:
        raise TypeError(f"pairs must hold integers, got {pairs.dtype}")
    pairs = pairs.to(torch.int64).contiguous()
    if not _compiling():
        for column, (name, size) in enumerate((("query", batch), ("key", key_batch))):
            low, high = int(pairs[:, column].min()), int(pairs[:, column].max())
            if low < 0 or high >= size:
                raise IndexError(
                    f"pairs[:, {column}] picks {name} {low if low < 0 else high}, but the {name} "
                    f"batch is {size}: indices go from 0 to {size - 1}"
                )
    return pairs


def _bias(key_mask: Tensor | None, key: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (True attends) or an additive bias, as a [B', M] bias."""
    if key_mask is None:
        return None
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a torch.Tensor, got {type(key_mask).__name__}")
    batch, keys = key.shape[0], key.shape[2]
    if key_mask.shape not in ((keys,), (batch, keys), (1, keys)):
        raise ValueError(
            f"key_mask has shape {_shape(key_mask)}; wanted [B', M] = [{batch}, {keys}] or "
            f"[M] = [{keys}], one entry a key"
        )
    if key_mask.device != key.device:
        raise ValueError(f"key_mask is on {key_mask.device} but key is on {key.device}")
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
    bias = bias.expand(batch, keys).contiguous()
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
    return bias


def _head_weights(
    head_weights: object, heads: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if head_weights is None:
        return None
    try:
        weights = torch.as_tensor(head_weights, dtype=dtype, device=device)
    except (TypeError, ValueError):
        raise TypeError(
            f"head_weights must be [H] = [{heads}] numbers, got {head_weights!r}"
        ) from None
    if weights.shape != (heads,):
        raise ValueError(f"head_weights has shape {_shape(weights)}; wanted [H] = [{heads}]")
    if not _compiling():
        total = float(weights.sum())
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
) -> tuple[Problem, Grid | None, Grid | None]:
    """The validated `Problem`, and the query's and key's grids (None where no grid is known)."""
    query = _check_tokens("query", query, "[B, H, N, d]")
    key = _check_tokens("key", key, "[B', H, M, d]")
    if query.device != key.device:
        raise ValueError(f"query is on {query.device} but key is on {key.device}: move one of them")
    if query.dtype != key.dtype:
        raise TypeError(f"query is {query.dtype} but key is {key.dtype}: convert one of them")
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query has H = {query.shape[1]} heads but key has {key.shape[1]}: the layout is "
            f"[B, H, tokens, d]; transpose(1, 2) if yours is [B, tokens, H, d]"
        )
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
    elif not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    dtype = compute_dtype(query.dtype)
    problem = Problem(
        query=query,
        key=key,
        bias=_bias(key_mask, key, dtype),
        head_weights=_head_weights(head_weights, query.shape[1], dtype, query.device),
        pairs=_pairs(pairs, query, key),
        lse=None,
        scale=float(scale),
        normalize=normalize or "block",
        grid_height=grid_height,
        grid_width=grid_width,
    )
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
        problem = problem._replace(lse=lse.to(dtype).contiguous())
    if _check_values and not _compiling():
        check_finite("query", query)
        check_finite("key", key)
    return problem, query_grid, key_grid


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
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {count!r}")
    return int(count)


def check_k(k: int, keys: int) -> int:
    """A whole number from 1 to the number of keys."""
    k = check_count("k", k)
    if k > keys:
        raise ValueError(f"k = {k} is more than the {keys} keys of the map: k must be <= {keys}")
    return k
