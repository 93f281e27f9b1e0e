"""The built-in model: a miniature Stable Diffusion 2 and the script that trains it.

The weights lie beside this file in `builtin/`, an ordinary diffusers pipeline folder.
Importing this package loads neither torch nor diffusers.
"""

from pathlib import Path

__all__ = ["builtin_folder"]


def builtin_folder() -> Path:
    """The packaged pipeline folder; `StableDiffusionPipeline.from_pretrained` loads it."""
    return Path(__file__).parent / "builtin"
