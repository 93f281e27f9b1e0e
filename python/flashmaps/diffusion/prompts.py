"""Which text tokens of a diffusion model spell which words of its prompt."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from flashmaps.diffusion.capture import denoisers

Span = tuple[int, int]  # characters [start, end) of a text

# A letter or digit of a script that puts spaces between words: not Thai, kana or Han.
_LETTER = "[^\\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"

# By the class of the denoiser, so that every pipeline around it (image to image, inpainting, ...)
# is known too: where in the text keys each tokenizer's tokens begin, and its names in the pipeline,
# of which the first that is there counts: text encoders side by side share positions.
_TOKENIZERS: dict[str, dict[int, tuple[str, ...]]] = {
    "UNet2DConditionModel": {0: ("tokenizer", "tokenizer_2")},  # SDXL's two CLIPs side by side
    "UNetMotionModel": {0: ("tokenizer", "tokenizer_2")},
    "SD3Transformer2DModel": {0: ("tokenizer", "tokenizer_2"), 77: ("tokenizer_3",)},
    "FluxTransformer2DModel": {0: ("tokenizer_2",)},  # CLIP's one vector is not attended to
    "PixArtTransformer2DModel": {0: ("tokenizer",)},
    "WanTransformer3DModel": {0: ("tokenizer",)},
    "QwenImageTransformer2DModel": {0: ("tokenizer",)},
}


def find(words: str, text: str) -> list[Span]:
    """Every place of ``words`` in ``text``: whole words, upper and lower case alike.

    Neighbouring words may be parted by any white space. Where a script has no spaces between words
    (Chinese, Japanese, Thai), a word is found inside others too.
    """
    parts = unicodedata.normalize("NFC", words).split()
    if not parts:
        raise ValueError(f"a word, or several neighbouring ones, is wanted; got {words!r}")
    pattern = r"\s+".join(map(re.escape, parts))
    before = f"(?<!{_LETTER})" if re.match(_LETTER, parts[0]) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, parts[-1][-1]) else ""
    return [found.span() for found in re.finditer(before + pattern + after, text, re.IGNORECASE)]


def words_of(text: str) -> list[str]:
    """The different words of a text, in order, as they are first written: "cat's" is one."""
    first: dict[str, str] = {}
    for word in re.findall(r"\w+(?:['’-]\w+)*", text):
        first.setdefault(word.lower(), word)
    return list(first.values())


@dataclass(frozen=True)
class Spelling:
    """A prompt as one tokenizer spells it.

    Attributes:
        text: the prompt, as that tokenizer gets it.
        start: position of its first token among the model's text tokens.
        tokens: its tokens, padding included, as it writes them.
        spans: the characters that each token stands for; empty for special tokens and padding.
        uncut: the same of the whole prompt without special tokens, however long.
        marks: "start", "end" or "padding" for each token that is one; else "".
    """

    text: str
    start: int
    tokens: tuple[str, ...]
    spans: tuple[Span, ...]
    uncut: tuple[Span, ...]
    marks: tuple[str, ...] = ()

    def marked(self, name: str) -> list[int]:
        """The model's text tokens with this mark."""
        return [self.start + at for at, mark in enumerate(self.marks) if mark == name]

    def positions(self, place: Span) -> list[int]:
        """The model's text tokens that spell this place; [] if some of them were cut off."""
        kept = [self.start + at for at, span in enumerate(self.spans) if _overlap(span, place)]
        needed = sum(_overlap(span, place) for span in self.uncut)
        return kept if len(kept) == needed else []


def _overlap(span: Span, place: Span) -> bool:
    return span[0] < span[1] and span[0] < place[1] and place[0] < span[1]


def spell(
    tokenizer: Any, text: str, length: int, *, start: int = 0, template: str = "{}", drop: int = 0
) -> Spelling:
    """The ``length`` tokens that a model gets of ``text``, padded and cut as diffusers does it.

    Args:
        tokenizer: a transformers tokenizer. Places come from its offsets; one that has none decodes
            its tokens one by one, and each is looked for in the text.
        start: see `Spelling`.
        template, drop: the prompt takes the place of ``{}``, and the first tokens of the whole are
            dropped again (Qwen).
    """
    before, after = template.split("{}")
    whole = before + text + after
    window = tokenizer.model_max_length
    if length > window and length % window == 0:
        return _in_windows(tokenizer, text, length // window, start)
    length = min(length, window)
    kept = {"padding": "max_length", "max_length": length + drop, "truncation": True}
    tokens, spans, attended = _encode(tokenizer, whole, kept)
    _, uncut, _ = _encode(tokenizer, whole, {"add_special_tokens": False, "verbose": False})
    marks = _marks(tokenizer, attended)

    def within_prompt(spans: list[Span]) -> tuple[Span, ...]:
        moved = [(a - len(before), b - len(before)) for a, b in spans]
        return tuple((a, b) if a < len(text) and b > 0 else (0, 0) for a, b in moved)

    return Spelling(
        text,
        start,
        tuple(tokens[drop:]),
        within_prompt(spans)[drop:],
        within_prompt(uncut),
        tuple(marks[drop:]),
    )


def _in_windows(tokenizer: Any, text: str, count: int, start: int) -> Spelling:
    """A prompt that is longer than the window, as it is given in chunks: each as many tokens as fit

    between a start and an end of its own, padded; the features of all follow each other.
    """
    ids, spans, _ = _encode(tokenizer, text, {"add_special_tokens": False, "verbose": False})
    before, after = _affixes(tokenizer)
    window = tokenizer.model_max_length
    size = window - len(before) - len(after)
    pad = getattr(tokenizer, "pad_token", None) or (after[-1] if after else "")
    tokens: list[str] = []
    places: list[Span] = []
    marks: list[str] = []
    for chunk in range(count):
        own = slice(chunk * size, (chunk + 1) * size)
        some, here = ids[own], spans[own]
        rest = size - len(some)
        tokens += [*before, *some, *after, *[pad] * rest]
        places += [(0, 0)] * len(before) + here + [(0, 0)] * (len(after) + rest)
        marks += ["start"] * len(before) + [""] * len(some) + ["end"] * len(after)
        marks += ["padding"] * rest
    return Spelling(text, start, tuple(tokens), tuple(places), tuple(spans), tuple(marks))


def _affixes(tokenizer: Any) -> tuple[list[str], list[str]]:
    """The special tokens that a tokenizer puts before a text and after it."""
    found = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    # CLIP has one at each end, T5 one at the end. An only one is the end where it is named so.
    if len(found) == 1 and found[0] != getattr(tokenizer, "eos_token", None):
        return found, []
    return found[: len(found) // 2], found[len(found) // 2 :]


def _marks(tokenizer: Any, attended: list[int]) -> list[str]:
    before, after = _affixes(tokenizer)
    # Padding on the left comes before the start.
    first = next((at for at, one in enumerate(attended) if one), len(attended))
    last = first + sum(attended)
    marks = ["" if one else "padding" for one in attended]
    for at in range(first, min(first + len(before), last)):
        marks[at] = "start"
    for at in range(max(first, last - len(after)), last):
        marks[at] = "end"
    return marks


def _encode(
    tokenizer: Any, text: str, options: dict[str, Any]
) -> tuple[list[str], list[Span], list[int]]:
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        spans = [_stripped(tuple(span), text) for span in encoded["offset_mapping"]]
    else:
        encoded = tokenizer(text, return_attention_mask=True, **options)
        spans = _spans_by_decoding(tokenizer, encoded, text)
    attended = list(encoded["attention_mask"])
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"]), spans, attended


def _stripped(span: Span, text: str) -> Span:
    """Without white space at its ends, which some tokenizers count to the word that follows."""
    piece = text[slice(*span)]
    start = span[0] + len(piece) - len(piece.lstrip())
    return start, max(start, start + len(piece.strip()))


def _spans_by_decoding(tokenizer: Any, encoded: Any, text: str) -> list[Span]:
    spans, at = [], 0
    for token, attended in zip(encoded["input_ids"], encoded["attention_mask"], strict=True):
        piece = re.escape(tokenizer.decode([token]).strip()) if attended else ""
        found = re.compile(piece, re.IGNORECASE).search(text, at) if piece else None
        spans.append(found.span() if found else (0, 0))
        at = spans[-1][1] if found else at
    return spans


def spellings(pipe: Any, prompt: str, length: int) -> list[Spelling]:
    """A prompt as a diffusers pipeline's text encoders get it, of ``length`` tokens together.

    Raises ValueError for a pipeline whose tokens are not known here.
    """
    model = next(iter(denoisers(pipe).values()))
    name = next((each.__name__ for each in type(model).__mro__ if each.__name__ in _TOKENIZERS), "")
    edits = getattr(pipe, "processor", None) is not None  # Qwen: pictures stand among the words
    if not name or edits:
        raise ValueError(
            f"how {type(pipe).__name__} with its {type(model).__name__} lays out its text is not "
            "known here; give the tokenizer= whose tokens it attends to, and text_offset= if they "
            "are not the first"
        )
    places = _TOKENIZERS[name]
    ends = [*list(places)[1:], length]
    found = []
    for (start, names), end in zip(places.items(), ends, strict=True):
        there = (getattr(pipe, each, None) for each in names)
        tokenizer = next((each for each in there if each is not None), None)
        if tokenizer is None or end <= start:
            continue
        options: dict[str, Any] = {"start": start}
        window = tokenizer.model_max_length
        if len(places) == 1 and end > window and end % window:
            raise ValueError(
                f"the model got {end} text tokens, which is no number of windows of {window}; give "
                "tokenizer=, and text_offset= for where its tokens begin"
            )
        if hasattr(pipe, "prompt_template_encode"):
            options["template"] = pipe.prompt_template_encode
            options["drop"] = pipe.prompt_template_encode_start_idx
        found.append(spell(tokenizer, _prepared(pipe, prompt, tokenizer), end - start, **options))
    if not found:
        wanted = " or ".join(sorted({each for names in places.values() for each in names}))
        raise ValueError(
            f"the pipeline has no {wanted}, so the words of its prompt cannot be found; give "
            "tokenizer="
        )
    return found


def _prepared(pipe: Any, prompt: str, tokenizer: Any) -> str:
    """The prompt as the pipeline prepares it for the tokenizer."""
    if hasattr(pipe, "_text_preprocessing"):  # PixArt: lower case, and T5 knows the difference
        return pipe._text_preprocessing(prompt, clean_caption=False)[0]
    if hasattr(pipe, "maybe_convert_prompt"):  # textual inversion: one word, several tokens
        return pipe.maybe_convert_prompt(prompt, tokenizer)
    if type(pipe).__name__.startswith("Wan"):
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return prompt_clean(prompt)
    return prompt
