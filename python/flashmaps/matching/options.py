"""The arguments of a match that say how maps are compared and read, and which values they take."""

from __future__ import annotations

from flashmaps.matching.readout import check_readout, check_window

NORMALIZE = ("block", "rows", "columns")

# How a point that is not a token's centre is carried, and how if nothing is said.
BETWEEN = ("token", "bilinear", "query")
_BETWEEN = {"hard": "token", "soft": "bilinear", "window": "bilinear", "parabola": "bilinear"}

# What is multiplied with what: (of the one image, of the other).
COMPARE = {
    "qk": ("query", "key"),
    "kk": ("key", "key"),
    "qq": ("query", "query"),
    "features": ("output", "output"),
}
READING = {
    "qk": "queries on keys",
    "kk": "keys on keys",
    "qq": "queries on queries",
    "features": "features on features",
}


def check_options(
    compare: str | None = None,
    temperature: float | None = None,
    normalize: str | None = None,
    readout: str | None = None,
    window: int | None = None,
    between: str | None = None,
) -> None:
    """ValueError, naming the argument, for one that is given and cannot be used."""
    if compare is not None and compare not in COMPARE:
        raise ValueError(
            f"compare={compare!r} is not known; choose 'qk' (attention), 'kk' (keys with keys), "
            "'qq' (queries with queries) or 'features' (what the blocks put out)"
        )
    if temperature is not None and not (
        isinstance(temperature, (int, float)) and 0 < temperature < float("inf")
    ):
        raise ValueError(f"temperature={temperature!r}; wanted a number above 0")
    if normalize is not None and normalize not in NORMALIZE:
        raise ValueError(f"normalize={normalize!r}; wanted {', '.join(map(repr, NORMALIZE))}")
    if readout is not None:
        check_readout("readout", readout)
    if window is not None:
        check_window(window)
    if between is not None:
        check_between(between)


def between_of(readout: str, between: str | None) -> str:
    """How points are carried: ``between`` where it is given, else what suits the readout."""
    return _BETWEEN[readout] if between is None else between


def check_between(between: object) -> None:
    """ValueError unless ``between`` is one of BETWEEN."""
    if between not in BETWEEN:
        raise ValueError(f"between={between!r}; wanted 'token', 'bilinear' or 'query'")
