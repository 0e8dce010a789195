"""Fits: two published answers on one table, recovery without noise, pins, penalties, nonsense."""

import dataclasses

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.scaling.laws import ChinchillaLaw, KaplanLaw
from lvm.scaling.observations import read_csv, select
from lvm.scaling.parametric import FitSettings, fit_law, log_residuals, refit
from tests.lvm.sweeps import (
    ASYMMETRIC,
    CHINCHILLA_CSV,
    isoflop_rows,
    make_rows,
    needs_chinchilla_csv,
)

SYMMETRIC = ChinchillaLaw(1.7, 400.0, 400.0, 0.31, 0.31)


def assert_published_refit(fit):
    """The refit of arXiv 2404.10102 on 240 rows."""
    law = fit.law
    assert pytest.approx(1.81724, abs=0.002) == law.E
    assert law.alpha == pytest.approx(0.34731, abs=0.001)
    assert law.beta == pytest.approx(0.36718, abs=0.001)
    assert pytest.approx(477.84, rel=0.01) == law.A
    assert pytest.approx(2143.86, rel=0.02) == law.B
    assert fit.objective <= 1.01830e-3
    assert 0.3 < fit.share_of_inits < 0.6


@needs_chinchilla_csv
def test_huber_gives_the_published_refit():
    rows = select(read_csv(CHINCHILLA_CSV), drop_highest=5)
    assert_published_refit(fit_law(rows, FitSettings(inits=100)))


@pytest.mark.slow
@needs_chinchilla_csv
def test_huber_from_all_starts_gives_the_published_refit():
    fit = fit_law(select(read_csv(CHINCHILLA_CSV), drop_highest=5), FitSettings())
    assert fit.inits == 4500
    assert_published_refit(fit)


@needs_chinchilla_csv
def test_variable_projection_gives_the_published_answer():
    rows = select(read_csv(CHINCHILLA_CSV), drop_highest=5, max_flops=1e21)
    fit = fit_law(rows, FitSettings("variable_projection"))
    expected = {"E": 1.905092, "A": 4.000523, "B": 1.050948, "alpha": 0.351058, "beta": 0.458742}
    assert fit.coefficients == pytest.approx(expected, rel=1e-5)
    assert fit.objective == pytest.approx(0.062414, rel=1e-4)
    assert fit.law.params_exponent == pytest.approx(0.566488, rel=1e-5)


@needs_chinchilla_csv
def test_variable_projection_depends_on_the_mask():
    fit = fit_law(select(read_csv(CHINCHILLA_CSV), drop_highest=5), FitSettings("variable_projection"))
    assert pytest.approx(1.8828, abs=1e-4) == fit.law.E
    assert (fit.law.alpha, fit.law.beta) == pytest.approx((0.3576, 0.4276), abs=1e-4)
    assert fit.objective == pytest.approx(0.08320, abs=1e-5)


@pytest.mark.parametrize("method", ["huber", "variable_projection"])
@pytest.mark.parametrize("law", [ASYMMETRIC, SYMMETRIC])
def test_fit_recovers_a_law_without_noise(method, law):
    fit = fit_law(isoflop_rows(law), FitSettings(method, inits=60))
    assert fit.law.values == pytest.approx(law.values, rel=1e-6)
    assert fit.objective < 1e-12


def test_variable_projection_huber_resists_an_outlier():
    rows = isoflop_rows(SYMMETRIC, sizes=7)
    rows.loss[3] *= 1.2
    laws = [fit_law(rows, FitSettings(f"variable_projection{s}", inits=4)).law for s in ("", "_huber")]
    assert pytest.approx(SYMMETRIC.E, rel=1e-3) == laws[1].E
    assert abs(laws[0].E - SYMMETRIC.E) > 5 * abs(laws[1].E - SYMMETRIC.E)


def test_kaplan_recovers_a_law_without_noise():
    law = KaplanLaw(8.8e13, 5.4e13, 0.076, 0.095)
    fit = fit_law(isoflop_rows(law), FitSettings("kaplan", inits=30))
    assert fit.law.values == pytest.approx(law.values, rel=1e-5)


def test_pin_keeps_the_irreducible_loss():
    rows = isoflop_rows(SYMMETRIC, noise=0.01)
    fit = fit_law(rows, FitSettings(pins={"E": 1.7}, inits=40))
    assert pytest.approx(1.7, rel=1e-12) == fit.law.E
    assert fit_law(rows, FitSettings(pins={"E": 1.2}, inits=40)).objective > fit.objective


def test_penalty_moves_the_share_of_overestimates():
    rows = isoflop_rows(SYMMETRIC, noise=0.01)
    shares = []
    for over, under in ((1, 1), (9, 1), (1, 9)):
        settings = FitSettings(overestimate_penalty=over, underestimate_penalty=under, inits=20)
        shares.append(np.mean(log_residuals(fit_law(rows, settings).law, rows) > 0))
    assert shares[1] < 0.2 < shares[0] < 0.8 < shares[2]


@pytest.mark.parametrize("method", ["huber", "variable_projection", "variable_projection_huber"])
def test_refit_of_the_same_rows_is_the_fit(method):
    rows = isoflop_rows(SYMMETRIC, sizes=7, noise=0.01)
    fit = fit_law(rows, FitSettings(method, inits=20))
    assert refit(rows, fit).values == pytest.approx(fit.law.values, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "cubic"}, "--method=cubic"),
        ({"delta": 0.0}, "--delta=0"),
        ({"pins": {"gamma": 1.0}}, "--pin=gamma"),
        ({"pins": {"E": -1.0}}, "--pin=E=-1"),
        ({"method": "variable_projection", "pins": {"E": 1.0}}, "--method=variable_projection"),
        ({"method": "variable_projection", "overestimate_penalty": 2.0}, "--method=variable_projection"),
    ],
)
def test_settings_reject_nonsense(settings, words):
    with pytest.raises(UserError, match=words):
        FitSettings(**settings)


def test_fit_rejects_rows_that_determine_nothing():
    rows = isoflop_rows(sizes=4)
    equal = dataclasses.replace(rows, loss=np.full(len(rows), 3.0))
    one_budget = isoflop_rows(budgets=np.array([1e19]))
    one_size = make_rows(np.full(9, 1e8), np.geomspace(1e9, 1e11, 9), np.geomspace(3, 2, 9))
    for bad, words in (
        (rows.take(np.arange(5)), "5 rows can't determine 5 parameters"),
        (equal, "all 20 rows have the loss 3"),
        (one_budget, "one compute budget, 1e\\+19 FLOPs"),
        (one_size, "1 distinct values of params"),
    ):
        with pytest.raises(UserError, match=words):
            fit_law(bad, FitSettings())
