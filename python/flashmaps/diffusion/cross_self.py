"""Self-attention between two images of a batch: KV injection, and its maps A_st and A_ts.

    with fm.CrossSelfAttnProcessor.on(pipe, "up_blocks.*.attn1", steps=range(4, 50)) as record:
        pipe(["a photo of a cat", "a drawing of a cat"])

Cao et al., MasaCtrl (2023); Alaluf et al., Cross-Image Attention (2024).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashmaps.diffusion.called import called_with
from flashmaps.diffusion.capture import denoisers
from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.guidance import Passes
from flashmaps.diffusion.processors import Layer, MapAttnProcessor
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.grids import Grid, square_grid

KEYS = ("other", "both", "source")
SOURCES = ("pairs", "first")


class CrossSelfAttnProcessor(MapAttnProcessor):
    """Self-attention in which a source and a target image of one batch see each other.

    KV injection, as in mutual self-attention control (MasaCtrl) and cross-image attention; note
    eq. 2.4. The batch holds pairs: source, target, source, target, ... With two prompts diffusers
    makes such a batch, with classifier-free guidance and without; ``num_images_per_prompt=2`` would
    pair images of one prompt. With ``sources="first"`` it holds one source and any number of
    targets.

    Args:
        keys: what a query attends to.
            "other": source queries on target keys and values, target queries on the source's:
            A_st and A_ts of each pair, in one batch.
            "both": on its own image's and then the other's, in one softmax.
            "source": both on the source's, so that the target takes its content from there.
        sources: "pairs", or "first": the first image is the source of all others (with keys="both"
            or "source"). It attends to itself: with "both" to its keys twice, which changes its
            output by rounding alone.
        where: [height, width] in 0 to 1, or one for each image, [images, height, width]: where in a
            query's image to inject. Elsewhere a layer gives what it gave; in between, a part of
            each. It is averaged to the tokens of each layer, and any size will do. The maps that
            are recorded are those as injected, at every query.
        guidance: whether the batch is the images twice, for classifier-free guidance. None: as the
            pipeline tells that `on` is given; else, as far as it can be seen, from a batch that
            holds the same picture twice.
        steps: which calls of each layer are injected, and recorded; the others are as they were.
        (others): as for :class:`MapAttnProcessor`.

    Layers of cross-attention are left as they are. Where nothing is injected, the output is that of
    ``AttnProcessor2_0`` to the last bit. Entries are of the maps as injected, one row of the batch
    for each image: statistics of A_st are ``entry.entropy[0::2]``, those of A_ts ``[1::2]``.
    Their keys are named "other"; "image" and "other"; or "source".

        with fm.CrossSelfAttnProcessor.on(pipe, "up_blocks.*.attn1", keep="qk") as record:
            pipe(["a photo of a cat", "a drawing of a cat"])
        A_st, A_ts = fm.CrossSelfAttnProcessor.maps(record[0])

    Raises ValueError for unknown keys; when a layer runs, for a batch that does not hold pairs once
    guidance is taken off (or whose parts of guidance cannot be told), and for a mask that differs
    between queries; and all that :class:`MapAttnProcessor` raises.
    """

    def __init__(
        self,
        *,
        keys: str = "other",
        sources: str = "pairs",
        where: Any = None,
        guidance: bool | None = None,
        **options: Any,
    ) -> None:
        if keys not in KEYS:
            raise ValueError(f"keys={keys!r}; choose from {', '.join(map(repr, KEYS))}")
        if sources not in SOURCES:
            raise ValueError(f"sources={sources!r}; choose from {', '.join(map(repr, SOURCES))}")
        if sources == "first" and keys == "other":
            raise ValueError(
                "sources='first' has one source for many targets, and with keys='other' it would "
                "attend to each of them at once; choose keys='source' or keys='both'"
            )
        super().__init__(**options)
        self._keys = keys
        self._sources = sources
        self._where = None if where is None else _weights(where)
        self._guidance = guidance
        self._parts: int | None = None  # of guidance, in the batch that runs; None: nothing tells
        self._size: Grid | None = None  # of the latents that the model was called with
        gridded = {"expectation", "pool"} & set(self._recorder.names)
        if keys == "both" and gridded and self._recorder.block is None:
            raise ValueError(
                f"keys='both' attends to two images in one sequence, which has no grid for "
                f"{' and '.join(sorted(gridded))}; give block='image->other' or 'image->image'"
            )

    @staticmethod
    def maps(entry: Entry, **options: Any) -> tuple[AttentionMap, AttentionMap]:
        """A_st and A_ts of an entry that holds Q and K, each with one map for each pair.

        A_st = map(Q_s, K_t), A_ts = map(Q_t, K_s), note eq. 2.4. With keys="both" they are the
        attention to the other image as if there were no own one: rows sum to 1.
        ``entry.map("image->other")`` has it with the share that fell on it. ``options`` go to
        `Entry.map`.

        Raises ValueError for an entry of another kind, or with keys="source", where the source sees
        itself alone and there is no A_st.
        """
        if "source" in entry.keys:
            raise ValueError(
                f"layer {entry.layer!r} ran with keys='source': the source attends to itself, so "
                "there is no A_st. A_ts of pair p is entry.map(pairs=[[2 * p + 1, 2 * p + 1]])"
            )
        if "other" not in entry.keys:
            raise ValueError(
                f"layer {entry.layer!r}: its keys are of no other image; maps takes entries that "
                "CrossSelfAttnProcessor recorded"
            )
        if "image" in entry.keys:
            options = {"block": "image->other", "renormalize": True, **options}
        of_source, of_target = (_every_other(entry, start) for start in (0, 1))
        return of_source.map(**options), of_target.map(**options)

    @classmethod
    def _among(cls, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
        found = {
            name: layer
            for name, layer in layers.items()
            if not getattr(layer, "is_cross_attention", False)
        }
        if not found:
            raise ValueError(
                f"layers chose {', '.join(layers)}, which attend to text; {cls.__name__} is for "
                "self-attention, such as layers='*.attn1'"
            )
        return found

    def _works(self, layer: Layer, step: int, first_time: bool, context: Tensor | None) -> bool:
        works = context is None and self._wanted_step(step)
        if first_time:
            layer.worked.add(works)
        elif len(layer.worked) > 1:
            raise RuntimeError(
                f"layer {layer.name!r} ran again in backward (gradient checkpointing), and which "
                "of its steps that was is not known, while only some were injected; give "
                "steps=None, or switch gradient checkpointing off"
            )
        return works

    def _mix(
        self, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, slice]]:
        tokens = key.shape[2]
        images = self._images(key)
        if mask is not None and mask.shape[-2] > 1:
            raise ValueError(
                f"{type(self).__name__} takes a mask over keys, [B, H, 1, M]; got "
                f"{tuple(mask.shape)}, which differs between queries"
            )

        def mixed(x: Tensor, dim: int) -> Tensor:
            if self._sources == "first":
                first = x.unflatten(0, (-1, images))[:, :1].expand(-1, images, *x.shape[1:])
                source = first.flatten(0, 1)
                return source if self._keys == "source" else torch.cat([x, source], dim)
            if self._keys == "source":
                return x[0::2].repeat_interleave(2, 0)
            other = x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # 1, 0, 3, 2, ...
            return other if self._keys == "other" else torch.cat([x, other], dim)

        own = slice(0, tokens)
        parts = {"image": own, "other": slice(tokens, 2 * tokens)}
        parts = parts if self._keys == "both" else {self._keys: own}
        return mixed(key, 2), mixed(value, 2), None if mask is None else mixed(mask, 3), parts

    def _images(self, key: Tensor) -> int:
        """How many images the batch holds once guidance is taken off; refuses what is no pairs."""
        batch, name = key.shape[0], type(self).__name__
        parts = self._parts if self._guidance is None else 1 + self._guidance
        if parts == 0:
            raise ValueError(
                f"{name}: the pipeline guides, but how many parts of guidance its batch of {batch} "
                "holds cannot be told; say guidance=True where it is the images twice, else False"
            )
        if parts is None:  # set on layers by hand: what the layer sees has to tell
            halves = key.detach().chunk(2) if batch % 2 == 0 else (key, key[:0])
            parts = 2 if (batch // 2) % 2 and torch.equal(*halves) else 1
        images = batch // parts
        wanted = images % 2 == 0 if self._sources == "pairs" else images > 1
        if batch % parts or not wanted:
            guided = f" in {parts} parts of guidance, that is {images}" if parts > 1 else ""
            what = (
                "of pairs (source, target, source, target, ...)"
                if self._sources == "pairs"
                else "of a source and at least one target"
            )
            raise ValueError(
                f"{name} needs a batch {what}, got a batch of {batch}{guided}; give the pipeline "
                "a prompt and latents for the source and for each target. (If it is no guidance, "
                "but images that start from the same latents, say guidance=False)"
            )
        return images

    def _blend(
        self,
        attended: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        grid: Grid | None,
    ) -> Tensor:
        if self._where is None:
            return attended
        tokens, images = query.shape[2], self._images(key)
        grid = grid or _level(self._grid or self._size, tokens) or square_grid(tokens)
        if grid is None:
            raise ValueError(
                f"where= needs the grid of {tokens} tokens, which is not known; give grid=(h, w)"
            )
        if len(self._where) not in (1, images):
            raise ValueError(
                f"where= holds weights for {len(self._where)} images, but the batch has {images}"
            )
        weights = F.adaptive_avg_pool2d(self._where[:, None], grid).flatten(1)
        weights = weights.expand(images, -1).repeat(query.shape[0] // images, 1)
        weights = weights[:, None, :, None].to(attended)  # [B, 1, N, 1]
        own = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        blend = own.lerp(attended, weights)
        return torch.where(weights == 0, own, torch.where(weights == 1, attended, blend))

    @classmethod
    @contextlib.contextmanager
    def _told(cls, processors: list[Any], pipe_or_model: Any) -> Iterator[None]:
        """Tells processors how many parts of guidance a batch holds, and the latents' size."""
        models = list(denoisers(pipe_or_model).values())
        passes = Passes(pipe_or_model, models, asked=True)

        def before(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = called_with(model, args, kwargs)
            guidance, batch = passes.begin(model, given)
            latent = given.get("sample", given.get("hidden_states"))
            for each in processors:
                each._parts = 0 if guidance == "unknown" else max(1, len(batch))
                each._size = tuple(latent.shape[-2:]) if isinstance(latent, Tensor) else None

        with contextlib.ExitStack() as undo:
            passes.watch(passes, undo)
            for model in models:
                undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
            yield


def _every_other(entry: Entry, start: int) -> Entry:
    def half(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[start::2]

    return dataclasses.replace(
        entry,
        query=half(entry.query),
        key=half(entry.key),
        lse=half(entry.lse),
        statistics={name: x[start::2] for name, x in entry.statistics.items()},
        _mask=half(entry._mask),
    )


def _weights(where: Any) -> Tensor:  # [1 or images, height, width], float32
    weights = torch.as_tensor(where).to(torch.float32)
    weights = weights[None] if weights.ndim == 2 else weights
    if weights.ndim != 3 or not weights.numel():
        raise ValueError(
            f"where= must be [height, width] or [images, height, width]; got "
            f"{tuple(torch.as_tensor(where).shape)}"
        )
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError("where= must be weights from 0 (as it was) to 1 (injected)")
    return weights


def _level(grid: Grid | None, tokens: int) -> Grid | None:
    """The grid of a layer: the latents', halved until it has as many cells as tokens."""
    while grid is not None and math.prod(grid) > tokens:
        grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
    return grid if grid is not None and math.prod(grid) == tokens else None
