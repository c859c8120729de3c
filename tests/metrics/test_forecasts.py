import numpy as np
import pytest
from scipy import stats

from jflow import metrics


def test_draws_of_a_normal_have_its_closed_form_and_what_their_number_adds():
    """CRPS(N(m, s^2), y) = s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - m) / s, and s /
    (sqrt(pi) L) more on average for L draws; within 4 standard errors of 4000 forecasts each."""
    rng = np.random.default_rng(0)
    for y, mean, std, count in ((0.3, 0.0, 1.0, 7), (-2.0, 1.0, 0.5, 20), (5.0, 5.0, 3.0, 1)):
        draws = mean + std * rng.normal(size=(4000, count))
        found = metrics.crps(np.full(4000, y), draws)
        z = (y - mean) / std
        closed = z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi)
        expected = std * (closed + 1 / (np.sqrt(np.pi) * count))
        assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(found))


def test_it_is_the_integral_over_the_empirical_distribution_and_the_error_of_one_draw():
    rng = np.random.default_rng(1)
    truth, draws = rng.normal(size=(3, 2)), rng.normal(size=(3, 5, 2))
    found = metrics.crps(truth, draws)
    u = np.linspace(-6, 6, 240_001)
    for i, j in np.ndindex(truth.shape):
        below = np.searchsorted(np.sort(draws[i, :, j]), u, side="right") / 5
        integral = np.trapezoid((below - (u >= truth[i, j])) ** 2, u)
        np.testing.assert_allclose(found[i, j], integral, atol=2e-4)  # six steps of 5e-5
    np.testing.assert_allclose(
        metrics.crps(truth, draws[:, :1]), np.abs(truth - draws[:, 0]), rtol=1e-12
    )


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"draws \[n, L, \*event\], got \[3\] and \[3\]"):
        metrics.crps(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"got \[3\] and \[2, 4\]"):
        metrics.crps(np.zeros(3), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="finite numbers"):
        metrics.crps(np.zeros(1), np.array([[np.nan, 1.0]]))
