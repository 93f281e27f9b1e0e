"""Neighbours' support: its formula written out, known answers, and whose confidence it makes."""

import itertools
import math

import numpy as np
import pytest
import torch
from flashmaps.diffusion.features import Features
from flashmaps.matching.confidence import Calibration, Term, local_ims
from flashmaps.matching.consensus import ROTATIONS, SCALES, offsets, spacing, weights
from flashmaps.matching.match import match_features
from flashmaps.matching.options import MatchOptions
from flashmaps.matching.support import RINGS, support


def numbered(grid):
    return torch.arange(grid[0] * grid[1])[None]


def written_out(forward, backward, source_grid, target_grid, i, t):
    """The formula of the module's docstring, one neighbour after the other."""
    height, width = target_grid
    close = 2 / 3 * spacing(target_grid)
    ratio = max(source_grid) / max(target_grid)

    def at(token, grid):
        return np.array([token % grid[1], token // grid[1]], float)

    best = 0.0
    for scale, degrees, hand in itertools.product(SCALES, ROTATIONS, (1, -1)):
        c, s = (scale * f(math.radians(degrees)) for f in (math.cos, math.sin))
        total = whole = 0.0
        for d, share in zip(offsets(target_grid, RINGS), weights(target_grid, RINGS), strict=True):
            if d == (0, 0):
                continue
            whole += share
            x, y = at(t, target_grid) + d
            if not (0 <= x < width and 0 <= y < height):
                continue
            j = int(y * width + x)
            k = int(backward[j])
            cycle = np.linalg.norm(at(int(forward[k]), target_grid) - (x, y))
            turned = np.array([hand * (c * d[0] - s * d[1]), s * d[0] + c * d[1]])
            off = at(k, source_grid) - at(i, source_grid) - ratio * turned
            reach = ratio * (close + 0.15 * math.hypot(*d))
            near = math.exp(-((np.linalg.norm(off) / reach) ** 2))
            total += share * math.exp(-((cycle / close) ** 2)) * near
        best = max(best, total / whole)
    return best


@pytest.mark.parametrize("source_grid, target_grid", [((9, 11), (9, 11)), ((12, 8), (6, 7))])
def test_is_what_its_formula_says(source_grid, target_grid):
    generator = torch.Generator().manual_seed(0)
    sources, targets = (g[0] * g[1] for g in (source_grid, target_grid))
    forward = torch.randint(targets, (2, sources), generator=generator)
    backward = torch.randint(sources, (2, targets), generator=generator)
    backward[0] = numbered(target_grid) * sources // targets  # something that agrees
    found = support(forward, backward, source_grid, target_grid)
    assert found.shape == forward.shape and found.dtype == torch.float32
    for image, token in itertools.product(range(2), range(0, sources, 7)):
        fields = forward[image], backward[image]
        wanted = written_out(*fields, source_grid, target_grid, token, int(forward[image, token]))
        assert math.isclose(found[image, token], wanted, rel_tol=1e-5, abs_tol=1e-7)
    tokens, placed = torch.tensor([[3, 5], [7, 1]]), torch.tensor([[2, 40], [11, 0]])
    some = support(forward, backward, source_grid, target_grid, tokens, placed)
    for image, n in itertools.product(range(2), range(2)):
        wanted = written_out(
            forward[image], backward[image], source_grid, target_grid,
            int(tokens[image, n]), int(placed[image, n]),
        )  # fmt: skip
        assert math.isclose(some[image, n], wanted, rel_tol=1e-5, abs_tol=1e-7)


def test_is_one_in_the_midst_of_a_mirror_image_and_small_where_nothing_agrees():
    grid = (40, 40)
    mirrored = numbered(grid).view(1, *grid).flip(2).flatten(1)
    found = support(mirrored, mirrored, grid, grid).view(grid)
    assert torch.allclose(found[8:32, 8:32], torch.ones(24, 24), atol=1e-6)
    assert found[0, 0] < 0.5  # most of its neighbours lie outside
    shuffled = torch.randperm(1600, generator=torch.Generator().manual_seed(0))[None]
    back = shuffled.argsort()
    alone = support(shuffled, back, grid, grid)  # a bijection, but no neighbour goes along
    assert alone.max() < 0.35 and alone.median() < 0.1
    wrong = support(mirrored, mirrored, grid, grid, numbered(grid), numbered(grid).flip(1))
    assert wrong.view(grid)[8:15, 20].max() < 0.05  # they lie far from where it is said


def test_local_ims_is_the_mean_over_the_tokens_around_that_there_are():
    generator = torch.Generator().manual_seed(0)
    for grid, reach in (((56, 50), 2), ((6, 9), 1)):
        errors = torch.rand(2, grid[0] * grid[1], generator=generator)
        found = local_ims(errors, grid).view(2, *grid)
        each = errors.view(2, *grid)
        for y, x in ((0, 0), (3, 1), (grid[0] - 1, 4)):
            part = each[:, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
            torch.testing.assert_close(found[:, y, x], part.mean((1, 2)))


def test_a_match_is_trusted_where_its_readout_puts_the_point():
    torch.manual_seed(0)
    grid, size = (10, 10), (40, 40)

    def seen():
        codes = torch.randn(1, 2, 100, 4)
        return Features(
            query=codes, key=codes, output=codes[:, :1], scale=1.0,
            head_weights=torch.tensor([0.5, 0.5]), grid=grid,
            image=np.zeros((*size, 3), np.float32), input_size=size, layers=("known",), timestep=0,
            seeds=(0,), prompt="",
        )  # fmt: skip

    calibration = Calibration(
        (Term("support", 2.0, 0.1, 0.05), Term("entropy", -1.0, 1.0, 2.0)), 0.1, 0.1, "the box"
    )
    options = MatchOptions(readout="consensus", calibration=calibration)
    m = match_features(seen(), seen(), options)
    trip = m.round_trip
    at_matches = support(trip.forward, trip.backward, grid, grid)
    wanted = calibration.probability({"support": at_matches, "entropy": m.entropy[None]})[0]
    torch.testing.assert_close(m.confidence, wanted)

    points = np.array([[3.0, 4.0], [30.0, 9.0], [17.0, 33.0]])
    tokens = torch.tensor([[m.token_at(point) for point in points]])
    for kind in ("hard", "consensus"):
        placed = [m.token_at(p, "target") for p in m.transfer(points, kind)]
        there = support(trip.forward, trip.backward, grid, grid, tokens, torch.tensor([placed]))
        said = calibration.probability({"support": there, "entropy": m.entropy[tokens]})[0].numpy()
        least = float(np.sort(said)[1])
        kept = ~np.isnan(m.transfer(points, kind, min_confidence=least)[:, 0])
        assert np.array_equal(kept, said >= least) and kept.sum() == 2
    np.testing.assert_allclose(
        m.confidence_at(points), said, rtol=1e-6
    )  # its own readout, the last
