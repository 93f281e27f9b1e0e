"""The built-in model: a miniature Stable Diffusion 2 and the script that trains it.

The weights lie beside this file in `builtin/`, an ordinary diffusers pipeline folder. Its card
(README.md) says how they were learned: without labels.
Importing this package loads neither torch nor diffusers.
"""

from pathlib import Path

__all__ = ["NAMES", "builtin_folder"]

NAMES = ("builtin",)


def builtin_folder(name: str = "builtin") -> Path:
    """A packaged pipeline folder; `StableDiffusionPipeline.from_pretrained` loads it.

    Raises ValueError for a name that is not one of ``NAMES``.
    """
    if name not in NAMES:
        raise ValueError(f"there is no built-in model {name!r}; there are: {', '.join(NAMES)}")
    return Path(__file__).parent / name
