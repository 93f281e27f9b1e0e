"""What a wheel must do wherever it was installed: reduce a map in C++, and know its version."""

import importlib.metadata

import flashmaps as fm
import torch

assert fm.__version__ == importlib.metadata.version("flashmaps"), fm.__version__
A = fm.AttentionMap(torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8), backend="cpu")
dense = A.to_dense()
assert (A.entropy() + (dense * dense.log()).sum(-1)).abs().max() < 1e-4
print("flashmaps", fm.__version__, A.backend)
