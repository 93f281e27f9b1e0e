"""What a training's steps are drawn from, on its device; and examples that are drawn meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import CLIPTokenizer

from .bank import tokenize
from .pictures import SECOND, VIEW, Example, Pictures

_CHUNK = 64
_WAITING = 16  # chunks that may wait to be taken


@dataclass
class Store:
    """Examples as a step wants them; the first ``count`` lines of each tensor hold some.

    Args:
        latents: float16 [n, 2, 2, 4, h, w], means and deviations of the first and second pictures.
        tokens: [n, 2, 3, 77], three captions of each.
        paint: uint8 [n, size, size, 3], what is warped to be seen as a view.
        labels: int16 [n, side, side, 2], with supervision alone.
    """

    latents: Tensor
    tokens: Tensor
    paint: Tensor
    labels: Tensor | None = None
    count: int = 0

    def __post_init__(self) -> None:
        self.count = self.count or len(self.latents)

    def __len__(self) -> int:
        return self.count

    def with_room(self, more: int) -> Store:
        """A copy with room for so many more examples, without labels."""

        def larger(x: Tensor) -> Tensor:
            new = x.new_empty(self.count + more, *x.shape[1:], device=self.latents.device)
            new[: self.count] = x[: self.count]
            return new

        return Store(
            larger(self.latents), larger(self.tokens), larger(self.paint), count=self.count
        )

    def add(self, latents: Tensor, tokens: Tensor, paint: Tensor) -> None:
        """Append examples; those for which there is no room are left out."""
        begin, end = self.count, min(self.count + len(latents), len(self.latents))
        self.latents[begin:end] = latents[: end - begin]
        self.tokens[begin:end] = tokens[: end - begin]
        self.paint[begin:end] = paint[: end - begin]
        self.count = end


class Stream:
    """Examples ``start`` and on of ``pictures``, drawn by other processes while something trains.

    Make it before the GPU is used: its processes are forks. Which examples a step finds there is a
    matter of time, so a training with a stream does not repeat to the bit.
    """

    def __init__(
        self, pictures: Pictures, start: int, workers: int, tokenizer: CLIPTokenizer
    ) -> None:
        dataset: Any = Subset(pictures, range(start, len(pictures)))  # type: ignore[arg-type]
        self.count = len(dataset)
        loader: Any = DataLoader(
            dataset,
            _CHUNK,
            num_workers=max(1, workers),
            collate_fn=partial(_gathered, tokenizer=tokenizer),
        )
        self._chunks = iter(loader)  # forks
        self._queue: queue.Queue[tuple[Tensor, Tensor]] = queue.Queue(_WAITING)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, device: torch.device) -> None:
        """Begin to collect, for a store on ``device``."""
        self._thread = threading.Thread(target=self._collect, args=(device,), daemon=True)
        self._thread.start()

    def _collect(self, device: torch.device) -> None:
        try:
            for chunk in self._chunks:
                images, tokens = (torch.from_numpy(each) for each in chunk)
                if device.type == "cuda":  # else copying waits for all that the GPU has to do
                    images, tokens = images.pin_memory(), tokens.pin_memory()
                if not self._put((images, tokens)):
                    return
        except BaseException as error:  # told where it is asked for
            self._error = error

    def _put(self, found: tuple[Tensor, Tensor]) -> bool:
        while not self._over.is_set():
            try:
                self._queue.put(found, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def ready(self) -> list[tuple[Tensor, Tensor]]:
        """Images uint8 [n, 3, size, size, 3] and tokens [n, 2, 3, 77] of what was drawn by now."""
        if self._error is not None:
            raise RuntimeError(f"a process that draws pictures failed: {self._error}")
        found = []
        while True:
            try:
                found.append(self._queue.get_nowait())
            except queue.Empty:
                return found

    def close(self) -> None:
        """End the other processes."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        del self._chunks


def _gathered(chunk: Sequence[Example], tokenizer: CLIPTokenizer) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([example.images for example in chunk])
    texts = [text for example in chunk for three in example.captions for text in three]
    return images, tokenize(tokenizer, texts).view(len(chunk), SECOND + 1, 3, -1).numpy()


def add_drawn(store: Store, stream: Stream, encode: Callable[[Tensor], Tensor]) -> None:
    """Move what the stream has drawn to the store; ``encode`` gives latents of uint8 images."""
    device = store.latents.device
    for drawn in stream.ready():
        images, tokens = (each.to(device, non_blocking=True) for each in drawn)
        pictures = images[:, : SECOND + 1]
        latents = encode(pictures.flatten(0, 1)).unflatten(0, (len(images), -1))
        store.add(latents, tokens, images[:, VIEW])
