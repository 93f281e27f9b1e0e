"""Segments of a collection: the same label in two images is the same part.

    co = fm.cosegment(["one.jpg", "two.jpg", "three.jpg"])
    co.labels[0]          # [h, w] of the first image
    co.parts              # where each part is seen, and where not
    co.match(0, 1)        # points of the parts that both show

One walk goes over the tokens of all n images: from a token of image s it chooses the image to go
to, each as likely as the other, and then a token of it by A_st, features on features. A link counts
less where its target is overloaded: what shows a part that another image lacks heaps up there on
what is least unlike it (the mapping density of the note's round trip). First each image falls into
parts of its own objects (:mod:`flashmaps.segmentation.segment`), what lies around things whole. The
flows between all of them are one small graph, clustered by the map equation. Then every token goes
to the label that it flows to most, over all images, twice. Nothing is forced: an image has the
labels that its tokens flow to.

Memory is that of the features, of one map at a time, and of (parts of all images)^2 numbers, which
are joined within their images where there are more than 4096; time grows with n^2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.arguments import whole
from flashmaps.diffusion.features import BUILTIN, Features
from flashmaps.maps.attention_map import AttentionMap
from flashmaps.maps.backends.choice import check_name
from flashmaps.maps.groups import group_flows, one_hot
from flashmaps.maps.statistics import mapping_density, round_trip
from flashmaps.matching.cross_map import cross_map
from flashmaps.segmentation.boundaries import patches, pixel_labels
from flashmaps.segmentation.collection import CoSegments, Part
from flashmaps.segmentation.map_equation import compact, merge_to, shortest
from flashmaps.segmentation.nesting import nested
from flashmaps.segmentation.seen import Seen, as_seen
from flashmaps.segmentation.segment import image_objects, likeness, see_objects
from flashmaps.segmentation.temperatures import link_temperature
from flashmaps.segmentation.walk import atom_flows, find_atoms, symmetric, walk_segments

_SWEEPS = 2  # of all tokens to the labels that they flow to
_NODES = 4096  # of all images; their flows are a square matrix

# Scores of a round trip that can weigh the links between images; see `evidence`.
EVIDENCE = ("density", "return_probability", "inverse_entropy")


def cosegment(
    images: Sequence[Any],
    *,
    model: Any = BUILTIN,
    layers: str | Iterable[str] | None = None,
    timestep: int | Sequence[int] | None = None,
    seeds: int | Sequence[int] | None = None,
    size: int | tuple[int, int] | None = None,
    count: int | None = None,
    evidence: str | Sequence[str] = "density",
    boundaries: bool = True,
    backend: str = "auto",
    seed: int = 0,
    progress: bool = False,
) -> CoSegments:
    """Segments that mean the same in every image of a collection.

    Args:
        images: two or more, each as for :func:`flashmaps.match`; or :class:`Features` of each, from
            one model and with the same layers, best with ``outputs=True``; or
            :class:`flashmaps.segmentation.seen.Seen` of each.
        model, layers, timestep, seeds, size: as for :func:`flashmaps.segment`; what is left out is
            the model's own.
        count: how many labels in all, for who knows; default: as many as make the code shortest.
        evidence: scores of the round trip s -> t -> s that weigh the links between images, none
            (``()``), one or several of "density", "return_probability" and "inverse_entropy", see
            :func:`link_weights`. Density takes one more pass over every map, the others two.
            ``flashmaps eval cosegments`` shows what each is worth.
        boundaries: find borders at pixels in the images, as :func:`flashmaps.segment` does.
        backend: what computes the maps; see :func:`flashmaps.maps.backends.choice`.
        seed: of the order of moves.
        progress: show bars.

    Raises ValueError for arguments out of range, before the model runs.
    """
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise ValueError("images must be a list of images; for a single one there is fm.segment")
    if len(images) < 2:
        raise ValueError(f"a collection has two images at least, got {len(images)}")
    if count is not None:
        count = whole("count", count, 1)
    seed = whole("seed", seed, 0)
    check_name(backend)
    names = (evidence,) if isinstance(evidence, str) else tuple(evidence)
    for each in names:
        if each not in EVIDENCE:
            raise ValueError(f"evidence {each!r} is not known; choose from {', '.join(EVIDENCE)}")
    given = [isinstance(each, (Features, Seen)) for each in images]
    if any(given) and not all(given):
        raise ValueError("images holds Features and images: give one or the other")
    if all(given):
        sets = [as_seen(each) for each in images]
    else:
        sets = see_objects(
            model, images, layers=layers, timestep=timestep, seeds=seeds, size=size,
            progress=progress,
        )  # fmt: skip
    with torch.no_grad():
        return _cosegment(sets, count, names, boundaries, backend, seed, progress)


def link(of: Features, to: Features, temperature: float, *, backend: str = "auto") -> AttentionMap:
    """A_st of the collection's walk: features on features, or keys on keys."""
    compare = "kk" if of.output is None or to.output is None else "features"
    return cross_map(of, to, compare=compare, temperature=temperature, backend=backend)


def link_weights(
    of: Features, to: Features, temperature: float, names: Sequence[str], *, backend: str = "auto"
) -> tuple[Tensor, Tensor] | None:
    """How far to trust what goes from each token of s, and what arrives at each token of t.

    (a [N_s], b [N_t]): the link i - j counts a_i A_ij b_j. With f(i) = argmax_j A_st[i, j]:

    - "return_probability": a_i = R_ii / max R: does a walk that went there come back?
    - "inverse_entropy": b_j = 1 - IME(j) / log N_s: does j know where it came from?
    - "density": b_j = 1 / max(1, MD(j)): an overloaded target counts as one.
    """
    if not names:
        return None
    if tuple(names) == ("density",):  # one map is enough
        A = link(of, to, temperature, backend=backend)
        ones = torch.ones(A.shape[1], dtype=A.dtype, device=A.device)
        return ones, 1 / mapping_density(A)[0].to(ones).clamp_min(1)
    there_and_back = (link(*ends, temperature, backend=backend) for ends in ((of, to), (to, of)))
    trip = round_trip(*there_and_back)
    here = torch.ones_like(trip.return_probability[0])
    there = torch.ones_like(trip.inverse_entropy[0])
    if "return_probability" in names:
        back = trip.return_probability[0]
        here = here * back / back.max().clamp_min(1e-12)
    if "inverse_entropy" in names:
        there = there * (1 - trip.inverse_entropy[0] / np.log(max(len(here), 2))).clamp_min(0)
    if "density" in names:
        there = there / trip.density[0].to(there).clamp_min(1)
    return here, there


class Links:
    """Maps between all images of a collection, one at a time, weighed by evidence.

    The walk chooses the image first, so that blocks count alike, but for what evidence takes from
    their links.
    """

    def __init__(
        self, sets: Sequence[Features], temperature: float, evidence: Sequence[str], backend: str
    ) -> None:
        self.sets, self.temperature = sets, temperature
        self.evidence, self.backend = tuple(evidence), backend

    def __iter__(self) -> Iterator[tuple[int, int, AttentionMap, tuple[Tensor, Tensor] | None]]:
        for s, of in enumerate(self.sets):
            for t, to in enumerate(self.sets):
                weights = None
                if s != t:
                    weights = link_weights(
                        of, to, self.temperature, self.evidence, backend=self.backend
                    )
                yield s, t, link(of, to, self.temperature, backend=self.backend), weights

    def flows(self, nodes: Sequence[np.ndarray], progress: bool = False) -> np.ndarray:
        """Flows between the nodes of all images: [sum of nodes] squared, symmetric, sums to 1."""
        ends = np.cumsum([0, *(int(each.max()) + 1 for each in nodes)])
        flow = np.zeros((ends[-1], ends[-1]), dtype=np.float32)
        labels = [torch.from_numpy(each) for each in nodes]
        for s, t, A, weights in _bar(self, len(nodes) ** 2, "flows", progress):
            if weights is None:
                block = group_flows(A, labels[s], labels[t])[0]
            else:
                here, there = weights
                x = one_hot(labels[t].to(A.device), int(ends[t + 1] - ends[t]), A.dtype)
                out = (A @ (x * there[None, :, None]))[0] * here[:, None]
                block = torch.zeros(int(ends[s + 1] - ends[s]), out.shape[1], dtype=out.dtype)
                block.index_add_(0, labels[s], out.cpu())
            block = block / len(labels[s])  # 1 in all, less what evidence takes
            flow[ends[s] : ends[s + 1], ends[t] : ends[t + 1]] = block.cpu().numpy()
        return symmetric(torch.from_numpy(flow))

    def shares(self, tokens: Sequence[np.ndarray], progress: bool = False) -> list[Tensor]:
        """What share of each token's flow, to all images and from them, goes to each label."""
        k = max(int(each.max()) for each in tokens) + 1
        hot = [one_hot(torch.from_numpy(each), k, torch.float32) for each in tokens]
        total = [torch.zeros(len(each), k) for each in tokens]
        for s, t, A, weights in _bar(self, len(tokens) ** 2, "tokens", progress):
            x, y = hot[t].to(A.device, A.dtype), hot[s].to(A.device, A.dtype)
            if weights is None:
                there, back = (A @ x)[0], (A.mT @ y)[0]
            else:
                a, b = (each[:, None] for each in weights)
                there, back = (A @ (x * b))[0] * a, (A.mT @ (y * a))[0] * b
            total[s] += there.float().cpu()
            total[t] += back.float().cpu()
        return [each / each.sum(1, keepdim=True).clamp_min(1e-12) for each in total]


def _bar(links: Links, total: int, name: str, progress: bool) -> Iterable[Any]:
    from tqdm.auto import tqdm

    return tqdm(links, total=total, desc=name, disable=not progress)


def _cosegment(
    seen: list[Seen],
    count: int | None,
    evidence: tuple[str, ...],
    boundaries: bool,
    backend: str,
    seed: int,
    progress: bool,
) -> CoSegments:
    found = [image_objects(each, backend=backend, seed=seed) for each in seen]
    sets = [each.likeness for each in seen]
    compare = "kk" if any(each.output is None for each in sets) else "features"
    temperature = link_temperature(sets, compare, [near for near, _ in found])
    nodes = []
    for each, (near, objects) in zip(sets, found, strict=True):
        like = likeness(each, temperature, backend=backend)
        fine = walk_segments(like, find_atoms(near), seed=seed)
        own = nested(objects.tokens, fine.tokens, each.grid)
        nodes.append(_at_most(max(2, _NODES // len(sets)), own, like))
    ends = np.cumsum([0, *(int(each.max()) + 1 for each in nodes)])
    if count is not None and count > ends[-1]:
        raise ValueError(f"count={count}: the images have {ends[-1]} segments to name, not more")
    links = Links(sets, temperature, evidence, backend)
    flow = links.flows(nodes, progress)
    groups = shortest(flow, np.random.default_rng(seed))
    if count is not None:
        start = groups if groups.max() + 1 >= count else np.arange(len(flow))
        groups = merge_to(flow, start, count)
    tokens = [groups[ends[i] : ends[i + 1]][each] for i, each in enumerate(nodes)]
    for _ in range(_SWEEPS):
        shares = links.shares(tokens, progress)
        swept = [each.argmax(1).numpy() for each in shares]
        if count is not None and len(np.unique(np.concatenate(swept))) < count:
            break
        tokens = swept
    return _result(sets, tokens, shares, boundaries)


def _at_most(count: int, nodes: np.ndarray, like: AttentionMap) -> np.ndarray:
    """Nodes of one image joined, those whose border costs least, until there are so many."""
    if int(nodes.max()) < count:
        return nodes
    flow = atom_flows(like, nodes)
    return merge_to(flow, np.arange(len(flow)), count)[nodes]


def _result(
    sets: list[Features], tokens: list[np.ndarray], shares: list[Tensor], boundaries: bool
) -> CoSegments:
    """Names without gaps, pixels, and what each part is."""
    used, inverse = np.unique(np.concatenate(tokens), return_inverse=True)
    names = compact(inverse)
    order = np.empty(len(used), dtype=np.int64)  # the old label that each new one had
    order[names] = used[inverse]
    cuts = np.cumsum([len(each) for each in tokens])[:-1]
    tokens = np.split(names, cuts)
    kept = torch.from_numpy(order)
    labels, confidence = [], []
    for found, own, share in zip(sets, tokens, shares, strict=True):
        share = share[:, kept]
        size = (int(found.image.shape[0]), int(found.image.shape[1]))
        voters = patches(found.image) if boundaries else None
        labels.append(pixel_labels(share, found.grid, size, voters))
        confidence.append(share[torch.arange(len(own)), torch.from_numpy(own)].numpy())
    parts = []
    for number in range(len(order)):
        areas = np.array([float((each == number).mean()) for each in tokens])
        vectors = torch.cat(
            [_vectors(found)[own == number] for found, own in zip(sets, tokens, strict=True)]
        )
        parts.append(
            Part(
                id=number,
                shares=areas,
                absent=tuple(int(i) for i in np.flatnonzero(areas == 0)),
                prototype=torch.nn.functional.normalize(vectors.mean(0), dim=0).numpy(),
                border=_on_the_frame(sets, tokens, number),
            )
        )
    return CoSegments(
        images=tuple(found.image for found in sets),
        sets=tuple(sets),
        labels=tuple(labels),
        tokens=tuple(tokens),
        parts=tuple(parts),
        confidence=tuple(confidence),
    )


def _vectors(found: Features) -> Tensor:
    """[N, c], what tokens are compared by, of length 1."""
    x = found.key if found.output is None else found.output
    flat = x[0].permute(1, 0, 2).flatten(1).float().cpu()
    return torch.nn.functional.normalize(flat, dim=-1)


def _on_the_frame(sets: list[Features], tokens: list[np.ndarray], number: int) -> float:
    """Of the images' outermost tokens, the share that has this label."""
    on, whole_frame = 0, 0
    for found, own in zip(sets, tokens, strict=True):
        plane = own.reshape(found.grid) == number
        frame = np.ones(found.grid, dtype=bool)
        frame[1:-1, 1:-1] = False
        on += int(plane[frame].sum())
        whole_frame += int(frame.sum())
    return on / whole_frame
