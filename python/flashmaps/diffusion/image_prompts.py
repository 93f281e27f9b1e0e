"""Where in the image each token of an image prompt is attended to (IP-Adapter, image to video).

with fm.capture(pipe, kind="image_prompt", reduce="image_to_prompt",
                guidance="conditional") as rec:
    pipe(prompt, ip_adapter_image=picture)
maps = fm.image_prompt_maps(rec, adapter=0)
maps.token_maps                      # [tokens, H, W]
maps.overlay(image).save("prompt.png")
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.words import averaged, chosen_entries, overlaid
from flashmaps.maps.grids import Grid


@dataclass(frozen=True, eq=False)
class ImagePromptMaps:
    """Heat maps of an image prompt's tokens over one image; made by :func:`image_prompt_maps`.

    Attributes:
        token_maps: ``[tokens, H, W]``, of videos ``[tokens, frames, H, W]``; float32 on the CPU.
            The probability with which each place of the image attends to each token of the prompt,
            averaged over heads, layers and steps. Where the prompt's tokens are all that there is
            to attend to (UNets, Flux), they sum to 1; with SD3's adapter, which puts the image's
            own keys beside them, the sum tells how much falls on the prompt.
        adapter: index of the IP-Adapter; None where the model has an image prompt of its own.
    """

    token_maps: Tensor
    adapter: int | None

    @property
    def mass(self) -> Tensor:
        """[H, W]: the probability that falls on the whole prompt."""
        return self.token_maps.sum(0)

    def __len__(self) -> int:
        return len(self.token_maps)

    def overlay(
        self, image: Any, token: int | None = None, *, alpha: float = 0.5, cmap: str = "turbo",
        frame: int | None = None,
    ) -> Any:  # fmt: skip
        """The map of a token, or of the whole prompt (`mass`), in colours over the image.

        As :meth:`flashmaps.WordMaps.overlay`. Raises IndexError for a token that is not there.
        """
        if token is not None and not -len(self) <= token < len(self):
            raise IndexError(f"token={token} is out of range: the prompt has {len(self)}")
        values = self.mass if token is None else self.token_maps[token]
        return overlaid(values, image, alpha=alpha, cmap=cmap, frame=frame)


def image_prompt_maps(
    record: Iterable[Entry],
    *,
    adapter: int | None = None,
    adapter_image: int | None = None,
    image: int = 0,
    guidance: str = "conditional",
    size: Grid | None = None,
) -> ImagePromptMaps:
    """Heat maps of an image prompt's tokens, as :func:`flashmaps.word_maps` makes them of words.

    Args:
        record: of a capture with ``kind="image_prompt"`` and ``reduce="image_to_prompt"`` or
            ``keep="qk"``.
        adapter: which IP-Adapter, where there are several. adapter_image: which of its images,
            where each has a mask and is attended to by itself.
        image, guidance, size: as for `word_maps`.

    Raises ValueError for a record without attention to an image prompt, one of several adapters
    where none is chosen, or an adapter that is not there.
    """
    entries = list(record)
    there = [e for e in entries if "image" in e.queries and "image_prompt" in e.keys]
    if not there:
        kinds = ", ".join(sorted({each.kind for each in entries})) or "none at all"
        raise ValueError(
            f"the record has no layer that attends to an image prompt (it has: {kinds}); capture "
            "with kind='image_prompt'"
        )
    for name, wanted in (("adapter", adapter), ("adapter_image", adapter_image)):
        seen = sorted({getattr(e, name) for e in there} - {None})
        if wanted is None and len(seen) > 1:
            raise ValueError(f"the record has image prompts of {name} {seen}: choose with {name}=")
        if wanted is not None and wanted not in seen:
            raise ValueError(f"{name}={wanted}: the record has {seen or 'none that is known'}")
        there = [e for e in there if wanted is None or getattr(e, name) == wanted]
    there = chosen_entries(there, guidance)
    maps = averaged(there, image, size, part="image_prompt", statistic="image_to_prompt")
    return ImagePromptMaps(maps, there[0].adapter)
