"""The lazy map: what it is, what may be asked of it, and the backends that answer.

Knows nothing of models and images; may import `kernels` alone. The way in is ``fm.AttentionMap``
(:class:`flashmaps.maps.attention_map.AttentionMap`).
"""
