"""What a capture leaves: entries of attention layers, from which lazy maps are made later."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.diffusion.layouts import unrotate
from flashmaps.files import whole_file
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import Grid

POSITIONS = ("kept", "removed")
_FORMAT = "flashmaps record 1"
# Parts that lie on the entry's grid; the last two are what CrossSelfAttnProcessor attends to.
_PICTURES = {"image", "other", "source"}
_IMAGES = ("image", "other", "source")  # parts of a sequence that lie on the entry's grid


@dataclass(frozen=True, eq=False)
class Entry:
    """One attention layer in one forward pass: Q and K, or statistics of its map, or both.

    Attributes:
        layer: full name, such as ``up_blocks.1.attentions.0.transformer_blocks.0.attn1``.
        step: index of the denoising step, counted from 0 since the capture began. Where guidance
            takes two forward passes (Flux, Wan), both belong to one step.
        kind: ``"self"``, ``"cross"`` (keys are text), ``"joint"`` (image and text in one sequence)
            or ``"image_prompt"`` (keys are an image prompt: IP-Adapter, image-to-video).
        query: ``[B, H, N, d]``; key: ``[B, H, M, d]``, as the attention saw them; None where only
            statistics were kept.
        scale: what the scores are multiplied by before the softmax.
        grid, frames: frames * height * width image tokens; grid is None when unknown.
        queries, keys: token ranges by name: ``"image"``, ``"text"``, ``"reference"`` (further
            images in the sequence), ``"image_prompt"``; keys also ``"other"`` and ``"source"``
            (of another image of the batch, see :class:`flashmaps.CrossSelfAttnProcessor`).
        guidance: ``"both"`` where the batch is [unconditional, conditional]; ``"conditional"`` or
            ``"unconditional"`` where each has a pass of its own; ``"other"``: neither, as SD3's
            skip-layer pass is, or more than the two, as the three parts of perturbed attention
            guidance (PAG) and of InstructPix2Pix are; None: no guidance, or none that is known of.
        statistics: by name, batch first; each is an attribute too: ``entry.entropy``.
        count: forward passes that the statistics are the mean of. Indices (argmax) do not average:
            they are those of the last pass.
        lse: ``[B, H, N]`` log-sum-exp where attention returned it.
        rotary: (cos, sin), ``[N, d]`` each, that query and key were rotated by, if they were.
    """

    layer: str
    step: int
    kind: str
    query: Any  # Tensor [B, H, N, d], or None
    key: Any  # Tensor [B, H, M, d], or None
    scale: float
    grid: Grid | None = None
    frames: int = 1
    queries: Mapping[str, slice] = field(default_factory=dict)
    keys: Mapping[str, slice] = field(default_factory=dict)
    guidance: str | None = None
    causal: bool = False
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    count: int = 1
    lse: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    rotated: bool = False  # by an embedding known (`rotary`) or not
    _mask: Tensor | None = None  # [B, M], of the first query and head
    _mask_alike: Tensor | None = None  # [] bool: whether the others have the same
    _timestep: Any = None

    @property
    def timestep(self) -> float | None:
        """The timestep the model was called with; None when the model takes none.

        In the model's own units: 0 to 999 for most, 0 to 1 for Flux. Converted on demand, since
        reading it from a GPU would make the model wait.
        """
        return None if self._timestep is None else float(self._timestep)

    @property
    def heads(self) -> int:
        """Number of attention heads H."""
        return self._need("query").shape[1]

    @property
    def key_grid(self) -> Grid | None:
        """(height, width) of the image keys; None for text."""
        return self.grid if any(name in self.keys for name in _IMAGES) else None

    def __getattr__(self, name: str) -> Tensor:
        statistics = self.__dict__.get("statistics", {})
        if name in statistics:
            return statistics[name]
        raise AttributeError(
            f"{name!r} is neither an attribute of an Entry nor a statistic it has "
            f"({', '.join(statistics) or 'none'}); name it in reduce= when you capture"
        )

    def frame(self, index: int) -> slice:
        """The token range of one frame of a video, for :meth:`map`."""
        if self.grid is None or "image" not in self.queries:
            raise ValueError(f"layer {self.layer!r}: the grid of its frames is not known")
        if not -self.frames <= index < self.frames:
            raise IndexError(f"frame {index} is out of range: there are {self.frames}")
        size = math.prod(self.grid)
        start = self.queries["image"].start + index % self.frames * size
        return slice(start, start + size)

    @property
    def conditional(self) -> Entry:
        """The half of the batch that saw the prompt; the whole where there was no guidance."""
        return self if self.guidance in (None, "conditional") else self._half("conditional")

    @property
    def unconditional(self) -> Entry:
        """The half of the batch that did not see the prompt (or saw the negative prompt)."""
        return self if self.guidance == "unconditional" else self._half("unconditional")

    def _half(self, which: str) -> Entry:
        if self.guidance != "both":
            raise ValueError(f"{self!r} has no {which} half: its guidance is {self.guidance!r}")
        second = which == "conditional"

        def half(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.chunk(2)[second]

        return dataclasses.replace(
            self,
            guidance=which,
            query=half(self.query),
            key=half(self.key),
            lse=half(self.lse),
            statistics={name: x.chunk(2)[second] for name, x in self.statistics.items()},
            _mask=half(self._mask),
        )

    def key_mask(self) -> Tensor | None:  # [B, M]
        """The mask as one value per key, [B, M] (True attends, or additive bias); None if none.

        Raises ValueError for a mask that differs between queries or heads.
        """
        if self._mask_alike is not None and not bool(self._mask_alike):
            raise ValueError(
                f"layer {self.layer!r}: its mask differs between queries or heads; a map takes one "
                "mask over keys, [batch, M]"
            )
        return self._mask

    def map(
        self,
        block: str | tuple[slice, slice] | None = None,
        *,
        to: Entry | None = None,
        positions: str = "kept",
        renormalize: bool = False,
        **options: Any,
    ) -> AttentionMap:
        """The layer's lazy :class:`flashmaps.AttentionMap`, as it was recorded.

        Args:
            block: part of the map as "queries->keys": ``"image->text"``, ``"text->image"``,
                ``"image->image"``; or two slices of tokens, such as
                ``(entry.frame(0), entry.frame(5))``. The rows of a block of a joint map sum to the
                mass that falls on it. This takes the whole rows' log-sum-exp: one pass, now.
            renormalize: attend within the block alone, as if the other keys were hidden: each
                head's rows sum to 1.
            to: another entry, of another image or text, whose keys take the place of this one's:
                A_st is ``source.map(to=target)`` (note eq. 2.4).
            positions: on models with rotary embeddings, ``"kept"`` compares Q and K as the
                attention did, rotated by their places: with ``to``, both images then lie in one
                frame, and equal places attract each other. ``"removed"`` turns them back first, so
                that content alone counts (exact but for one rounding).
            options: go to AttentionMap and win over what was recorded.

        Raises ValueError for a causal layer, a mask that differs between queries, an entry without
        Q and K, a block that the layer has not.
        """
        other = self if to is None else to
        if self.causal or other.causal:
            raise ValueError(
                f"layer {self.layer!r} is causal; maps of causal layers are not offered"
            )
        if positions not in POSITIONS:
            raise ValueError(f"positions={positions!r}; choose from {', '.join(POSITIONS)}")
        query, key = self._placed("query", positions), other._placed("key", positions)
        settings: dict[str, Any] = {"scale": self.scale}
        mask = other.key_mask() if "key_mask" not in options else options["key_mask"]
        lse = self.lse if to is None and positions == "kept" and not options else None
        whole = slice(0, query.shape[2]), slice(0, key.shape[2])
        rows, columns = whole if block is None else self._block(block, other)
        if columns != whole[1] and not renormalize:
            if lse is None:
                over = {name: options[name] for name in ("pairs", "backend") if name in options}
                scale = options.get("scale", self.scale)
                lse = AttentionMap(query[:, :, rows], key, scale=scale, key_mask=mask, **over).lse
            else:
                lse = lse[:, :, rows]
        elif columns != whole[1]:
            lse = None
        elif lse is not None:
            lse = lse[:, :, rows]
        if mask is not None:
            settings["key_mask"] = mask[..., columns]
        if lse is not None:
            settings["lse"] = lse
        settings["query_grid"] = _grid_of(rows, self.grid, self.queries)
        settings["key_grid"] = _grid_of(columns, other.grid, other.keys)
        options = {name: value for name, value in options.items() if name != "key_mask"}
        return AttentionMap(query[:, :, rows], key[:, :, columns], **{**settings, **options})

    def _block(self, block: str | tuple[slice, slice], other: Entry) -> tuple[slice, slice]:
        if not isinstance(block, str):
            rows, columns = block
            return rows, columns
        names = [name.strip() for name in block.split("->")]
        if len(names) != 2:
            raise ValueError(f"block={block!r}; write it as 'image->text', or give two slices")
        found = []
        for name, side, parts in (
            (names[0], "queries", self.queries),
            (names[1], "keys", other.keys),
        ):
            if name not in parts:
                there = ", ".join(parts) or "unknown for its processor: give slices instead"
                raise ValueError(
                    f"block={block!r}: the {side} of layer {self.layer!r} have no {name!r}; "
                    f"there are: {there}"
                )
            found.append(parts[name])
        return found[0], found[1]

    def _placed(self, side: str, positions: str) -> Tensor:
        tensor = self._need(side)
        if positions == "kept" or not self.rotated:
            return tensor
        if self.rotary is None:
            raise ValueError(
                f"layer {self.layer!r}: its rotary embedding is of a form that cannot be removed "
                "here; use positions='kept'"
            )
        return unrotate(tensor, *self.rotary)

    def _need(self, side: str) -> Tensor:
        tensor = self.query if side == "query" else self.key
        if tensor is None:
            raise ValueError(
                f"layer {self.layer!r}: Q and K were not kept, only statistics "
                f"({', '.join(self.statistics)}); capture with keep='qk' to make maps"
            )
        return tensor

    def __repr__(self) -> str:
        parts = [self.layer, self.kind, f"step={self.step}", f"timestep={self.timestep}"]
        parts.append(f"grid={self.grid}")
        if self.guidance is not None:
            parts.append(f"guidance={self.guidance!r}")
        if self.query is not None and self.key is not None:
            parts += [f"query={tuple(self.query.shape)}", f"key={tuple(self.key.shape)}"]
        if self.statistics:
            parts.append(f"statistics=({', '.join(self.statistics)}), count={self.count}")
        return f"Entry({', '.join(parts)})"


def _grid_of(part: slice, grid: Grid | None, parts: Mapping[str, slice]) -> Grid | None:
    """The grid of a range of tokens: a whole image, or a whole frame of a video."""
    if grid is None or part.start is None or part.stop is None:
        return None
    size = math.prod(grid)
    for image in (parts[name] for name in _IMAGES if name in parts):
        inside = image.start <= part.start and part.stop <= image.stop
        if inside and part.stop - part.start == size and (part.start - image.start) % size == 0:
            return grid
    return None


class Record(Sequence[Entry]):
    """What a capture has seen, in order of execution: a read-only sequence of :class:`Entry`."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = list(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __getitem__(self, index: Any) -> Any:
        return self._entries[index]

    def __repr__(self) -> str:
        return f"Record({len(self)} entries of {len(self.layers)} layers)"

    @property
    def layers(self) -> list[str]:
        """Names of the layers seen, in order of first execution."""
        return list(dict.fromkeys(entry.layer for entry in self._entries))

    def select(
        self,
        layers: str | Iterable[str] | None = None,
        *,
        step: int | Iterable[int] | None = None,
        kind: str | None = None,
        resolution: Any = None,
        guidance: str | None = None,
    ) -> Record:
        """The entries that match all that is given; see :class:`flashmaps.capture` for the values.

        ``guidance="conditional"`` takes that half of entries that hold both.
        """
        steps = None if step is None else whole_numbers("step", step)
        sizes = None if resolution is None else resolutions(resolution)
        chosen = [
            entry
            for entry in self._entries
            if (layers is None or matches(entry.layer, patterns(layers)))
            and (steps is None or entry.step in steps)
            and (kind is None or entry.kind == kind)
            and (sizes is None or entry.grid in sizes)
        ]
        if guidance is not None:
            chosen = [half for entry in chosen if (half := of_guidance(entry, guidance))]
        return Record(chosen)

    def map(
        self,
        block: str | None = None,
        *,
        to: Record | None = None,
        weights: Sequence[float] | None = None,
        **options: Any,
    ) -> AttentionMap:
        """The mean of all entries' maps, as one lazy map with all their heads; O(N d) memory.

            rec.select("up_blocks.2.*", kind="self").map().entropy()

        ``to`` gives the keys, entry by entry: the same selection of another record. ``weights`` sum
        to 1, one for each entry. Entries must agree in tokens and batch; see
        ``AttentionMap.average`` and :meth:`Entry.map`.
        """
        if not self._entries:
            raise ValueError("there are no entries to take the map of; select() chose none")
        others: Sequence[Entry | None] = [None] * len(self) if to is None else list(to)
        if len(others) != len(self):
            raise ValueError(
                f"to has {len(others)} entries for {len(self)}; make the same selection of both"
            )
        maps = [
            entry.map(block, to=other, **options)
            for entry, other in zip(self._entries, others, strict=True)
        ]
        for entry, attention_map in zip(self._entries, maps, strict=True):
            if attention_map.shape != maps[0].shape:
                raise ValueError(
                    f"maps of different sizes do not average: {self[0].layer!r} is "
                    f"{maps[0].shape}, {entry.layer!r} is {attention_map.shape}; choose one level "
                    "with select(resolution=...)"
                )
        return AttentionMap.average(maps, weights)

    def clear(self) -> None:
        """Forget everything seen so far, to bound memory in a long run."""
        self._entries.clear()

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all: tensors as they are, the rest as JSON."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        shared: dict[Any, str] = {}
        rows = [_as_json(each, index, tensors, shared) for index, each in enumerate(self._entries)]
        with whole_file(path) as new:
            save_file(tensors, new, {"format": _FORMAT, "entries": json.dumps(rows)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Record:
        """Read what :meth:`save` wrote. Raises ValueError for any other file."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r} to load a record from")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise ValueError(
                        f"{str(path)!r} is not a record that this version of flashmaps reads: its "
                        f"format is {about.get('format')!r}, wanted {_FORMAT!r}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from None
        return cls(_from_json(row, tensors) for row in json.loads(about["entries"]))


_PLAIN = ("layer", "step", "kind", "scale", "grid", "frames", "guidance", "causal", "count")
_TENSORS = ("query", "key", "lse", "_mask", "_mask_alike")


def _as_json(
    entry: Entry, index: int, tensors: dict[str, Tensor], shared: dict[Any, str]
) -> dict[str, Any]:
    """One entry as JSON; its tensors go into ``tensors``, rotary embeddings only once: `shared`."""

    def put(name: str, tensor: Tensor) -> str:
        tensor = tensor.detach().contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor if whole else tensor.clone()  # safetensors refuses shared storage
        return name

    row: dict[str, Any] = {name: getattr(entry, name) for name in _PLAIN}
    row |= {"timestep": entry.timestep, "rotated": entry.rotated}
    for name in ("queries", "keys"):
        row[name] = {part: [at.start, at.stop] for part, at in getattr(entry, name).items()}
    for name in _TENSORS:
        tensor = getattr(entry, name)
        row[name] = None if tensor is None else put(f"{index}.{name}", tensor)
    row["statistics"] = {
        name: put(f"{index}.statistics.{name}", x) for name, x in entry.statistics.items()
    }
    if entry.rotary is not None:
        row["rotary"] = []
        for n, x in enumerate(entry.rotary):
            place = (x.data_ptr(), x.shape, x.stride())
            if place not in shared:
                shared[place] = put(f"rotary.{index}.{n}", x)
            row["rotary"].append(shared[place])
    return row


def _from_json(row: dict[str, Any], tensors: Mapping[str, Tensor]) -> Entry:
    values: dict[str, Any] = {name: row[name] for name in (*_PLAIN, "rotated")}
    values["grid"] = None if row["grid"] is None else tuple(row["grid"])
    values["_timestep"] = row["timestep"]
    for name in ("queries", "keys"):
        values[name] = {part: slice(*at) for part, at in row[name].items()}
    for name in _TENSORS:
        values[name] = None if row[name] is None else tensors[row[name]]
    values["statistics"] = {name: tensors[key] for name, key in row["statistics"].items()}
    if "rotary" in row:
        values["rotary"] = tuple(tensors[name] for name in row["rotary"])
    return Entry(**values)


def same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are the same numbers in memory; views of one tensor are different objects."""
    if one is None or other is None:
        return one is other
    return (one.data_ptr(), one.shape, one.stride()) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
    )


# -- how entries are chosen, here and by `capture` -------------------------------------------------


def patterns(layers: str | Iterable[str]) -> list[str]:
    """``layers`` as a list of :mod:`fnmatch` patterns."""
    found = [layers] if isinstance(layers, str) else list(layers)
    for each in found:
        if not isinstance(each, str):
            raise TypeError(f"layers must be patterns of layer names, got {each!r}")
    # `model.attn_processors` names layers with this ending; take its names too.
    return [each.removesuffix(".processor") for each in found]


def whole_numbers(name: str, value: Any) -> set[int]:
    """One index or several, of any integer type (numpy's, torch's); ValueError for others."""
    try:
        found = {operator.index(value)}
    except TypeError:
        try:
            found = {operator.index(each) for each in value}
        except TypeError:
            found = {-1}
    if any(each < 0 for each in found):
        raise ValueError(f"{name} must be indices of denoising steps, 0 or more; got {value!r}")
    return found


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's full name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def resolutions(value: Any) -> set[Grid]:
    """``resolution=`` as grids: n means (n, n), a tuple is one grid, a list has several."""
    found = set()
    for each in value if isinstance(value, (list, set, frozenset)) else [value]:
        grid = (each, each) if isinstance(each, int) else each
        if not (
            isinstance(grid, tuple)
            and len(grid) == 2
            and all(isinstance(n, int) and n > 0 for n in grid)
        ):
            raise ValueError(
                f"resolution={value!r}; wanted a side such as 32, a grid (height, width), or a "
                "list of them"
            )
        found.add(grid)
    if not found:
        raise ValueError("resolution is empty; give at least one grid")
    return found


def of_guidance(entry: Entry, which: str) -> Entry | None:
    """The wanted half of an entry; None if it belongs to the other half."""
    if entry.guidance is None:  # named, so that its statistics join those of guided steps
        named = dataclasses.replace(entry, guidance="conditional")
        return named if which == "conditional" else None
    if entry.guidance == "both":
        return getattr(entry, which)
    return entry if entry.guidance == which else None
