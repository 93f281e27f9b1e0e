"""What becomes of an attention layer that was observed: copied, reduced, accumulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.arguments import sides, switch
from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.graph import refusing
from flashmaps.diffusion.record import Record
from flashmaps.diffusion.streaming import Stream, bytes_of
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import Grid
from flashmaps.maps.lazy import REDUCTIONS

KEEP = ("qk", "statistics", "mean")
# Beyond AttentionMap.reduce's own names.
MORE_STATISTICS = ("density", "pool", "image_to_text", "image_to_prompt")

Statistic = Callable[[AttentionMap], Tensor]
# An entry's statistics are attributes of it, beside these.
_TAKEN = {each.name for each in dataclasses.fields(Entry)} | set(dir(Entry))


class Recorder:
    """Takes entries that still hold the layer's own Q and K, and puts into ``record`` what is kept.

    Args:
        keep: "qk": Q and K of every pass (and its statistics); "statistics": the statistics of
            every pass; "mean": for each layer their mean over passes, in constant memory. None:
            "mean" where ``reduce`` is given, else "qk".
        reduce: what to compute at once: names of `AttentionMap.reduce`, computed in one pass;
            "density": how many queries have key j as their argmax, [B, M]; "pool": the map pooled
            to ``pool_to``; "image_to_text": every image query's attention to every text key,
            [B, N, M]; "image_to_prompt": likewise to every key of an image prompt; functions of
            the lazy map that return a tensor, batch first, named after themselves, or a mapping
            from names to functions.
        pool_to: (height, width) for "pool", of queries and image keys.
        block: the part of the map that is reduced, as in `Entry.map`.
        dtype, device: of Q and K that are kept; device also of statistics.
        per_head: statistics of each head by itself, [B, H, ...], and "max_logit" among them: of
            the names of `AttentionMap.reduce` and "density" alone.
        grad: keep Q and K with their graph, so that maps made of them have gradients. They are then
            the layer's own, not copies.
        to: a folder to write entries to while the model runs (`flashmaps.diffusion.streaming`).
        record: where to put what is kept, for several recorders that share one; None: a new one.
    """

    def __init__(
        self,
        *,
        keep: str | None = None,
        reduce: str | Statistic | Iterable[str | Statistic] | Mapping[str, Any] = (),
        pool_to: Grid = (16, 16),
        block: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        per_head: bool = False,
        grad: bool = False,
        to: str | Path | None = None,
        record: Record | None = None,
    ) -> None:
        self.per_head = switch("per_head", per_head)
        self.names, self.functions = _statistics(reduce, per_head)
        if keep is None:
            keep = "mean" if self.names or self.functions else "qk"
        if keep not in KEEP:
            raise ValueError(
                f"keep={keep!r} is not known; choose from {', '.join(map(repr, KEEP))}"
            )
        if keep != "qk" and not (self.names or self.functions):
            raise ValueError(
                f"keep={keep!r} keeps statistics, but reduce names none: for example "
                "reduce=('entropy', 'argmax')"
            )
        self.grad = switch("grad", grad)
        if grad and (keep != "qk" or self.names or self.functions or to is not None):
            raise ValueError(
                "grad=True keeps Q and K with their graph: give it with keep='qk', without reduce= "
                "and to=, and compute statistics from entry.map()"
            )
        if to is not None and keep == "mean":
            raise ValueError(
                "to= writes what each pass keeps; means take constant memory, and are saved after "
                "the run with record.save(path). Give keep='qk' or keep='statistics' with it"
            )
        self.keep = keep
        self._stream = None if to is None else Stream(to)
        cells = sides(pool_to)
        if cells is None or min(cells) < 1:
            raise ValueError(f"pool_to={pool_to!r}; wanted (height, width), both at least 1")
        self.pool_to = cells
        self.block = block
        self.dtype = dtype
        self.device = device
        self.record = Record() if record is None else record
        self.source: Tensor | None = None  # what copies hang on, see graph.py
        self._means: dict[Any, int] = {}  # where in the record the mean of a layer stands
        self._rotary: tuple[Any, Any] = (None, None)  # the last one, and its copy

    def take(self, entry: Entry) -> None:
        """Record one layer of one pass; the entry's own tensors are not held on to."""
        entry = self._reduced(entry)
        if self.keep == "qk":
            self._append(self._refusing(self._copied(entry)))
            return
        if not entry.statistics:  # "image_to_text" of a layer without text
            return
        entry = dataclasses.replace(
            entry, query=None, key=None, lse=None, rotary=None, _mask=None, _mask_alike=None
        )
        if self.keep == "statistics":
            self._append(self._refusing(entry))
        else:  # an average over steps has none
            self._accumulate(dataclasses.replace(entry, step=None, _timestep=None))

    def _reduced(self, entry: Entry) -> Entry:
        """The entry with its statistics."""
        if not (self.names or self.functions):
            return entry
        try:
            statistics = self._reduce(entry)
            return dataclasses.replace(entry, statistics=statistics, per_head=self.per_head)
        except Exception as error:
            error.add_note(
                f"Raised by reduce= on layer {entry.layer!r} (kind {entry.kind}, grid "
                f"{entry.grid}); kind=, layers= and resolution= choose which are reduced."
            )
            raise

    def _refusing(self, entry: Entry) -> Entry:
        """With gradients that raise, unless there is a graph."""
        if self.source is None or self.grad:
            return entry
        return dataclasses.replace(
            entry,
            query=refusing(entry.query, self.source),
            key=refusing(entry.key, self.source),
            statistics={n: refusing(x, self.source) for n, x in entry.statistics.items()},
        )

    def _append(self, entry: Entry) -> None:
        self.record._entries.append(entry)
        if self._stream is not None:
            self._stream.added(self.record._entries)

    def _reduce(self, entry: Entry) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        # Autocast would round the map's own products to half precision.
        with torch.no_grad(), torch.autocast(entry.query.device.type, enabled=False):
            fused = [name for name in self.names if name not in MORE_STATISTICS]
            gridded = {"expectation", "pool"} & set(self.names)
            if gridded and entry.kind == "joint" and self.block is None:
                raise ValueError(
                    f"layer {entry.layer!r} attends to image and text in one sequence, which has "
                    f"no grid for {' and '.join(sorted(gridded))}; give block='image->image'"
                )
            wanted = list(dict.fromkeys([*fused, *(["argmax"] if "density" in self.names else [])]))
            if wanted or self.functions or "pool" in self.names:
                attention_map = entry.map(self.block)
            if "pool" in self.names:
                image_keys = attention_map.key_grid is not None and entry.kind != "cross"
                found, pooled = attention_map.reduce_and_pool(
                    wanted,
                    _no_finer(self.pool_to, attention_map.query_grid),
                    _no_finer(self.pool_to, attention_map.key_grid) if image_keys else None,
                )
                found["pool"] = pooled
            elif wanted:
                found = attention_map.reduce(*wanted, per_head=self.per_head)._asdict()
            if "density" in self.names:
                found["density"] = _density(found["argmax"], attention_map.shape[2])
            if "image_to_text" in self.names and _sees_text(entry):
                found["image_to_text"] = entry.map("image->text").to_dense()
            if "image_to_prompt" in self.names and "image_prompt" in entry.keys:
                found["image_to_prompt"] = entry.map("image->image_prompt").to_dense()
            for name, function in self.functions.items():
                found[name] = _checked(name, function(attention_map), attention_map.shape[0])
        if "density" in self.names and "argmax" not in self.names:
            del found["argmax"]
        return {
            name: tensor.detach().to(self.device if self.device is not None else tensor.device)
            for name, tensor in found.items()
        }

    def _copied(self, entry: Entry) -> Entry:
        rotary = entry.rotary
        if rotary is not None:
            # All layers of a pass share one embedding; so do their entries.
            if not _same_tensor(self._rotary[0], rotary[0]):
                self._rotary = rotary[0], tuple(_to(each, self.device) for each in rotary)
            rotary = self._rotary[1]
        return dataclasses.replace(
            entry,
            query=self._copy(entry.query),
            key=self._copy(entry.key),
            lse=_to(entry.lse, self.device),
            rotary=rotary,
            _mask=_to(entry._mask, self.device),
        )

    def _copy(self, tensor: Tensor) -> Tensor:
        if self.grad:
            return tensor.to(device=self.device, dtype=self.dtype)
        # Always a copy: a view of a fused projection would keep V alive too, and a processor that
        # works in place would change what was recorded.
        return tensor.detach().to(device=self.device, dtype=self.dtype, copy=True)

    def _accumulate(self, entry: Entry) -> None:
        key = _mean_of(entry)
        entries = self.record._entries
        at = self._means.get(key)
        # The record may have been cleared, and others may have filled it anew.
        if at is None or at >= len(entries) or _mean_of(entries[at]) != key:
            self._means[key] = len(entries)
            entries.append(self._refusing(entry))
            return
        so_far = entries[at]
        count = so_far.count + 1
        means = {
            name: x
            if not x.is_floating_point()
            else so_far.statistics[name].detach().lerp(x, 1 / count)
            for name, x in entry.statistics.items()
        }
        mean = dataclasses.replace(entry, statistics=means, count=count)
        entries[at] = self._refusing(mean)

    def end(self) -> None:
        """Let go of what was only needed while layers ran; write what waits to be."""
        self.source = None
        self._rotary = (None, None)
        if self._stream is not None:
            self._stream.flush(self.record._entries)


def _sees_text(entry: Entry) -> bool:
    return "image" in entry.queries and "text" in entry.keys


class Tally:
    """In a recorder's place, counts the bytes that it would keep: for `capture.estimate`."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.record: list[None] = []  # as long as the record would be
        self.means: dict[Any, int] = {}  # bytes of each mean
        self.each: list[tuple[int | None, int]] = []  # step and bytes of each entry

    def take(self, entry: Entry) -> None:
        """Count one layer of one pass."""
        one = self._recorder
        self.record.append(None)
        statistics = one._reduced(entry)
        if one.keep == "qk":
            kept = sum(
                each.numel() * (one.dtype or each.dtype).itemsize
                for each in (entry.query, entry.key)
            )
            kept += bytes_of(dataclasses.replace(statistics, query=None, key=None))
            self.each.append((entry.step, kept))
        elif statistics.statistics:
            bare = dataclasses.replace(statistics, query=None, key=None, lse=None, _mask=None)
            if one.keep == "mean":
                self.means[_mean_of(bare)] = bytes_of(bare)
            else:
                self.each.append((entry.step, bytes_of(bare)))

    def end(self) -> None:
        """Nothing is held."""


def _mean_of(entry: Entry) -> tuple[Any, ...]:
    """What entries have in common whose statistics are averaged."""
    shapes = tuple((name, x.shape) for name, x in entry.statistics.items())
    # Of one layer several calls may be image prompts; which adapter is called when may change.
    call = entry.call if entry.adapter is None else (entry.adapter, entry.adapter_image)
    guidance = entry.guidance, entry.batch
    return (entry.layer, entry.kind, call, *guidance, entry.grid, entry.frames, shapes)


def _checked(name: str, statistic: Any, batch: int) -> Tensor:
    if isinstance(statistic, Tensor) and statistic.ndim and len(statistic) == batch:
        return statistic
    got = tuple(statistic.shape) if isinstance(statistic, Tensor) else type(statistic).__name__
    raise TypeError(
        f"the function {name!r} in reduce= must return a tensor, batch first: [{batch}, ...]; "
        f"got {got}"
    )


def _to(tensor: Tensor | None, device: torch.device | str | None) -> Any:
    return None if tensor is None else tensor.detach().to(device or tensor.device)


def _density(argmax: Tensor, keys: int) -> Tensor:  # [..., N] -> [..., M]
    """MD(j) = the number of queries i with argmax_i = j, as a float so that it averages."""
    count = torch.zeros((*argmax.shape[:-1], keys), dtype=torch.float32, device=argmax.device)
    return count.scatter_add_(-1, argmax, torch.ones_like(argmax, dtype=torch.float32))


def _no_finer(wanted: Grid, grid: Grid | None) -> Grid:
    """What is asked for, or the layer's own grid where that is coarser."""
    return wanted if grid is None else (min(wanted[0], grid[0]), min(wanted[1], grid[1]))


def _statistics(
    reduce: Any, per_head: bool = False
) -> tuple[tuple[str, ...], dict[str, Statistic]]:
    """``reduce=`` as names that are known here, and functions by name."""
    if isinstance(reduce, str) or callable(reduce):
        reduce = (reduce,)
    named = reduce.items() if isinstance(reduce, Mapping) else ((None, each) for each in reduce)
    names: list[str] = []
    functions: dict[str, Statistic] = {}
    known: tuple[str, ...] = (*REDUCTIONS, *MORE_STATISTICS)
    if per_head:
        known = (*REDUCTIONS, "max_logit", "density")
    for name, each in named:
        if per_head and (callable(each) or (each in MORE_STATISTICS and each not in known)):
            what = getattr(each, "__name__", each)
            raise ValueError(
                f"reduce={what!r} is of the mean over heads; with per_head=True choose from "
                f"{', '.join(known)}"
            )
        if callable(each):
            name = str(name or getattr(each, "__name__", type(each).__name__))
            if name in functions or name in known or name in _TAKEN:
                raise ValueError(
                    f"reduce= has a function named {name!r}, a name that is taken; give functions "
                    "names of their own: reduce={'name': function}"
                )
            functions[name] = each
        elif name is None and each in known:
            names.append(each)
        else:
            own = each == "max_logit" and not per_head
            raise ValueError(
                f"reduce={each!r} is unknown; choose from {', '.join(known)}, or give a function "
                "of the lazy map" + (" (it is of single heads: per_head=True)" if own else "")
            )
    return tuple(dict.fromkeys(names)), functions


def _same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are the same numbers in memory; views of one tensor are different objects."""
    if one is None or other is None:
        return one is other
    return (one.data_ptr(), one.shape, one.stride()) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
    )
