"""How the map of two images is made and read: one frozen thing, with its defaults and its checks.

``compare="qk"`` is the note's way, A_st = softmax(scale Q_s K_t^T): where each source token looks
in the target. Queries and keys live in different spaces, so that what a token looks at need not be
what it looks like. "kk" compares keys with keys, "qq" queries with queries, and "features" what the
layers' transformer blocks put out, all by cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypedDict

from flashmaps.arguments import number
from flashmaps.matching.confidence import Calibration
from flashmaps.matching.readout import check_readout, check_window

NORMALIZE = ("block", "rows", "columns")

# How a point that is not a token's centre is carried, and how if nothing is said.
BETWEEN = ("token", "bilinear", "query")
_BETWEEN = {
    "hard": "token",
    "soft": "bilinear",
    "window": "bilinear",
    "parabola": "bilinear",
    "consensus": "query",
}

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


# A temperature below it would make scores that float32 cannot hold; a row is one key long before.
COLDEST = 1e-12


class MapKeywords(TypedDict, total=False):
    """Fields of :class:`MatchOptions` that make the map, as keywords of a function."""

    compare: str
    temperature: float | None
    normalize: str


class MatchKeywords(MapKeywords, total=False):
    """Fields of :class:`MatchOptions` as keywords of a function."""

    readout: str
    window: int
    between: str | None
    calibration: Calibration | None


@dataclass(frozen=True)
class MatchOptions:
    """How the map of two images is made, and how its rows become places and a confidence.

    Functions that take one take its fields as keywords too, which win over it.

    Attributes:
        compare: "qk", "kk", "qq" or "features": what is compared with what.
        temperature: of the softmax, at least COLDEST; None: 1 for "qk", else
            ``flashmaps.matching.cross_map.TEMPERATURE``.
        normalize: "block", "rows" or "columns", see :class:`flashmaps.AttentionMap`.
        readout: how a row becomes a place: "hard", "soft", "window", "parabola" or "consensus", see
            :func:`flashmaps.matching.readout.read`.
        window: tokens to each side that readouts "window" and "consensus" average over, at least 1.
        between: how a point between token centres is carried: "token", "bilinear" or "query", see
            :meth:`flashmaps.Match.transfer`; None: what suits the readout.
        calibration: of the confidence, for these very options; None: there is none.

    Raises ValueError, naming the field, for a value that cannot be used.
    """

    compare: str = "kk"
    temperature: float | None = None
    normalize: str = "block"
    readout: str = "hard"
    window: int = 1
    between: str | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.compare not in COMPARE:
            raise ValueError(
                f"compare={self.compare!r} is not known; choose 'qk' (attention), 'kk' (keys with "
                "keys), 'qq' (queries with queries) or 'features' (what the blocks put out)"
            )
        if self.temperature is not None:
            number("temperature", self.temperature, least=COLDEST)
        if self.normalize not in NORMALIZE:
            wanted = ", ".join(map(repr, NORMALIZE))
            raise ValueError(f"normalize={self.normalize!r}; wanted {wanted}")
        check_readout("readout", self.readout)
        check_window(self.window)
        if self.between not in (None, *BETWEEN):
            raise ValueError(f"between={self.between!r}; wanted 'token', 'bilinear' or 'query'")

    @property
    def carried_by(self) -> str:
        """How points are carried: ``between`` where it is given, else what suits the readout."""
        return _BETWEEN[self.readout] if self.between is None else self.between

    def with_given(self, **given: Any) -> Self:
        """With the arguments that are not None in place of these.

        A temperature belongs to what is compared: another comparison drops it. Whatever changes the
        map or where its rows point drops the calibration.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        if chosen.get("compare", self.compare) != self.compare:
            chosen.setdefault("temperature", None)
        made = replace(self, **chosen)  # which checks them
        if all(_plain(value) == _plain(getattr(self, name)) for name, value in chosen.items()):
            return self
        return replace(made, calibration=None)

    def about(self, compare: str) -> MatchOptions:
        """These where they are about this comparison, else the plain ones for it."""
        return self if compare == self.compare else MatchOptions(compare)

    def to_json(self) -> dict[str, Any]:
        """As plain values, for :meth:`from_json`."""
        plain = {each.name: _plain(getattr(self, each.name)) for each in fields(self)}
        calibration = plain.pop("calibration")
        return {**plain, "confidence": None if calibration is None else calibration.to_json()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """From plain values. Raises ValueError that says what is wrong with them."""
        given: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in found.items()
        }
        confidence = given.pop("confidence", None)
        unknown = set(given) - {each.name for each in fields(cls)} | set(given) & {"calibration"}
        if unknown:
            raise ValueError(f"its settings hold {sorted(unknown)}, which are not known")
        calibration = None if confidence is None else Calibration.from_json(confidence)
        return cls(**given, calibration=calibration)


def map_options(options: MatchOptions | None, given: MapKeywords) -> MatchOptions:
    """``options`` with those given in place of its own, for what makes a map and reads nothing.

    Raises TypeError for a keyword that says nothing about the map.
    """
    unknown = set(given) - set(MapKeywords.__annotations__)
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: not among the arguments that make a map")
    return replace(options or MatchOptions(), **given)


def comparisons(compare: str | Sequence[str]) -> tuple[str, ...]:
    """One comparison or several as a tuple, each once. ValueError for none or an unknown one."""
    chosen = (compare,) if isinstance(compare, str) else tuple(dict.fromkeys(compare))
    for each in chosen:
        MatchOptions(each)  # which checks it
    if not chosen:
        raise ValueError(f"compare is empty; give at least one of {', '.join(COMPARE)}")
    return chosen


def _plain(value: Any) -> Any:
    """As JSON will have it, one whole number for several that are one."""
    if isinstance(value, (list, tuple)):
        return [int(each) if not isinstance(each, str) else each for each in value]
    return value
