"""Segments of one image: objects, and their parts, with nothing to choose.

    seg = fm.segment("street.jpg")
    seg.labels            # [h, w], the object of each pixel
    seg.level(1).labels   # [h, w], its parts
    seg.plot().savefig("street-segments.png")

Two walks over the tokens are told in the fewest bits (:mod:`flashmaps.segmentation.map_equation`).
Parts are where the walk stays that goes by how alike features are: what belongs to one part looks
alike. Objects are where the walk stays that goes by attention, queries on keys of the encoder's
first layer (:mod:`flashmaps.segmentation.seen`), at the temperature the model was trained with, and
three steps in ten by likeness: it starts from segments of likeness, joins those between which it
goes back and forth, and then moves single tokens. How many there are follows in both cases. Parts
are cut at the borders of objects, and are connected; what lies around things is one part
(:mod:`flashmaps.segmentation.nesting`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.arguments import whole
from flashmaps.diffusion.features import BUILTIN, Features, features, load_model
from flashmaps.diffusion.images import Image
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.backends.choice import check_name
from flashmaps.maps.lazy import check_square
from flashmaps.maps.validation import need_grid
from flashmaps.matching.cross_map import cross_map
from flashmaps.matching.options import MatchOptions
from flashmaps.matching.settings import settings_of
from flashmaps.segmentation.boundaries import borders, patches, pixel_labels
from flashmaps.segmentation.map_equation import compact, merge_below, merge_to, shortest
from flashmaps.segmentation.nesting import connected, nested, without_single
from flashmaps.segmentation.result import Level, Segments
from flashmaps.segmentation.seen import Seen, as_seen, with_object_layers
from flashmaps.segmentation.temperatures import OBJECTS, part_temperature
from flashmaps.segmentation.walk import (
    Segmentation,
    atom_flows,
    find_atoms,
    nearest_tokens,
    sweep,
    told_by,
    walk_segments,
)

# Of the objects' walk, how many steps go by likeness, as the parts' walk does: without them a map
# that is a little more diffuse joins small objects with what is behind them. Chosen there too.
LIKE_STEPS = 0.3
# Bits of a step that an object has to save: what saves less is found in one view of a thing and not
# in the next. Chosen there too, and on warps of photographs.
LEAST_SAVING = 0.003


def segment(
    image: Any,
    *,
    model: Any = BUILTIN,
    compare: str | None = None,
    layers: str | Iterable[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    seeds: int | Sequence[int] | None = None,
    size: int | tuple[int, int] | None = None,
    temperature: float | None = None,
    count: int | None = None,
    boundaries: bool = True,
    backend: str = "auto",
    seed: int = 0,
) -> Segments:
    """Segments of an image, or of what a model has already seen of it.

    Args:
        image: a path, PIL image, numpy array or torch tensor; or :class:`Features` of one image,
            best with ``outputs=True``, or :class:`flashmaps.segmentation.seen.Seen`; or a square
            :class:`flashmaps.AttentionMap` of one image, whose segments alone are found
            then, on its ``query_grid``.
        model, layers, timestep, seeds, size: as for :func:`flashmaps.match`; what is left out is
            the model's own. Without ``layers``, attention ("qk") is read from the encoder's first
            layer, ``down_blocks.0.attentions.0``, where the model has one with as many tokens, and
            all else from the layers that it matches by: the image is shown to the model twice.
            Layers, or Features, that are given are read for both.
        compare: None: objects by "qk", their parts by "features" (or "kk" where there are none).
            "qk", "kk", "qq" or "features": one level alone, by that.
        temperature: of the softmax of objects, beside the model's own; of that one level where
            ``compare`` is given. Nothing needs it.
        count: how many segments on the first level, for who knows; default: as many as make the
            code shortest.
        boundaries: find the borders at pixels in the image (scikit-image); else they are those of
            interpolated tokens. A map alone has no image.
        backend: what computes the maps; see :func:`flashmaps.maps.backends.choice`.
        seed: of the order of moves. The same seed gives the same segments.

    Memory beyond the features is O(N (d + segments)) and the flows between atoms; no map is built.

    Raises ValueError for arguments out of range, before the model runs.
    """
    if count is not None:
        count = whole("count", count, 1)
    seed = whole("seed", seed, 0)
    check_name(backend)
    MatchOptions().with_given(compare=compare, temperature=temperature)  # checked before the work
    if isinstance(image, AttentionMap):
        return _of_map(image, count, seed)
    if isinstance(image, (Features, Seen)):
        seen = as_seen(image)
    else:
        (seen,) = see_objects(
            model, [image], layers=layers, timestep=timestep, seeds=seeds, size=size
        )
    found = seen.likeness
    tokens = found.grid[0] * found.grid[1]
    if count is not None and count > tokens:
        raise ValueError(f"count={count}: the image has {tokens} tokens; wanted at most as many")
    with torch.no_grad():
        levels = _levels(seen, compare, temperature, count, backend, seed)
        return _finish(found.image, found.grid, levels, boundaries)


def see(
    model: Any,
    images: Sequence[Any],
    *,
    layers: str | Iterable[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    seeds: int | Sequence[int] | None = None,
    size: int | tuple[int, int] | None = None,
    progress: bool = False,
) -> list[Features]:
    """Features of images as segments need them: queries, keys and outputs, the model's own way."""
    pipe = load_model(model)
    settings = settings_of(pipe).with_given(
        layers=layers, timestep=timestep, seeds=seeds, size=size
    )
    return features(pipe, list(images), **settings.for_features, outputs=True, progress=progress)


def see_objects(
    model: Any,
    images: Sequence[Any],
    *,
    layers: str | Iterable[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    seeds: int | Sequence[int] | None = None,
    size: int | tuple[int, int] | None = None,
    progress: bool = False,
) -> list[Seen]:
    """As :func:`see`; and where no layers are given, with the attention that objects go by."""
    pipe = load_model(model)
    sets = see(
        pipe, images, layers=layers, timestep=timestep, seeds=seeds, size=size, progress=progress
    )
    return with_object_layers(pipe, sets) if layers is None else [as_seen(each) for each in sets]


def likeness(
    found: Features, temperature: float, compare: str | None = None, *, backend: str = "auto"
) -> AttentionMap:
    """The walk by likeness: of features, or of keys where their outputs were not kept."""
    compare = compare or likeness_of(found)
    return cross_map(found, found, compare=compare, temperature=temperature, backend=backend)


def likeness_of(found: Features) -> str:
    """What is compared where the caller says nothing."""
    return "kk" if found.output is None else "features"


def object_segments(
    A: AttentionMap,  # [1, N, N]
    rough: Segmentation,
    *,
    count: int | None = None,
    seed: int = 0,
) -> Segmentation:
    """Objects by the walk of ``A``, made of segments by likeness at first; then tokens move.

    Begun from them, rather than from atoms, the walk cannot cut through what looks alike: what
    attention alone makes of a plain background is many pieces.
    """
    flow = atom_flows(A, rough.tokens)
    groups = shortest(flow, np.random.default_rng(seed))
    if count is None:
        groups = merge_below(flow, groups, LEAST_SAVING)
    else:
        start = groups if groups.max() + 1 >= count else np.arange(len(flow))
        groups = merge_to(flow, start, count)
    return sweep(A, compact(groups[rough.tokens]), keep=count is not None)


def _levels(
    seen: Seen,
    compare: str | None,
    temperature: float | None,
    count: int | None,
    backend: str,
    seed: int,
) -> list[tuple[str, Segmentation]]:
    found = seen.likeness
    if compare is not None:
        # Attention has no like tokens of its own to begin with: atoms are those of likeness.
        by = likeness_of(found) if compare == "qk" else compare
        near = nearest_tokens(likeness(found, OBJECTS, by, backend=backend))
        if temperature is None and compare != "qk":
            temperature = part_temperature(found, compare, near)
        of = seen.attention if compare == "qk" else found
        A = cross_map(of, of, compare=compare, temperature=temperature, backend=backend)
        return [(compare, walk_segments(A, find_atoms(near), count=count, seed=seed))]
    near, objects = image_objects(
        seen, temperature=temperature, count=count, backend=backend, seed=seed
    )
    fine = likeness(found, part_temperature(found, likeness_of(found), near), backend=backend)
    made = walk_segments(fine, find_atoms(near), seed=seed)
    parts = nested(objects.tokens, made.tokens, found.grid)
    pieces = connected(parts, objects.tokens, found.grid)
    pieces = without_single(pieces, objects.tokens, fine)
    return [("objects", objects), ("parts", told_by(fine, pieces))]


def image_objects(
    seen: Seen,
    *,
    temperature: float | None = None,
    count: int | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> tuple[Tensor, Segmentation]:
    """The nearest other token of each by likeness, [N], and the image's objects."""
    like = likeness(seen.likeness, OBJECTS, backend=backend)
    near = nearest_tokens(like)
    atoms = find_atoms(near)
    rough = walk_segments(like, atoms, seed=seed)
    if count is not None and rough.count < count:
        rough = walk_segments(like, atoms, count=count, seed=seed)
    of = seen.attention
    attention = cross_map(of, of, compare="qk", temperature=temperature, backend=backend)
    A = AttentionMap.average([attention, like], [1 - LIKE_STEPS, LIKE_STEPS])
    return near, object_segments(A, rough, count=count, seed=seed)


def _of_map(A: AttentionMap, count: int | None, seed: int) -> Segments:
    check_square("segment", A.shape)
    if A.shape[0] != 1:
        raise ValueError(f"the map has a batch of {A.shape[0]}; wanted the map of one image")
    grid = need_grid("query_grid", A.query_grid, A.shape[1], "segment")
    if count is not None and count > A.shape[1]:
        raise ValueError(f"count={count}: the map has {A.shape[1]} tokens; wanted at most as many")
    with torch.no_grad():
        made = walk_segments(A, find_atoms(nearest_tokens(A)), count=count, seed=seed)
        return _finish(None, grid, [("segments", made)], False)


def _finish(
    image: Image | None,
    grid: tuple[int, int],
    levels: list[tuple[str, Segmentation]],
    boundaries: bool,
) -> Segments:
    """Levels with their pixels, and how they hang together."""
    size = grid if image is None else (int(image.shape[0]), int(image.shape[1]))
    voters = patches(image) if boundaries and image is not None else None
    made: list[Level] = []
    for name, found in levels:
        labels = pixel_labels(found.share, grid, size, voters)
        own = found.share[torch.arange(len(found.tokens)), torch.from_numpy(found.tokens)]
        parents = None
        if made:
            above = made[-1]
            votes = np.zeros((found.count, above.count), dtype=np.int64)
            np.add.at(votes, (found.tokens, above.tokens), 1)
            parents = votes.argmax(1)
        made.append(
            Level(
                name=name,
                tokens=found.tokens,
                labels=labels,
                parents=parents,
                codelength=found.codelength,
                alone=found.alone,
                confidence=own.numpy(),
                boundary=borders(labels),
            )
        )
    return Segments(image, grid, tuple(made))
