"""Words that a text encoder was never taught: embeddings that stand in a prompt by name.

Textual inversion (Gal et al. 2023): the encoder reads ordinary words where learned ones will be,
and their input embeddings are exchanged before its first layer. Nothing of the pipeline changes,
and gradients reach the embeddings through the encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashmaps.files import whole_file

# Words that tokenizers spell as one token, to stand where the learned one will.
_STAND_INS = ("*", "x", "a")

Words = Mapping[str, Tensor]  # of each word [n, width]: n tokens that stand side by side
Places = dict[str, tuple[int, ...]]  # of each learned word that a prompt holds, its tokens


def needs_one_encoder(pipe: Any, what: str) -> torch.device:
    """Where the pipeline computes. ValueError unless it has one text encoder and a UNet."""
    needs = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "encode_prompt")
    missing = [name for name in needs if getattr(pipe, name, None) is None]
    if missing or getattr(pipe, "text_encoder_2", None) is not None:
        why = f"it has no {missing[0]}" if missing else "it has two text encoders"
        raise ValueError(
            f"{what} needs a pipeline with one text encoder and a UNet, such as Stable "
            f"Diffusion 1 or 2; got {type(pipe).__name__}: {why}"
        )
    return torch.device(pipe._execution_device)


def prompt_states(
    pipe: Any, prompts: Sequence[str], words: Words
) -> tuple[Tensor, tuple[Places, ...]]:
    """What the UNet is told by prompts that hold learned words, [B, tokens, c], and where they are.

    Raises ValueError where a prompt is longer than the encoder reads.
    """
    tokenizer = pipe.tokenizer
    stand_in = next(
        (w for w in _STAND_INS if len(tokenizer(w, add_special_tokens=False).input_ids) == 1), None
    )
    if stand_in is None:
        raise ValueError("this tokenizer has no word of one token to stand in for the learned one")
    texts, places = zip(*(_spelt(pipe, each, words, stand_in) for each in prompts), strict=True)

    def put(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for row, found in enumerate(places):
            for name, at in found.items():
                output[row, list(at)] = words[name].to(output)
        return output

    handle = pipe.text_encoder.get_input_embeddings().register_forward_hook(put)
    try:
        states = pipe.encode_prompt(list(texts), pipe._execution_device, 1, False)[0]
    finally:
        handle.remove()
    return states, places


def _spelt(pipe: Any, prompt: str, words: Words, stand_in: str) -> tuple[str, Places]:
    """The prompt with stand-ins, and the places of learned words in it."""
    names = sorted(words, key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", prompt) if names else [prompt]
    text, at, places = "", 1, dict[str, tuple[int, ...]]()
    for piece in pieces:
        if piece in words:
            count = len(words[piece])
            places[piece] = tuple(range(at, at + count))
            text, at = f"{text} {' '.join([stand_in] * count)} ", at + count
        elif piece.strip():
            text = text + piece
            at += len(pipe.tokenizer(piece.strip(), add_special_tokens=False).input_ids)
    longest = int(pipe.tokenizer.model_max_length) - 1  # the last one is the end
    if at > longest:
        raise ValueError(
            f"the prompt takes {at - 1} tokens and this model reads {longest - 1}: fewer parts, or "
            "fewer tokens a part"
        )
    return text, places


def start_embedding(pipe: Any, initial: str | None, seed: int) -> Tensor:
    """[width] float32: the mean of a word's embeddings, or drawn as the vocabulary is spread."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()
    if initial is None:
        drawn = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(seed))
        return drawn * float(table.std()) + table.mean(0).cpu()
    found = pipe.tokenizer(initial, add_special_tokens=False).input_ids
    if not found:
        raise ValueError(f"initial={initial!r} has no tokens")
    return table[found].mean(0).cpu()


def save_word(path: str | Path, name: str, embedding: Tensor) -> Path:
    """Write a textual inversion, {name: [width] or [n, width]}, which diffusers loads."""
    from safetensors.torch import save_file

    with whole_file(path) as new:
        save_file({name: embedding.detach().float().cpu().contiguous()}, new)
    return Path(path)
