"""See it: where the tokens of images look, in a browser or a notebook, row by row as one points.

May import `segmentation` and the rooms below it. The ways in are :func:`flashmaps.explorer.run.run`
(``flashmaps explore``: a server on this machine) and ``fm.explore``
(:func:`flashmaps.explorer.widget.explore`, in a notebook). Both show the page in ``static/``, and
both answer it by :meth:`flashmaps.explorer.session.Session.answer`: a name and parameters in, plain
values and bytes out. Nothing that comes from a page names a file.
"""
