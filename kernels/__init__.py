"""GPU kernels written in Triton: the code behind backend "triton".

The kernels themselves are not part of this release. What is here only says so, to
`flashmaps.backends()` and to whoever asks for the backend by name. Importing this package never
imports triton.
"""

__all__ = ["unavailable_reason"]


def unavailable_reason() -> str:
    """Why backend "triton" cannot run here, in one sentence a user can act on."""
    return (
        "the Triton kernels are not part of flashmaps 0.1; "
        'use backend="cpu" or backend="reference" with tensors on the CPU'
    )
