"""Self-attention between two images of a batch: KV injection, and its maps A_st and A_ts.

    with fm.CrossSelfAttnProcessor.on(pipe, "up_blocks.*.attn1", steps=range(4, 50)) as record:
        pipe(["a photo of a cat", "a drawing of a cat"])

Cao et al., MasaCtrl (2023); Alaluf et al., Cross-Image Attention (2024).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.processors import Layer, MapAttnProcessor
from flashmaps.maps.attention_map import AttentionMap

KEYS = ("other", "both", "source")


class CrossSelfAttnProcessor(MapAttnProcessor):
    """Self-attention in which a source and a target image of one batch see each other.

    KV injection, as in mutual self-attention control (MasaCtrl) and cross-image attention; note
    eq. 2.4. The batch holds pairs: source, target, source, target, ... With two prompts diffusers
    makes such a batch, with classifier-free guidance and without; ``num_images_per_prompt=2`` would
    pair images of one prompt.

    Args:
        keys: what a query attends to.
            "other": source queries on target keys and values, target queries on the source's:
            A_st and A_ts of each pair, in one batch.
            "both": on its own image's and then the other's, in one softmax.
            "source": both on the source's, so that the target takes its content from there.
        steps: which calls of each layer are injected, and recorded; the others are as they were.
        (others): as for :class:`MapAttnProcessor`.

    Layers of cross-attention are left as they are. Where nothing is injected, the output is that of
    ``AttnProcessor2_0`` to the last bit. Entries are of the maps as injected, one row of the batch
    for each image: statistics of A_st are ``entry.entropy[0::2]``, those of A_ts ``[1::2]``.
    Their keys are named "other"; "image" and "other"; or "source".

        with fm.CrossSelfAttnProcessor.on(pipe, "up_blocks.*.attn1", keep="qk") as record:
            pipe(["a photo of a cat", "a drawing of a cat"])
        A_st, A_ts = fm.CrossSelfAttnProcessor.maps(record[0])

    Raises ValueError for unknown keys; when a layer runs, for an odd batch and for a mask that
    differs between queries; and all that :class:`MapAttnProcessor` raises.
    """

    def __init__(self, *, keys: str = "other", **options: Any) -> None:
        if keys not in KEYS:
            raise ValueError(f"keys={keys!r}; choose from {', '.join(map(repr, KEYS))}")
        super().__init__(**options)
        self._keys = keys
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
        batch, tokens = key.shape[0], key.shape[2]
        if batch % 2:
            raise ValueError(
                f"{type(self).__name__} needs a batch of pairs (source, target, source, target, "
                f"...), got a batch of {batch}; give the pipeline two prompts and two latents"
            )
        if mask is not None and mask.shape[-2] > 1:
            raise ValueError(
                f"{type(self).__name__} takes a mask over keys, [B, H, 1, M]; got "
                f"{tuple(mask.shape)}, which differs between queries"
            )

        def mixed(x: Tensor, dim: int) -> Tensor:
            if self._keys == "source":
                return x[0::2].repeat_interleave(2, 0)
            other = x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # 1, 0, 3, 2, ...
            return other if self._keys == "other" else torch.cat([x, other], dim)

        own = slice(0, tokens)
        parts = {"image": own, "other": slice(tokens, 2 * tokens)}
        parts = parts if self._keys == "both" else {self._keys: own}
        return mixed(key, 2), mixed(value, 2), None if mask is None else mixed(mask, 3), parts


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
