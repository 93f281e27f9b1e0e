"""Statistics of each head by itself, against dense softmaxes in float64."""

from __future__ import annotations

import math

import flashmaps as fm
import pytest
import torch
from problems import contiguous, every_second, fused, tokens_first

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

NAMES = ("entropy", "max", "argmax", "expectation", "column_sum", "max_logit", "lse")
LAYOUTS = {
    "contiguous": contiguous,
    "tokens first": tokens_first,
    "fused": fused,
    "every second": every_second,
}


def heads_of(query, key, *, pairs=None, mask=None, scale=None):
    """Scores and probabilities of every head in float64: [P, H, N, M]."""
    q, k = query.double(), key.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    bias = torch.zeros(len(k), 1, 1, k.shape[2], dtype=torch.float64)
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None, None], -math.inf) if mask.dtype == torch.bool else (
            mask.double()[:, None, None]
        )  # fmt: skip
    if pairs is not None:
        of_query, of_key = torch.tensor(pairs).unbind(1)
        q, k, bias = q[of_query], k[of_key], bias[of_key]
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    return scores, scores.softmax(-1)


def check(found, scores, p, grid):
    """Each result within a band of the float32 roundings that go into it."""
    eps = torch.finfo(torch.float32).eps
    plogp = torch.where(p > 0, p * p.clamp_min(1e-300).log(), 0.0)
    spread = scores.where(scores.isfinite(), torch.zeros(())).abs().amax(-1)
    # A score of d products is off by about sqrt(d) eps of its size; so, relatively, is exp of it.
    relative = eps * (64 + 8 * spread)
    height, width = grid
    xs = (torch.arange(width).double() + 0.5).div(width).repeat(height)
    ys = (torch.arange(height).double() + 0.5).div(height).repeat_interleave(width)
    centre = torch.stack((xs, ys), -1)

    def near(got, wanted, band):
        assert got.shape == wanted.shape
        assert ((got.double() - wanted).abs() <= band).all()

    near(found.entropy, -plogp.sum(-1), relative * (1 - plogp.sum(-1)) * 4)
    near(found.max, p.amax(-1), relative * p.amax(-1))
    near(found.max_logit, scores.amax(-1), relative * (1 + spread))
    near(found.lse, scores.logsumexp(-1), relative * (1 + spread))
    near(found.expectation, p @ centre, relative[..., None])
    near(found.column_sum, p.sum(-2), (relative[..., None] * p).sum(-2) * 4)
    picked = p.gather(-1, found.argmax[..., None])[..., 0]
    near(picked, p.amax(-1), relative * p.amax(-1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("paired", [False, True], ids=["batch", "pairs"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_every_head_has_its_own_statistics(backend, layout, paired, masked):
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 35, 16), torch.randn(2, 3, 24, 16)
    pairs = [[0, 1], [1, 1], [1, 0]] if paired else None
    mask = torch.rand(2, 24) < 0.7 if masked else None
    place = LAYOUTS[layout]
    A = fm.AttentionMap(
        place(query), place(key), key_mask=mask, pairs=pairs, key_grid=(4, 6), backend=backend
    )
    found = A.reduce(*NAMES, per_head=True)
    assert found.entropy.shape == (3 if paired else 2, 3, 35)
    check(found, *heads_of(query, key, pairs=pairs, mask=mask), (4, 6))


def test_an_additive_mask_is_part_of_the_logits(backend):
    torch.manual_seed(1)
    query, key, mask = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 16, 8), torch.randn(2, 16) * 3
    A = fm.AttentionMap(query, key, key_mask=mask, scale=0.5, backend=backend)
    scores, p = heads_of(query, key, mask=mask, scale=0.5)
    check(A.reduce(*NAMES, per_head=True), scores, p, (4, 4))


def test_the_mean_of_heads_is_no_mean_of_their_entropies(backend):
    """A user's mistake (flash-attention's discussion of averaged heads): the two differ."""
    torch.manual_seed(2)
    A = fm.AttentionMap(torch.randn(1, 4, 25, 8) * 2, torch.randn(1, 4, 25, 8) * 2, backend=backend)
    each = A.reduce("entropy", per_head=True).entropy
    assert (A.entropy() > each.mean(1)).all()  # entropy is concave
    one = fm.AttentionMap(A.problem.query[:, :1], A.problem.key[:, :1], backend=backend)
    torch.testing.assert_close(each[:, 0], one.entropy(), atol=1e-6, rtol=1e-5)


def test_no_copy_of_q_or_k_is_made():
    from flashmaps.maps.heads import one_head_each

    for place in (contiguous, tokens_first, fused):
        query, key = place(torch.randn(2, 3, 35, 16)), place(torch.randn(2, 3, 24, 16))
        A = fm.AttentionMap(query, key)
        for one in one_head_each(A.problem):
            assert one.query.untyped_storage().data_ptr() == query.untyped_storage().data_ptr()
            assert one.key.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()


def test_a_known_log_sum_exp_is_used(backend):
    """As a block of a joint map has it: of more keys than there are."""
    torch.manual_seed(3)
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 16, 8)
    scores, p = heads_of(query, key)
    lse = scores.logsumexp(-1)
    block = fm.AttentionMap(
        query, key[:, :, 4:], lse=lse.float(), key_grid=(3, 4), backend=backend
    ).reduce("max", "max_logit", "lse", per_head=True)
    torch.testing.assert_close(block.max.double(), p[..., 4:].amax(-1), atol=1e-6, rtol=1e-5)
    wanted = scores[..., 4:].amax(-1)
    torch.testing.assert_close(block.max_logit.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block.lse.double(), lse, atol=1e-5, rtol=1e-5)


def test_what_only_heads_have_is_refused_elsewhere():
    A = fm.AttentionMap(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8))
    with pytest.raises(ValueError, match="reduction 'max_logit' is unknown"):
        A.reduce("max_logit")
    with pytest.raises(ValueError, match=r"'colour' is unknown.*with per_head=True also max_logit"):
        A.reduce("colour", per_head=True)
    with pytest.raises(ValueError, match="needs at least one of"):
        A.reduce(per_head=True)
    rows = fm.AttentionMap(A.problem.query, A.problem.key, normalize="rows")
    with pytest.raises(ValueError, match=r"max_logit is of scores, which normalize='rows'"):
        rows.reduce("max_logit", per_head=True)
    assert rows.reduce("entropy", per_head=True).entropy.shape == (1, 2, 9)
