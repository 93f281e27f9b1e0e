"""Images in, features out: forward passes of a Stable Diffusion model under capture.

An image is encoded by the VAE, carried to a timestep and shown to the UNet once; the queries and
keys of the chosen layers, concatenated along heads, are the features that matching works with. What
the layers' transformer blocks put out can be kept too.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashmaps.arguments import switch, unicode_text
from flashmaps.diffusion.capture import Entry, capture, find_layers
from flashmaps.diffusion.feature_files import check_entries, grey, read_fields, write_features
from flashmaps.diffusion.images import Image, fit_size, load_image, resize
from flashmaps.diffusion.latents import Denoise, encode, invert, noised, plan_inversion
from flashmaps.diffusion.loading import BUILTIN, PARTS, load_model
from flashmaps.files import whole_file

__all__ = [
    "BUILTIN",
    "DEFAULT_BATCH",
    "DEFAULT_LAYERS",
    "DEFAULT_TIMESTEP",
    "Features",
    "features",
    "load_model",
]

# The note works at the level with N = 1024 tokens: 32 x 32 in SD at 512 pixels. In the decoder of
# SD1.5 and SD2, and of the built-in miniature at 128 pixels, that level is up_blocks.2. The layers
# of the decoder are those that published work on diffusion features found to carry semantics.
DEFAULT_LAYERS = "up_blocks.2.*.attn1"
# Of 1000: next to no noise. On known warps of four photographs (not the demo's), an early built-in
# model finds 43 % of the points within 2 % of the image at timestep 1 and 10 % at 101 (keys with
# keys). Large models match meaning, rather than places, better at about 261.
DEFAULT_TIMESTEP = 1
# A pair; and as many as an ordinary call with guidance shows the UNet at once, so that whoever can
# generate with a model can match with it.
DEFAULT_BATCH = 2
OTHER_NOISE = 1_000_003  # added to the seeds of the next image when noise is to differ
_SEEDS_END = 2**63 - 1  # the largest that torch takes, and leaves room for


@dataclass(frozen=True)
class Features:
    """Q and K of one image, all chosen layers, seeds and timesteps concatenated along heads.

    With ``head_weights`` their head-averaged map is the average of the maps of layers, seeds and
    timesteps. ``timestep`` is what the model was told, a tuple if several; under DDIM inversion
    (``inversion_steps``) it may differ from what was asked for, and there are no seeds.
    """

    query: Tensor  # [1, H, N, d]
    key: Tensor  # [1, H, N, d]
    scale: float
    head_weights: Tensor  # [H], sums to 1
    grid: tuple[int, int]  # (height, width) of the tokens
    image: Image  # [h, w, 3], as given
    input_size: tuple[int, int]  # (height, width) that the model saw
    layers: tuple[str, ...]
    timestep: int | tuple[int, ...]
    seeds: tuple[int, ...]
    prompt: str
    inversion_steps: int | None = None
    output: Tensor | None = None  # [1, L, N, c], of the layers' blocks; None where not asked for

    def save(
        self,
        path: str | Path,
        *,
        image: bool = True,
        dtype: torch.dtype | None = None,
        only: Iterable[str] | None = None,
    ) -> Path:
        """Write a safetensors file, whole or not at all.

        Args:
            path: file to write; :class:`flashmaps.diffusion.feature_folder.FeatureFolder` takes a
                folder of ``*.safetensors`` as a sequence, in the order of their names.
            image: keep the image too, as bytes where they say the same to the bit. Without it what
                is loaded has a grey one of that size.
            dtype: that tensors are kept in, such as torch.float16; default: as they are. The
                head weights stay as they are.
            only: of query, key and output, those that are kept; default: all.
        """
        with whole_file(path) as new:
            write_features(new, self, image=image, dtype=dtype, only=only)
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        only: Iterable[str] | None = None,
    ) -> Features:
        """Read what :meth:`save` wrote; or a saved record, as :meth:`from_record` does.

        Tensors are those of the file, memory-mapped, unless ``device`` or ``dtype`` makes others of
        them. ``only``: of query, key and output, those that are read. Raises FileNotFoundError, or
        ValueError for a file of another kind.
        """
        found = read_fields(path, device=device, dtype=dtype, only=only)
        return cls(**found) if isinstance(found, dict) else cls.from_record(found)

    @classmethod
    def from_record(cls, record: Iterable[Entry], image: Any = None, row: int = 0) -> Features:
        """The features that a capture's record holds, all its entries along heads.

        Args:
            record: self-attention of one image alone, all entries of one number of tokens, with Q
                and K: ``rec.select("up_blocks.2.*", kind="self")``.
            image: that the entries are of, anything
                :func:`flashmaps.diffusion.images.load_image` takes; default: grey, one pixel a
                token.
            row: of the record's batch.

        Raises ValueError for entries that do not go together.
        """
        entries = list(record)
        check_entries(entries, row)
        _check_same_tokens(entries)
        timesteps = tuple(dict.fromkeys(each.timestep for each in entries))
        grid = entries[0].grid
        assert grid is not None  # checked above
        pixels = grey(grid) if image is None else load_image(image, "image")
        return _join(
            entries, (), row, image=pixels, input_size=tuple(pixels.shape[:2]),
            timestep=timesteps[0] if len(timesteps) == 1 else timesteps, seeds=(), prompt="",
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and the image."""
        tensors = [x for x in (self.query, self.key, self.output) if x is not None]
        pixels = self.image.size * self.image.itemsize if all(self.image.strides) else 0
        return sum(x.numel() * x.element_size() for x in (*tensors, self.head_weights)) + pixels


def default_size(pipe: Any) -> int:
    """The longer side, in pixels, that the model was trained on."""
    cells = pipe.unet.config.sample_size
    if cells is None:
        raise ValueError("this model does not say what size it was trained on; give size=")
    return int(cells if isinstance(cells, int) else max(cells)) * vae_factor(pipe)


def vae_factor(pipe: Any) -> int:
    """Pixels per latent cell, per side."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def size_multiple(pipe: Any) -> int:
    """Both sides of an image must be a multiple of this, so that every level halves evenly."""
    return vae_factor(pipe) * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


def default_layers(pipe: Any) -> str:
    """The pattern of self-attention layers to use when none is given; see DEFAULT_LAYERS.

    SDXL has no attention there; in it, the same level (half as many tokens per side as the latent
    has cells) is up_blocks.1.
    """
    for pattern in (DEFAULT_LAYERS, "up_blocks.1.*.attn1"):
        try:
            find_layers(pipe.unet, pattern)
            return pattern
        except ValueError:
            pass
    return "up_blocks.*.attn1"


@torch.no_grad()
def features(
    model: Any,
    images: Any,
    *,
    layers: str | Iterable[str] | None = None,
    timestep: int | Sequence[int] = DEFAULT_TIMESTEP,
    prompt: str | Sequence[str] = "",
    seeds: int | Sequence[int] = (0,),
    inversion_steps: int | None = None,
    size: int | tuple[int, int] | None = None,
    same_noise: bool = True,
    batch_size: int = DEFAULT_BATCH,
    outputs: bool = False,
    progress: bool = False,
) -> list[Features]:
    """Queries and keys of a model's self-attention layers for each image.

    For every seed s and timestep t: x_t = sqrt(a_t) z + sqrt(1 - a_t) e_s, with z the mean of the
    VAE's posterior times its scaling factor, a_t the scheduler's cumulative product and e_s normal
    noise; then one forward pass of the UNet. What the UNet predicts (noise, velocity) does not
    matter. Or, with ``inversion_steps``, x_t is where DDIM inversion carries z, and one more pass
    shows it to the UNet; see :func:`flashmaps.diffusion.latents.invert`.

    The pipeline is left as it was: its scheduler, its modules' modes and hooks, the global random
    number generators. Its weights may be offloaded (model, sequential, group), placed by a device
    map or in half precision: inputs go where the pipeline computes, and modules are called so that
    their hooks run. Latents are float32; Q and K have the UNet's dtype and device.

    Args:
        model: anything :func:`load_model` takes: Stable Diffusion 1, 2 or XL.
        images: one image or a list, each anything :func:`flashmaps.diffusion.images.load_image`
        takes.
        layers: patterns of self-attention layers, all with the same number of tokens; default: the
            decoder's second finest level in SD (see DEFAULT_LAYERS).
        timestep: 0 (next to no noise) to num_train_timesteps - 1 (next to nothing else), or
            several, whose maps are averaged.
        prompt: the text the UNet sees, one for all or one for each image; empty is unconditional,
            which for SDXL means zeros where its pipeline takes zeros.
        seeds: one or more noise seeds; the maps of several are averaged.
        inversion_steps: carry images to the timestep by DDIM inversion in a schedule of so many
            steps from 0 to 1000, instead of adding noise; the model sees ``prompt``, without
            guidance. The timesteps are those of the schedule that are nearest: ``timestep=261`` is
            one of 50 steps, and takes 14 forward passes and one more. ``seeds`` play no part.
        size: longer side in pixels, or (height, width); default: what the model was trained on.
            Both sides are rounded to what the model can halve, see :func:`size_multiple`.
        same_noise: whether images of equal size get the same noise. Much noise that is the same
            makes every token match its own place: the model recognises the noise. Different noise
            makes matching harder, but does not mislead.
        batch_size: how many images of equal size go through the model together. Results do not
            depend on it but for rounding; memory does. Default: 2, what a call of the pipeline with
            guidance needs too.
        outputs: keep what the transformer block of each layer puts out as well, one "head" for each
            layer, seed and timestep; they must be of one width. Not from a compiled UNet.
        progress: show a bar, one step for each forward pass.

    Raises ValueError for arguments out of range and for models of other families, by name.
    """
    from tqdm.auto import tqdm

    for name, value in (("same_noise", same_noise), ("outputs", outputs), ("progress", progress)):
        switch(name, value)
    pipe = load_model(model)
    layers = _patterns(pipe, layers)
    if outputs and hasattr(pipe.unet, "_orig_mod"):
        raise ValueError(
            "outputs=True needs a UNet that is not compiled: what its blocks put out cannot be seen"
        )
    trained = int(pipe.scheduler.config.num_train_timesteps)
    several = not isinstance(timestep, numbers.Integral)
    timesteps = _whole_numbers("timestep", timestep, 0, trained - 1)
    seeds = _whole_numbers("seeds", seeds, 0, _SEEDS_END)
    plan = None
    if inversion_steps is not None:
        if seeds != (0,):
            raise ValueError(
                f"seeds={seeds!r} with inversion_steps={inversion_steps!r}: inversion draws no "
                "noise; leave one of them out"
            )
        (inversion_steps,) = _whole_numbers("inversion_steps", [inversion_steps], 1, trained)
        plan = plan_inversion(pipe, timesteps, inversion_steps)
        seeds, timesteps = (), plan.stops
    (batch_size,) = _whole_numbers("batch_size", [batch_size], 1, _SEEDS_END)

    if not isinstance(images, (list, tuple)):
        images = [images]
    prompts = _prompts(prompt, len(images))
    loaded = [load_image(image, f"image {i}") for i, image in enumerate(images)]
    size, multiple = default_size(pipe) if size is None else size, size_multiple(pipe)
    sizes = [fit_size(image.shape[0], image.shape[1], size, multiple) for image in loaded]
    shifts = [0 if same_noise else index * OTHER_NOISE for index in range(len(loaded))]
    drawn = [tuple(seed + shift for seed in seeds) for shift in shifts]

    batches = _batches(sizes, batch_size)
    passes = len(seeds) * len(timesteps) if plan is None else len(plan.path) + len(plan.stops)
    found: dict[int, Features] = {}
    with (
        _borrowed(pipe),
        tqdm(total=len(batches) * passes, desc="model", disable=not progress) as bar,
    ):
        texts = {text: _encode_prompt(pipe, text) for text in dict.fromkeys(prompts)}
        for batch in batches:
            conditions = _conditions(pipe, [texts[prompts[i]] for i in batch], sizes[batch[0]])
            denoise = _denoiser(pipe, conditions, bar.update)
            latent = encode(pipe, [resize(loaded[i], sizes[i]) for i in batch])
            if plan is None:
                carried = noised(pipe, latent, timesteps, [drawn[i] for i in batch])
            else:
                carried = invert(plan, latent, denoise)
            entries: list[Entry] = []
            blocks: list[Tensor] = []
            for t, x_t in carried:
                with (
                    capture(pipe.unet, layers) as record,
                    block_outputs(pipe, layers if outputs else ()) as seen,
                ):
                    denoise(x_t, t)
                entries.extend(record)
                blocks.extend(seen[block_of(entry.layer)] for entry in record if outputs)
            _check_same_tokens(entries)
            _check_numbers(entries, blocks)
            _check_same_width(entries, blocks)
            for place, i in enumerate(batch):
                found[i] = _join(
                    entries,
                    blocks,
                    place,
                    image=loaded[i],
                    input_size=sizes[i],
                    timestep=timesteps if several else timesteps[0],
                    seeds=drawn[i],
                    prompt=prompts[i],
                    inversion_steps=inversion_steps,
                )
    return [found[i] for i in range(len(loaded))]


def check_features(
    pipe: Any,
    *,
    layers: str | Iterable[str] | None = None,
    timestep: int | Sequence[int] = DEFAULT_TIMESTEP,
    seeds: int | Sequence[int] = (0,),
    size: int | tuple[int, int] | None = None,
    same_noise: bool = True,
) -> None:
    """Raise ValueError for arguments that :func:`features` refuses, before there are images."""
    _patterns(pipe, layers)
    trained = int(pipe.scheduler.config.num_train_timesteps)
    _whole_numbers("timestep", timestep, 0, trained - 1)
    _whole_numbers("seeds", seeds, 0, _SEEDS_END)
    switch("same_noise", same_noise)
    side = default_size(pipe)
    fit_size(side, side, side if size is None else size, size_multiple(pipe))


def _patterns(pipe: Any, layers: str | Iterable[str] | None) -> list[str]:
    """The patterns of layers, checked before the model runs."""
    if layers is None:
        layers = default_layers(pipe)
    patterns = [layers] if isinstance(layers, str) else layers
    if isinstance(patterns, Iterable):
        patterns = list(patterns)
        if all(isinstance(pattern, str) for pattern in patterns):
            capture(pipe.unet, patterns)  # refuses what matches nothing or cannot be observed
            return patterns
    raise ValueError(
        f"layers={layers!r} must be a pattern of layer names such as {DEFAULT_LAYERS!r}, or several"
    )


def _whole_numbers(name: str, value: Any, low: int, high: int) -> tuple[int, ...]:
    """``value``, one whole number from low to high, or several, of any integer type."""
    try:
        given = [value] if isinstance(value, (str, bytes)) else list(value)
    except TypeError:
        given = [value]
    if not given:
        raise ValueError(f"{name} is empty; give at least one whole number")
    for each in given:
        if isinstance(each, bool) or not isinstance(each, numbers.Integral):
            raise ValueError(f"{name}={each!r} must be a whole number; it takes {low} to {high}")
        if not low <= int(each) <= high:
            raise ValueError(f"{name}={each} is out of range; it takes {low} to {high}")
    return tuple(int(each) for each in given)


def _prompts(prompt: str | Sequence[str], images: int) -> list[str]:
    """One prompt for each image."""
    if isinstance(prompt, str):
        return [unicode_text("prompt", prompt)] * images
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(each, str) for each in prompt):
        raise ValueError(f"prompt={prompt!r} must be a string, or a list of one for each image")
    if len(prompt) != images:
        raise ValueError(f"prompt has {len(prompt)} strings for {images} images")
    return [unicode_text("prompt", each) for each in prompt]


def _batches(sizes: Sequence[tuple[int, int]], most: int) -> list[list[int]]:
    """Indices of images of equal size, at most ``most`` together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        alike.setdefault(size, []).append(index)
    return [
        group[start : start + most]
        for group in alike.values()
        for start in range(0, len(group), most)
    ]


@contextmanager
def _borrowed(pipe: Any) -> Iterator[None]:
    """Without dropout, which would draw; afterwards every module's mode is what it was."""
    parts = (getattr(pipe, name, None) for name in PARTS)
    modules = [each for part in parts if isinstance(part, nn.Module) for each in part.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        pipe.maybe_free_model_hooks()  # as diffusers' calls end: under model offload, all go home


def _encode_prompt(pipe: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
    """Text embeddings [1, tokens, width], and SDXL's pooled ones [1, width]."""
    # Without a prompt, what the pipeline takes for unconditional: SDXL's zeros, for one.
    empty = prompt == ""
    encoded = pipe.encode_prompt(
        prompt,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=empty,
    )
    text, *pooled = encoded[1::2] if empty else encoded[::2]
    return text, pooled[0] if pooled else None


def _conditions(
    pipe: Any, texts: Sequence[tuple[Tensor, Tensor | None]], size: tuple[int, int]
) -> dict[str, Any]:
    """What the UNet wants beside latents and timestep, for a batch of images of one size."""
    dtype = pipe.unet.dtype
    text = torch.cat([embedded for embedded, _ in texts]).to(dtype)
    pooled = [each.to(dtype) for _, each in texts if each is not None]
    if not pooled:
        return {"encoder_hidden_states": text}
    # SDXL's picture was this large, nothing was cut off, and it shall be this large.
    ids = torch.tensor([[*size, 0, 0, *size]] * len(texts), dtype=dtype, device=text.device)
    added = {"text_embeds": torch.cat(pooled), "time_ids": ids}
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


def _denoiser(pipe: Any, conditions: dict[str, Any], done: Callable[[], Any]) -> Denoise:
    def denoise(latent: Tensor, timestep: int) -> Tensor:
        predicted = pipe.unet(latent.to(pipe.unet.dtype), timestep, **conditions).sample
        done()
        return predicted.to(latent)

    return denoise


def block_of(layer: str) -> str:
    """The name of the transformer block that an attention layer is in."""
    return layer.rpartition(".")[0]


@contextmanager
def block_outputs(pipe: Any, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the blocks of some layers put out in the latest forward pass, by name: [B, N, c].

    ``layers``: patterns, as in :func:`features`; none watch nothing.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _arguments, output: seen.update({name: output})

    patterns = list(layers)
    names = {block_of(name) for name in find_layers(pipe.unet, patterns)} if patterns else set()
    hooks = [
        pipe.unet.get_submodule(name).register_forward_hook(keep(name)) for name in sorted(names)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _join(
    entries: Sequence[Entry], blocks: Sequence[Tensor], place: int, **settings: Any
) -> Features:
    """One image of the batch: all layers and passes as one set of heads, each counting the same."""
    first = entries[0]
    assert first.grid is not None  # _check_same_tokens has refused the rest
    weights = [torch.full((each.heads,), 1.0 / (each.heads * len(entries))) for each in entries]
    return Features(
        query=torch.cat([entry.query[place : place + 1] for entry in entries], dim=1),
        key=torch.cat([entry.key[place : place + 1] for entry in entries], dim=1),
        scale=first.scale,
        head_weights=torch.cat(weights).to(first.query.device),
        grid=first.grid,
        layers=tuple(dict.fromkeys(entry.layer for entry in entries)),
        output=torch.stack([block[place : place + 1] for block in blocks], dim=1)
        if blocks
        else None,
        **settings,
    )


def _check_numbers(entries: Sequence[Entry], blocks: Sequence[Tensor]) -> None:
    """ValueError, naming the layer, where a model has put out NaN or infinity."""
    made = [(f"layer {e.layer!r}", part) for e in entries for part in (e.query, e.key)]
    made += [
        (f"block {block_of(entry.layer)!r}", block)
        for entry, block in zip(entries, blocks, strict=False)
    ]
    for where, tensor in made:
        if not (math.isfinite(tensor.amin()) and math.isfinite(tensor.amax())):
            raise ValueError(
                f"{where} of the model puts out NaN or infinity: its weights are damaged, or it "
                "overflows in half precision (then load it with torch_dtype=torch.float32)"
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


def _check_same_width(entries: Sequence[Entry], blocks: Sequence[Tensor]) -> None:
    widths = {entry.layer: block.shape[-1] for entry, block in zip(entries, blocks, strict=False)}
    if len(set(widths.values())) > 1:
        told = "\n  ".join(f"{name}: {width} channels" for name, width in widths.items())
        raise ValueError(f"outputs of different widths cannot be averaged:\n  {told}")
