import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from jflow import metrics
from jflow.metrics import _two_sample


def test_energy_distance_is_the_v_statistic_of_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.normal(1, 2, size=(25, 3))
    expected = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    np.testing.assert_allclose(
        metrics.energy_distance(x, y), expected, rtol=1e-7
    )  # sqrt of rounded zeros: 1e-8


def test_energy_distance_squares_what_scipy_returns():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=300), rng.exponential(size=200)
    np.testing.assert_allclose(
        metrics.energy_distance(x[:, None], y[:, None]), stats.energy_distance(x, y) ** 2, rtol=1e-6
    )


def test_energy_distance_of_gaussians():
    """For N(0, 1) and N(m, 1), D = X - Y ~ N(m, 2): 2 E|D| - 2 * 2 / sqrt(pi)."""
    m, q = 1.5, (np.arange(4000) + 0.5) / 4000
    x = stats.norm.ppf(q)[:, None]  # quantiles: no noise, error of order 1/n
    mean_abs = 2 / np.sqrt(np.pi) * np.exp(-(m**2) / 4) + m * (
        1 - 2 * stats.norm.cdf(-m / np.sqrt(2))
    )
    np.testing.assert_allclose(
        metrics.energy_distance(x, x + m), 2 * mean_abs - 4 / np.sqrt(np.pi), rtol=2e-3
    )


def test_energy_distance_of_points():
    """One point each at distance 5: 2 * 5 - 0 - 0. Equal sets: 0."""
    assert metrics.energy_distance([[0.0, 0.0]], [[3.0, 4.0]]) == pytest.approx(10)
    x = np.random.default_rng(2).normal(size=(50, 4)) + 1e4
    assert abs(metrics.energy_distance(x, x[::-1])) < 1e-7


def test_wasserstein_in_one_dimension_pairs_sorted_rows():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=60), rng.exponential(size=60)
    expected = np.sqrt(np.mean((np.sort(x) - np.sort(y)) ** 2))
    np.testing.assert_allclose(metrics.wasserstein(x[:, None], y[:, None]), expected, rtol=1e-12)


def test_wasserstein_of_shifts_and_copies():
    """A shift is its own optimal transport, at the length of the shift; a shuffled copy is at 0."""
    x = np.random.default_rng(6).normal(size=(50, 2, 3)) + 1e4
    shift = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(
        metrics.wasserstein(x, x[::-1] + shift), np.linalg.norm(shift), rtol=1e-9
    )
    assert metrics.wasserstein(x, x[::-1]) == 0


def test_wasserstein_agrees_with_pot():
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(40, 3)), rng.normal(1, 2, size=(40, 3))
    np.testing.assert_allclose(
        metrics.wasserstein(x, y) ** 2, ot.emd2([], [], ot.dist(x, y)), rtol=1e-9
    )


def test_wasserstein_of_unequal_sets_is_an_error():
    with pytest.raises(ValueError, match="equal size, got 3 and 4 rows"):
        metrics.wasserstein(np.zeros((3, 2)), np.zeros((4, 2)))


def test_nearest_distance():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(80, 5))
    np.testing.assert_allclose(
        metrics.nearest_distance(x, y), cdist(x, y).min(1).mean(), rtol=1e-12
    )
    assert metrics.nearest_distance(y[:10] + 1e6, y + 1e6) == 0  # copies, even far from the origin


def test_chunks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(33, 2, 2)), rng.normal(size=(21, 2, 2))
    whole = metrics.energy_distance(x, y), metrics.nearest_distance(x, y)
    monkeypatch.setattr(_two_sample, "CHUNK", 50)  # two rows of y at a time, and a last odd one
    again = metrics.energy_distance(x, y), metrics.nearest_distance(x, y)
    np.testing.assert_allclose(
        again, whole, rtol=1e-7
    )  # the zero diagonal comes out of rounding as 1e-8


def test_jax_arrays_go_in_and_floats_come_out():
    x = jnp.arange(6.0).reshape(3, 2)
    for value in (metrics.energy_distance(x, x + 1), metrics.nearest_distance(x, x + 1)):
        assert isinstance(value, float)


def test_bad_rows():
    for f in (metrics.energy_distance, metrics.nearest_distance):
        with pytest.raises(ValueError, match=r"\[3, 2\] and \[3, 4\]"):
            f(np.zeros((3, 2)), np.zeros((3, 4)))
        with pytest.raises(ValueError, match="NaN"):
            f(np.full((3, 2), np.nan), np.zeros((3, 2)))
        with pytest.raises(ValueError, match="expected arrays"):
            f(np.zeros((0, 2)), np.zeros((3, 2)))


def test_permutation_test_wants_a_whole_number_of_permutations():
    with pytest.raises(
        ValueError, match="permutations to be a whole number of at least 1, got 2.5"
    ):
        metrics.permutation_test(np.zeros((3, 1)), np.ones((3, 1)), permutations=2.5)


def test_permutation_test_has_its_level_and_sees_a_shift():
    rng = np.random.default_rng(5)
    null = [
        metrics.permutation_test(
            rng.normal(size=(12, 2)), rng.normal(size=(9, 2)), permutations=19, seed=i
        )[1]
        for i in range(200)
    ]
    # P(p <= 0.1) = 0.1 up to ties: 20 of 200 expected, standard deviation 4.2; five of them either
    # way.
    assert 0 < np.sum(np.array(null) <= 0.1) < 42
    found, p = metrics.permutation_test(
        rng.normal(size=(40, 2)), rng.normal(1.5, 1, size=(40, 2)), permutations=99
    )
    assert p == 0.01 and found > 0
