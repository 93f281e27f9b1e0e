"""Every output of a few maps, by name: for tests that compare the bits of two runs.

Run as a program, it prints a digest of each output after putting inputs and outputs of the C++
kernel right before a page that may not be touched: to read or write beyond them ends the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
from collections.abc import Callable

import flashmaps as fm
import torch
from flashmaps.maps.lazy import REDUCTIONS
from torch import Tensor

Place = Callable[[Tensor], Tensor]

GUARDED_DTYPES = (torch.float32, torch.float64, torch.float16)  # bfloat16 goes float16's ways


def outputs(backend: str, dtype: torch.dtype, place: Place = lambda t: t) -> dict[str, Tensor]:
    """Rows, columns, both from a known log-sum-exp, normalised, masked, composed; odd sizes."""

    def draw(*shape: int, seed: int) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return place(values.to(dtype))

    query, key = draw(2, 3, 101, 19, seed=0), draw(2, 3, 143, 19, seed=1)
    mask = torch.arange(143) % 7 > 0
    grids = {"query_grid": (1, 101), "key_grid": (11, 13), "backend": backend}
    plain = fm.AttentionMap(query, key, **grids)
    found: dict[str, Tensor] = {}
    maps = {
        "plain": plain,
        "lse": fm.AttentionMap(query, key, lse=place(plain.lse), **grids),
        "mask": fm.AttentionMap(query, key, key_mask=mask, pairs=[[1, 0], [0, 1]], **grids),
        "rows": fm.AttentionMap(query, key, normalize="rows", **grids),
        "columns": fm.AttentionMap(
            query, key, normalize="columns", head_weights=[0.5, 0, 0.5], **grids
        ),
    }
    names = [name for name in REDUCTIONS if name != "diagonal"]
    result = plain.dtype
    x = place(torch.randn(2, 143, 5, generator=torch.Generator().manual_seed(2), dtype=result))
    y = place(torch.randn(2, 101, 5, generator=torch.Generator().manual_seed(3), dtype=result))
    for title, A in maps.items():
        fields = A.reduce(*names)._asdict()
        fields |= {"lse": A.lse, "dense": A.to_dense(), "rows": A.rows([3, -1])}
        fields |= {"product": A @ x, "transposed": A.mT @ y, "pool": A.pool(key_to=(4, 5))}
        fields |= dict(zip(("values", "indices"), A.topk(9), strict=True))
        found |= {f"{title} {name}": field for name, field in fields.items()}
    square = fm.AttentionMap(query, query, backend=backend)
    found["diagonal"] = square.diagonal()
    back = fm.AttentionMap(key, query, query_grid=(11, 13), key_grid=(1, 101), backend=backend)
    found |= {f"trip {k}": v for k, v in vars(fm.round_trip(plain, back)).items()}
    composed = (plain @ back).reduce("entropy", "argmax", "diagonal", "column_sum")
    found |= {f"composed {k}": v for k, v in composed._asdict().items()}
    long_rows = draw(1, 1, 33, 8, seed=4), draw(1, 1, 70001, 8, seed=5)
    two_passes = fm.AttentionMap(*long_rows, backend=backend).reduce("entropy", "column_sum")
    found |= {f"two passes {k}": v for k, v in two_passes._asdict().items()}
    return found


def digests(of: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in of.items()
    }


class Guarded:
    """Copies tensors to where their last byte is followed by a page without access."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.kept: list[object] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = max(1, torch.Size(shape).numel() * dtype.itemsize)
        pages = -(-size // mmap.PAGESIZE) + 1
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        guard = start + (pages - 1) * mmap.PAGESIZE
        no_access = self.libc.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0)
        assert no_access == 0, ctypes.get_errno()
        buffer = (ctypes.c_char * size).from_address(guard - size)
        self.kept += (memory, buffer)
        count = torch.Size(shape).numel()
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def main() -> None:
    from flashmaps.maps import problem as _problem
    from flashmaps.maps.backends import cpu

    guarded = Guarded()

    def guarded_outputs(problem, request):
        empty = _problem.empty_outputs(problem, request)
        return {name: guarded.empty(out.shape, out.dtype) for name, out in empty.items()}

    cpu.empty_outputs = guarded_outputs
    torch.set_num_threads(2)
    for dtype in GUARDED_DTYPES:
        print(json.dumps(digests(outputs("cpu", dtype, guarded))), flush=True)


if __name__ == "__main__":
    main()
