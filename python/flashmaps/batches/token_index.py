"""The images that are most like each one by their tokens, from an index of a library (faiss)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from flashmaps.diffusion.features import Features
from flashmaps.matching.options import COMPARE

TOKENS = 32  # of an image, evenly spaced
_FLAT = 2**16  # vectors up to which the index is exact
_LINKS = 32  # of a vector in the graph of a larger one
_SEARCHED = 128  # vectors that a search of the graph keeps in mind, at least


def token_vectors(features: Features, compare: str, most: int = TOKENS) -> np.ndarray:
    """[at most ``most``, H d] float32: unit vectors of evenly spaced tokens, heads side by side.

    Scaled by 1 / sqrt(H), so that their products are means over heads of cosines.
    """
    x = getattr(features, COMPARE[compare][1])[0].float()  # [H, N, d]
    chosen = torch.linspace(0, x.shape[1] - 1, min(most, x.shape[1])).round().long()
    unit = torch.nn.functional.normalize(x[:, chosen], dim=-1) / x.shape[0] ** 0.5
    return np.ascontiguousarray(unit.transpose(0, 1).flatten(1).cpu().numpy())


def nearest_by_tokens(
    sets: Iterable[Features], compare: str, number: int, *, flat: int = _FLAT
) -> list[tuple[int, int]]:
    """For each image, (it, one of the ``number`` images that look most like it), nearest first.

    Each of an image's tokens finds the tokens of other images that are nearest by cosine; an image
    scores the sum, over these tokens, of the best cosine that was found in it. Of equals the lowest
    number comes first. With more than ``flat`` tokens in all, the search goes through a graph
    (HNSW) and may miss some. The graph is built by one thread: the same images give the same pairs.

    Raises ImportError without faiss.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"search='tokens' needs faiss ({error}); install it with: "
            "pip install 'flashmaps[search]'"
        ) from error
    vectors = [token_vectors(each, compare) for each in sets]
    owner = np.repeat(np.arange(len(vectors)), [len(v) for v in vectors])
    number = min(number, len(vectors) - 1)
    index = _index(faiss, vectors, len(owner) <= flat)
    # Besides those of the image itself, enough that ``number`` others can be among them.
    most = min(len(owner), max(map(len, vectors)) + 4 * number)
    found = []
    for image, own in enumerate(vectors):
        cosines, places = index.search(own, most)
        score = np.zeros(len(vectors))
        for row, place in zip(cosines, places, strict=True):
            best = np.full(len(vectors), -np.inf)
            hits = place >= 0
            np.maximum.at(best, owner[place[hits]], row[hits])
            score += np.where(np.isfinite(best), best + 1, 0)  # what was not found says nothing
        score[image] = -np.inf
        order = np.argsort(-score, kind="stable")[:number]
        found += [(image, int(other)) for other in order]
    return found


def _index(faiss: Any, vectors: list[np.ndarray], exact: bool) -> Any:
    width = vectors[0].shape[1]
    if exact:
        index = faiss.IndexFlatIP(width)
    else:
        index = faiss.IndexHNSWFlat(width, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = max(_SEARCHED, 4 * TOKENS)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for each in vectors:
            index.add(each)
    finally:
        faiss.omp_set_num_threads(threads)
    return index
