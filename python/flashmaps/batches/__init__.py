"""Collections of images: which pairs, matched in bulk, resumable; what it will take, beforehand.

Imports matching and what is below it. The way in is :func:`flashmaps.batches.run.batch`, which is
``fm.batch`` and the command ``flashmaps batch``.
"""
