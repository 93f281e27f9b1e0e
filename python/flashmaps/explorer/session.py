"""One visitor: pictures, the ways they are looked at, and the answers to what a page asks."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from flashmaps.explorer import scripts
from flashmaps.explorer.generation import Generation, generate, words_of_picture
from flashmaps.explorer.packing import levels, pack, roots
from flashmaps.explorer.parameters import Parameters
from flashmaps.explorer.pictures import Picture, picture, uploaded
from flashmaps.explorer.view import Model, Pair

MOST_PICTURES = 24
MOST_LOOKS = 3  # pairs that are kept for a visitor
_SEGMENT_SIDE = 384  # pixels of the labels that the page gets

# Statistics of a match that lie over a picture: of which side, what they are called, in what unit.
STATISTICS = {
    "entropy": ("source", "Entropy", "nats"),
    "max": ("source", "Largest probability", ""),
    "confidence": ("source", "Confidence", ""),
    "cycle": ("source", "Cycle error", "of the side"),
    "return": ("source", "Return probability", ""),
    "spread": ("source", "Round-trip spread", "of the side"),
    "ime": ("target", "Inverse mapping entropy", "nats"),
    "density": ("target", "Mapping density", "tokens"),
    "nims": ("target", "NIMS", ""),
    "nims_log1p": ("target", "IME / log(1 + MD)", ""),
}

# Questions by the lane that answers them: those that run the model or whole maps, and quick ones.
SLOW = ("look", "statistic", "pin", "words", "segments", "collect", "generate", "upload")
QUICK = ("about", "image", "row", "others", "frame", "script", "forget")


class Gone(LookupError):
    """What was asked about is not here (any more); the page may make it anew."""


class Session:
    """What one visitor has, apart from all others.

    Args:
        model: the model that looks.
        pictures: those that are there from the start; they are shared, and never changed.
    """

    def __init__(self, model: Model, pictures: Sequence[Picture]) -> None:
        self.model = model
        self._pictures: OrderedDict[str, Picture] = OrderedDict(
            (f"p{i}", each) for i, each in enumerate(pictures)
        )
        self._own: set[str] = set()
        self._made = len(pictures)
        self._pairs: OrderedDict[str, Pair] = OrderedDict()
        self._generation: Generation | None = None
        self._lock = threading.Lock()  # two lanes answer one visitor

    def answer(self, name: str, given: Any, data: bytes = b"") -> bytes:
        """The packed answer to a question.

        Raises ValueError for parameters that cannot be used, :class:`Gone` for what is not here.
        """
        if name not in SLOW and name not in QUICK:
            raise Gone("there is no such question")
        if data and name != "upload":
            raise ValueError(f"{name} takes no bytes")
        parameters = Parameters(given)
        method: Callable[..., bytes] = getattr(self, f"_{name}")
        return method(parameters, data) if name == "upload" else method(parameters)

    # -- pictures ----------------------------------------------------------------------------------

    def _about(self, given: Parameters) -> bytes:
        given.done()
        statistics = {
            name: {"side": side, "label": label, "unit": unit}
            for name, (side, label, unit) in STATISTICS.items()
        }
        return pack(
            {
                "model": self.model.told(),
                "pictures": self.listed(),
                "statistics": statistics,
                "most_pictures": MOST_PICTURES,
            }
        )

    def listed(self) -> list[dict[str, Any]]:
        """Its pictures: id, name, size, and whether they are this visitor's own."""
        with self._lock:
            return [
                {
                    "id": key, "name": each.name, "height": each.image.shape[0],
                    "width": each.image.shape[1], "own": key in self._own,
                }
                for key, each in self._pictures.items()
            ]  # fmt: skip

    def _picture(self, key: str) -> Picture:
        with self._lock:
            found = self._pictures.get(key)
        if found is None:
            raise Gone("that picture is not here")
        return found

    def _image(self, given: Parameters) -> bytes:
        found = self._picture(given.text("picture", 20))
        given.done()
        return pack({"type": "image/png"}, found.shown)

    def add(self, new: Picture) -> str:
        """A picture of this visitor's own; its id."""
        with self._lock:
            if len(self._pictures) >= MOST_PICTURES:
                raise ValueError(
                    f"there are {MOST_PICTURES} pictures already, which is the most; remove one"
                )
            key = f"p{self._made}"
            self._made += 1
            self._pictures[key] = new
            self._own.add(key)
        return key

    def _upload(self, given: Parameters, data: bytes) -> bytes:
        name = given.text("name", 200)
        given.done()
        key = self.add(uploaded(name, data))
        return pack({"picture": key, "pictures": self.listed()})

    def _forget(self, given: Parameters) -> bytes:
        key = given.text("picture", 20)
        given.done()
        with self._lock:
            if key not in self._own:
                raise Gone("that picture is not yours to remove")
            gone = self._pictures.pop(key)
            self._own.discard(key)
            for look in [k for k, p in self._pairs.items() if gone in (p.source, p.target)]:
                del self._pairs[look]
        return pack({"pictures": self.listed()})

    # -- looking -----------------------------------------------------------------------------------

    def _look(self, given: Parameters) -> bytes:
        source = self._picture(given.text("source", 20))
        target = self._picture(given.text("target", 20))
        view = self.model.view(given)
        given.done()
        pair = Pair(self.model, source, target, view)
        key = secrets.token_hex(4)
        with self._lock:
            self._pairs[key] = pair
            while len(self._pairs) > MOST_LOOKS:
                self._pairs.popitem(last=False)
        here, there = pair.features["source"], pair.features["target"]
        return pack(
            {
                "look": key, "heads": pair.heads, "layers": list(here.layers),
                "source_grid": list(here.grid), "target_grid": list(there.grid),
                "compare": pair.options.compare, "backend": pair.map("source", "target").backend,
            }
        )  # fmt: skip

    def _pair(self, given: Parameters) -> Pair:
        key = given.text("look", 20)
        with self._lock:
            pair = self._pairs.get(key)
            if pair is not None:
                self._pairs.move_to_end(key)
        if pair is None:
            raise Gone("this way of looking is not kept any more")
        return pair

    def _row(self, given: Parameters) -> bytes:
        """Where a token looks: in its own picture, in the other, and where that looks back."""
        pair = self._pair(given)
        side = given.choice("side", ("source", "target")) or "source"
        token = pair.check_token(side, given.whole("token", 0, 1 << 30))
        given.done()
        other = "target" if side == "source" else "source"
        itself = pair.row(side, side, token)
        there = pair.row(side, other, token)
        best = int(there.argmax())
        back = pair.row(other, side, best)
        home = int(back.argmax())
        shares = there / there.sum().clamp_min(1e-30)
        entropy = float(-(shares * shares.clamp_min(1e-30).log()).sum())
        return pack(
            {
                "token": token, "side": side, "best": best, "home": home,
                "max": float(there.max()), "entropy": entropy,
                "sizes": [len(itself), len(there), len(back)],
                "distance": self._distance(pair, side, token, home),
            },
            roots(itself) + roots(there) + roots(back),
        )  # fmt: skip

    @staticmethod
    def _distance(pair: Pair, side: str, token: int, home: int) -> float:
        height, width = pair.features[side].grid
        down = (token // width - home // width) / height
        across = (token % width - home % width) / width
        return float(np.hypot(across, down))

    def _pin(self, given: Parameters) -> bytes:
        """The match of a token, how sure it is, and where the round trip ends."""
        pair = self._pair(given)
        side = given.choice("side", ("source", "target")) or "source"
        token = pair.check_token(side, given.whole("token", 0, 1 << 30))
        given.done()
        match, trip = pair.match, pair.match.round_trip
        if side == "source":
            best = int(match.forward[token])
            home = int(match.backward[best])
            place = match.place_of(token).tolist()
            confidence = float(match.confidence[token])
        else:
            best = int(match.backward[token])
            home = int(match.forward[best])
            place = match.place_of(token, "target").tolist()
            confidence = float(match.confidence[best])
        return pack(
            {
                "side": side, "token": token, "best": best, "home": home, "place": place,
                "confidence": confidence, "calibrated": match.calibrated,
                "distance": self._distance(pair, side, token, home),
                "hard_ims": float(trip.hard_ims[0]),
            }
        )  # fmt: skip

    def _statistic(self, given: Parameters) -> bytes:
        pair = self._pair(given)
        name = given.choice("name", tuple(STATISTICS))
        given.done()
        if name is None:
            raise ValueError(f"name is missing; wanted one of {', '.join(STATISTICS)}")
        side = STATISTICS[name][0]
        match, trip = pair.match, pair.match.round_trip
        values = {
            "entropy": lambda: match.entropy,
            "max": lambda: match.max_probability,
            "confidence": lambda: match.confidence,
            "cycle": lambda: trip.hard_distance[0],
            "return": lambda: trip.return_probability[0],
            "spread": lambda: trip.spread[0],
            "ime": lambda: trip.inverse_entropy[0],
            "density": lambda: trip.density[0],
            "nims": lambda: trip.nims[0],
            "nims_log1p": lambda: trip.nims_log1p[0],
        }[name]()
        data, low, high = levels(values)
        finite = values.float()[values.float().isfinite()]
        mean = float(finite.mean()) if len(finite) else float("nan")
        return pack(
            {
                "name": name, "side": side, "grid": list(pair.features[side].grid),
                "low": low, "high": high, "mean": mean,
            },
            data,
        )  # fmt: skip

    # -- a collection ------------------------------------------------------------------------------

    def _collect(self, given: Parameters) -> bytes:
        """Makes ready the rows of the source in every other picture."""
        pair = self._pair(given)
        given.done()
        with self._lock:
            others = {k: p for k, p in self._pictures.items() if p is not pair.source}
        outputs = pair.options.compare == "features"
        found = self.model.see([pair.source, *others.values()], pair.view, outputs=outputs)[1:]
        for key, each in zip(others, found, strict=True):
            pair.add(key, each)
        pair.others = tuple(others)
        return pack({"others": list(others), "grids": [list(each.grid) for each in found]})

    def _others(self, given: Parameters) -> bytes:
        """Where a token of the source looks in each picture of the collection."""
        pair = self._pair(given)
        token = pair.check_token("source", given.whole("token", 0, 1 << 30))
        given.done()
        rows = [pair.row("source", key, token) for key in pair.others]
        return pack(
            {
                "others": list(pair.others), "sizes": [len(row) for row in rows],
                "best": [int(row.argmax()) for row in rows], "max": [float(r.max()) for r in rows],
            },
            b"".join(map(roots, rows)),
        )  # fmt: skip

    # -- segments, words, generation ---------------------------------------------------------------

    def _segments(self, given: Parameters) -> bytes:
        from flashmaps.segmentation.segment import segment

        found = self._picture(given.text("picture", 20))
        view = self.model.view(given)
        given.done()
        made = segment(self.model.sight(found, view))
        height, width = made.labels.shape
        step = max(1, -(-max(height, width) // _SEGMENT_SIDE))
        shown = [level.labels[::step, ::step] for level in made.tree]
        return pack(
            {
                "size": list(shown[0].shape),
                "levels": [{"name": each.name, "count": each.count} for each in made.tree],
            },
            b"".join((labels % 256).astype(np.uint8).tobytes() for labels in shown),
        )

    def _words(self, given: Parameters) -> bytes:
        found = self._picture(given.text("picture", 20))
        prompt = given.text("prompt")
        view = self.model.view(given)
        given.done()
        if not prompt.strip():
            raise ValueError("prompt is empty; write what the picture shows")
        maps = words_of_picture(self.model, found, prompt, view)
        packed = [levels(maps[word].flatten()) for word in maps.words]
        return pack(
            {
                "words": maps.words, "grid": list(maps.grid),
                "low": [low for _, low, _ in packed], "high": [high for _, _, high in packed],
            },
            b"".join(data for data, _, _ in packed),
        )  # fmt: skip

    def _generate(self, given: Parameters) -> bytes:
        prompt = given.text("prompt")
        steps = given.whole("steps", 1, 50) or 8
        seed = given.whole("seed", 0, 2**31) or 0
        given.done()
        with self._lock:
            full = len(self._pictures) >= MOST_PICTURES
        if full:
            raise ValueError(f"there are {MOST_PICTURES} pictures already; remove one")
        made = generate(self.model.pipe, prompt, steps, seed)
        key = self.add(picture(f"{prompt[:60] or 'no prompt'} (seed {seed})", made.image))
        self._generation = made
        return pack(
            {
                "picture": key, "pictures": self.listed(), "steps": made.steps,
                "timesteps": made.timesteps, "layers": list(made.layers),
                "grids": [list(grid) for grid in made.grids],
                "means": made.means, "bounds": made.bounds,
            }
        )  # fmt: skip

    def _frame(self, given: Parameters) -> bytes:
        """Entropy of one layer at one step of the generation."""
        layer, step = given.whole("layer", 0, 1 << 16), given.whole("step", 0, 1 << 16)
        given.done()
        made = self._generation
        if made is None:
            raise Gone("nothing has been generated yet")
        if layer is None or step is None or layer >= len(made.layers) or step >= made.steps:
            raise ValueError(f"there are {len(made.layers)} layers and {made.steps} steps, from 0")
        values = made.entropy[layer][step]
        scaled = (values / max(made.bounds[layer], 1e-30)).clamp(0, 1)
        data = (1 + 254 * scaled).round().to(torch.uint8).numpy().tobytes()
        return pack({"grid": list(made.grids[layer]), "mean": float(values.mean())}, data)

    def _script(self, given: Parameters) -> bytes:
        """The Python that makes the picture that is seen."""
        pair = self._pair(given)
        side = given.choice("side", ("source", "target")) or "source"
        token = given.whole("token", 0, 1 << 30)
        statistic = given.choice("statistic", tuple(STATISTICS))
        prompt, word = given.text("prompt"), given.text("word")
        level = given.whole("level", 0, 9)
        layer, step = given.whole("layer", 0, 1 << 16), given.whole("step", 0, 1 << 16)
        given.done()
        if token is not None:
            pair.check_token(side, token)
        name, made = self.model.name, self._generation
        if layer is not None and step is not None:
            if made is None or layer >= len(made.layers) or step >= made.steps:
                raise Gone("that generation is not here")
            told = scripts.generation(name, made, layer, step)
        elif word:
            told = scripts.words(name, pair, prompt, word)
        elif level is not None:
            told = scripts.segments(name, pair, level)
        else:
            told = scripts.script(name, pair, side, token, statistic)
        return pack({"python": told})
