"""Diffusers' models whose layers are known: the order of their tokens, and their grids.

Each order was read in the processor or the model that concatenates, and is proven by
``tests/test_families.py``: changing only the text changes exactly the rows that are called text.
A class that is not listed here is not known, nor is a subclass that has a ``forward`` (of a model)
or a ``__call__`` (of a processor) of its own.
"""

from __future__ import annotations

from flashmaps.diffusion.families_image import IMAGES
from flashmaps.diffusion.families_unet import UNETS
from flashmaps.diffusion.families_video import VIDEOS

FAMILIES = (*UNETS, *IMAGES, *VIDEOS)
