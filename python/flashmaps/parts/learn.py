"""Parts of a collection as words of a diffusion model, learned without a label.

    parts = fm.learn_parts(["a.jpg", "b.jpg", "c.jpg", ...])
    parts.masks("new.jpg")      # [P, h, w], where each part is
    parts.save("birds")         # birds/part-0.safetensors: pipe.load_textual_inversion

One word for the object and one for each part, all learned together, the model frozen: the prompt of
an image names the object and the parts that it shows. docs/parts.md says how well it works, and
what the losses are worth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashmaps.arguments import number, switch, whole
from flashmaps.diffusion.capture import find_layers
from flashmaps.diffusion.features import default_size, size_multiple
from flashmaps.diffusion.guide import frozen
from flashmaps.diffusion.images import fit_size, load_image, resize
from flashmaps.diffusion.latents import encode
from flashmaps.diffusion.learned_words import needs_one_encoder, prompt_states, start_embedding
from flashmaps.diffusion.loading import BUILTIN, load_model
from flashmaps.diffusion.token_training import STATE, Training
from flashmaps.files import Run, check_folder, open_run
from flashmaps.matching.settings import fingerprint
from flashmaps.parts.head import fit_head
from flashmaps.parts.losses import LOSSES, noise_errors, step_losses
from flashmaps.parts.presence import fit_norms
from flashmaps.parts.reading import seen
from flashmaps.parts.regions import hard_labels, part_masks, shown
from flashmaps.parts.result import KIND, Parts, check_word
from flashmaps.segmentation.cosegment import cosegment

LARGE = 100_000_000  # parameters of a UNet from which on gradients are checkpointed
_BARE = 0.25  # of the prompts, those that name the object alone
_HELD_TIMESTEPS = (150, 400, 650, 850)
_EVERY = 25  # steps between two looks at the images held out
_FALL = 0.3  # of the steps, at the end, in which the rate falls
READ_AT = 100  # timestep, of 1000
READ_SEEDS = (0,)


@dataclass(frozen=True)
class _Job:
    """What stays the same in every step."""

    pipe: Any
    latents: Tensor  # [n, c, h, w]
    masks: Tensor  # [n, 1 + P, h, w], the object's first
    present: Tensor  # [n, P] bool
    names: tuple[str, ...]  # the category's first
    loss: str
    weight: float
    layers: tuple[str, ...]
    timesteps: tuple[int, int]
    batch: int
    seed: int

    def prompt(self, image: int, bare: bool) -> str:
        parts = () if bare else torch.nonzero(self.present[image])[:, 0].tolist()
        return " ".join(("a", self.names[0], *(self.names[1 + p] for p in parts)))

    def words(self, embedding: Tensor) -> dict[str, Tensor]:  # from [1 + P, n, c]
        return dict(zip(self.names, embedding, strict=True))

    def total(
        self, embedding: Tensor, images: Sequence[int], timesteps: Sequence[int],
        noise: Tensor, bare: Sequence[bool], *, attend: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(what is minimised, L_n, L_a); ``attend``: whether L_a counts in "both"."""
        rows = list(images)
        prompts = [self.prompt(i, b) for i, b in zip(rows, bare, strict=True)]
        told = (self.pipe, self.latents[rows], noise, timesteps, prompts, self.words(embedding))
        if self.loss == "noise" or (self.loss == "both" and not attend):
            noises = noise_errors(*told).mean()
            return noises, noises, torch.zeros(())
        noises, attention = step_losses(*told, self.masks[rows], self.names, self.layers)
        if self.loss == "attention":
            return attention, noises, attention
        return noises + self.weight * attention, noises, attention

    def draw(self, step: int, images: Sequence[int]) -> dict[str, Any]:
        """Of the step alone, so that a run that goes on draws what it would have drawn."""
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randint(len(images), (self.batch,), generator=drawn)
        if self.batch <= len(images):
            chosen = torch.randperm(len(images), generator=drawn)[: self.batch]
        low, high = self.timesteps
        # One timestep from each of equally many ranges: less scatter than by plain chance.
        places = (torch.arange(self.batch) + torch.rand(self.batch, generator=drawn)) / self.batch
        shape = (self.batch, *self.latents.shape[1:])
        return {
            "images": [images[int(i)] for i in chosen],
            "timesteps": [low + int(p * (high + 1 - low)) for p in places.tolist()],
            "noise": torch.randn(shape, generator=drawn).to(self.latents),
            "bare": (torch.rand(self.batch, generator=drawn) < _BARE).tolist(),
        }

    @torch.no_grad()
    def held_out(self, embedding: Tensor, images: Sequence[int], *, attend: bool) -> float:
        """What is minimised, of images held out, with noise that is always the same."""
        total = 0.0
        for image in images:
            drawn = torch.Generator().manual_seed(self.seed * 1_000_003 - 1 - image)
            count = len(_HELD_TIMESTEPS)
            noise = torch.randn((count, *self.latents.shape[1:]), generator=drawn)
            value, _, _ = self.total(
                embedding, [image] * count, _HELD_TIMESTEPS, noise.to(self.latents),
                [False] * count, attend=attend,
            )  # fmt: skip
            total += float(value)
        return total / len(images)


def learn_parts(
    images: Sequence[Any],
    *,
    segments: Any = None,
    model: Any = BUILTIN,
    loss: str = "both",
    weight: float = 0.005,
    tokens: int = 1,
    steps: int = 120,
    batch: int = 2,
    rate: float = 0.1,
    ema: float = 0.95,
    held_out: int | None = None,
    patience: int | None = 4,
    timesteps: tuple[int, int] = (200, 950),
    layers: str | Iterable[str] = "*.attn2",
    size: int | tuple[int, int] | None = None,
    initial: str | None = None,
    category: str = "<thing>",
    name: str = "part",
    checkpointing: bool | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Parts:
    """Learn a word for the object that images have in common, and one for each of its parts.

    Minimises, by Adam, the loss of :mod:`flashmaps.parts.losses` over the words' input embeddings,
    ``batch`` images with new noise in each step; nothing of the model changes. A quarter of the
    prompts names the object alone, so that its word explains it by itself. In "both" the first half
    of the steps is for the noise alone: words that mean something first, then places.

    Args:
        images: of things of one kind, two or more, as for :func:`flashmaps.match`.
        segments: where the parts are: a :class:`flashmaps.CoSegments` of these images; or for each
            image labels [h, w] (below 0: none) or weights [P, h, w]; None: ``fm.cosegment`` finds
            them. At most 12 parts, the largest.
        model: as for :func:`flashmaps.match`; Stable Diffusion 1, 2, or the built-in one.
        loss: "noise", "attention" or "both"; weight: of the attention in "both".
        tokens: embeddings a word.
        steps, batch, rate: of Adam; the rate in units of the spread of the model's own embeddings,
            falling to nothing over the last 30 % of the steps.
        ema: of the running mean of the embeddings, which is the result.
        held_out: how many of the images to hold out; None: one in eight, none of fewer than eight.
            Every 25 steps of the second half the loss on them is looked at, and the best words are
            kept; after ``patience`` looks that were no better training stops (None: never).
        timesteps: first and last of those that noise is added for.
        layers: cross-attention layers of the attention loss, and of reading.
        size: of what the model sees, as in :func:`flashmaps.match`; images become squares unless it
            is (height, width). None: what it was trained on.
        initial: a word whose embedding all start from; None: drawn as the vocabulary is spread.
        category, name: what the words are called: "<thing>", and "<part-0>", "<part-1>", ...
        checkpointing: of gradients, for memory; None: in UNets of more than 1e8 parameters.
        seed: of the start, the order, the noise.
        folder: where to keep the state every 25 steps, and at the end what ``Parts.save`` writes.
            A run that was killed goes on when called again with the same arguments, to the same
            bits; one that is done is read. ``overwrite``: throw away one of other arguments.
        progress: show a bar with the loss and the time left.

    Raises ValueError, before the model is run, for arguments out of range; where segments show no
    object, are empty or do not fit; where a folder is of other arguments.
    """
    pipe, asked = _checked(locals())
    pictures = [load_image(each, f"image {i}") for i, each in enumerate(images)]
    wanted = default_size(pipe) if size is None else size
    shape = fit_size(1, 1, wanted, size_multiple(pipe))
    if folder is not None:
        check_folder(folder, KIND, grows=True)
    if segments is None:
        segments = cosegment(pictures, model=pipe, seed=seed, progress=progress)
    masks = part_masks(segments, len(pictures), shape)
    shown_parts = shown(masks)
    names = (category, *(f"<{name}-{p}>" for p in range(masks.shape[1])))
    device = needs_one_encoder(pipe, "learn_parts")
    with torch.no_grad():
        small = [resize(each, shape) for each in pictures]
        latents = torch.cat([encode(pipe, [each]) for each in small])
        start = torch.stack([
            torch.stack([start_embedding(pipe, initial, seed * 1009 + 31 * k + j)
                         for j in range(tokens)]) for k in range(len(names))
        ])  # fmt: skip
        prompt_states(pipe, [" ".join(("a", *names))], dict(zip(names, start, strict=True)))
    found = tuple(find_layers(pipe.unet, layers))
    asked |= {
        "size": list(shape), "layers": list(found), "weights": fingerprint(pipe),
        "collection": _digest(small, masks),
    }  # fmt: skip
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()
    training = Training(start.to(device), rate * float(table.std()), ema)
    whole_object = masks.amax(1, keepdim=True)
    job = _Job(
        pipe, latents, torch.cat((whole_object, masks), 1).to(device), shown_parts, names, loss,
        weight, found, timesteps, batch, seed,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        run = None
        if folder is not None:
            run = stack.enter_context(open_run(folder, KIND, asked, overwrite=overwrite))
            if run.whole("parts.json"):
                return Parts.load(folder)
            if run.whole(STATE):
                training.load(run.folder / STATE, asked)
        for part in (pipe.unet, pipe.text_encoder):
            stack.enter_context(frozen(part))
        large = sum(p.numel() for p in pipe.unet.parameters()) > LARGE
        if checkpointing or (checkpointing is None and large):
            stack.enter_context(_checkpointed(pipe.unet))
        _train(job, training, _held(len(pictures), held_out), patience, steps, run, asked, progress)
        made = _result(job, training, pictures=small, asked=asked, model=_name(model))
        if run is not None:
            with run.files(instead_of=[STATE]) as new:
                made.write(new)
    return made


def _checked(given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The loaded model, and the arguments that a run depends on."""
    images, loss = given["images"], given["loss"]
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence) or len(images) < 2:
        raise ValueError("images must be a list of two images of one kind, at least")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not known; choose from {', '.join(LOSSES)}")
    for key, least in (("tokens", 1), ("steps", 1), ("batch", 1), ("seed", 0)):
        whole(key, given[key], least)
    number("weight", given["weight"], least=0)
    number("rate", given["rate"], least=0)
    number("ema", given["ema"], least=0, most=1)
    if given["patience"] is not None:
        whole("patience", given["patience"], 1)
    _held(len(images), given["held_out"])
    for key in ("progress", "overwrite"):
        switch(key, given[key])
    check_word("category", given["category"])
    check_word("name", f"<{given['name']}-0>")
    if given["category"].startswith(f"<{given['name']}-"):
        raise ValueError(f"category={given['category']!r} could be the name of a part")
    pipe = load_model(given["model"])
    needs_one_encoder(pipe, "learn_parts")
    low, high = given["timesteps"]
    last = int(pipe.scheduler.config.num_train_timesteps) - 1
    if not 0 <= whole("timesteps", low, 0) <= whole("timesteps", high, 0) <= last:
        raise ValueError(f"timesteps=({low}, {high}) must be in order from 0 to {last}")
    kept = (
        "loss", "weight", "tokens", "steps", "batch", "rate", "ema", "held_out", "patience",
        "initial", "category", "name", "seed",
    )  # fmt: skip
    return pipe, {**{key: given[key] for key in kept}, "timesteps": [low, high]}


def _name(model: Any) -> str:
    return str(model) if isinstance(model, (str, Path)) else ""


def _held(count: int, asked: int | None) -> list[int]:
    """Which images are held out: the last ones."""
    if asked is None:
        asked = count // 8
    whole("held_out", asked, 0, count - 1)
    return list(range(count - asked, count))


def _digest(images: Sequence[np.ndarray], masks: Tensor) -> str:
    found = hashlib.sha256()
    for each in (*images, masks.numpy()):
        found.update(np.ascontiguousarray(each).tobytes())
    return found.hexdigest()[:16]


@contextlib.contextmanager
def _checkpointed(unet: Any) -> Iterator[None]:
    """Activations are computed again on the way back, unless the model does that anyway."""
    if unet.is_gradient_checkpointing:
        yield
        return
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


def _train(
    job: _Job, training: Training, held: list[int], patience: int | None, steps: int,
    run: Run | None, asked: dict[str, Any], progress: bool,
) -> None:  # fmt: skip
    from tqdm.auto import tqdm

    learned_from = [i for i in range(len(job.latents)) if i not in held]
    done = len(training.losses)
    with (
        tqdm(total=steps, initial=done, disable=not progress, unit="step", desc="parts") as bar,
        torch.enable_grad(),
    ):
        for step in range(done, steps):
            if training.notes.get("stopped"):
                break
            attend = step >= steps // 2
            drawn = job.draw(step, learned_from)
            value, noises, attention = job.total(training.embedding, **drawn, attend=attend)
            training.step(value, scale=min(1.0, (steps - step) / (_FALL * steps)))
            bar.set_postfix(
                loss=f"{training.losses[-1]:.3f}", noise=f"{float(noises.detach()):.3f}",
                attention=f"{float(attention.detach()):.2f}", refresh=False,
            )  # fmt: skip
            bar.update()
            if (step + 1) % _EVERY == 0 or step + 1 == steps:
                if attend:  # before that there is no telling
                    _look(job, training, held, patience)
                if run is not None:
                    with run.file(STATE) as new:
                        training.write(new, asked)


def _look(job: _Job, training: Training, held: list[int], patience: int | None) -> None:
    """Keep the average if the images held out say that it is the best yet; stop if it is time."""
    notes = training.notes
    if not held:
        training.best = training.average
        return
    value = job.held_out(training.average, held, attend=True)
    notes.setdefault("held_out", []).append([len(training.losses), value])
    if value < notes.get("best", float("inf")):
        notes["best"], notes["waited"] = value, 0
        training.best = training.average
    else:
        notes["waited"] = notes.get("waited", 0) + 1
        notes["stopped"] = patience is not None and notes["waited"] >= patience


def _result(
    job: _Job, training: Training, *, pictures: Sequence[np.ndarray], asked: dict[str, Any],
    model: str,
) -> Parts:  # fmt: skip
    embedding = training.best.detach().float()
    prompt = " ".join(("a", *job.names))
    masks = job.masks[:, 1:].float().cpu()
    logs = torch.cat([
        seen(job.pipe, each[None], [prompt], job.words(embedding), job.names, layers=job.layers,
             timestep=READ_AT, seeds=READ_SEEDS)
        for each in job.latents
    ])  # fmt: skip
    head = fit_head(logs.float().cpu(), masks)
    norms = fit_norms(
        job.pipe, pictures, masks, job.words(embedding), job.names, job.layers, READ_AT, head
    )
    height, width = pictures[0].shape[:2]
    return Parts(
        names=job.names[1:],
        embeddings=embedding[1:].cpu(),
        category=job.names[0],
        category_embedding=embedding[0].cpu(),
        model=model,
        weights=fingerprint(job.pipe),
        size=(height, width),
        layers=job.layers,
        timestep=READ_AT,
        head=head,
        norms=norms,
        images=tuple(np.rint(each * 255).astype(np.uint8) for each in pictures),
        labels=tuple(hard_labels(masks)),
        losses=tuple(training.losses),
        settings=json.loads(json.dumps({**asked, "notes": training.notes})),
    )
