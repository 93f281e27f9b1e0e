"""From two images, or many pairs of them, to matches with a confidence.

May import `diffusion`, `maps`, `models` and `files`. The way in is ``fm.match``
(:func:`flashmaps.matching.match.match`).
"""
