"""Envelope and IsoFLOP parabolas: exact where they must be, and their known bias."""

import dataclasses

import numpy as np
import pytest

from lvm.scaling.frontier import (
    envelope,
    envelope_frontier,
    fit_parabolas,
    isoflop_bias,
    isoflop_frontier,
)
from lvm.scaling.laws import ChinchillaLaw
from tests.lvm.sweeps import ASYMMETRIC, isoflop_rows

SYMMETRIC = ChinchillaLaw(1.7, 400.0, 400.0, 0.31, 0.31)
# The exponents of the published worst case; the relative bias depends on nothing else of the law.
SPARSE = ChinchillaLaw(1.7, 400.0, 400.0, 0.71, 0.372)


def test_parabola_finds_an_exact_minimum():
    rows = isoflop_rows(SYMMETRIC, sizes=5)
    params = np.array([SYMMETRIC.optimum(C).params for C in rows.flops])
    exact = dataclasses.replace(rows, loss=2 + 0.1 * np.log(rows.params / (0.7 * params)) ** 2)
    for parabola in fit_parabolas(exact):
        assert parabola.problem == ""
        assert parabola.params == pytest.approx(0.7 * SYMMETRIC.optimum(parabola.flops).params)
        assert parabola.params * parabola.tokens * 6 == pytest.approx(parabola.flops)
        assert parabola.loss == pytest.approx(2)
        assert parabola.center_offset == pytest.approx(1 / 0.7)
    frontier = isoflop_frontier(fit_parabolas(exact))
    assert frontier.params.exponent == pytest.approx(0.5)
    assert frontier.params(1e25) == pytest.approx(0.7 * SYMMETRIC.optimum(1e25).params)


def test_isoflop_is_unbiased_on_a_centered_symmetric_grid():
    assert isoflop_bias(isoflop_rows(SYMMETRIC), SYMMETRIC, [1e21, 1e25]) == pytest.approx([0, 0], abs=1e-9)


def test_isoflop_bias_is_the_published_worst_case():
    # Sizes N*/2 to N*·2, whose centers drift from N* to N*/3, five budgets 1e18 to 1e22: N* −35 %, D* +54 %.
    rows = isoflop_rows(SPARSE, np.geomspace(1e18, 1e22, 5), width=2.0, centers=3.0 ** -np.linspace(0, 1, 5))
    parabolas = fit_parabolas(rows)
    frontier = isoflop_frontier([dataclasses.replace(parabola, problem="") for parabola in parabolas])
    optimum = SPARSE.optimum(3.8e25)
    assert frontier.params(3.8e25) / optimum.params - 1 == pytest.approx(-0.35, abs=0.005)
    assert frontier.tokens(3.8e25) / optimum.tokens - 1 == pytest.approx(0.54, abs=0.005)
    # Minima outside of the sizes are not used, which leaves half of the bias.
    assert [bool(parabola.problem) for parabola in parabolas] == [False, False, False, True, True]
    assert isoflop_bias(rows, SPARSE, [3.8e25]) == pytest.approx([-0.186], abs=0.005)


def test_isoflop_bias_grows_with_the_width_of_the_grid():
    biases = [isoflop_bias(isoflop_rows(ASYMMETRIC, width=width), ASYMMETRIC, [1e25])[0] for width in (2, 4, 16)]
    assert 0.01 < abs(biases[0]) < abs(biases[1]) < abs(biases[2])


def test_parabola_without_a_use_says_why():
    rows = isoflop_rows(SYMMETRIC, centers=100.0)
    assert all("outside of the sizes" in parabola.problem for parabola in fit_parabolas(rows))
    few = fit_parabolas(isoflop_rows(SYMMETRIC, sizes=3))
    assert all("3 sizes" in parabola.problem for parabola in few)
    assert isoflop_frontier(few) is None
    hill = dataclasses.replace(rows, loss=10 - rows.loss)
    assert all("no minimum" in parabola.problem for parabola in fit_parabolas(hill))


def test_envelope_is_what_no_cheaper_row_beats():
    rows = isoflop_rows(SYMMETRIC, noise=0.02)
    kept = envelope(rows)
    order = np.lexsort((rows.loss, rows.flops))
    lowest, expected = np.inf, []
    for i in order:
        if rows.loss[i] < lowest:
            lowest = rows.loss[i]
            expected.append(str(i))
    assert kept.name.tolist() == expected
    assert np.all(np.diff(kept.loss) < 0)
    assert np.all(np.diff(kept.flops) >= 0)


def test_envelope_follows_the_optimum_on_a_fine_grid():
    frontier = envelope_frontier(isoflop_rows(SYMMETRIC, np.geomspace(1e17, 1e21, 30), sizes=41))
    assert frontier.params.exponent == pytest.approx(0.5, abs=0.02)
    assert frontier.params(1e20) == pytest.approx(SYMMETRIC.optimum(1e20).params, rel=0.1)
    assert envelope_frontier(isoflop_rows(SYMMETRIC, np.array([1e19]))) is None
