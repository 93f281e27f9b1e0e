"""All that knows diffusers: maps captured from running models, features of images, words.

May import `maps`, `models` and `files`. The ways in are ``fm.capture``
(:class:`flashmaps.diffusion.capture.capture`) and :func:`flashmaps.diffusion.features.features`.
"""
