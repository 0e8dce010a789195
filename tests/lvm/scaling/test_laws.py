"""Laws: derivatives, compute-optimal allocations and their inverse."""

import numpy as np
import pytest
import scipy.optimize

from lvm.scaling.laws import ChinchillaLaw, KaplanLaw

LAWS = [ChinchillaLaw(1.8, 480.0, 2100.0, 0.35, 0.37), KaplanLaw(8.8e13, 5.4e13, 0.076, 0.095)]


@pytest.mark.parametrize("law", LAWS)
def test_log_loss_has_its_derivatives(law):
    log_params, log_tokens = np.log([[1e7, 1e8, 1e10], [1e9, 1e12, 1e10]])
    log_loss, jacobian = law.log_loss(law.point, log_params, log_tokens)
    np.testing.assert_allclose(log_loss, np.log(law.loss(np.exp(log_params), np.exp(log_tokens))))
    for i, row in enumerate(jacobian):
        step = np.eye(len(law.point))[i] * 1e-6
        ends = [law.log_loss(law.point + sign * step, log_params, log_tokens)[0] for sign in (1, -1)]
        np.testing.assert_allclose(row, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_point_and_law_are_inverse(law):
    again = type(law).from_point(law.point)
    np.testing.assert_allclose(list(again.values.values()), list(law.values.values()))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("ratio", [6.0, 8.5])
def test_optimum_has_the_least_loss(law, ratio):
    optimum = law.optimum(1e21, ratio)

    def loss(log_params):
        params = np.exp(np.atleast_1d(log_params))
        return law.loss(params, 1e21 / ratio / params)[0]

    best = scipy.optimize.minimize_scalar(loss, bounds=(10, 40), method="bounded", options={"xatol": 1e-9})
    assert optimum.params == pytest.approx(np.exp(best.x), rel=1e-4)
    assert optimum.params * optimum.tokens * ratio == pytest.approx(1e21)
    assert optimum.loss == pytest.approx(best.fun)


@pytest.mark.parametrize("law", LAWS)
def test_params_exponent_is_the_slope_of_optima(law):
    low, high = law.optimum(1e18).params, law.optimum(1e24).params
    assert np.log(high / low) / np.log(1e6) == pytest.approx(law.params_exponent)


@pytest.mark.parametrize("law", LAWS)
def test_flops_to_reach_inverts_the_optimum(law):
    assert law.flops_to_reach(law.optimum(3e22).loss) == pytest.approx(3e22)
    assert law.flops_to_reach(law.irreducible_loss) == float("inf")
