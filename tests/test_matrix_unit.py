"""Half precision on the processor's matrix unit (AMX), beside the build without; small maps."""

from __future__ import annotations

import flashmaps as fm
import pytest
import torch
from flashmaps.maps.backends import cpu
from test_instruction_sets import BUILDS, OneBuild


@pytest.mark.skipif("amx" not in BUILDS, reason="this processor has no matrix unit that we use")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [2, 8, 31, 32, 40, 64, 72, 160])
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 97])
def test_both_builds_agree(
    keys: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of whole and of broken tiles, keys of whole and of broken ones, hidden keys."""
    generator = torch.Generator().manual_seed(keys * dim)
    query, key = (torch.randn(2, 3, n, dim, generator=generator).to(dtype) for n in (50, keys))
    mask = torch.randn(2, keys, generator=generator)
    if keys > 1:
        mask[:, keys // 2] = -torch.inf
    found = {}
    for build in ("amx", "avx512"):
        monkeypatch.setattr(cpu, "_C", OneBuild(build))
        lazy = fm.AttentionMap(query, key, key_mask=mask, backend="cpu")
        known = fm.AttentionMap(query, key, key_mask=mask, lse=lazy.lse, backend="cpu")
        found[build] = (lazy.to_dense(), known.to_dense(), lazy.lse)
        monkeypatch.undo()
    # Scores are sums of `dim` exact products, each sum rounded: at most dim eps of their size, and
    # a probability changes by as much as its score.
    scores = (query.float() @ key.float().mT).abs().max() / dim**0.5 + mask.nan_to_num().abs().max()
    bound = float((4 + dim) * torch.finfo(torch.float32).eps * (1 + scores))
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@pytest.mark.skipif("amx" not in BUILDS, reason="this processor has no matrix unit that we use")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (40, 40), (40, 64), (33, 33)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_the_way_home_too(
    strided: bool, dims: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Return probabilities: the map back by the unit as well, where its heads are as long."""
    generator = torch.Generator().manual_seed(sum(dims))
    sizes, scores = ((50, 97), (97, 50)), 0.0
    pairs = []
    for (rows, keys), dim in zip(sizes, dims, strict=True):
        query, key = (
            torch.randn(2, 3, n, dim, generator=generator).to(dtype) for n in (rows, keys)
        )
        scores = max(scores, float((query.float() @ key.float().mT).abs().max()) / dim**0.5)
        pairs.append((query.mT.contiguous().mT if strided else query, key))
    found = []
    for build in ("amx", "avx512"):
        monkeypatch.setattr(cpu, "_C", OneBuild(build))
        there, back = (fm.AttentionMap(*pair, backend="cpu") for pair in pairs)
        found.append((there @ back).diagonal())
        monkeypatch.undo()
    # As above, for the probabilities of both maps.
    bound = 2 * float((4 + max(dims)) * torch.finfo(torch.float32).eps * (1 + scores))
    torch.testing.assert_close(found[0], found[1], rtol=bound, atol=0)


@pytest.mark.skipif(not BUILDS, reason="the C++ extension is not built")
def test_a_thread_is_woken_for_work_that_is_worth_it() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        few, many = (torch.randn(1, 2, n, 8) for n in (6, 1024))
        assert fm.AttentionMap(few, few, backend="cpu").plan("entropy").share == 0.25
        assert fm.AttentionMap(many, many, backend="cpu").plan("entropy").share == 1
    finally:
        torch.set_num_threads(before)
