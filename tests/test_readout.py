"""Places read from rows of a map: exact where the row has a known peak."""

from __future__ import annotations

import flashmaps as fm
import pytest
import torch
from flashmaps.maps.grids import centres
from flashmaps.matching.readout import ROWS, read, read_map

GRID = (7, 9)
CENTRES = centres(GRID, dtype=torch.float64)
TOKEN = torch.tensor([1 / 9, 1 / 7], dtype=torch.float64)  # one token's width and height


def bell(peak, width=1.0):
    """exp(-d^2 / 2 width^2) of every token, d being its distance from the peak in tokens."""
    tokens = (CENTRES - peak) / TOKEN
    return torch.exp(-tokens.square().sum(-1) / (2 * width**2))


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.3, -0.2), (-0.45, 0.4)])
def test_a_parabola_finds_the_peak_of_a_bell_exactly(shift):
    """The logarithm of a normal density is a parabola, whatever its width."""
    peak = CENTRES[3 * 9 + 4] + torch.tensor(shift, dtype=torch.float64) * TOKEN
    for width in (0.6, 1.0, 3.0):
        found = read(bell(peak, width)[None], GRID, "parabola")[0]
        torch.testing.assert_close(found, peak)


def test_a_window_is_the_mean_of_its_tokens():
    rows = torch.zeros(63, dtype=torch.float64)
    rows[3 * 9 + 4], rows[3 * 9 + 5], rows[0] = 0.5, 0.25, 0.25
    found = read(rows, GRID, "window", 1)
    torch.testing.assert_close(found, (2 * CENTRES[31] + CENTRES[32]) / 3)
    # A window over everything is the mean of all.
    torch.testing.assert_close(read(rows, GRID, "window", 9), read(rows, GRID, "soft"))
    torch.testing.assert_close(read(rows, GRID, "soft"), rows @ CENTRES)
    assert torch.equal(read(rows, GRID), CENTRES[31])


def test_a_window_ends_at_the_edge_and_a_parabola_stays_on_it():
    rows = torch.zeros(63, dtype=torch.float64)
    rows[0], rows[1], rows[9], rows[62] = 0.4, 0.2, 0.2, 0.2
    found = read(rows, GRID, "window", 1)
    torch.testing.assert_close(found, (0.4 * CENTRES[0] + 0.2 * CENTRES[[1, 9]].sum(0)) / 0.8)
    assert torch.equal(read(rows, GRID, "parabola"), CENTRES[0])


def test_flat_and_empty_rows_give_numbers():
    for rows in (torch.ones(4, 63) / 63, torch.zeros(4, 63)):
        for readout in ROWS:
            assert read(rows, GRID, readout).isfinite().all(), readout


def test_a_map_is_read_as_its_rows_are(monkeypatch):
    from flashmaps.matching import readout

    torch.manual_seed(0)
    A = fm.AttentionMap(
        torch.randn(2, 3, 10, 8), torch.randn(2, 3, 63, 8), key_grid=GRID, query_grid=(2, 5)
    )
    dense = A.to_dense()
    for chunk in (2**22, 3 * 2 * 63):  # at once; three rows at a time
        monkeypatch.setattr(readout, "_CHUNK_ELEMENTS", chunk)
        for each in ROWS:
            torch.testing.assert_close(
                read_map(A, each, 2), read(dense, GRID, each, 2), atol=1e-5, rtol=1e-5
            )


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rows have 62 entries; a grid of \(7, 9\) has 63"):
        read(torch.ones(62), GRID)
    with pytest.raises(ValueError, match=r"readout='mode'; wanted 'hard'"):
        read(torch.ones(63), GRID, "mode")
    with pytest.raises(ValueError, match=r"window must be a whole number >= 1, got 1\.5"):
        read(torch.ones(63), GRID, "window", 1.5)
