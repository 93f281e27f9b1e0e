"""Where in the image each word of the prompt is attended to.

    with fm.capture(pipe, kind="cross", reduce="image_to_text", guidance="conditional") as rec:
        image = pipe(prompt).images[0]
    maps = fm.word_maps(rec, prompt, pipe)
    maps["cat"]                          # [H, W]
    maps.overlay("red car", image).save("red_car.png")

Models with joint attention (SD3, Flux, Qwen) are captured with ``kind="joint"``.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmaps.arguments import as_whole, number, sides, switch, unicode_text, whole
from flashmaps.diffusion.animation import maps_of_frames, write_animation
from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.guidance import UNTOLD
from flashmaps.diffusion.images import load_image
from flashmaps.diffusion.prompts import Span, Spelling, find, spell, spellings, words_of
from flashmaps.diffusion.selection import of_guidance
from flashmaps.maps.grids import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MERGES = ("mean", "sum")
# Names of tokens that are no words.
_MARKS = {"<start>": "start", "<end>": "end", "<padding>": "padding"}
_GUIDANCE = ("conditional", "unconditional")


class WordError(KeyError):
    """A word that has no map: it is not in the prompt, or was cut off."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError alone would put it in quotes


@dataclass(frozen=True, eq=False)
class WordMaps:
    """Heat maps of the words of one prompt over one image; made by :func:`word_maps`.

    Attributes:
        prompt: the prompt.
        tokens: the model's text tokens as strings, special ones and padding included.
        token_maps: ``[tokens, H, W]``, of videos ``[tokens, frames, H, W]``; float32 on the CPU.
            The probability with which each place of the image attends to each token, averaged over
            heads, layers and steps. In models with cross-attention they sum to 1 over tokens; with
            joint attention the rest falls on the image itself.
        merge: how several tokens make one map; see :meth:`of`.
    """

    prompt: str
    tokens: tuple[str, ...]
    token_maps: Tensor
    merge: str
    _spellings: tuple[Spelling, ...]

    @property
    def words(self) -> list[str]:
        """The different words of the prompt that the model got, in order."""
        return [word for word in words_of(self.prompt) if any(self._chosen(word, None))]

    @property
    def grid(self) -> Grid:
        """(height, width) of the maps."""
        height, width = self.token_maps.shape[-2:]
        return height, width

    def __getitem__(self, word: str) -> Tensor:
        return self.of(word)

    def __contains__(self, word: str) -> bool:
        return any(self._chosen(word, None))

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"WordMaps({', '.join(self.words)}; {tuple(self.token_maps.shape)})"

    def of(self, word: str, *, occurrence: int | None = None, merge: str | None = None) -> Tensor:
        """The heat map of a word, ``[H, W]``; ``maps[word]`` for short. Of videos [frames, H, W].

        Args:
            word: a word of the prompt, or several neighbouring ones. Upper and lower case are
                alike, and punctuation around it is not part of it. Or ``"<start>"``, ``"<end>"`` or
                ``"<padding>"``: the special tokens of a text, of every window of a long one.
            occurrence: which one, from 0, of a word that occurs several times; None takes all.
            merge: "mean" of the maps of the tokens that spell it: the probability of a token of
                this word. "sum": the probability that falls on the word. Default: as the maps were
                made. Where two text encoders stand one after the other (SD3: CLIP, then T5) the
                mean is that of both encoders' means; one that did not get the word does not count.

        Raises WordError, a KeyError, for a word that is not in the prompt or was cut off, and
        IndexError for an occurrence that is not there.
        """
        groups = [group for group in self.positions(word, occurrence) if group]
        if _merge(merge or self.merge) == "sum":
            return self.token_maps[[at for group in groups for at in group]].sum(0)
        return torch.stack([self.token_maps[group].mean(0) for group in groups]).mean(0)

    def positions(self, word: str, occurrence: int | None = None) -> list[list[int]]:
        """The tokens of a word, as indices of ``tokens``: one list for each text encoder."""
        groups = self._chosen(word, occurrence)
        if any(groups):
            return groups
        if (name := _MARKS.get(word)) is not None:
            marked = [each.marked(name) for each in self._spellings]
            if any(marked):
                return marked
            raise WordError(f"this text has no token that is its {name}: {word!r}")
        if not any(find(word, each.text) for each in self._spellings):
            raise WordError(
                f"{word!r} is not in the prompt; its words are: {', '.join(self.words) or '(none)'}"
            )
        longest = max(self._spellings, key=lambda each: len(each.tokens))
        raise WordError(
            f"{word!r} was cut off: the model takes {len(longest.tokens)} tokens, and the prompt "
            f"has {sum(start < end for start, end in longest.uncut)} besides the special ones; "
            "shorten it, or put the word first"
        )

    def _chosen(self, word: str, occurrence: int | None) -> list[list[int]]:
        return [
            sorted(
                {at for place in _places(word, each, occurrence) for at in each.positions(place)}
            )
            for each in self._spellings
        ]

    def overlay(
        self,
        word: str,
        image: Any,
        *,
        alpha: float = 0.5,
        cmap: str = "turbo",
        occurrence: int | None = None,
        frame: int | None = None,
    ) -> Any:
        """A word's heat map in colours over the image: a PIL image of the image's size.

        The map is stretched to 0..1 from its least to its greatest value, for the eye: to compare
        words, compare the maps.

        Args:
            image: the generated image: PIL, a path, or an array as in :func:`flashmaps.match`.
            alpha: weight of the colours, 0 to 1; the rest is the image.
            cmap: name of a matplotlib colour map.
            occurrence: as in :meth:`of`.
            frame: of a video, which frame of the maps; ``image`` is a picture of that time.
        """
        values = self.of(word, occurrence=occurrence)
        return overlaid(values, image, alpha=alpha, cmap=cmap, frame=frame)

    def plot(
        self,
        image: Any,
        words: Sequence[str] | None = None,
        *,
        alpha: float = 0.5,
        cmap: str = "turbo",
        same_scale: bool = False,
        frame: int | None = None,
    ) -> Figure:
        """The image and all words' heat maps over it, beside each other: a matplotlib Figure.

        Args:
            words: which words; default all of the prompt.
            same_scale: colours mean the same probability for every word; else each has its own
                scale. The titles give both ends.
            image, alpha, cmap, frame: as in :meth:`overlay`.
        """
        from matplotlib.figure import Figure

        picture = load_image(image)
        chosen = self.words if words is None else list(words)
        maps = {word: _frame(self.of(word), frame) for word in chosen}
        limits = {word: (float(each.min()), float(each.max())) for word, each in maps.items()}
        if switch("same_scale", same_scale) and limits:
            lows, highs = zip(*limits.values(), strict=True)
            limits = dict.fromkeys(limits, (min(lows), max(highs)))
        columns = min(4, len(maps) + 1)
        rows = -(-(len(maps) + 1) // columns)
        side = 3.0  # inches
        height = side * picture.shape[0] / picture.shape[1] + 0.5
        figure = Figure(figsize=(side * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        axes[0].imshow(picture)
        axes[0].set_title("image", fontsize=10, loc="left")
        for ax, (word, values) in zip(axes[1:], maps.items(), strict=False):
            low, high = limits[word]
            ax.imshow(_blend(picture, values, (low, high), alpha, cmap))
            ax.set_title(f"{word}\n{low:.2g} to {high:.2g}", fontsize=10, loc="left")
        return figure

    def animate(
        self,
        word: str,
        video: Sequence[Any],
        path: str | Path,
        *,
        fps: float = 8.0,
        alpha: float = 0.5,
        cmap: str = "turbo",
        occurrence: int | None = None,
    ) -> Path:
        """A word's heat maps over a video, frame by frame: a GIF, or MP4 where ffmpeg is.

        Args:
            video: the frames, pictures as in :meth:`overlay`; as many as the maps have, or more: a
                map stands for the frames that its latent frame is decoded to.
            path: ending in ``.gif`` or ``.mp4``; written whole or not at all.
            fps: frames each second.
            alpha, cmap, occurrence: as in :meth:`overlay`; one scale of colours for all frames.

        Raises ValueError for maps of an image, fewer pictures than maps and another ending,
        RuntimeError for an MP4 without ffmpeg.
        """
        values = self.of(word, occurrence=occurrence)
        if values.ndim == 2:
            raise ValueError("these are maps of an image, not of a video; see overlay()")
        if len(video) < len(values):
            raise ValueError(f"video has {len(video)} frames, but there are {len(values)} maps")
        limits = (float(values.min()), float(values.max()))
        frames = (
            _blend(load_image(picture), values[at], limits, alpha, cmap)
            for picture, at in zip(video, maps_of_frames(len(video), len(values)), strict=True)
        )
        return write_animation(path, ((each * 255 + 0.5).astype("uint8") for each in frames), fps)


def word_maps(
    record: Iterable[Entry],
    prompt: str,
    pipe: Any = None,
    *,
    tokenizer: Any = None,
    text_offset: int = 0,
    image: int = 0,
    guidance: str = "conditional",
    size: Grid | None = None,
    merge: str = "mean",
) -> WordMaps:
    """Heat maps of a prompt's words from captured attention of image tokens to text tokens.

    The probability P(text token | image token), averaged over heads, over the steps of each layer,
    then over layers, each of which weighs the same. Coarser layers are resampled first: bilinear
    between cell centres (``align_corners=False``), which keeps sums over tokens.

    Args:
        record: what :func:`flashmaps.capture` gave, or a part of it:
            ``rec.select("up_blocks.*")``. Of each layer either the statistic "image_to_text" or Q
            and K must have been kept; the map of one layer at a time is made. Layers that do not
            attend to text are passed over.
        prompt: the text of this image, as it was given to the pipeline. With several text encoders
            what the one attended to was given: ``prompt_3`` or ``prompt_2`` if SD3 or Flux had one.
        pipe: the pipeline, which knows its tokenizers. Known are those around UNets (SD1.5, SD2,
            SDXL, AnimateDiff), SD3, Flux, PixArt, Wan and Qwen-Image (not its editing).
        tokenizer, text_offset: for other models: a transformers tokenizer, and which text token is
            its first.
        image: index of the image in the batch, guidance not counted. (A bare model that was
            captured without guidance= does not tell of any: there the index counts both halves.)
        guidance: with classifier-free guidance, the "conditional" half, or the "unconditional" one
            with the negative prompt.
        size: (height, width) of the maps; default the finest grid among the layers.
        merge: "mean" or "sum" over the tokens of a word; see :meth:`WordMaps.of`.

    Raises ValueError, saying what is missing, for a record without attention to text, layers of
    unknown grid or of different texts, an image that is not in the batch; TypeError for a prompt
    that is not one text.
    """
    if not isinstance(prompt, str):
        raise TypeError(
            f"prompt must be the text of one image, got {prompt!r}; of a batch give the prompt of "
            f"the one that image= names"
        )
    _merge(merge)
    whole("image", image)
    entries = _attending(record, guidance)
    length = _one(entries, "text tokens", lambda entry: _size(entry.keys["text"]))
    text = unicodedata.normalize("NFC", unicode_text("prompt", prompt))
    if tokenizer is not None:
        if not 0 <= whole("text_offset", text_offset) < length:
            raise ValueError(f"text_offset={text_offset}: the model has {length} text tokens")
        spelt = [spell(tokenizer, text, length - text_offset, start=text_offset)]
    elif pipe is not None:
        spelt = spellings(pipe, text, length)
    else:
        raise TypeError("give the pipeline, or its tokenizer=, to find the words among the tokens")
    tokens = [""] * length
    for each in spelt:
        tokens[each.start : each.start + len(each.tokens)] = each.tokens
    maps = averaged(entries, image, size)
    return WordMaps(text, tuple(tokens), maps, merge, tuple(spelt))


def averaged(
    entries: list[Entry],
    image: int,
    size: Grid | None,
    *,
    part: str = "text",
    statistic: str = "image_to_text",
) -> Tensor:
    """Attention to a part of the keys, the mean over layers: [tokens, H, W], on the CPU.

    [tokens, frames, H, W] of a video. ``size``: (height, width); None: the finest grid's.
    """
    frames = _one(entries, "frames", lambda entry: entry.frames * entry.rows)
    means = _means(entries, image, part, statistic)
    size = _checked_size(size) or max(means, key=math.prod)
    maps = sum(_resampled(mean, frames, grid, size) for grid, mean in means.items())
    assert isinstance(maps, Tensor)
    return maps.cpu()


def _attending(record: Iterable[Entry], guidance: str) -> list[Entry]:
    """The entries in which the image attends to text, of the wanted half of guidance."""
    entries = list(record)
    attending = [each for each in entries if "image" in each.queries and "text" in each.keys]
    if not attending:
        kinds = ", ".join(sorted({each.kind for each in entries})) or "none at all"
        why = next((each.why for each in entries if each.why), "")
        raise ValueError(
            f"the record has no layer in which image tokens attend to text (it has: {kinds}); "
            + (why or "capture with kind='cross' or, where the model attends jointly, kind='joint'")
        )
    return chosen_entries(attending, guidance)


def chosen_entries(attending: list[Entry], guidance: str) -> list[Entry]:
    """The wanted part of guidance of each; ValueError where there is none."""
    if guidance not in _GUIDANCE:
        raise ValueError(f"guidance={guidance!r}; choose from {', '.join(_GUIDANCE)}")
    chosen = [half for each in attending if (half := of_guidance(each, guidance)) is not None]
    if not chosen:
        parts = sorted({str(each.guidance) for each in attending})
        if "unknown" in parts:
            raise ValueError(f"the record holds no {guidance} pass: {UNTOLD}")
        raise ValueError(
            f"the record holds no {guidance} pass (it has: {', '.join(parts)}); capture with "
            f"guidance={guidance!r}"
        )
    return chosen


def _means(
    entries: list[Entry], image: int, part_of_keys: str, statistic: str
) -> dict[Grid, Tensor]:
    """For each grid [frames * h * w, tokens]: its layers' part of the mean over all layers."""
    passes: Counter[str] = Counter()
    for entry in entries:
        passes[entry.layer] += entry.count
    means: dict[Grid, Tensor] = {}
    for entry in entries:
        if entry.grid is None:
            raise ValueError(
                f"layer {entry.layer!r}: the grid of its image tokens is not known; leave it out "
                "with rec.select(...)"
            )
        found = _attention_to(entry, image, part_of_keys, statistic)
        part = found * (entry.count / passes[entry.layer] / len(passes))
        so_far = means.get(entry.grid)
        means[entry.grid] = part if so_far is None else so_far.add_(part)
    return means


def _attention_to(entry: Entry, image: int, part: str, name: str) -> Tensor:
    """[frames * h * w, tokens]; frames stand in one sequence, or are rows of the batch."""
    statistic = entry.statistics.get(name)
    if statistic is None and entry.query is None:
        raise ValueError(
            f"layer {entry.layer!r}: neither {name!r} nor Q and K were kept, only "
            f"{', '.join(entry.statistics)}; capture with reduce={name!r}"
        )
    batch = len(entry.query if statistic is None else statistic) // entry.rows
    if not -batch <= image < batch:
        raise ValueError(f"image={image} is out of range: layer {entry.layer!r} saw {batch}")
    rows = [image % batch * entry.rows + frame for frame in range(entry.rows)]
    if statistic is None:
        maps = entry.map(f"image->{part}", pairs=[(row, row) for row in rows]).to_dense()
    else:
        maps = statistic[rows]
    return maps.flatten(0, 1).float()


def _resampled(mean: Tensor, frames: int, grid: Grid, size: Grid) -> Tensor:
    """[frames * h * w, tokens] as [tokens, H, W], or [tokens, frames, H, W] of a video."""
    maps = mean.view(frames, *grid, -1).permute(0, 3, 1, 2)
    if grid != size:
        # Antialiasing is plain bilinear where it enlarges, and averages where it shrinks.
        maps = F.interpolate(maps, size=size, mode="bilinear", antialias=True, align_corners=False)
    return maps[0] if frames == 1 else maps.transpose(0, 1)


def overlaid(
    values: Tensor, image: Any, *, alpha: float, cmap: str, frame: int | None = None
) -> Any:
    """A heat map in colours over an image, from its least to its greatest value: a PIL image."""
    from PIL import Image as Pil

    number("alpha", alpha, least=0, most=1)
    picture = load_image(image)
    values = _frame(values, frame)
    mixed = _blend(picture, values, (float(values.min()), float(values.max())), alpha, cmap)
    return Pil.fromarray((mixed * 255 + 0.5).astype("uint8"))


def _frame(values: Tensor, frame: int | None) -> Tensor:
    if values.ndim == 2 and frame is None:
        return values
    if values.ndim == 2:
        raise ValueError(f"frame={frame!r}: these are maps of an image, not of a video")
    if frame is None or not -len(values) <= whole("frame", frame) < len(values):
        raise ValueError(
            f"frame={frame!r}: these are maps of {len(values)} frames; give the one to show"
        )
    return values[frame]


def _places(word: str, spelling: Spelling, occurrence: int | None) -> list[Span]:
    places = find(word, spelling.text)
    if occurrence is None or not places:
        return places
    which = as_whole(occurrence)
    if which is None or not 0 <= which < len(places):
        raise IndexError(f"occurrence={occurrence!r}: {word!r} occurs {len(places)} times, from 0")
    return [places[which]]


def _one(entries: list[Entry], what: str, of: Any) -> int:
    """What all entries must have in common."""
    found = {of(entry): entry.layer for entry in entries}
    if len(found) > 1:
        shown = ", ".join(f"{count} in {layer!r}" for count, layer in found.items())
        raise ValueError(f"layers with different numbers of {what} do not average: {shown}")
    return next(iter(found))


def _size(part: slice) -> int:
    return part.stop - part.start


def _merge(merge: str) -> str:
    if merge not in MERGES:
        raise ValueError(f"merge={merge!r}; choose from {', '.join(MERGES)}")
    return merge


def _checked_size(size: Any) -> Grid | None:
    if size is None:
        return None
    found = sides(size)
    if found is None or min(found) < 1:
        raise ValueError(f"size={size!r}; wanted (height, width), both at least 1")
    return found


def _blend(
    picture: Any, values: Tensor, limits: tuple[float, float], alpha: float, cmap: str
) -> Any:
    """[h, w, 3] in 0..1: colours of [H, W] values, resampled to the picture, over it."""
    from matplotlib import colormaps

    size = picture.shape[:2]
    low, high = limits
    heat = F.interpolate(
        values[None, None], size=size, mode="bilinear", antialias=True, align_corners=False
    )[0, 0]
    heat = (heat - low) / (high - low) if high > low else torch.zeros_like(heat)
    colours = colormaps[cmap](heat.clamp(0, 1).numpy())[:, :, :3]
    return (1 - alpha) * picture + alpha * colours
