"""From one image, or many, to segments: sets of tokens where the walk of attention stays.

May import `matching`, `diffusion`, `maps` and `files`. The ways in
are ``fm.segment`` (:func:`flashmaps.segmentation.segment.segment`) and ``fm.cosegment``
(:func:`flashmaps.segmentation.cosegment.cosegment`).
"""
