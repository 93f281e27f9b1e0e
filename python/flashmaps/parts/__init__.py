"""Parts of a collection as learned words: found again in other images, told missing, imagined.

May import `segmentation`, `matching`, `diffusion`, `maps` and `files`. The ways in are
``fm.learn_parts`` (:func:`flashmaps.parts.learn.learn_parts`), whose result is a
:class:`flashmaps.parts.result.Parts`, and ``fm.find_parts``
(:func:`flashmaps.parts.find.find_parts`); and ``fm.complete``
(:func:`flashmaps.parts.completion.complete`).
"""
