"""A CLIP tokenizer with a small vocabulary, learnt from a word list by byte-pair encoding.

Every byte stays a token of its own, so any text can be encoded; the listed words become one token
each. The files have the layout of Stable Diffusion 2's tokenizer folder.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from flashmaps.world import vocabulary

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# What the photos show, and other plain words of captions.
_PLAIN = """
a an the of in on at with and over under behind front left right above below near photo picture
image drawing close up view small large big tiny old new bright dark light part grey gray black
white red green blue yellow orange purple pink brown colour color cat woman astronaut man camera
cup coffee table rocket launch pad retina eye coins temple china roof flower petals brick wall
grass gravel stones moon craters galaxies stars sky cells tissue clock page text letters face
ear head hand suit flag helmet spoon saucer circle square triangle star ring cross line dot
background texture pattern wood metal stone water cloud tree leaf house car dog bird fish boat
one two three four five
""".split()
# The captions of the drawn world come on top, so that each of their words is one token.
WORDS = [*_PLAIN, *(word for word in vocabulary() if word not in _PLAIN)]

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that GPT-2 and CLIP use, "!" first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent neighbouring pair (ties alphabetically) until each word is whole."""
    split = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges = []
    while any(len(symbols) > 1 for symbols in split):
        pairs = Counter(pair for symbols in split for pair in pairwise(symbols))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merge(symbols, best) for symbols in split]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_tokenizer() -> CLIPTokenizer:
    """A `CLIPTokenizer` over `WORDS`; padded with "!" to 77 tokens as in Stable Diffusion 2."""
    from transformers import CLIPTokenizer

    tokens, merges = _vocabulary()
    return CLIPTokenizer(
        vocab=tokens, merges=merges, model_max_length=77, pad_token="!", unk_token=END
    )


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt, the form in which CLIP tokenizers have always shipped."""
    tokens, merges = _vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    alphabet, merges = byte_alphabet(), learn_merges(WORDS)
    tokens = [*alphabet, *(symbol + END_OF_WORD for symbol in alphabet)]
    tokens += ["".join(pair) for pair in merges]
    # Two different merges may build the same token; it keeps its first place.
    tokens = [*dict.fromkeys(tokens), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges
