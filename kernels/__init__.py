"""GPU kernels written in Triton: the code behind backend "triton".

Importing this package never imports triton: `backend` does, when something runs.

| module | what it holds |
| --- | --- |
| `tile` | the tile of the mean map, which all kernels share |
| `reducers` | what each statistic makes of a tile |
| `kernel_lse`, `kernel_reduce`, `kernel_return` | the kernels |
| `run`, `views` | a launch and what it may allocate; a map as kernels are told of it |
| `launch_lse`, `launch_reduce`, `launch_topk`, `launch_return` | launches of them, in which tiles |
| `kernel_gradient`, `launch_gradient`, `backward` | the way back |
| `launches` | which of them a request takes |
| `composing` | the same for compositions |
| `settings`, settings.json | the tiles of each architecture |
| `backend` | `supports` and `reduce`, what all backends have |
| `ahead` | compiles kernels without a GPU and reads what came of it |
| `autotune` | rewrites the settings on a machine with a GPU |
| `rates` | how many exp2 a GPU does in a second |
"""

import importlib.util
import os

import torch

__all__ = ["INTERPRETING", "unavailable_reason"]

# Whether triton runs its kernels in Python, on the CPU. It decides when it is imported; so do we.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None

_INSTEAD = 'use backend="cpu" or backend="reference" with tensors on the CPU'


def unavailable_reason() -> str | None:
    """Why backend "triton" cannot run here, in one sentence a user can act on; None if it can."""
    if not _INSTALLED:
        return f"triton is not installed (pip install triton, on Linux); {_INSTEAD}"
    if not INTERPRETING and not torch.cuda.is_available():
        return f"torch sees no GPU here; {_INSTEAD}"
    return None
