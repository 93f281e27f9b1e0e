"""What computes: plain torch, C++ on the CPU, CUDA C++; Triton stands in `flashmaps.kernels`.

A backend knows `flashmaps.maps.problem`, not the maps above it. The way in is
:func:`flashmaps.maps.backends.choice.select`.
"""
