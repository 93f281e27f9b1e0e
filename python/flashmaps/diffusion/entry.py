"""One attention layer in one forward pass, as a capture keeps it; its lazy map is made later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashmaps import arguments
from flashmaps.diffusion.layouts import REMEDY
from flashmaps.diffusion.positions import unrotate
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import Grid

POSITIONS = ("kept", "removed")
# Parts that lie on the entry's grid; the last two are what CrossSelfAttnProcessor attends to.
_IMAGES = ("image", "other", "source")


@dataclass(frozen=True, eq=False)
class Entry:
    """One attention layer in one forward pass: Q and K, or statistics of its map, or both.

    Attributes:
        layer: full name, such as ``up_blocks.1.attentions.0.transformer_blocks.0.attn1``.
        step: index of the denoising step, counted from 0 since the capture began. Where guidance
            takes several forward passes (Flux, Wan, guiders), all belong to one step. None for a
            mean over passes, which has no step and no timestep.
        kind: ``"self"``, ``"cross"`` (keys are text, or a video's sound), ``"joint"`` (image and
            text in one sequence), ``"temporal"`` (over frames, at one place), ``"image_prompt"``
            (keys are an image prompt: IP-Adapter, image-to-video) or ``"unknown"``.
        query: ``[B, H, N, d]``; key: ``[B, H, M, d]``, as the attention saw them; None where only
            statistics were kept.
        scale: what the scores are multiplied by before the softmax.
        grid, frames: frames * height * width image tokens; grid is None when unknown.
        queries, keys: token ranges by name: ``"image"``, ``"text"``, ``"reference"`` (further
            images in the sequence), ``"image_prompt"``; keys also ``"other"`` and ``"source"``
            (of another image of the batch, see :class:`flashmaps.CrossSelfAttnProcessor`). Empty
            where they are not known: ``why`` says why.
        rows: of a video whose frames are rows of the batch (AnimateDiff): how many frames; row
            ``b * rows + f`` is frame f of video b. Else 1.
        guidance: ``"conditional"`` or ``"unconditional"`` where each has a pass of its own;
            ``"both"`` where the batch holds these two halves, ``"several"`` where it holds other
            parts (perturbed attention guidance, InstructPix2Pix); ``"other"`` for a further pass
            (with layers skipped, perturbed, without the sound of a video); ``"unknown"`` where the
            pipeline guides, but which part this is cannot be told; None: no guidance, or none that
            is known of.
        batch: the equal parts that the batch holds, in order, as far as they are known:
            ``("unconditional", "conditional")``, ``("conditional", "image", "unconditional")``.
        call: which attention of the layer's pass this is; image prompts come after the text,
            and a processor that attends to each image by itself (Mochi) calls once for each.
        adapter, adapter_image: index of the IP-Adapter whose image prompt this is, and of the image
            where each has a mask and is attended to by itself; None: none, or not known.
        statistics: by name, batch first; each is an attribute too: ``entry.entropy``.
        count: forward passes that the statistics are the mean of. Indices (argmax) do not average:
            they are those of the last pass.
        per_head: whether statistics are those of each head, ``[B, H, ...]``, not of their mean.
        lse: ``[B, H, N]`` log-sum-exp where attention returned it.
        rotary: (cos, sin), ``[N, d]`` each, that query and key were rotated by, if they were.
    """

    layer: str
    step: int | None
    kind: str
    query: Any  # Tensor [B, H, N, d], or None
    key: Any  # Tensor [B, H, M, d], or None
    scale: float
    grid: Grid | None = None
    frames: int = 1
    queries: Mapping[str, slice] = field(default_factory=dict)
    keys: Mapping[str, slice] = field(default_factory=dict)
    guidance: str | None = None
    batch: tuple[str, ...] = ()
    call: int = 0
    adapter: int | None = None
    adapter_image: int | None = None
    causal: bool = False
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    count: int = 1
    per_head: bool = False
    lse: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    rotated: bool = False  # by an embedding known (`rotary`) or not
    rows: int = 1
    why: str = ""
    _mask: Tensor | None = None  # [B, M], of the first query and head; or bool [B, N, M]
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
            why = self.why or f"it is not known here; {REMEDY}"
            raise ValueError(f"layer {self.layer!r} has no grid of frames: {why}")
        if not -self.frames <= arguments.whole("index", index) < self.frames:
            raise IndexError(f"frame {index} is out of range: there are {self.frames}")
        size = math.prod(self.grid)
        start = self.queries["image"].start + index % self.frames * size
        return slice(start, start + size)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of guidance that this entry holds; empty where none is known of."""
        if self.batch:
            return self.batch
        if self.guidance == "both":
            return ("unconditional", "conditional")
        return (self.guidance,) if self.guidance in ("conditional", "unconditional") else ()

    @property
    def conditional(self) -> Entry:
        """The part of the batch that saw the prompt; the whole where there was no guidance."""
        return self if self.guidance is None else self.part("conditional")

    @property
    def unconditional(self) -> Entry:
        """The part of the batch that did not see the prompt (or saw the negative prompt)."""
        return self.part("unconditional")

    def part(self, which: str) -> Entry:
        """One part of guidance, by its name in :attr:`parts`, such as "perturbed"."""
        if self.guidance == which:
            return self
        if which not in self.parts:
            why = f"it holds {', '.join(self.parts)}" if self.parts else _no_parts(self.guidance)
            raise ValueError(f"{self!r} has no {which} part: {why}")
        count, index = len(self.parts), self.parts.index(which)

        def half(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.unflatten(0, (count, -1))[index]

        return dataclasses.replace(
            self,
            guidance=which,
            batch=(),
            query=half(self.query),
            key=half(self.key),
            lse=half(self.lse),
            statistics={
                name: x.unflatten(0, (count, -1))[index] for name, x in self.statistics.items()
            },
            _mask=half(self._mask),
        )

    def key_mask(self) -> Tensor | None:  # [B, M]
        """The mask as one value per key, [B, M] (True attends, or additive bias); None if none.

        [B, N, M] bool where it differs between queries. Raises ValueError for one that differs
        between heads, or is no mask but weights that differ between queries.
        """
        if self._mask_alike is not None and not bool(self._mask_alike):
            raise ValueError(
                f"layer {self.layer!r}: its mask differs between heads, or adds numbers that "
                "differ between queries; a map takes [batch, M], or [batch, N, M] of True and False"
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

        Masks that differ between queries, and causal layers, are exact on backend "reference".

        Raises ValueError for a mask that differs between heads or weighs keys otherwise for each
        query, for an entry without
        Q and K, a block that the layer has not.
        """
        arguments.switch("renormalize", renormalize)
        other = self if to is None else to
        if positions not in POSITIONS:
            raise ValueError(f"positions={positions!r}; choose from {', '.join(POSITIONS)}")
        query, key = self._placed("query", positions), other._placed("key", positions)
        settings: dict[str, Any] = {"scale": self.scale}
        mask = other.key_mask() if "key_mask" not in options else options["key_mask"]
        if other.causal and "key_mask" not in options:
            mask = _causal(mask, query.shape[2], key)
        by_query = mask is not None and mask.ndim == 3
        lse = self.lse if to is None and positions == "kept" and not options else None
        whole = slice(0, query.shape[2]), slice(0, key.shape[2])
        rows, columns = whole if block is None else self._block(block, other)
        if columns != whole[1] and not renormalize:
            if lse is None:
                whole_mask = mask[:, rows] if mask is not None and by_query else mask
                over = {name: options[name] for name in ("pairs", "backend") if name in options}
                scale = options.get("scale", self.scale)
                lse = AttentionMap(
                    query[:, :, rows], key, scale=scale, key_mask=whole_mask, **over
                ).lse
            else:
                lse = lse[:, :, rows]
        elif columns != whole[1]:
            lse = None
        elif lse is not None:
            lse = lse[:, :, rows]
        if mask is not None:
            settings["key_mask"] = (mask[:, rows] if by_query else mask)[..., columns]
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
                there = ", ".join(parts) or f"none: {self.why or REMEDY}"
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
        parts = [self.layer, self.kind]
        if self.step is not None:
            parts += [f"step={self.step}", f"timestep={self.timestep}"]
        parts.append(f"grid={self.grid}")
        if self.guidance is not None:
            parts.append(f"guidance={self.guidance!r}")
        if self.adapter is not None:
            parts.append(f"adapter={self.adapter}")
        if self.query is not None and self.key is not None:
            parts += [f"query={tuple(self.query.shape)}", f"key={tuple(self.key.shape)}"]
        if self.statistics:
            parts.append(f"statistics=({', '.join(self.statistics)}), count={self.count}")
        return f"Entry({', '.join(parts)})"


def _no_parts(guidance: str | None) -> str:
    if guidance == "unknown":
        return "its pipeline guides, but which part is which cannot be told; capture with batch="
    return f"its guidance is {guidance!r}"


def _causal(mask: Tensor | None, queries: int, key: Tensor) -> Tensor:
    """As scaled_dot_product_attention has it: query i sees keys 0 to i. [B, N, M]"""
    keys = key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril()
    if mask is None:
        return seen.expand(key.shape[0], -1, -1)
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask <= -1e4)).all()):
            raise ValueError("a causal layer with a mask that weighs keys has no map here")
        mask = mask == 0
    return seen & (mask[:, None] if mask.ndim == 2 else mask)


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
