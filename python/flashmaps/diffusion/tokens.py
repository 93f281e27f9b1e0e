"""A word for a place: an embedding whose cross-attention falls where it is told, in any image.

    learned = fm.optimize_tokens(pipe, ["a.png", "b.png"], [[(0.4, 0.3)], [(0.6, 0.2)]])
    learned.find(pipe, "c.png").point      # (x, y) in the unit square
    learned.save("part.safetensors")       # pipe.load_textual_inversion("part.safetensors")

After SLiMe (Khani et al. 2024), correspondence by tokens (Hedlin et al. 2023) and StableKeypoints
(2024). Here it is the input embedding that is optimised, through the text
encoder, so that the result is a textual inversion which diffusers loads. The maps are lazy: memory
grows with the tokens of the image, not with their square.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmaps.arguments import number, unicode_text, whole
from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.guide import frozen
from flashmaps.diffusion.images import load_image, resize
from flashmaps.diffusion.latents import encode, noised
from flashmaps.diffusion.learned_words import (
    needs_one_encoder,
    prompt_states,
    save_word,
    start_embedding,
)
from flashmaps.diffusion.record import Record
from flashmaps.diffusion.token_training import STATE, Training
from flashmaps.maps.grids import centres


class Found(NamedTuple):
    """Where a learned token is attended to in an image."""

    map: Tensor  # [h, w], sums to 1
    point: tuple[float, float]  # (x, y) of its largest cell's centre, in the unit square


@dataclass(frozen=True, eq=False)
class LearnedToken:
    """An embedding and how it was learned; made by :func:`optimize_tokens`."""

    token: str
    embedding: Tensor  # [width], float32
    prompt: str
    layers: tuple[str, ...]
    resolution: Any
    timesteps: tuple[int, int]
    losses: tuple[float, ...]

    def save(self, path: str | Path) -> Path:
        """Write the textual inversion, {token: embedding}, which diffusers loads. safetensors."""
        return save_word(path, self.token, self.embedding)

    @torch.no_grad()
    def find(
        self, pipe: Any, image: Any, *, seeds: Sequence[int] = (0, 1, 2, 3), size: Any = None
    ) -> Found:
        """Where the token is attended to in another image: the mean over ``seeds`` of the noise.

        At the middle of the timesteps that it was learned at.
        """
        latent = encode(pipe, [_fitted(pipe, image, size)])
        t = sum(self.timesteps) // 2
        text, at = _text(pipe, self.prompt, self.token, self.embedding)
        maps: list[Tensor] = []
        for _, x in noised(pipe, latent, [t], [list(seeds)]):
            for p, grid in _attended(self._record(pipe, x, t, text), at):
                maps.append(p.view(1, 1, *grid))
        finest = max((m.shape[2:] for m in maps), key=lambda s: s[0] * s[1])
        whole_map = torch.stack([
            F.interpolate(m, finest, mode="bilinear", align_corners=False)[0, 0] for m in maps
        ]).mean(0)  # fmt: skip
        whole_map = whole_map / whole_map.sum()
        where = centres((finest[0], finest[1]))[int(whole_map.argmax())]
        return Found(whole_map, (float(where[0]), float(where[1])))

    def _record(self, pipe: Any, x: Tensor, t: int, text: Tensor) -> Record:
        return _run(pipe, x, t, text, self.layers, self.resolution, grad=False)


def optimize_tokens(
    pipe: Any,
    images: Sequence[Any],
    targets: Sequence[Any],
    *,
    token: str = "<part>",
    prompt: str = "{}",
    initial: str | None = None,
    layers: str | Iterable[str] = "*.attn2",
    resolution: Any = None,
    steps: int = 200,
    rate: float = 0.1,
    timesteps: tuple[int, int] = (50, 500),
    sigma: float = 0.06,
    size: Any = None,
    seed: int = 0,
    folder: str | Path | None = None,
    save_every: int = 25,
    progress: bool = True,
) -> LearnedToken:
    """An embedding whose cross-attention falls on given points or masks of some images.

    Minimises, by Adam, the cross-entropy of the token's column of the map, normalised over the
    image, against the target: -sum_i T_i log(A_it / sum_k A_kt), the mean over layers, one image
    with new noise at a random timestep in each step.

    Args:
        pipe: a pipeline with one text encoder and a UNet (Stable Diffusion 1, 2, the built-in
            model). It is not changed.
        images: paths, PIL images, arrays.
        targets: one for each image: points [K, 2] as (x, y) in the unit square, or a mask [h, w] of
            any size but w = 2 (bool, or weights >= 0).
        token: what the learned word is called. prompt: around it, with ``{}`` in its place.
        initial: a word whose embedding it starts from; None: drawn as the vocabulary is spread.
        layers, resolution: which maps count, as in `flashmaps.capture`.
        steps, rate: of Adam; the rate in units of the spread of the model's own embeddings.
        timesteps: first and last of those that noise is added for.
        sigma: of the Gaussian around a point, in units of the image's side.
        size: (height, width) in pixels that images are resized to; None: the model's own.
        seed: of the start, the order and the noise: the same seed gives the same embedding.
        folder: where to keep the state each ``save_every`` steps. Called again with the same
            arguments (``steps`` may be more) it goes on from there, to the same bits.
        progress: show a bar.

    Raises ValueError for targets that do not fit the images, a pipeline of another kind, or a
    folder whose state is of other arguments.
    """
    device = needs_one_encoder(pipe, "optimize_tokens")
    whole("steps", steps, 1)
    whole("save_every", save_every, 1)
    rate, sigma = number("rate", rate), number("sigma", sigma)
    if not images or len(images) != len(targets):
        raise ValueError(
            f"there are {len(images)} images and {len(targets)} targets: give one target an image"
        )
    if unicode_text("prompt", prompt).count("{}") != 1:
        raise ValueError(f"prompt={prompt!r} must have {{}} once, in the place of the token")
    text_prompt = prompt.replace("{}", unicode_text("token", token))
    wanted = [_target(index, t, sigma) for index, t in enumerate(targets)]
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()
    spread = float(table.std())
    settings = {
        "token": token, "prompt": prompt, "initial": initial, "layers": patterns,
        "resolution": str(resolution), "rate": rate, "timesteps": list(timesteps), "sigma": sigma,
        "size": str(size), "seed": seed, "images": len(images),
    }  # fmt: skip
    state = Training(start_embedding(pipe, initial, seed).to(device), rate * spread)
    path = None if folder is None else Path(folder) / STATE
    if path is not None and path.exists():
        state.load(path, settings)
    elif path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    from tqdm.auto import tqdm

    with torch.no_grad():
        latents = [encode(pipe, [_fitted(pipe, image, size)]) for image in images]
    done = len(state.losses)
    with tqdm(total=steps, initial=min(done, steps), disable=not progress, unit="step") as bar:
        for step in range(done, steps):
            # Of the step alone, so that a run that goes on draws what it would have drawn.
            drawn = torch.Generator().manual_seed(seed * 1_000_003 + step)
            which = int(torch.randint(len(images), (1,), generator=drawn))
            low, high = timesteps
            t = int(torch.randint(low, high + 1, (1,), generator=drawn))
            noise = int(torch.randint(2**31, (1,), generator=drawn))
            ((_, x),) = noised(pipe, latents[which], [t], [[noise]])
            state.step(
                _loss(pipe, x, t, text_prompt, token, state.embedding, patterns, resolution,
                      wanted[which])
            )  # fmt: skip
            bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
            bar.update()
            if path is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                state.save(path, settings)
    return LearnedToken(
        token, state.embedding.detach().float().cpu(), text_prompt, patterns, resolution,
        timesteps, tuple(state.losses),
    )  # fmt: skip


def _fitted(pipe: Any, image: Any, size: Any) -> Any:
    if size is None:
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        size = (side, side)
    return resize(load_image(image), tuple(size))


def _target(index: int, target: Any, sigma: float) -> Any:
    """From a grid to weights of its cells, [N], that sum to 1."""
    where = torch.as_tensor(target)
    name = f"targets[{index}]"
    if where.ndim != 2 or where.numel() == 0:
        raise ValueError(
            f"{name} must be points [K, 2] in the unit square, or a mask [h, w]; got shape "
            f"{list(where.shape)}"
        )
    where = where.float()
    if where.shape[1] == 2:
        if bool((where < 0).any() or (where > 1).any()):
            raise ValueError(f"{name} has points outside of the unit square: (x, y) in 0 .. 1")
        return lambda grid: _normalized(_bumps(where, grid, sigma))
    if not bool((where >= 0).all()) or float(where.sum()) <= 0:
        raise ValueError(f"{name} is a mask with nothing in it, or with negative weights")
    return lambda grid: _normalized(F.adaptive_avg_pool2d(where[None, None], grid).flatten())


def _bumps(points: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    off = (centres(grid)[:, None] - points).square().sum(-1)  # [N, K]
    return torch.softmax(-off / (2 * sigma**2), 0).sum(1)


def _normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum()


def _text(pipe: Any, prompt: str, token: str, embedding: Tensor) -> tuple[Tensor, int]:
    """The prompt's states with the embedding in the token's place, and where that is."""
    states, (places,) = prompt_states(pipe, [prompt], {token: embedding[None]})
    return states, places[token][0]


def _run(
    pipe: Any, x: Tensor, t: int, text: Tensor, layers: Any, resolution: Any, *, grad: bool
) -> Record:
    dtype = pipe.unet.dtype
    with capture(
        pipe.unet, layers, kind="cross", resolution=resolution, keep="qk", grad=grad
    ) as record:
        pipe.unet(x.to(dtype), t, encoder_hidden_states=text.to(dtype))
    return record


def _attended(record: Record, at: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """The token's column over the image, summing to 1, and the grid, of each layer."""
    for entry in record:
        A = entry.map()
        if entry.grid is None:
            raise ValueError(f"layer {entry.layer!r} has no grid; choose others by layers=")
        one = torch.zeros((A.shape[2], 1), dtype=A.dtype, device=A.device)
        one[at] = 1
        column = (A @ one)[0, :, 0]
        yield column / column.sum(), entry.grid


def _loss(
    pipe: Any, x: Tensor, t: int, prompt: str, token: str, embedding: Tensor, layers: Any,
    resolution: Any, target: Any,
) -> Tensor:  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for part in (pipe.unet, pipe.text_encoder):
            stack.enter_context(frozen(part))
        text, at = _text(pipe, prompt, token, embedding)
        record = _run(pipe, x, t, text, layers, resolution, grad=True)
        losses = [
            -(target(grid).to(p) * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()
            for p, grid in _attended(record, at)
        ]
        if not losses:
            raise ValueError("no cross-attention layer was recorded; choose by layers=")
        return torch.stack(losses).mean()
