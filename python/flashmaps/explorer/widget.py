"""The view in a notebook: the same page, asking this process in place of a server."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flashmaps.diffusion.features import BUILTIN, Features, load_model
from flashmaps.explorer.packing import unpack
from flashmaps.explorer.pictures import Picture, picture
from flashmaps.explorer.session import Gone, Session
from flashmaps.explorer.view import Model, View
from flashmaps.matching.options import COMPARE, NORMALIZE, MatchOptions
from flashmaps.matching.result import Match
from flashmaps.matching.settings import MatchSettings
from flashmaps.segmentation.seen import Seen, as_seen

STATIC = Path(__file__).parent / "static"
_MODULES = (
    "draw.js", "template.js", "telling.js", "pictures.js", "looking.js", "pins.js", "collection.js",
    "over.js", "painting.js", "saving.js", "hands.js", "view.js", "widget.js",
)  # fmt: skip


class MatchModel(Model):
    """Stands in for a model where a match is all there is: what it saw, and no more."""

    def __init__(self, match: Match) -> None:
        self.name = "this match"
        here = match.source
        self.layers = here.layers
        steps = here.timestep if isinstance(here.timestep, tuple) else (here.timestep,)
        options = {name: getattr(match.options, name) for name in MatchOptions.__dataclass_fields__}
        self.own = MatchSettings(**options, layers=here.layers, timestep=steps, seeds=here.seeds)
        self.timesteps = max(steps) + 1
        self.size = max(here.input_size)
        self._match = match

    def told(self) -> dict[str, Any]:
        """For the page: as a model tells it, with nothing to choose that takes another pass."""
        own = self.own
        compare = [c for c in COMPARE if c != "features" or self._match.source.output is not None]
        return {
            "name": self.name, "layers": list(self.layers), "timesteps": self.timesteps,
            "sizes": [self.size], "compare": compare, "normalize": list(NORMALIZE),
            "own": {
                "layers": list(self.layers), "timestep": list(own.timesteps), "size": self.size,
                "compare": own.compare, "temperature": own.temperature,
                "normalize": own.normalize,
            },
        }  # fmt: skip

    def sizes(self) -> list[int]:
        """The one that the match was made at."""
        return [self.size]

    def see(self, pictures: list[Picture], view: View, *, outputs: bool) -> list[Features]:
        """What the match saw. Raises ValueError for anything else."""
        if view.layers not in (None, self.layers) or view.timestep not in (
            None,
            self.own.timesteps,
        ):
            raise ValueError("a match has the layers and timesteps it was made with; see images")
        known = {0: self._match.source, 1: self._match.target}
        found = [None if each.place is None else known[each.place] for each in pictures]
        if any(each is None for each in found):
            raise ValueError("a match knows its own two pictures; give fm.explore the images")
        return [each for each in found if each is not None]

    def sight(self, one: Picture, view: View) -> Seen:
        """What the match saw of a picture, for all that segments read."""
        return as_seen(self.see([one], view, outputs=True)[0])

    @property
    def pipe(self) -> Any:
        """Raises ValueError: there is none."""
        raise ValueError("a match has no model; give fm.explore the images and model=")


def explore(of: Any, target: Any = None, *, model: Any = BUILTIN) -> Any:
    """Point at pictures in a notebook: the view of ``flashmaps explore`` as a widget.

    Args:
        of: a :class:`flashmaps.Match`, whose own maps are shown; or an image, or a list of images,
            each anything that :func:`flashmaps.match` takes.
        target: a second image, where ``of`` is one.
        model: for images: anything :func:`flashmaps.match` takes. A match needs none.

    Returns an anywidget, shown where it is the last line of a cell. Rows of the maps are computed
    in this process, as the pointer moves.

    Raises ImportError without the package anywidget, ValueError for images that cannot be read.
    """
    try:
        import anywidget  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"fm.explore needs anywidget ({error}); install it with: "
            "pip install 'flashmaps[explore]'"
        ) from error
    if isinstance(of, Match):
        if target is not None:
            raise ValueError("a match has its target already; leave target out")
        both = (("source", of.source), ("target", of.target))
        shown = [picture(name, each.image) for name, each in both]
        for place, each in enumerate(shown):
            each.place = place
        return _widget()(Session(MatchModel(of), shown))
    images: Sequence[Any] = of if isinstance(of, (list, tuple)) else [of]
    images = [*images, *([] if target is None else [target])]
    if not images:
        raise ValueError("there is nothing to explore: give a match, or images")
    names = [
        Path(each).name if isinstance(each, (str, Path)) else f"image {i}"
        for i, each in enumerate(images)
    ]
    pictures = [picture(name, each) for name, each in zip(names, images, strict=True)]
    pipe = load_model(model)
    name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
    return _widget()(Session(Model(pipe, name), pictures if len(pictures) > 1 else pictures * 2))


def module() -> str:
    """The view as one JavaScript module: its files one after another, imports left out."""
    texts = [(STATIC / name).read_text("utf-8") for name in _MODULES]
    joined = "\n".join(re.sub(r"^import .*?;\n", "", text, flags=re.M) for text in texts)
    return re.sub(r"^export (?!default)", "", joined, flags=re.M)


@cache
def _widget() -> type:
    import anywidget

    class Explorer(anywidget.AnyWidget):
        """The widget; see :func:`explore`."""

        _esm = module()
        _css = (STATIC / "style.css").read_text("utf-8")

        def __init__(self, session: Session) -> None:
            super().__init__()
            self.session = session
            self.on_msg(self._asked)

        def _asked(self, _: Any, message: Any, buffers: list[Any]) -> None:
            """Answer a question of the page by a message of the same id."""
            number, name = message.get("id"), message.get("name", "")
            data = bytes(buffers[0]) if buffers else b""
            try:
                with torch.no_grad():
                    answer = self.session.answer(name, message.get("parameters", {}), data)
                values, found = unpack(answer)
                self.send({"id": number, "values": values}, [found])
            except Gone as gone:
                self.send({"id": number, "error": str(gone), "kind": "gone"})
            except (ValueError, ImportError) as error:
                self.send({"id": number, "error": str(error), "kind": "invalid"})
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                self.send({"id": number, "error": f"that failed: {error}", "kind": "failed"})

        def __repr__(self) -> str:
            names = ", ".join(each["name"] for each in self.session.listed())
            return f"Explorer({names}; show it as the last line of a notebook's cell)"

    return Explorer
